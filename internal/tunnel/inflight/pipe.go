package inflight

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Pipe is the two ends of a pipe, neither of which blocks.
type Pipe struct{ R, W int }

// Close closes both ends.
func (p Pipe) Close() error { return errors.Join(unix.Close(p.R), unix.Close(p.W)) }

// leastPipe is the size below which a pipe moves no more at a time than a buffer does.
const leastPipe = 64 << 10

// NewPipes makes n pipes of the given size, or as many and as large as the user may
// have. The caller closes them, or hands them to [Open].
func NewPipes(n, size int) []Pipe {
	var pipes []Pipe
	for len(pipes) < min(n, MaxPipes) {
		p, ok := newPipe(size)
		if !ok {
			break
		}
		pipes = append(pipes, p)
	}
	return pipes
}

// newPipe makes a pipe of the given size, or smaller. All pipes of a user without
// privileges may have only so many pages together (pipe-user-pages-soft of proc(5)); what
// is made beyond that has two pages and does not grow.
func newPipe(size int) (p Pipe, ok bool) {
	var fds [2]int
	if unix.Pipe2(fds[:], unix.O_NONBLOCK|unix.O_CLOEXEC) != nil {
		return p, false
	}
	p = Pipe{R: fds[0], W: fds[1]}
	for size = max(size, leastPipe); size >= leastPipe; size /= 2 {
		if _, err := unix.FcntlInt(uintptr(p.W), unix.F_SETPIPE_SZ, size); err == nil {
			return p, true
		}
	}
	p.Close()
	return Pipe{}, false
}

// check refuses what would block.
func (p Pipe) check() error {
	for _, fd := range []int{p.R, p.W} {
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0); err != nil || flags&unix.O_NONBLOCK == 0 {
			return fmt.Errorf("descriptor %d of a pipe would block", fd)
		}
	}
	return nil
}

// holds returns how many bytes are in the pipe. (TIOCINQ is FIONREAD.)
func (p Pipe) holds() (int, error) { return unix.IoctlGetInt(p.R, unix.TIOCINQ) }

// LoopPipe is a pipe of a [Store], which closes it.
type LoopPipe struct {
	R, W  int
	claim claim
}

func (s *Store) newLoopPipe(i int) *LoopPipe {
	p := s.pipes[i]
	return &LoopPipe{p.R, p.W, s.pipeClaim(i)}
}

func (s *Store) pipeClaim(i int) claim { return claim{s, &s.words(s.pipeClaims, MaxPipes)[i]} }

// Pipe returns an empty pipe that is claimed by d, nil if none is free. No buffer may
// be claimed by d any more.
func (s *Store) Pipe(d Direction) *LoopPipe {
	last := len(s.freePipes) - 1
	if last < 0 {
		return nil
	}
	p := s.freePipes[last]
	p.claim.set(d)
	s.freePipes = s.freePipes[:last]
	s.heldPipes.Add(1)
	return p
}

// FreePipe takes a pipe back and ends its claim. Bytes that are still in the pipe, since
// their receiver was lost, are thrown away: nobody else may get them.
func (s *Store) FreePipe(p *LoopPipe) {
	s.discard(p.R)
	p.claim.clear()
	s.freePipes = append(s.freePipes, p)
	s.heldPipes.Add(-1)
}

// discard reads what there is.
func (s *Store) discard(fd int) {
	for {
		if n, err := unix.Read(fd, s.scratch[:]); n <= 0 && err != unix.EINTR {
			return
		}
	}
}
