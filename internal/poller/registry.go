package poller

import (
	"errors"
	"fmt"
	"math"
	"math/bits"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// interest is what every descriptor is registered for. What is not asked for, an error
// or the end of both directions, the kernel reports always.
const interest = unix.EPOLLIN | unix.EPOLLOUT | unix.EPOLLPRI | unix.EPOLLRDHUP | unix.EPOLLET

// entry is what is known of a descriptor. It has no pointers, so that the garbage
// collector does not look at it.
type entry struct {
	fd         int32
	index      uint32
	generation uint32 // of the registration; 0: not in use
	owner      uint16 // in registry.owners
	queued     bool   // in Loop.again
}

// registration is what the kernel says in the events of a descriptor. Each has a
// generation of its own, which tells it from those that had the same handle before: an
// event of one that was removed may stand in the batch that is being worked on.
type registration struct {
	handle     Handle
	generation uint32
}

// Add registers a descriptor, which is not to block and stays its owner's. What it is
// ready for already is told in one of the next turns.
func (l *Loop) Add(fd int, o Owner, index uint32) (Handle, error) {
	if l.signal != nil {
		return 0, errVirtual
	}
	h := l.registry.take()
	e := l.registry.at(h)
	*e = entry{fd: int32(fd), index: index, generation: l.registry.nextGeneration(), owner: l.registry.owner(o)}
	l.event = unix.EpollEvent{Events: interest, Fd: int32(h), Pad: int32(e.generation)}
	if errno := l.control(unix.EPOLL_CTL_ADD, fd); errno != 0 {
		l.registry.release(h)
		return 0, fmt.Errorf("poller: %w", os.NewSyscallError("epoll_ctl", errno))
	}
	return h, nil
}

// control changes what the kernel tells of a descriptor. It does not tell the Go runtime,
// which costs more than a call that does not wait.
func (l *Loop) control(what, fd int) unix.Errno {
	_, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_CTL, uintptr(l.epoll), uintptr(what), uintptr(fd), uintptr(unsafe.Pointer(&l.event)), 0, 0)
	return errno
}

var errVirtual = errors.New("poller: a virtual loop has no descriptors")

// Pass gives a descriptor to another owner, which knows it by another number. It is a
// store: nothing is told again that was told already. It is there for connections that
// become something else, as a parked one does that becomes a tunnel.
func (l *Loop) Pass(h Handle, o Owner, index uint32) {
	e := l.registry.use(h)
	number := l.registry.owner(o)
	l.registry.disown(e.owner)
	e.owner, e.index = number, index
}

// Remove ends the registration. Nothing is told about the descriptor any more. It comes
// before close: a duplicate in another process keeps the registration alive, and the
// number may be another descriptor's by then.
func (l *Loop) Remove(h Handle) {
	e := l.registry.use(h)
	// It fails only for a descriptor that was closed, which has left the set by itself.
	l.control(unix.EPOLL_CTL_DEL, int(e.fd))
	l.registry.release(h)
}

// Again has Ready called without events, in this turn or a later one, after those that
// asked before. Asked more than once until then, it is still called once.
func (l *Loop) Again(h Handle) {
	e := l.registry.use(h)
	if !e.queued {
		e.queued = true
		l.again = append(l.again, registration{h, e.generation})
	}
}

// runAgain calls the first of those that asked for it. Each of them may take as long as a
// megabyte takes, so no turn calls all: what has become ready meanwhile comes in between.
func (l *Loop) runAgain() (any bool) {
	n := min(len(l.again), againBatch)
	queue := append(l.queue[:0], l.again[:n]...)
	l.again = append(l.again[:0], l.again[n:]...)
	for _, r := range queue {
		if e := l.registry.find(r); e != nil {
			e.queued = false
			any = true
			l.registry.owners[e.owner].Ready(e.index, 0)
		}
	}
	l.queue = queue
	return any
}

func (l *Loop) dispatch(event *unix.EpollEvent) {
	e := l.registry.find(registration{Handle(event.Fd), uint32(event.Pad)})
	if e != nil {
		l.registry.owners[e.owner].Ready(e.index, translate(event.Events))
	}
}

func translate(kernel uint32) (e Events) {
	if kernel&unix.EPOLLIN != 0 {
		e |= Readable
	}
	if kernel&unix.EPOLLOUT != 0 {
		e |= Writable
	}
	if kernel&unix.EPOLLPRI != 0 {
		e |= Urgent | Readable
	}
	if kernel&(unix.EPOLLRDHUP|unix.EPOLLHUP) != 0 {
		e |= Hup | Readable
	}
	if kernel&unix.EPOLLERR != 0 {
		e |= Error | Hup | Readable
	}
	return e
}

// chunkSize is how many entries are allocated together.
const chunkSize = 256

// chunk is a part of the entries. Its memory is there only while one of them is used.
type chunk struct {
	entries *[chunkSize]entry
	used    [chunkSize / 64]uint64
	count   int
}

// registry is the entries of a loop, by handle, and their owners. Low handles are taken
// first, so that chunks become empty.
type registry struct {
	chunks     []chunk
	notFull    int               // no chunk before this one has room
	spare      *[chunkSize]entry // of the chunk that became empty last, all zero
	generation uint32
	owners     []Owner
	owned      []int // entries of each owner; 0: there is none
}

// at returns the entry of a handle that was taken.
func (r *registry) at(h Handle) *entry { return &r.chunks[h/chunkSize].entries[h%chunkSize] }

// use returns the entry of a descriptor that an owner has registered.
func (r *registry) use(h Handle) *entry {
	if h != 0 && int(h/chunkSize) < len(r.chunks) && r.chunks[h/chunkSize].entries != nil {
		if e := r.at(h); e.generation != 0 {
			return e
		}
	}
	panic(fmt.Sprintf("poller: handle %d is not in use", h))
}

// find returns the entry of a registration, nil when that has ended.
func (r *registry) find(reg registration) *entry {
	c := &r.chunks[reg.handle/chunkSize]
	if c.entries == nil {
		return nil
	}
	e := &c.entries[reg.handle%chunkSize]
	if e.generation != reg.generation {
		return nil
	}
	return e
}

func (r *registry) nextGeneration() uint32 {
	r.generation++
	if r.generation == 0 {
		r.generation = 1
	}
	return r.generation
}

// take returns the lowest handle that is free.
func (r *registry) take() Handle {
	for r.notFull < len(r.chunks) && r.chunks[r.notFull].count == chunkSize {
		r.notFull++
	}
	if r.notFull == len(r.chunks) {
		r.chunks = append(r.chunks, chunk{})
	}
	c := &r.chunks[r.notFull]
	if c.entries == nil {
		c.entries, r.spare = r.spare, nil
	}
	if c.entries == nil {
		c.entries = new([chunkSize]entry)
	}
	n := c.take()
	return Handle(r.notFull*chunkSize + n)
}

// take returns the lowest number that is free in a chunk that is not full.
func (c *chunk) take() int {
	c.count++
	for i := range c.used {
		if bit := bits.TrailingZeros64(^c.used[i]); bit < 64 {
			c.used[i] |= 1 << bit
			return i*64 + bit
		}
	}
	panic("poller: a full chunk")
}

// release frees a handle.
func (r *registry) release(h Handle) {
	e := r.at(h)
	r.disown(e.owner)
	*e = entry{}
	n := int(h / chunkSize)
	c := &r.chunks[n]
	c.used[h%chunkSize/64] &^= 1 << (h % 64)
	c.count--
	if c.count == 0 {
		c.entries, r.spare = nil, c.entries
	}
	r.notFull = min(r.notFull, n)
}

// owner returns the number of an owner, who has one entry more then. There are few: a
// loop is shared by packages, not by connections.
func (r *registry) owner(o Owner) uint16 {
	free := len(r.owners)
	for i := range r.owners {
		switch {
		case r.owned[i] == 0:
			free = i
		case r.owners[i] == o:
			r.owned[i]++
			return uint16(i)
		}
	}
	if free > math.MaxUint16 {
		panic("poller: too many owners")
	}
	if free == len(r.owners) {
		r.owners, r.owned = append(r.owners, nil), append(r.owned, 0)
	}
	r.owners[free], r.owned[free] = o, 1
	return uint16(free)
}

// disown takes an entry from an owner.
func (r *registry) disown(number uint16) {
	r.owned[number]--
	if r.owned[number] == 0 {
		r.owners[number] = nil
	}
}
