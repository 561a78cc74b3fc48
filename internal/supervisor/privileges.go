package supervisor

import (
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

// shedPrivileges takes all capabilities from the calling thread. no_new_privs comes
// first: without it a program that root executes has again what the bounding set
// leaves; with it execve(2) gives no more than the thread had.
func shedPrivileges() error {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("no_new_privs: %w", err)
	}
	// What is not permitted and inheritable any more leaves the ambient set too.
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	if err := unix.Capset(&header, &none[0]); err != nil {
		return fmt.Errorf("give up the capabilities: %w", err)
	}
	return nil
}
