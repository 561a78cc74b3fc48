package systemd

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// nextWith returns what is said next and the descriptors that come with it.
func (m manager) nextWith(t *testing.T) (string, []int) {
	t.Helper()
	m.SetReadDeadline(time.Now().Add(limit))
	packet, rights := make([]byte, 4096), make([]byte, 4096)
	n, rn, _, _, err := m.ReadMsgUnix(packet, rights)
	if err != nil {
		t.Fatalf("nothing was said: %v", err)
	}
	messages, err := unix.ParseSocketControlMessage(rights[:rn])
	if err != nil {
		t.Fatal(err)
	}
	var fds []int
	for _, one := range messages {
		some, err := unix.ParseUnixRights(&one)
		if err != nil {
			t.Fatal(err)
		}
		fds = append(fds, some...)
	}
	return string(packet[:n]), fds
}

// wantStored expects that file, and no other descriptor, is stored under the key.
func (m manager) wantStored(t *testing.T, key string, file *os.File) {
	t.Helper()
	m.wantRemoved(t, key)
	text, fds := m.nextWith(t)
	if want := "FDSTORE=1\nFDPOLL=0\nFDNAME=" + storedName(key); text != want || len(fds) != 1 {
		t.Fatalf("systemd hears %q with %d descriptors, want %q with one", text, len(fds), want)
	}
	defer unix.Close(fds[0])
	if got, want := identity(t, fds[0]), identity(t, int(file.Fd())); got != want {
		t.Errorf("it is %v, want %v", got, want)
	}
}

// wantRemoved expects that what the key has is removed.
func (m manager) wantRemoved(t *testing.T, key string) {
	t.Helper()
	text, fds := m.nextWith(t)
	if want := "FDSTOREREMOVE=1\nFDNAME=" + storedName(key); text != want || len(fds) != 0 {
		t.Fatalf("systemd hears %q with %d descriptors, want %q", text, len(fds), want)
	}
}

func identity(t *testing.T, fd int) file {
	t.Helper()
	var status unix.Stat_t
	if err := unix.Fstat(fd, &status); err != nil {
		t.Fatal(err)
	}
	return file{status.Dev, status.Ino}
}

func memory(t *testing.T) *os.File {
	t.Helper()
	fd, err := unix.MemfdCreate("stored", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "stored")
	t.Cleanup(func() { f.Close() })
	return f
}

// descriptors is how many this process has.
func descriptors(t *testing.T) int {
	t.Helper()
	all, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}

func keeper(t *testing.T, room int) manager {
	t.Helper()
	t.Setenv("FDSTORE", fmt.Sprint(room))
	return listen(t)
}

func discard() *slog.Logger { return slog.New(slog.DiscardHandler) }

func TestDescriptorsAreLeftWithSystemd(t *testing.T) {
	m := keeper(t, 10)
	n := NewNotifier(discard())
	a, b := memory(t), memory(t)
	before := descriptors(t)
	n.Store("ledger", int(a.Fd()))
	m.wantStored(t, "ledger", a)
	n.Store("listener unix:/run/ü:1", int(b.Fd()))
	m.wantStored(t, "listener unix:/run/ü:1", b)

	c := memory(t)
	before++
	n.Store("ledger", int(c.Fd()))
	n.Store("ledger", int(c.Fd())) // is there, or on its way
	m.wantStored(t, "ledger", c)
	n.Hold()
	n.Store("ledger", int(c.Fd()))
	if again := n.store.noted("ledger"); again >= 0 {
		t.Error("what systemd has is sent again")
	}
	n.Release()
	n.Remove("ledger")
	m.wantRemoved(t, "ledger")
	n.Store("ledger", int(c.Fd()))
	m.wantStored(t, "ledger", c)
	n.Remove("of a predecessor")
	m.wantRemoved(t, "of a predecessor")
	n.Close(limit)
	if more := descriptors(t) - before; more != 0 {
		t.Errorf("%d descriptors are left", more)
	}
}

// The caller may close its descriptor, and reuse its number, as soon as it likes; and
// of what was not said yet only the newest counts.
func TestAStuckSystemdGetsWhatIsToBeThere(t *testing.T) {
	m := keeper(t, 10)
	n := newNotifier(t, discard())
	n.Hold() // as if it were stuck
	before := descriptors(t)
	a, b, c := memory(t), memory(t), memory(t)
	for range 100 {
		n.Store("a", int(a.Fd()))
		n.Remove("a")
		n.Store("a", int(b.Fd()))
		n.Remove("b")
		n.Store("b", int(a.Fd()))
		n.Store("c", int(c.Fd()))
		n.Remove("c")
	}
	if more := descriptors(t) - before; more != 3+2 {
		t.Errorf("%d descriptors more, want the files and two duplicates", more)
	}
	b.Close()
	n.Release()
	for range 3 {
		text, fds := m.nextWith(t)
		for _, fd := range fds {
			unix.Close(fd)
		}
		if text == "FDSTOREREMOVE=1\nFDNAME="+storedName("c") {
			if len(fds) != 0 {
				t.Error("the removal of c has descriptors")
			}
			continue
		}
		name := text[strings.LastIndex(text, "=")+1:]
		key, ok := storedKey(name)
		if text != "FDSTOREREMOVE=1\nFDNAME="+name || !ok {
			t.Fatalf("systemd hears %q", text)
		}
		if text, fds = m.nextWith(t); text != "FDSTORE=1\nFDPOLL=0\nFDNAME="+name || len(fds) != 1 {
			t.Fatalf("systemd hears %q", text)
		}
		if got, is := identity(t, fds[0]), identity(t, int(a.Fd())); (key == "b") != (got == is) {
			t.Errorf("%s is the wrong file", key)
		}
		unix.Close(fds[0])
	}
	n.Ready()
	if got := m.next(t); got != "READY=1" {
		t.Errorf("systemd hears %q", got)
	}
}

// Whatever fails, what systemd has in the end is right.
func TestADepositThatFailsIsMadeLater(t *testing.T) {
	m := keeper(t, 10)
	path := m.LocalAddr().String()
	if err := errors.Join(m.Close(), os.Remove(path)); err != nil {
		t.Fatal(err)
	}
	log := new(lockedBuffer)
	n := newNotifier(t, slog.New(slog.NewTextHandler(log, nil)))
	a, b := memory(t), memory(t)
	n.Store("a", int(a.Fd()))
	for deadline := time.Now().Add(limit); log.String() == ""; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the log says nothing")
		}
	}
	again, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: path})
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	n.Store("b", int(b.Fd()))
	manager{again}.wantStored(t, "a", a)
	manager{again}.wantStored(t, "b", b)
}

func TestTheStoreHasRoomForSoManyOnly(t *testing.T) {
	m := keeper(t, 2)
	log := new(lockedBuffer)
	n := newNotifier(t, slog.New(slog.NewTextHandler(log, nil)))
	files := []*os.File{memory(t), memory(t), memory(t)}
	for i, f := range files {
		n.Store(fmt.Sprint(i), int(f.Fd()))
		n.Store(fmt.Sprint(i), int(f.Fd()))
	}
	m.wantStored(t, "0", files[0])
	m.wantStored(t, "1", files[1])
	if lines := strings.Count(log.String(), "\n"); lines != 1 || !strings.Contains(log.String(), "FileDescriptorStoreMax=") {
		t.Errorf("the log is:\n%s", log)
	}
	other := memory(t)
	n.Store("1", int(other.Fd())) // which needs no room
	m.wantStored(t, "1", other)
	n.Remove("0")
	m.wantRemoved(t, "0")
	n.Store("2", int(files[2].Fd()))
	m.wantStored(t, "2", files[2])
}

func TestWithoutAStoreNothingIsSent(t *testing.T) {
	m := listen(t)
	t.Setenv("FDSTORE", "")
	log := new(lockedBuffer)
	n := newNotifier(t, slog.New(slog.NewTextHandler(log, nil)))
	n.Store("a", int(memory(t).Fd()))
	n.Ready()
	if got := m.next(t); got != "READY=1" || !strings.Contains(log.String(), "FileDescriptorStoreMax=") {
		t.Errorf("systemd hears %q, the log is %q", got, log)
	}
}

func TestANameThatSystemdWouldNotTakeIsNotSent(t *testing.T) {
	m := keeper(t, 10)
	log := new(lockedBuffer)
	n := newNotifier(t, slog.New(slog.NewTextHandler(log, nil)))
	n.Store(strings.Repeat("x", 300), int(memory(t).Fd()))
	n.Store("closed", 1<<20)
	n.Ready()
	if got := m.next(t); got != "READY=1" || !strings.Contains(log.String(), "characters; systemd takes 255") ||
		!strings.Contains(log.String(), "bad file descriptor") {
		t.Errorf("systemd hears %q, the log is %q", got, log)
	}
}

func TestNamesInTheStoreAreKeysAndNoOthers(t *testing.T) {
	for _, key := range []string{"", "ledger", "listener [::]:80", "listener unix:/run/ü", "counts 12", "\x00\xff:"} {
		name := storedName(key)
		if strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r >= 0x7f || r == ':' }) {
			t.Errorf("the name of %q is %q", key, name)
		}
		if got, ok := storedKey(name); !ok || got != key {
			t.Errorf("the name of %q is that of %q (%v)", key, got, ok)
		}
	}
	for _, name := range []string{"", "web", "holdfast", "holdfast.socket", "holdfast-web", "stored", "unknown",
		"holdfast-stored-a", "holdfast-stored-a=", "holdfast-stored-ab\n", "holdfast-stored-AB"} {
		if key, ok := storedKey(name); ok {
			t.Errorf("%q is taken for %q", name, key)
		}
	}
}

// A process that is fed from a full table of descriptors is one that lives.
func TestTheWayToSystemdStaysOpen(t *testing.T) {
	m := listen(t)
	n := newNotifier(t, discard())
	n.Ready()
	m.next(t)
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Setrlimit(unix.RLIMIT_NOFILE, &syscall.Rlimit{Cur: 0, Max: old.Max}); err != nil {
		t.Fatal(err)
	}
	n.Alive(0)
	got := m.next(t)
	if err := syscall.Setrlimit(unix.RLIMIT_NOFILE, &syscall.Rlimit{Cur: old.Cur, Max: old.Max}); err != nil {
		t.Fatal(err)
	}
	if got != "WATCHDOG=1" {
		t.Errorf("systemd hears %q", got)
	}
}

func TestACandidateSaysNothingBeforeItIsBelieved(t *testing.T) {
	m := keeper(t, 10)
	n := newNotifier(t, discard())
	n.Hold()
	a := memory(t)
	n.Alive(0)
	n.Store("a", int(a.Fd()))
	n.Status("1")
	n.Status("2")
	other := newNotifier(t, discard())
	other.Reloading() // is heard at once
	if got := m.next(t); !strings.HasPrefix(got, "RELOADING=1") {
		t.Errorf("systemd hears %q", got)
	}
	n.Release()
	if got := m.next(t); got != "WATCHDOG=1\nSTATUS=2" {
		t.Errorf("systemd hears %q", got)
	}
	m.wantStored(t, "a", a)
}

func TestACandidateThatIsDiscardedSaysNothing(t *testing.T) {
	m := keeper(t, 10)
	n := NewNotifier(discard())
	n.Hold()
	a := memory(t)
	before := descriptors(t)
	n.Store("a", int(a.Fd()))
	n.Ready()
	n.Close(limit)
	if more := descriptors(t) - before; more != 0 {
		t.Errorf("%d descriptors are left", more)
	}
	newNotifier(t, discard()).Status("x")
	if got := m.next(t); got != "STATUS=x" {
		t.Errorf("systemd hears %q", got)
	}
}

func TestASupervisorIsRelieved(t *testing.T) {
	m := keeper(t, 10)
	n := newNotifier(t, discard())
	n.Hold()
	a := memory(t)
	n.Store("a", int(a.Fd()))
	n.Status("x")
	n.Release()
	relieved := make(chan error, 1)
	go func() { relieved <- n.Relieve(4711, limit) }()
	if got := m.next(t); got != "STATUS=x" {
		t.Errorf("systemd hears %q", got)
	}
	m.wantStored(t, "a", a)
	if got := m.next(t); got != "MAINPID=4711\nREADY=1" {
		t.Errorf("systemd hears %q", got)
	}
	text, fds := m.nextWith(t)
	if text != "BARRIER=1" || len(fds) != 1 {
		t.Fatalf("systemd hears %q with %d descriptors", text, len(fds))
	}
	select {
	case err := <-relieved:
		t.Errorf("it did not wait for systemd: %v", err)
	case <-time.After(50 * time.Millisecond): // it has no reason to go on
	}
	unix.Close(fds[0])
	if err := <-relieved; err != nil {
		t.Error(err)
	}

	// systemd does not listen to this one any more.
	n.Stopping()
	n.Store("b", int(a.Fd()))
	newNotifier(t, discard()).Status("another")
	if got := m.next(t); got != "STATUS=another" {
		t.Errorf("systemd hears %q", got)
	}
}

func TestASystemdThatDoesNotConfirmIsNotWaitedForForLong(t *testing.T) {
	t.Run("it hears", func(t *testing.T) {
		m := listen(t)
		n := NewNotifier(discard())
		err := n.Relieve(4711, 10*time.Millisecond)
		if err == nil || m.next(t) != "MAINPID=4711\nREADY=1" {
			t.Errorf("got %v", err)
		}
		n.Close(limit)
		select {
		case <-n.done:
		default:
			t.Error("somebody waits on")
		}
	})
	t.Run("it does not", func(t *testing.T) {
		m := listen(t)
		fill, err := net.DialUnix("unixgram", nil, m.LocalAddr().(*net.UnixAddr))
		if err != nil {
			t.Fatal(err)
		}
		defer fill.Close()
		fill.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
		for err == nil {
			_, err = fill.Write([]byte("X=1"))
		}
		n := newNotifier(t, discard())
		n.Status("before")
		if err := n.Relieve(4711, 10*time.Millisecond); err == nil || !strings.Contains(err.Error(), "process 4711") {
			t.Errorf("got %v", err)
		}
		for m.next(t) != "STATUS=before" {
		}
		n.Status("after") // nobody has relieved it
		if got := m.next(t); got != "STATUS=after" {
			t.Errorf("systemd hears %q", got)
		}
	})
	t.Run("it is not there", func(t *testing.T) {
		m := listen(t)
		m.Close()
		if err := newNotifier(t, discard()).Relieve(4711, limit); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("got %v", err)
		}
	})
}

func TestWithoutSystemdNothingIsLeft(t *testing.T) {
	var n *Notifier
	n.Hold()
	n.Release()
	n.Store("a", 0)
	n.Remove("a")
	if err := n.Relieve(1, 0); err != nil {
		t.Error(err)
	}
}

// --- what comes back --------------------------------------------------------------

// passed is set in a process that says what systemd has passed to it.
const passed = "SYSTEMD_TEST_PASSED"

type arrival struct {
	Sockets []string
	Stored  map[string]string // contents by key
	Left    string            // of the environment
}

func sayWhatWasPassed() {
	sockets, stored := Files()
	a := arrival{Stored: make(map[string]string), Left: os.Getenv("LISTEN_FDS") + os.Getenv("LISTEN_FDNAMES")}
	for _, s := range sockets {
		a.Sockets = append(a.Sockets, s.Name())
	}
	for key, fd := range stored {
		text := make([]byte, 100)
		n, _ := unix.Pread(fd, text, 0)
		a.Stored[key] = string(text[:max(n, 0)])
		if flags, _ := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); flags&unix.FD_CLOEXEC == 0 {
			a.Stored[key] += " not close-on-exec"
		}
	}
	json.NewEncoder(os.Stdout).Encode(a)
}

func TestWhatWasLeftComesBackAndTheSocketsOfUnitsAreOthers(t *testing.T) {
	var files []*os.File
	var names []string
	pass := func(name, content string) {
		f := memory(t)
		if _, err := f.WriteString(content); err != nil {
			t.Fatal(err)
		}
		files, names = append(files, f), append(names, name)
	}
	pass("web", "")
	pass("holdfast-web", "")
	pass(storedName("ledger"), "new")
	pass(storedName("ledger"), "old")
	pass(storedName("listener unix:/a:b"), "socket")
	pass("holdfast.socket", "")

	cmd := exec.Command("/bin/sh", "-c", `export LISTEN_PID=$$; exec "$0"`, os.Args[0])
	cmd.Env = append(os.Environ(), passed+"=1", fmt.Sprintf("LISTEN_FDS=%d", len(files)), "LISTEN_FDNAMES="+strings.Join(names, ":"))
	cmd.ExtraFiles = files
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var got arrival
	text, err := io.ReadAll(bufio.NewReader(out))
	if err := errors.Join(err, cmd.Wait(), json.Unmarshal(text, &got)); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	if want := []string{"web", "holdfast-web", "holdfast.socket"}; !slices.Equal(got.Sockets, want) {
		t.Errorf("sockets %q, want %q", got.Sockets, want)
	}
	if len(got.Stored) != 2 || got.Stored["ledger"] != "new" || got.Stored["listener unix:/a:b"] != "socket" {
		t.Errorf("stored is %q", got.Stored)
	}
	if got.Left != "" {
		t.Errorf("the environment still says %q", got.Left)
	}
}
