package service

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"time"
	"unicode"

	"golang.org/x/sys/unix"

	"holdfast/internal/control"
	"holdfast/internal/pidfd"
	"holdfast/internal/supervisor"
)

// The limits of an upgrade. The last two are for what follows when nothing can be
// refused any more.
const (
	prepareTimeout = 10 * time.Second // from the start of a candidate until it could command
	commitTimeout  = 5 * time.Second  // until it commands
	deathTimeout   = 10 * time.Second // a killed process that is not gone then is stuck in the kernel
	systemdTimeout = 5 * time.Second  // until systemd knows which process the service is
)

// sendTimeout bounds how long a message may wait in front of a full queue: the queue
// of a process that reads is never full.
const sendTimeout = 2 * time.Second

// heir is what of this service, beside the supervisor, a successor gets and needs.
type heir interface {
	// belongings are duplicates of descriptors by their keys, which the caller closes.
	belongings() (map[string]int, error)

	// hold has new commands wait for whoever commands next, until open.
	hold()
	open()

	// relieve has the service manager take another process for the service.
	relieve(pid int, within time.Duration) error
}

// succession starts candidates, one at a time.
type succession struct {
	flip flip
	of   heir
	log  *slog.Logger

	pid                           int // ours
	prepareTimeout, commitTimeout time.Duration

	last *candidate // of whose Upgrade the next one waits for the end
	lost error      // why the service may have no supervisor after this one
}

func newSuccession(f flip, of heir, log *slog.Logger) *succession {
	return &succession{flip: f, of: of, log: log, pid: os.Getpid(), prepareTimeout: prepareTimeout, commitTimeout: commitTimeout}
}

// candidate is the process that is to succeed this one. It implements
// [supervisor.Successor].
type candidate struct {
	*succession
	log      *slog.Logger
	deadline time.Time // for it to be prepared

	conn *control.Conn
	// Its end, of which we have a duplicate: what it has not taken can be closed when it
	// is dead, and what it has said last is followed by an end of file.
	theirs *os.File

	said    chan *control.Message // closed when it says nothing any more
	broken  error                 // why, if it does not keep to the protocol; set before said is closed
	flipped chan struct{}         // closed when tableflip's Upgrade has ended
	outcome error                 // of that
	over    chan struct{}         // closed when nobody listens to it any more

	discard func() error // once

	// Of its hello.
	process *pidfd.Process
	version string
}

// start is [supervisor.Options.Successor].
func (s *succession) start(ctx context.Context) (supervisor.Successor, error) {
	if s.pid == 1 {
		return nil, errors.New("the supervisor is process 1: a container is replaced, not upgraded")
	}
	c := &candidate{
		succession: s, log: s.log, deadline: time.Now().Add(s.prepareTimeout),
		said: make(chan *control.Message), flipped: make(chan struct{}), over: make(chan struct{}),
	}
	if err := s.free(c.within(ctx, "the supervisor before this one, or an earlier candidate, has not ended")); err != nil {
		return nil, err
	}
	c.discard = sync.OnceValue(c.end)
	if err := c.connect(); err != nil {
		return nil, err
	}
	s.last = c
	go c.flipOver()
	go c.listen()
	if err := c.greet(ctx); err != nil {
		return nil, errors.Join(err, c.Discard())
	}
	return c, nil
}

// free waits until tableflip could start another process.
func (s *succession) free(ctx context.Context, cancel context.CancelFunc) error {
	defer cancel()
	if s.last != nil {
		select {
		case <-s.last.flipped:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	if s.flip.WaitForParent(ctx) != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return nil
}

// within bounds what the candidate may take until it is prepared. late says what is so
// when the time is over.
func (c *candidate) within(ctx context.Context, late string) (context.Context, context.CancelFunc) {
	return context.WithDeadlineCause(ctx, c.deadline, fmt.Errorf("%s within %s", late, c.prepareTimeout))
}

// connect makes the channel.
func (c *candidate) connect() error {
	ours, theirs, err := control.Ends()
	if err != nil {
		return err
	}
	c.theirs = os.NewFile(uintptr(theirs), channelName)
	if c.conn, err = control.NewPredecessorConn(ours); err != nil {
		return errors.Join(err, c.theirs.Close())
	}
	// tableflip keeps a duplicate until the next one, or until the candidate is ready.
	if err := c.flip.AddFile(channelName, c.theirs); err != nil {
		return errors.Join(err, c.conn.Close(), c.theirs.Close())
	}
	return nil
}

// flipOver runs tableflip's Upgrade, which ends before the candidate is ready if that is
// dead, or dies.
func (c *candidate) flipOver() {
	defer close(c.flipped)
	at(starts)
	c.outcome = upgrade(c.flip)
	if c.outcome != nil {
		c.hangUp()
	}
}

// hangUp has whoever has the candidate's end say nothing more, and hear nothing.
func (c *candidate) hangUp() {
	if raw, err := c.theirs.SyscallConn(); err == nil { // or else it is closed
		_ = raw.Control(func(fd uintptr) { _ = unix.Shutdown(int(fd), unix.SHUT_RDWR) }) // of a pair: cannot fail
	}
}

// listen takes what the candidate says.
func (c *candidate) listen() {
	defer close(c.said)
	for {
		m, fds, err := c.conn.Receive()
		if err != nil {
			if errors.Is(err, control.ErrProtocol) {
				c.broken = err
			}
			return
		}
		control.Discard(fds)
		select {
		case c.said <- m:
		case <-c.over:
			return
		}
	}
}

// await returns what the candidate says next, which must be of the type.
func (c *candidate) await(ctx context.Context, want control.Type) (*control.Message, error) {
	select {
	case m, ok := <-c.said:
		switch {
		case !ok:
			return nil, c.gone(ctx)
		case m.Type != want:
			return nil, fmt.Errorf("the new program has said %q, and not %q", m.Type, want)
		case m.Error != "":
			return nil, errors.New(readable(m.Error))
		}
		return m, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// gone says why the candidate says nothing any more.
func (c *candidate) gone(ctx context.Context) error {
	if c.broken != nil {
		return fmt.Errorf("the new program: %w", c.broken)
	}
	select {
	case <-c.flipped:
		return fmt.Errorf("the new program has not come up: %w", c.outcome)
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// readable leaves lines, and nothing else that a terminal would obey.
func readable(text string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) || r == '\n' {
			return r
		}
		return unicode.ReplacementChar
	}, text)
}

// greet learns what the candidate is.
func (c *candidate) greet(ctx context.Context) error {
	ctx, cancel := c.within(ctx, "the new program has not said what it is")
	defer cancel()
	m, err := c.await(ctx, control.TypeCandidate)
	if err != nil {
		return err
	}
	hello := m.Hello
	switch {
	case hello == nil || readable(hello.Version) != hello.Version || len(hello.Version) > 128:
		return errors.New("the new program has no version that can be shown")
	case !hello.Meets(control.Core, control.CoreMin):
		return fmt.Errorf("version %s speaks control protocol %d to %d, this supervisor %d to %d", hello.Version, hello.CoreMin, hello.Core, control.CoreMin, control.Core)
	}
	if c.process, err = openChild(hello.PID); err != nil {
		return fmt.Errorf("the new program says that it is process %d: %w", hello.PID, err)
	}
	c.version = hello.Version
	c.log = c.log.With("of_pid", hello.PID, "version", hello.Version)
	c.log.Info("candidate has come up")
	at(greeted)
	return nil
}

// Offer implements [supervisor.Successor].
func (c *candidate) Offer(ctx context.Context, estate *control.Estate, fds map[string]int) error {
	payload, err := control.Payload(estate)
	if err != nil {
		return err
	}
	defer payload.Close()
	own, err := c.of.belongings()
	if err != nil {
		return err
	}
	defer control.CloseNamed(own)
	send := func(m *control.Message, fds ...int) error { return c.conn.Send(m, sendTimeout, fds...) }
	for _, some := range []map[string]int{own, fds} {
		if err := control.SendFiles(control.TypeInherit, some, send); err != nil {
			return c.explain(ctx, err)
		}
	}
	if err := c.conn.Send(&control.Message{Type: control.TypeEstate}, sendTimeout, int(payload.Fd())); err != nil {
		return c.explain(ctx, err)
	}
	at(offered)
	ctx, cancel := c.within(ctx, "the new program could not command the generations")
	defer cancel()
	_, err = c.await(ctx, control.TypePrepared)
	at(agreed)
	return err
}

// explain returns what the candidate has said last, or how it has ended, in the place of
// an error of the channel.
func (c *candidate) explain(ctx context.Context, err error) error {
	if !errors.Is(err, unix.EPIPE) {
		return err
	}
	_, err = c.await(ctx, control.TypePrepared)
	return err
}

// Commit implements [supervisor.Successor].
func (c *candidate) Commit(ctx context.Context) error {
	c.of.hold()
	if err := c.conn.Send(&control.Message{Type: control.TypeCommit}, sendTimeout); err != nil {
		return c.explain(ctx, err)
	}
	at(committed)
	timer := time.NewTimer(c.commitTimeout)
	defer timer.Stop()
	select {
	case <-c.flipped:
		if c.outcome != nil {
			return fmt.Errorf("the new program: %w", c.outcome)
		}
		at(relieved)
		return nil
	case <-timer.C:
		return fmt.Errorf("the new program does not command within %s", c.commitTimeout)
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Farewell implements [supervisor.Successor].
func (c *candidate) Farewell(context.Context) {
	err := c.of.relieve(c.PID(), systemdTimeout)
	if err == nil {
		err = c.alive()
	}
	if err == nil {
		err = c.conn.Send(&control.Message{Type: control.TypeFarewell}, sendTimeout)
	}
	if err != nil {
		// This process has not ended in order then: a service manager that takes it for the
		// service starts another supervisor, which adopts.
		c.lost = fmt.Errorf("the successor (pid %d) may not be the service's main process: %w", c.PID(), err)
		c.log.Error("no farewell to the successor", "err", err)
	}
	at(dismissed)
}

// alive says whether the candidate lives. A service manager that knew it before will
// notice its end from here on; to one that had ended by then it has not listened.
func (c *candidate) alive() error {
	p, err := openChild(c.PID())
	if err != nil {
		return err
	}
	return p.Close()
}

// Discard implements [supervisor.Successor].
func (c *candidate) Discard() error { return c.discard() }

func (c *candidate) end() error {
	err := c.kill()
	c.hangUp()
	c.empty()
	close(c.over)
	for _, e := range []error{c.conn.Close(), c.theirs.Close()} {
		err = errors.Join(err, e)
	}
	if c.process != nil {
		err = errors.Join(err, c.process.Close())
	}
	c.of.open()
	return err
}

// kill returns when the process is gone. One that has not said which it is has been
// given nothing, so that it would be killed later, by tableflip, is as good.
func (c *candidate) kill() error {
	process := c.process
	if process == nil {
		if process = findCandidate(); process == nil {
			return nil
		}
		defer process.Close()
	}
	if err := process.Signal(unix.SIGKILL); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("kill the candidate: %w", err)
	}
	c.log.Warn("candidate is discarded")
	stuck := time.AfterFunc(deathTimeout, func() { process.Close() })
	defer stuck.Stop()
	if err := process.Wait(); err != nil {
		return fmt.Errorf("the candidate was killed and is not gone after %s: it is stuck in the kernel", deathTimeout)
	}
	return nil
}

// empty closes what the candidate was sent and has not received. It would be open for as
// long as its end is, which tableflip sees to.
func (c *candidate) empty() {
	fd, err := control.DuplicateOf(c.theirs)
	if err != nil {
		return // it is closed
	}
	conn, err := control.NewCandidateConn(fd)
	for err == nil {
		var fds []int
		_, fds, err = conn.Receive()
		control.CloseAll(fds)
	}
	if conn != nil {
		_ = conn.Close() // nothing is left in it
	}
}

// PID implements [supervisor.Successor].
func (c *candidate) PID() int { return c.process.PID() }

// Version implements [supervisor.Successor].
func (c *candidate) Version() string { return c.version }
