package control_test

import (
	"errors"
	"os"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/control"
)

// crowd has more descriptors on their way than this user may, until clear is called. It
// must be called by a test that is not parallel, whose goroutine sends: the limit is that of
// the process, and it is the thread's capabilities that would lift it.
func crowd(t *testing.T, file *token) (clear func()) {
	t.Helper()
	runtime.LockOSThread() // for good: the thread ends with the test's goroutine
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	if err := unix.Capset(&header, &none[0]); err != nil {
		t.Fatal(err)
	}
	ends, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	const most = 100
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: most, Max: limit.Max}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		unix.Close(ends[0])
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
			t.Error(err)
		}
	})
	for err == nil {
		err = unix.Sendmsg(ends[0], []byte("x"), unix.UnixRights(file.times(most/2)...), nil, unix.MSG_DONTWAIT)
	}
	if err != unix.ETOOMANYREFS {
		t.Fatalf("%v, want %v", err, unix.ETOOMANYREFS)
	}
	return func() { unix.Close(ends[1]) }
}

// What others of the same user have on their way counts, too, so that it may be nobody's
// fault here. Not parallel: see crowd.
func TestTooManyDescriptorsOnTheirWayAreAMatterOfTime(t *testing.T) {
	file := newToken(t)
	conn, _ := pair(t)
	vault, _ := vaults(t)
	senders := map[string]func(time.Duration) error{
		"a message": func(within time.Duration) error {
			return conn.Send(&control.Message{Type: control.TypeListeners, Keys: []string{"k"}}, within, file.fd)
		},
		"a packet of a vault": func(within time.Duration) error {
			return vault.Send(&control.VaultPacket{Type: control.VaultStore, Files: file.times(1)}, within)
		},
	}
	for what, send := range senders {
		t.Run(what, func(t *testing.T) {
			clear := crowd(t, file)
			if err := send(200 * time.Millisecond); !errors.Is(err, os.ErrDeadlineExceeded) || !errors.Is(err, unix.ETOOMANYREFS) {
				t.Errorf("%v, want that the time is over, and why", err)
			}
			defer time.AfterFunc(20*time.Millisecond, clear).Stop()
			if err := send(liveness); err != nil {
				t.Error(err)
			}
		})
	}
}
