package cli

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"holdfast/internal/pidfd"
	"holdfast/internal/runtimedir"
)

const (
	// orphansTimeout is how long orphans may take to end unless it is said otherwise.
	orphansTimeout = 30 * time.Second

	// killTimeout is how long a process may take to be gone that was killed.
	killTimeout = 10 * time.Second
)

var errSupervised = errors.New("a supervisor runs")

// stopOrphans ends the generations that a supervisor has left behind which is gone. It
// holds the lock meanwhile, so that none adopts them.
func (c *commands) stopOrphans(cmd *cobra.Command, limit time.Duration, now bool) error {
	path, err := runtimeDir(c.runtimeDir)
	if err != nil {
		return err
	}
	const what = "nothing was ended"
	dir, err := openAsOwner(path)
	if errors.Is(err, fs.ErrNotExist) {
		fmt.Fprintf(cmd.OutOrStdout(), "nothing is known of generations: there is no runtime directory %s\n", path)
		return nil
	}
	if err != nil {
		return &commandError{what, err}
	}
	lock, err := dir.Lock()
	if held, ok := errors.AsType[*runtimedir.HeldError](err); ok {
		err = fmt.Errorf("%w (pid %s)", errSupervised, held.PID)
	}
	if err != nil {
		return &commandError{what, err}
	}
	defer lock.Close()
	state, err := dir.LoadState()
	if err != nil {
		return &commandError{what, err}
	}
	if _, gone := os.Lstat(dir.Rendezvous()); state == nil && gone == nil {
		return &commandError{what, fmt.Errorf("a supervisor was killed here, and what it had noted is gone: generations of it may live (`pgrep -x holdfast-proxy` shows them)")}
	}
	if state == nil {
		fmt.Fprintf(cmd.OutOrStdout(), "nothing is known of generations: no supervisor has left word in %s\n", path)
		return nil
	}
	return endAll(cmd.OutOrStdout(), state.Generations, limit, now)
}

// openAsOwner opens a runtime directory as the user to whom it belongs, which root
// becomes for the rest of this process. What a service has noted itself must not make
// root end the processes of others.
func openAsOwner(path string) (*runtimedir.Dir, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if owner := info.Sys().(*syscall.Stat_t); os.Geteuid() == 0 && owner.Uid != 0 {
		err = syscall.Setgroups(nil)
		if err == nil {
			err = syscall.Setgid(int(owner.Gid))
		}
		if err == nil {
			err = syscall.Setuid(int(owner.Uid))
		}
		if err != nil {
			return nil, fmt.Errorf("become user %d: %w", owner.Uid, err)
		}
	}
	return runtimedir.Open(path)
}

// outcome is what became of a generation, as it is told, or why it may still be there.
type outcome struct {
	text string
	err  error
}

// endAll ends generations at the same time, and tells of each when it has ended.
func endAll(w io.Writer, generations []runtimedir.Generation, limit time.Duration, now bool) error {
	outcomes := make(chan outcome)
	for _, g := range generations {
		go func() {
			text, err := end(g, limit, now)
			name := fmt.Sprintf("generation %d (pid %d)", g.Number, g.PID)
			if err != nil {
				err = fmt.Errorf("%s: %w", name, err)
			}
			outcomes <- outcome{name + " " + text, err}
		}()
	}
	var left []error
	for range generations {
		o := <-outcomes
		if o.err != nil {
			left = append(left, o.err)
			continue
		}
		fmt.Fprintln(w, o.text)
	}
	if len(left) > 0 {
		return &commandError{fmt.Sprintf("%d of %d generations may still run", len(left), len(generations)), errors.Join(left...)}
	}
	fmt.Fprintln(w, "no generation is left")
	return nil
}

// end has a generation drain, and kills it if that takes too long or it is to end now.
func end(g runtimedir.Generation, limit time.Duration, now bool) (string, error) {
	process, err := pidfd.Open(g.Identity)
	if errors.Is(err, os.ErrProcessDone) {
		return "was gone already", nil
	}
	if err != nil {
		return "", err
	}
	defer process.Close()
	gone := make(chan error, 1)
	go func() { gone <- process.Wait() }()
	if !now {
		if err := tell(process, syscall.SIGTERM); err != nil {
			return "", err
		}
		select {
		case err := <-gone:
			return "has ended", err
		case <-time.After(limit):
		}
	}
	if err := tell(process, syscall.SIGKILL); err != nil {
		return "", err
	}
	select {
	case err := <-gone:
		if now {
			return "was killed", err
		}
		return fmt.Sprintf("did not end within %s and was killed", limit), err
	case <-time.After(killTimeout):
		return "", fmt.Errorf("was killed and is not gone after %s", killTimeout)
	}
}

// tell sends a signal. That the process has ended is no error: Wait says so.
func tell(process *pidfd.Process, sig os.Signal) error {
	if err := process.Signal(sig); !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	return nil
}
