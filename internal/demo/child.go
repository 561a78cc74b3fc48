package demo

import (
	"fmt"
	"os/exec"
	"runtime"
	"syscall"
	"time"
)

// stopTimeout is how long a child may take to end by itself.
const stopTimeout = 10 * time.Second

// child is a process that the demo has started.
type child struct {
	cmd   *exec.Cmd
	ended chan struct{} // closed when it is gone
}

// start starts cmd in a process group of its own, so that a Ctrl-C in the terminal
// reaches the demo only, which ends things in order. A child does not outlive the
// demo even if that is killed.
func start(cmd *exec.Cmd) (*child, error) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	c := &child{cmd: cmd, ended: make(chan struct{})}
	started := make(chan error)
	go func() {
		defer close(c.ended)
		// The kernel sends Pdeathsig when the starting thread ends, so it stays.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			cmd.Wait() // how it ended is not asked
		}
	}()
	return c, <-started
}

func (c *child) pid() int { return c.cmd.Process.Pid }

// stop ends it and waits until it is gone.
func (c *child) stop() error {
	c.cmd.Process.Signal(syscall.SIGTERM) // an error is that it has ended
	select {
	case <-c.ended:
		return nil
	case <-time.After(stopTimeout):
		c.cmd.Process.Kill()
		<-c.ended
		return fmt.Errorf("%s (pid %d) did not end within %s and was killed", c.cmd.Args[1], c.pid(), stopTimeout)
	}
}
