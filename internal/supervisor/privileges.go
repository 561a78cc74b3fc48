package supervisor

import (
	"errors"
	"fmt"
	"os/exec"
	"runtime"

	"golang.org/x/sys/unix"
)

// startUnprivileged starts cmd without any capability, and without a way to gain
// one, whatever the supervisor itself has for the ports that it opens.
//
// Capabilities belong to threads (capabilities(7)) and a child has those of the
// thread that forks it. So a thread gives all up, forks, and ends, as the thread of
// a goroutine does that exits while it is locked to it.
func startUnprivileged(cmd *exec.Cmd) error {
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// The main thread cannot end, and it is what ps shows of the process. As
			// long as this goroutine holds it, no other gets it.
			started <- startUnprivileged(cmd)
			runtime.UnlockOSThread()
			return
		}
		err := shedPrivileges()
		if err == nil {
			err = cmd.Start()
		}
		started <- err
	}()
	return <-started
}

// shedPrivileges takes from the calling thread what its children would inherit.
func shedPrivileges() error {
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return fmt.Errorf("clear the ambient capabilities: %w", err)
	}
	// A program that root starts has whatever the bounding set leaves. Only who has
	// CAP_SETPCAP can narrow it; whoever is neither root nor has that gains nothing by it.
	for c := uintptr(0); ; c++ {
		err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EPERM) {
			break // beyond the last one, or not allowed
		}
		if err != nil {
			return fmt.Errorf("drop the bounding capability %d: %w", c, err)
		}
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var sets [2]unix.CapUserData
	err := unix.Capget(&header, &sets[0])
	if err == nil {
		sets[0].Inheritable, sets[1].Inheritable = 0, 0
		err = unix.Capset(&header, &sets[0])
	}
	if err != nil {
		return fmt.Errorf("clear the inheritable capabilities: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("no_new_privs: %w", err)
	}
	return nil
}
