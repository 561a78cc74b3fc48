package inflight

import (
	"errors"
	"fmt"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// legacy is what a predecessor has claimed for a direction. More than one claim is a
// contradiction, and so is that of a pipe that is not there.
type legacy struct {
	buffers  []*Buffer
	filled   uint64 // of the last one
	pipes    []*LoopPipe
	phantoms []claim
}

// ErrDamaged says that a memory file is none, or that its first page was written to.
var ErrDamaged = errors.New("the memory file is damaged")

// Reopen returns a Store of the memory file and the pipes of a process that is dead, as
// it has left them. It takes fd and the pipes over, also when it fails. killed says that
// the process was killed from outside.
//
// What the predecessor has claimed counts as held. [Store.Settle] or [Store.Surrender] is
// called for both directions of each of its tunnels before anything else is done with
// these, and [Store.Settled] after the last.
func Reopen(fd int, pipes []Pipe, killed bool) (*Store, error) {
	return openStore(fd, pipes, func(s *Store) error {
		if err := s.adopt(); err != nil {
			return err
		}
		s.accuse(killed)
		return nil
	})
}

// adopt finds out what is claimed. Nothing that the file says is trusted.
func (s *Store) adopt() error {
	s.left = make(map[Direction]*legacy)
	buffers, err := s.claims(s.bufferClaims, s.buffers)
	if err != nil {
		return err
	}
	for i, w := range buffers {
		b := s.newBuffer(i)
		if w == 0 {
			b.used = true // nobody knows
			s.freeBuffers = append(s.freeBuffers, b)
			continue
		}
		l := s.legacy(w)
		l.buffers, l.filled = append(l.buffers, b), w>>filledShift
		s.heldBuffers.Add(1)
	}
	s.fresh = len(buffers)
	if err := s.forgetFresh(); err != nil {
		return err
	}

	claims, err := s.claims(s.pipeClaims, MaxPipes)
	if err != nil {
		return err
	}
	for i := range slices.Backward(s.pipes) { // so that the first, and largest, is taken first
		p := s.newLoopPipe(i)
		if i >= len(claims) || claims[i] == 0 {
			s.discard(p.R) // nobody's
			s.freePipes = append(s.freePipes, p)
			continue
		}
		l := s.legacy(claims[i])
		l.pipes = append(l.pipes, p)
		s.heldPipes.Add(1)
	}
	for i := len(s.pipes); i < len(claims); i++ {
		if w := claims[i]; w != 0 {
			l := s.legacy(w)
			l.phantoms = append(l.phantoms, s.pipeClaim(i))
		}
	}
	return nil
}

// claims returns words of the file up to the last that is not 0.
func (s *Store) claims(at, n int) (values []uint64, err error) {
	used, err := pagesInUse(s.fd, at, n)
	if err != nil {
		return nil, err
	}
	words := s.words(at, n)
	for i := range words {
		if !used[i*word/page] {
			continue
		}
		if w := words[i].Load(); w != 0 {
			values = append(values, make([]uint64, i-len(values))...)
			values = append(values, w)
		}
	}
	return values, nil
}

// legacy returns that of the direction of a claim, which may be none at all.
func (s *Store) legacy(w uint64) *legacy {
	d := Direction(uint32(w) - 1)
	if int(d) < s.directions {
		s.claimed[d/64] |= 1 << (d % 64)
	}
	if s.left[d] == nil {
		s.left[d] = new(legacy)
	}
	return s.left[d]
}

// forgetFresh gives back the memory of the buffers beyond those that are claimed. They
// are as if they were never used then.
func (s *Store) forgetFresh() error {
	if s.fresh == s.buffers {
		return nil
	}
	return os.NewSyscallError("madvise", unix.Madvise(s.mem[s.memory+s.fresh*BufferSize:], unix.MADV_REMOVE))
}

// accuse notes whom the predecessor was working on when it died by itself. Who was so
// twice is not touched any more.
func (s *Store) accuse(killed bool) {
	working, suspect := s.working.Load(), s.suspect.Load()
	s.working.Store(0)
	switch {
	case killed || working == 0:
		s.suspect.Store(0)
	case working == suspect:
		s.quarantined = working
	default:
		s.suspect.Store(working)
	}
}

// Suspect returns the tunnel that the last two processes were working on when they died,
// neither of which was killed: its slot, and the low half of its number. It is to be
// ended before anything of it is touched.
func (s *Store) Suspect() (slot, number uint32, ok bool) {
	w := s.quarantined
	return uint32(w) - 1, uint32(w >> 32), w != 0
}

// Absolve says that this process has lived for long enough: the tunnel that its
// predecessor was working on is above suspicion.
func (s *Store) Absolve() { s.suspect.Store(0) }

// Rest is what of a direction is in flight when a successor goes on with it.
type Rest struct {
	Finding
	Buffer *Buffer   // held, and nil if nothing is to be sent of it
	Pipe   *LoopPipe // held, and nil if nothing is in it
}

// Settle finds out what is in flight of direction d of a predecessor ([Recover]), and
// brings the file up to date. What was sent already it takes from the source, a
// descriptor. src and dst are what [Look] says of source and receiver, less what it said
// when the direction began.
//
// Both directions of a tunnel are settled before anything else is done with its sockets:
// read, write, shutdown or taking an error.
//
// If it fails, or what is in flight is Lost, all that is claimed remains so. The caller
// resets the receiver and then calls [Store.Surrender].
func (s *Store) Settle(d Direction, source int, src, dst Counters) (Rest, error) {
	t := Trace{
		Completed: s.Completed(d),
		Source:    src,
		Receiver:  dst,
		Reset:     src.Gone && (src.Failed || s.Marks(d)&MarkLost != 0 || s.Marks(d^1)&MarkFin == 0),
	}
	l := s.left[d]
	var err error
	if t.Hold, t.Bytes, err = l.hold(); err != nil {
		return Rest{}, err
	}
	f, err := Recover(t)
	r := Rest{Finding: f}
	if err != nil || f.Lost {
		return r, err
	}
	if f.Discard > 0 {
		if err := discard(source, l.buffers[0].Bytes[:f.Discard]); err != nil {
			return r, err
		}
	}
	switch {
	case f.From < f.To:
		r.Buffer = l.buffers[0]
		r.Buffer.Filled(f.To)
		delete(s.left, d)
	case f.Piped > 0:
		r.Pipe = l.pipes[0]
		delete(s.left, d)
	default:
		s.Surrender(d)
	}
	s.setCompleted(d, f.Completed)
	return r, nil
}

func (l *legacy) hold() (Hold, uint64, error) {
	switch {
	case l == nil:
		return HoldNothing, 0, nil
	case len(l.phantoms) > 0 || len(l.buffers)+len(l.pipes) != 1 || l.filled > BufferSize:
		return HoldBroken, 0, nil
	case len(l.buffers) == 1:
		return HoldBuffer, l.filled, nil
	}
	n, err := Pipe{R: l.pipes[0].R}.holds()
	if err != nil {
		return HoldBroken, 0, fmt.Errorf("inflight: %w", os.NewSyscallError("FIONREAD", err))
	}
	return HoldPipe, uint64(n), nil
}

// discard takes bytes from the queue of a socket that has them.
func discard(fd int, p []byte) error {
	for len(p) > 0 {
		n, _, err := unix.Recvfrom(fd, p, unix.MSG_DONTWAIT|unix.MSG_TRUNC)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return fmt.Errorf("inflight: %w", os.NewSyscallError("recv", err))
		case n == 0:
			return fmt.Errorf("inflight: %w: %d bytes that were sent are not there", ErrContradiction, len(p))
		default:
			p = p[n:]
		}
	}
	return nil
}

// Surrender frees what a predecessor has claimed for a direction that does not go on:
// its receiver was reset.
func (s *Store) Surrender(d Direction) {
	l := s.left[d]
	if l == nil {
		return
	}
	delete(s.left, d)
	for _, b := range l.buffers {
		s.Free(b)
	}
	for _, p := range l.pipes {
		s.FreePipe(p)
	}
	for _, c := range l.phantoms {
		c.clear()
	}
}

// Settled frees what a predecessor has claimed for directions that nobody has asked for.
func (s *Store) Settled() {
	for d := range s.left {
		s.Surrender(d)
	}
}
