package inflight

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Direction is one of the two directions of a tunnel: twice the number of the tunnel's
// slot, or one more than that.
type Direction uint32

// Store is a memory file and pipes, in use. [Store.Held] may be called by anybody; all
// else is for one goroutine only, that of the loop.
type Store struct {
	layout
	fd               int
	mem              []byte
	counts           []atomic.Uint64
	working, suspect *atomic.Uint64 // words of the header
	pipes            []Pipe

	freeBuffers []*Buffer // the last one was used last
	fresh       int       // the first buffer that was never used
	freePipes   []*LoopPipe
	left        map[Direction]*legacy // of a predecessor, until it is settled
	quarantined uint64                // what Suspect returns, as the word
	claimed     []uint64              // a bit for each direction that claims something
	counted     []bool                // pages of counts that have memory
	scratch     [page]byte

	heldBuffers, heldPipes atomic.Int64
}

// Open returns a Store of a memory file and pipes in which nothing is in flight. It takes
// fd and the pipes over, also when it fails.
func Open(fd int, pipes []Pipe) (*Store, error) {
	return openStore(fd, pipes, func(s *Store) error { return s.checkIdle() })
}

func openStore(fd int, pipes []Pipe, check func(*Store) error) (*Store, error) {
	s := &Store{fd: fd, pipes: pipes}
	if err := s.open(check); err != nil {
		return nil, errors.Join(fmt.Errorf("inflight: %w", err), s.Close())
	}
	return s, nil
}

func (s *Store) open(check func(*Store) error) (err error) {
	if s.layout, err = readLayout(s.fd); err != nil {
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if len(s.pipes) > MaxPipes {
		return fmt.Errorf("%d pipes, more than %d", len(s.pipes), MaxPipes)
	}
	for _, p := range s.pipes {
		if err := p.check(); err != nil {
			return err
		}
	}
	if s.counted, err = pagesInUse(s.fd, s.layout.counts, s.directions); err != nil {
		return err
	}
	s.mem, err = unix.Mmap(s.fd, 0, s.size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return os.NewSyscallError("mmap", err)
	}
	s.counts = s.words(s.layout.counts, s.directions)
	s.working, s.suspect = &s.words(workingAt, 1)[0], &s.words(suspectAt, 1)[0]
	s.claimed = make([]uint64, roundUp(s.directions, 64)/64)
	return check(s)
}

// checkIdle refuses a file or a pipe in which a predecessor has left something.
func (s *Store) checkIdle() error {
	claims, err := pagesInUse(s.fd, s.bufferClaims, (s.layout.counts-s.bufferClaims)/word)
	if err != nil {
		return err
	}
	if slices.Contains(claims, true) {
		return errors.New("bytes are in flight in the memory file")
	}
	for _, p := range s.pipes {
		if n, err := p.holds(); err != nil || n != 0 {
			return fmt.Errorf("a pipe holds %d bytes, or is none: %v", n, err)
		}
	}
	for i := range slices.Backward(s.pipes) { // so that the first, and largest, is taken first
		s.freePipes = append(s.freePipes, s.newLoopPipe(i))
	}
	return nil
}

// Close unmaps the file, and closes it and the pipes. No buffer may be used any more.
func (s *Store) Close() error {
	var err error
	if s.mem != nil {
		err = unix.Munmap(s.mem)
	}
	for _, p := range s.pipes {
		err = errors.Join(err, p.Close())
	}
	return errors.Join(err, unix.Close(s.fd))
}

// words returns words of the file. There is no copy of them anywhere else.
func (s *Store) words(at, n int) []atomic.Uint64 {
	mem := s.mem[at : at+n*word]
	return unsafe.Slice((*atomic.Uint64)(unsafe.Pointer(unsafe.SliceData(mem))), n)
}

// Directions returns how many directions there can be.
func (s *Store) Directions() int { return s.directions }

// Held returns how many buffers and pipes were taken and not given back, also for the
// moment. Anybody may call it.
func (s *Store) Held() (buffers, pipes int) {
	return int(s.heldBuffers.Load()), int(s.heldPipes.Load())
}

// countsPerPage is how many counts share the memory that [Store.Trim] gives back.
const countsPerPage = page / word

// A word of the counts is a count in its low bits, and marks above it.
const (
	countBits = 56
	countMask = 1<<countBits - 1
)

// Marks of a direction that this package knows; the others are the caller's. A mark
// stands until the direction begins again.
const (
	MarkLost = 1 << 7 // the source was reset or given up; stored before the kernel's error is taken
	MarkFin  = 1 << 6 // our FIN goes to the receiver; stored before the FIN is sent
)

// Begin sets count and marks of a direction back to 0, for a new tunnel. Who does that
// also when a tunnel ends lets [Store.Trim] give their memory back.
func (s *Store) Begin(d Direction) {
	if s.counted[d/countsPerPage] { // the others are 0
		s.counts[d].Store(0)
	}
}

// Complete counts n bytes more that have left the direction's buffer or pipe.
func (s *Store) Complete(d Direction, n int) {
	s.counted[d/countsPerPage] = true
	s.counts[d].Add(uint64(n))
}

// Completed returns the count of a direction.
func (s *Store) Completed(d Direction) uint64 { return s.count(d) & countMask }

// Mark adds marks to a direction.
func (s *Store) Mark(d Direction, marks uint8) {
	s.counted[d/countsPerPage] = true
	s.counts[d].Or(uint64(marks) << countBits)
}

// Marks returns the marks of a direction.
func (s *Store) Marks(d Direction) uint8 { return uint8(s.count(d) >> countBits) }

func (s *Store) count(d Direction) uint64 {
	if !s.counted[d/countsPerPage] {
		return 0
	}
	return s.counts[d].Load()
}

// setCompleted sets the count of a direction, and leaves its marks.
func (s *Store) setCompleted(d Direction, n uint64) {
	if s.Completed(d) != n { // or it would give memory to what is 0
		s.counted[d/countsPerPage] = true
		s.counts[d].Store(s.counts[d].Load()&^countMask | n&countMask)
	}
}

// Enter says that the tunnel in a slot is being worked on, until Leave or the next Enter.
func (s *Store) Enter(slot uint32, number uint64) { s.working.Store(number<<32 | (uint64(slot) + 1)) }

// Leave says that no tunnel is being worked on.
func (s *Store) Leave() { s.working.Store(0) }

// FD returns the descriptor of the memory file, which stays the Store's.
func (s *Store) FD() int { return s.fd }

// Pipes returns the pipes in the order in which they were given, which stay the Store's.
func (s *Store) Pipes() []Pipe { return s.pipes }

// Trim gives the memory of what is not in use back: of buffers that are free and of
// counts that are 0.
func (s *Store) Trim() {
	for _, b := range s.freeBuffers {
		b.trim()
	}
	for i, counted := range s.counted {
		if counted {
			s.counted[i] = !s.trimCounts(i)
		}
	}
}

// trimCounts gives a page of counts back if all of them are 0, and says so.
func (s *Store) trimCounts(i int) bool {
	first := i * countsPerPage
	for n := first; n < min(first+countsPerPage, s.directions); n++ {
		if s.counts[n].Load() != 0 {
			return false
		}
	}
	at := s.layout.counts + i*page
	return unix.Madvise(s.mem[at:at+page], unix.MADV_REMOVE) == nil
}

// claim is a word that says whose bytes are in a buffer or pipe, and in its high half
// how many bytes were read into the buffer.
type claim struct {
	store *Store
	word  *atomic.Uint64
}

const filledShift = 32

// set makes the claim that of d, with nothing read so far.
func (c claim) set(d Direction) {
	bit := uint64(1) << (d % 64)
	c.forget()
	if int(d) >= c.store.directions || c.store.claimed[d/64]&bit != 0 {
		panic(fmt.Sprintf("inflight: direction %d claims twice, or is none", d))
	}
	c.store.claimed[d/64] |= bit
	c.word.Store(uint64(d) + 1)
}

// clear makes the claim nobody's.
func (c claim) clear() {
	c.forget()
	c.word.Store(0)
}

// forget forgets whose the claim is. (A predecessor may have left one that is of no
// direction.)
func (c claim) forget() {
	if old := uint32(c.word.Load()); old != 0 && int(old) <= c.store.directions {
		d := old - 1
		c.store.claimed[d/64] &^= 1 << (d % 64)
	}
}
