// Package child starts processes that end with whoever started them.
package child

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"time"
)

// stopTimeout is how long a child may take to end by itself.
const stopTimeout = 10 * time.Second

// Child is a process that was started. Its methods may be called concurrently.
type Child struct {
	cmd   *exec.Cmd
	ended chan struct{}
}

// Start starts cmd in a process group of its own, so that a Ctrl-C in the terminal
// reaches only us, who then end things in order. A child is sent SIGTERM when we are
// gone, even if we were killed.
func Start(cmd *exec.Cmd) (*Child, error) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	c := &Child{cmd: cmd, ended: make(chan struct{})}
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

// PID is the number of its process.
func (c *Child) PID() int { return c.cmd.Process.Pid }

// Ended is closed when it is gone.
func (c *Child) Ended() <-chan struct{} { return c.ended }

// Outcome says how it ended. It is for when Ended is closed.
func (c *Child) Outcome() *os.ProcessState { return c.cmd.ProcessState }

// Kill ends it at once and waits until it is gone.
func (c *Child) Kill() {
	c.cmd.Process.Kill() // an error is that it has ended
	<-c.ended
}

// Stop asks it to end, waits until it is gone, and kills it if that takes more than 10
// seconds, which is an error.
func (c *Child) Stop() error {
	c.cmd.Process.Signal(syscall.SIGTERM) // an error is that it has ended
	select {
	case <-c.ended:
		return nil
	case <-time.After(stopTimeout):
		c.Kill()
		return fmt.Errorf("%v (pid %d) did not end within %s and was killed", c.cmd.Args, c.PID(), stopTimeout)
	}
}
