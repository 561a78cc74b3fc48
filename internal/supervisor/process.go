package supervisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"

	"holdfast/internal/control"
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
	return "exit status 0"
}
