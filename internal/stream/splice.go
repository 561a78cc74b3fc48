package stream

import (
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/poller"
	"holdfast/internal/task"
	"holdfast/internal/tunnel/inflight"
)

// ReadError says that [Splice] could not read: all that was read has been sent, unless
// [Progress] did not want it.
type ReadError struct{ Err error }

func (e *ReadError) Error() string { return fmt.Sprintf("read: %v", e.Err) }
func (e *ReadError) Unwrap() error { return e.Err }

// WriteError says that [Splice] could not send: what was read and is not counted as moved
// is lost.
type WriteError struct{ Err error }

func (e *WriteError) Error() string { return fmt.Sprintf("write: %v", e.Err) }
func (e *WriteError) Unwrap() error { return e.Err }

// Progress is told how a [Splice] goes on. It must not wait, and may close both connections.
type Progress interface {
	// Awaiting: nothing is there to be read, and the task begins to wait for it. It may be
	// told several times until something comes.
	Awaiting()

	// Took: n bytes were read, and are sent next. With an error they are lost, and the
	// splice ends with it as if they could not be read.
	Took(n int) error

	// Gave: the receiving connection has taken n bytes.
	Gave(n int)
}

// Splice sends n bytes of one connection to another of the same loop, beginning with what
// is buffered, and says how many the kernel has taken. It is there for what is long: the
// bytes go through a pipe, in which the kernel moves pages instead of copying bytes. Where
// no pipe is to be had it copies.
//
// It waits for each of the two as Fill and Send do, and ends with what ends them: a
// [*ReadError] or a [*WriteError], by which the caller knows whose fault it is, or io.EOF
// when the first one has ended its direction too early. A deadline is one for the whole: who
// limits how long nothing may move puts it off when progress is told, which may be nil.
func Splice(t *task.Task, from, to *Conn, n int64, progress Progress) (moved int64, err error) {
	if from.loop != to.loop {
		panic("stream: a splice between two loops")
	}
	for moved < n && err == nil {
		var more int
		more, err = spliceOnce(t, from, to, n-moved, progress)
		moved += int64(more)
	}
	from.end()
	to.end()
	return moved, err
}

// spliceOnce moves what is there. It may be nothing without an error.
func spliceOnce(t *task.Task, from, to *Conn, left int64, progress Progress) (moved int, err error) {
	if b := from.Buffered(); len(b) > 0 {
		b = b[:min(int64(len(b)), left)]
		from.Consume(len(b))
		return to.pass(t, b, progress)
	}
	if !from.Readable() && progress != nil {
		progress.Awaiting()
	}
	if err := from.turn(t); err != nil {
		return 0, &ReadError{err}
	}
	if err := to.stopped(); err != nil {
		return 0, &WriteError{err} // before anything is read that would be lost
	}
	if p, ok := from.pipe(to); ok {
		n, errno := splice(from.fd, int32(p.W), int(min(left, mostAtOnce)))
		if n > 0 {
			from.reads += 1 + uint8(n/readSize)
			from.received(n)
			return to.pour(t, p, n, progress)
		}
		from.loop.pipes.put(p)
		switch {
		case errno == unix.EAGAIN:
			from.drained()
			return 0, nil
		case errno != 0 && errno != unix.EINVAL:
			return 0, &ReadError{os.NewSyscallError("splice", errno)} // it is told once
		}
	}
	// No pipe, nothing that can be spliced, or the end. The next turn sends what has come.
	switch err := from.receive(readSize); err {
	case nil, errAgain:
		return 0, nil
	case io.EOF:
		return 0, io.EOF
	default:
		return 0, &ReadError{err}
	}
}

func took(progress Progress, n int) error {
	if progress != nil {
		if err := progress.Took(n); err != nil {
			return &ReadError{err}
		}
	}
	return nil
}

func gave(progress Progress, n int) {
	if progress != nil {
		progress.Gave(n)
	}
}

// pass sends bytes that were buffered.
func (c *Conn) pass(t *task.Task, b []byte, progress Progress) (moved int, err error) {
	if err := took(progress, len(b)); err != nil {
		return 0, err
	}
	if err := c.Send(t, b, nil, nil); err != nil {
		return 0, &WriteError{err}
	}
	gave(progress, len(b))
	return len(b), nil
}

// pipe returns an empty pipe for what comes. A splice sees nothing of what is behind an
// urgent mark, and what has TLS has to pass through it.
func (c *Conn) pipe(to *Conn) (p inflight.Pipe, ok bool) {
	if c.known&poller.Urgent != 0 || c.Secure() != nil || to.Secure() != nil {
		return p, false
	}
	return c.loop.pipes.take(c.loop.Now())
}

// pour sends the n bytes that are in a pipe, and takes the pipe back.
func (c *Conn) pour(t *task.Task, p inflight.Pipe, n int, progress Progress) (moved int, err error) {
	l := c.loop
	if err := took(progress, n); err != nil {
		l.pipes.lose(p)
		return 0, err
	}
	for err = c.stopped(); moved < n && err == nil; {
		taken, errno := splice(int32(p.R), c.fd, n-moved)
		moved += taken
		c.sent(taken)
		switch {
		case taken > 0:
			gave(progress, taken)
			err = c.stopped()
		case errno == unix.EAGAIN:
			c.known &^= poller.Writable // it is told when there is room
			err = c.await(t, poller.Writable)
		case errno == 0:
			err = io.ErrNoProgress
		default:
			err = os.NewSyscallError("splice", errno)
		}
	}
	if moved < n {
		l.pipes.lose(p)
		return moved, &WriteError{err}
	}
	l.pipes.put(p)
	return moved, nil
}

const (
	// pipeSize is what a pipe holds of single pages. A page of the pipe may stand for more:
	// what a program has written into a socket of the same machine, or a network card has
	// put together, comes in pieces of up to 32 KiB.
	pipeSize = 256 << 10

	// mostAtOnce is what is put into a pipe at once, if it holds so much: more would keep the
	// others of a loop waiting.
	mostAtOnce = 1 << 20

	// mostPipes is how many pipes a loop has, if nobody says otherwise. One is in use while
	// somebody is slow to take what it holds.
	mostPipes = 16

	// pipePause is how long a loop does without when it could not have one more.
	pipePause = time.Second
)

// pipes are those of a loop, made when they are needed. Those that nobody uses are empty.
type pipes struct {
	free   []inflight.Pipe
	made   int
	failed time.Time // when there was none to be had

	most    int // of made
	mayHave func(fd int) bool
}

func (s *pipes) take(now time.Time) (p inflight.Pipe, ok bool) {
	if last := len(s.free) - 1; last >= 0 {
		p, s.free = s.free[last], s.free[:last]
		return p, true
	}
	if s.made >= s.most || now.Sub(s.failed) < pipePause {
		return p, false
	}
	made := inflight.NewPipes(1, pipeSize)
	if len(made) == 0 || s.mayHave != nil && !s.mayHave(max(made[0].R, made[0].W)) {
		for _, p := range made {
			_ = p.Close()
		}
		s.failed = now
		return p, false
	}
	s.made++
	return made[0], true
}

// put takes an empty pipe back.
func (s *pipes) put(p inflight.Pipe) { s.free = append(s.free, p) }

// lose closes a pipe in which there may be bytes.
func (s *pipes) lose(p inflight.Pipe) {
	s.made--
	_ = p.Close() // nothing is to be written any more
}

// LimitPipes says how many pipes [Splice] may have, and of a descriptor whether one of them
// may have it; nil: always. It is called before the loop runs.
func (l *Loop) LimitPipes(most int, mayHave func(fd int) bool) {
	l.pipes.most, l.pipes.mayHave = most, mayHave
}

// Pipes returns how many pipes of the loop nobody uses, and how many there are.
func (l *Loop) Pipes() (free, made int) { return len(l.pipes.free), l.pipes.made }

// trim closes those that nobody uses.
func (s *pipes) trim() {
	for _, p := range s.free {
		s.lose(p)
	}
	s.free = nil
}
