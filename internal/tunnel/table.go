package tunnel

import (
	"net/netip"
	"time"

	"holdfast/internal/poller"
	"holdfast/internal/tunnel/inflight"
)

// slot is what a loop keeps of one tunnel: a record of fixed size without pointers, which
// the garbage collector does not look at. What has pointers is in its [label].
type slot struct {
	dates
	active time.Duration // the moment at which a byte was last passed on
	cutAt  time.Duration // the moment at which its end began
	number uint64        // 0: the slot is free; or retired

	sockets [2]socket
	flows   [2]flow

	id           identity
	reason       Reason // Open until its end begins
	closed       Reason // who closed first, by a FIN; Open while nobody did
	parting      bool   // all that is left is to close the sockets
	still        bool   // nothing is done with its sockets: it waits for the vault
	foreign      bool   // not both sockets are plain TCP (foreign.go)
	based        bool   // it has a base
	custody      custody
	older, newer uint32 // its neighbours in the order of the start
	origin       uint32
}

// retired is the number in a slot whose tunnel is gone.
const retired = ^uint64(0)

func (s *slot) lives() bool { return s.number != 0 && s.number != retired }

// The two sockets of a tunnel, and its two flows, each by the socket that it comes from.
const (
	down = 0 // the client's
	up   = 1 // the server's
)

// socket is one of the two connections of a tunnel.
type socket struct {
	fd     int32
	handle poller.Handle

	// What the kernel has told, until a call says otherwise.
	readable bool
	writable bool
	hup      bool // a read that is shorter than asked for does not mean that there is no more
	urgent   bool // the same, and a splice stops for good: the peer sends urgent bytes
	failed   bool // it is broken, which nobody has looked at yet

	broken    bool // nobody can be reached there any more
	lost      bool // broken, and that is why the tunnel ended
	finSent   bool
	truncated bool // bytes for this socket were given up, so a FIN would be a lie
	ended     bool // its FIN was read

	// Of a foreign tunnel.
	secure  bool // it has TLS
	local   bool // it is a unix socket
	finOwed bool // our FIN is to go out behind what TLS is still owed
}

// flow is one direction of a tunnel: from the socket of the same number to the other.
type flow struct {
	moved   uint64  // bytes that the receiver's kernel took; below 0 as long as what it took was no byte of the tunnel's
	silence silence // of the receiver
	watched uint32  // place in engine.watched, plus 1; 0: nothing is on its way
	turn    uint32  // of the loop, in which the flow was last pumped
	left    int32   // what it may still move in that turn
	phase   phase
	holds   bool // something is in engine.held
	bulk    bool // the last turn moved so much that the next one begins with splice
	heard   bool // something was read from the sender since the last look for stalled peers
}

// took notes that the receiver's kernel has taken n bytes, and returns how many of them are
// the tunnel's.
func (f *flow) took(n int) (own int) {
	before := int64(f.moved)
	f.moved += uint64(n)
	return int(f.counted()) - int(max(before, 0))
}

// counted is how many bytes of the tunnel the receiver's kernel has taken.
func (f *flow) counted() uint64 { return uint64(max(int64(f.moved), 0)) }

// label is what of a tunnel has pointers.
type label struct {
	tag     any
	client  netip.AddrPort
	started time.Time
}

// chunkSize is how many slots are allocated together. It makes whole pages of them.
const chunkSize = 1024

// chunk is a part of the table. Its memory is there only while it is needed.
type chunk struct {
	slots  *[chunkSize]slot
	labels *[chunkSize]label
	bases  *[chunkSize]smallBase // nil while none of its tunnels has had one
	used   int
	free   int // no slot before this one is free
}

// nobody is the number of no slot.
const nobody = ^uint32(0)

// table holds the tunnels of a loop. A tunnel keeps its slot until its end. Low slots are
// taken first, so that chunks become empty.
type table struct {
	chunks         []chunk
	notFull        int             // no chunk before this one has room
	large          map[uint32]base // those that are no smallBase
	used           int
	oldest, newest uint32 // ends of the list in the order of the start
}

func newTable() table { return table{oldest: nobody, newest: nobody} }

// at returns the slot of a number that was taken.
func (t *table) at(n uint32) *slot { return &t.chunks[n/chunkSize].slots[n%chunkSize] }

func (t *table) label(n uint32) *label { return &t.chunks[n/chunkSize].labels[n%chunkSize] }

// base returns the base of a tunnel that has one.
func (t *table) base(n uint32) base {
	if b, ok := t.large[n]; ok {
		return b
	}
	return t.chunks[n/chunkSize].bases[n%chunkSize].whole()
}

// setBase gives a tunnel its base, once.
func (t *table) setBase(n uint32, b base) {
	c := &t.chunks[n/chunkSize]
	if c.bases == nil {
		c.bases = new([chunkSize]smallBase)
	}
	small, ok := b.small()
	if c.bases[n%chunkSize] = small; !ok {
		if t.large == nil {
			t.large = make(map[uint32]base)
		}
		t.large[n] = b
	}
	t.at(n).based = true
}

// taken says whether a slot is not free.
func (t *table) taken(n uint32) bool {
	return int(n/chunkSize) < len(t.chunks) && t.chunks[n/chunkSize].slots != nil && t.at(n).number != 0
}

// find returns the slot of a tunnel that may have ended; nil: it has.
func (t *table) find(n uint32, number uint64) *slot {
	if t.taken(n) && t.at(n).number == number {
		return t.at(n)
	}
	return nil
}

// take returns the lowest free slot, for the caller to fill and then to join.
func (t *table) take() (n uint32, s *slot) {
	for t.notFull < len(t.chunks) && t.chunks[t.notFull].used == chunkSize {
		t.notFull++
	}
	if t.notFull == len(t.chunks) {
		t.chunks = append(t.chunks, chunk{})
	}
	c := &t.chunks[t.notFull]
	c.need()
	for c.slots[c.free].number != 0 {
		c.free++
	}
	n = uint32(t.notFull*chunkSize + c.free)
	return n, t.takeAt(n)
}

// takeAt returns a slot that is free, for the caller to fill and then to join.
func (t *table) takeAt(n uint32) *slot {
	for int(n/chunkSize) >= len(t.chunks) {
		t.chunks = append(t.chunks, chunk{})
	}
	c := &t.chunks[n/chunkSize]
	c.need()
	c.used++
	t.used++
	s := &c.slots[n%chunkSize]
	*s = slot{}
	s.flows[down].phase, s.flows[up].phase = relaying, relaying
	return s
}

func (c *chunk) need() {
	if c.slots == nil {
		c.slots, c.labels = new([chunkSize]slot), new([chunkSize]label)
	}
}

// join gives a tunnel its place in the order of the start. Nearly all are the newest.
func (t *table) join(n uint32) {
	s := t.at(n)
	s.older, s.newer = t.newest, nobody
	for s.older != nobody && t.at(s.older).started > s.started {
		s.older, s.newer = t.at(s.older).older, s.older
	}
	if s.older == nobody {
		t.oldest = n
	} else {
		t.at(s.older).newer = n
	}
	if s.newer == nobody {
		t.newest = n
	} else {
		t.at(s.newer).older = n
	}
}

// retire takes a tunnel out. Its slot is nobody else's until it is released.
func (t *table) retire(n uint32) {
	s := t.at(n)
	if s.older == nobody {
		t.oldest = s.newer
	} else {
		t.at(s.older).newer = s.newer
	}
	if s.newer == nobody {
		t.newest = s.older
	} else {
		t.at(s.newer).older = s.older
	}
	*s, *t.label(n) = slot{number: retired}, label{}
	delete(t.large, n)
}

// release frees the slot of a tunnel that was taken out. It returns whether its chunk has
// become empty.
func (t *table) release(n uint32) (empty bool) {
	t.at(n).number = 0
	c := &t.chunks[n/chunkSize]
	c.used--
	t.used--
	c.free = min(c.free, int(n%chunkSize))
	t.notFull = min(t.notFull, int(n/chunkSize))
	return c.used == 0
}

// trim gives the memory of empty chunks back.
func (t *table) trim() {
	for i := range t.chunks {
		if c := &t.chunks[i]; c.used == 0 {
			*c = chunk{}
		}
	}
	last := len(t.chunks)
	for last > 0 && t.chunks[last-1].slots == nil {
		last--
	}
	t.chunks = append([]chunk(nil), t.chunks[:last]...)
}

// inChunk yields the tunnels of one chunk.
func (t *table) inChunk(c int) func(yield func(uint32, *slot) bool) {
	return func(yield func(uint32, *slot) bool) {
		if c >= len(t.chunks) || t.chunks[c].used == 0 {
			return
		}
		for i := range t.chunks[c].slots {
			if s := &t.chunks[c].slots[i]; s.lives() && !yield(uint32(c*chunkSize+i), s) {
				return
			}
		}
	}
}

// all yields all tunnels, the oldest first. Those that it has yielded may be released
// meanwhile.
func (t *table) all() func(yield func(uint32, *slot) bool) {
	return func(yield func(uint32, *slot) bool) {
		for n := t.oldest; n != nobody; {
			s := t.at(n)
			next := s.newer
			if !yield(n, s) {
				return
			}
			n = next
		}
	}
}

// key is the name of a flow in the store.
func key(n uint32, from int) inflight.Direction {
	return inflight.Direction(2*n) + inflight.Direction(from)
}
