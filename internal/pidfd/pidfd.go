// Package pidfd identifies processes for longer than their numbers last, and signals
// and awaits those that are somebody else's children.
//
// The number of a process is free for another as soon as it was waited for. An
// [Identity] can be written down and read by whoever comes later; a [Process] is a
// pidfd (pidfd_open(2)), which never comes to mean another process.
package pidfd

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// Identity says which process is meant: no two that ever ran have the same.
type Identity struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"`          // clock ticks since the system was started, as in field 22 of /proc/PID/stat
	Boot  string `json:"boot,omitempty"` // of the system; "" where /proc does not show it, as in a sandbox
}

// is leaves out the boot where one of the two does not know it.
func (id Identity) is(other Identity) bool {
	return id.PID == other.PID && id.Start == other.Start && (id.Boot == other.Boot || id.Boot == "" || other.Boot == "")
}

// Of returns the identity of the process that has the number now. It is for one that
// cannot end unnoticed: oneself, a child that was not waited for, the other end of an
// open connection. The error wraps os.ErrProcessDone if there is none.
func Of(pid int) (Identity, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) { // ESRCH: it ended while it was read
		return Identity{}, fmt.Errorf("process %d: %w", pid, os.ErrProcessDone)
	}
	if err != nil {
		return Identity{}, fmt.Errorf("process %d: %w", pid, err)
	}
	start, err := startOf(stat)
	if err != nil {
		return Identity{}, fmt.Errorf("process %d: %w", pid, err)
	}
	boot, _ := os.ReadFile("/proc/sys/kernel/random/boot_id") // may not be shown
	return Identity{PID: pid, Start: start, Boot: string(bytes.TrimSpace(boot))}, nil
}

// startOf reads field 22 of what is in /proc/PID/stat. The second field, the name in
// parentheses, may itself contain spaces and parentheses (proc_pid_stat(5)).
func startOf(stat []byte) (uint64, error) {
	name := bytes.LastIndexByte(stat, ')')
	fields := bytes.Fields(stat[name+1:])
	if name < 0 || len(fields) <= 22-3 {
		return 0, errors.New("/proc shows no time of its start")
	}
	return strconv.ParseUint(string(fields[22-3]), 10, 64) // the first that is left is the third
}

// Process is a running process or one that has ended, whose child it may ever be. Its
// methods may be called concurrently.
type Process struct {
	pid int
	fd  *os.File // in the runtime's poller: who waits is a goroutine, and no thread
}

// Open opens the process that is meant. The error wraps os.ErrProcessDone if that one
// is gone, also where its number is another's now. One that has ended and was not
// waited for is gone as well.
func Open(id Identity) (*Process, error) {
	fd, openErr := unix.PidfdOpen(id.PID, unix.PIDFD_NONBLOCK)
	p := &Process{pid: id.PID}
	if openErr == nil {
		p.fd = os.NewFile(uintptr(fd), "pidfd")
	}
	// Only now is the number looked at: if what was opened still runs afterwards, the
	// number was its own all the time.
	now, err := Of(id.PID)
	switch {
	case err == nil && !now.is(id):
		err = fmt.Errorf("process %d: %w, and its number is another's now", id.PID, os.ErrProcessDone)
	case err == nil && openErr != nil:
		err = fmt.Errorf("process %d: pidfd_open: %w", id.PID, openErr)
	case err == nil && ended(fd):
		err = fmt.Errorf("process %d: %w", id.PID, os.ErrProcessDone)
	}
	if err != nil {
		p.fd.Close() // of nil, does nothing
		return nil, err
	}
	return p, nil
}

// PID is its number. Another may have it when the process has ended.
func (p *Process) PID() int { return p.pid }

// Signal sends a signal. The error is os.ErrProcessDone if it was waited for already.
func (p *Process) Signal(sig os.Signal) error {
	number, ok := sig.(syscall.Signal)
	if !ok {
		return fmt.Errorf("signal process %d: %v is no signal of this system", p.pid, sig)
	}
	raw, err := p.fd.SyscallConn()
	if err != nil {
		return err
	}
	if outer := raw.Control(func(fd uintptr) { err = unix.PidfdSendSignal(int(fd), number, nil, 0) }); outer != nil {
		return outer
	}
	if errors.Is(err, unix.ESRCH) {
		return os.ErrProcessDone
	}
	if err != nil {
		return fmt.Errorf("signal process %d: %w", p.pid, err)
	}
	return nil
}

// Wait blocks until the process has ended, or until Close, which makes it return an
// error. Whether its parent has waited for it makes no difference.
func (p *Process) Wait() error {
	raw, err := p.fd.SyscallConn()
	if err != nil {
		return err
	}
	return raw.Read(func(fd uintptr) bool { return ended(int(fd)) })
}

// Close makes an end of Wait. The process goes on.
func (p *Process) Close() error { return p.fd.Close() }

// ended says whether the process of a pidfd has: it is readable then.
func ended(fd int) bool {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, 0)
		if !errors.Is(err, unix.EINTR) {
			return n > 0
		}
	}
}
