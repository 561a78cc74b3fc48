package supervisor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"
	"time"

	"holdfast/internal/control"
	"holdfast/internal/pidfd"
	"holdfast/internal/tickets"
)

// process is a proxy process. Signals go through its pidfd (os.Process has one),
// so none can reach another process that got the number.
type process interface {
	PID() int
	Signal(os.Signal) error
	// Wait blocks until the process has ended and says how, once.
	Wait() string
}

// channel is our end of a control channel.
type channel interface {
	caller
	Receive() (*control.Message, []int, error)
	Close() error
}

// kernel is what a supervisor needs of the kernel. Tests put another in its place.
type kernel struct {
	start    func(*release) (process, channel, error)
	check    func(context.Context, *release) error
	identify func(pid int) (pidfd.Identity, error)
	find     func(pidfd.Identity) (process, error)
	ends     func() (ours, theirs int, err error) // of a new control channel
	channel  func(end int) (channel, error)       // of the supervisor

	setOOMScore func(p process, score int) error // nil: nobody is told

	uptime func() time.Duration // the clock of ticket keys
}

func realKernel() kernel {
	return kernel{
		start:    startChild,
		check:    func(ctx context.Context, r *release) error { return r.check(ctx) },
		identify: pidfd.Of,
		find:     findProcess,
		ends:     control.Ends,
		channel:  func(end int) (channel, error) { return control.NewSupervisorConn(end) },

		setOOMScore: setOOMScore,

		uptime: tickets.Uptime,
	}
}

type child struct{ cmd *exec.Cmd }

// startChild starts a generation in a process group of its own: what a terminal
// sends to the supervisor's must not reach it. Its control channel is descriptor 4.
func startChild(r *release) (process, channel, error) {
	ours, theirs, err := control.Pair()
	if err != nil {
		return nil, nil, err
	}
	defer theirs.Close()
	cmd := r.command(context.Background(), "run")
	cmd.ExtraFiles = append(cmd.ExtraFiles, theirs)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr // an access log may be the one, the log is the other
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := startUnprivileged(cmd); err != nil {
		return nil, nil, errors.Join(fmt.Errorf("start %s: %w", r.binary.Name(), err), ours.Close())
	}
	return &child{cmd}, ours, nil
}

func (c *child) PID() int                   { return c.cmd.Process.Pid }
func (c *child) Signal(sig os.Signal) error { return c.cmd.Process.Signal(sig) }

func (c *child) Wait() string {
	if err := c.cmd.Wait(); err != nil {
		return err.Error()
	}
	return endedWell
}

// found is a process that another supervisor has started: not our child, so nobody
// tells us how it ended.
type found struct{ p *pidfd.Process }

func findProcess(id pidfd.Identity) (process, error) {
	p, err := pidfd.Open(id)
	if err != nil {
		return nil, err
	}
	return found{p}, nil
}

func (f found) PID() int                   { return f.p.PID() }
func (f found) Signal(sig os.Signal) error { return f.p.Signal(sig) }

func (f found) Wait() string {
	f.p.Wait()
	return endedUnseen
}

// endedUnseen is how a process ends that is not our child, as far as we know.
const endedUnseen = "it was started by another supervisor, and how it ended is not known"

func (f found) Close() error { return f.p.Close() }

// closeProcess lets go of a process that nobody waits for any more.
func closeProcess(p process) {
	if c, ok := p.(io.Closer); ok {
		_ = c.Close() // a pidfd: there is nothing to lose
	}
}

// identityOf is what p can be found again by. Where /proc does not show it, it is the
// number alone, by which nothing is found.
func (s *Supervisor) identityOf(p process) pidfd.Identity {
	id, err := s.kernel.identify(p.PID())
	if err != nil {
		return pidfd.Identity{PID: p.PID()}
	}
	return id
}
