package systemd

// In-package: the environment of a service is process-wide, so these tests do not
// run in parallel.

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

const limit = 20 * time.Second

func TestMain(m *testing.M) {
	if os.Getenv(passed) != "" {
		sayWhatWasPassed()
		return
	}
	goleak.VerifyTestMain(m)
}

// manager is systemd's end.
type manager struct{ *net.UnixConn }

func listen(t *testing.T) manager {
	t.Helper()
	path := filepath.Join(t.TempDir(), "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: path})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	t.Setenv("NOTIFY_SOCKET", path)
	return manager{conn}
}

func (m manager) next(t *testing.T) string {
	t.Helper()
	m.SetReadDeadline(time.Now().Add(limit))
	var packet [4096]byte
	n, err := m.Read(packet[:])
	if err != nil {
		t.Fatalf("nothing was said: %v", err)
	}
	return string(packet[:n])
}

func newNotifier(t *testing.T, log *slog.Logger) *Notifier {
	t.Helper()
	n := NewNotifier(log)
	t.Cleanup(func() { n.Close(limit) })
	return n
}

func TestWhatSystemdHears(t *testing.T) {
	m := listen(t)
	n := newNotifier(t, slog.New(slog.DiscardHandler))
	for _, c := range []struct {
		say  func()
		want string
	}{
		{n.Ready, "READY=1"},
		{n.Stopping, "STOPPING=1"},
		{func() { n.Alive(0) }, "WATCHDOG=1"},
		{func() { n.Alive(30 * time.Second) }, "WATCHDOG=1\nEXTEND_TIMEOUT_USEC=30000000"},
		{func() { n.Status("generation 1 serving 1,988 tunnels") }, "STATUS=generation 1 serving 1,988 tunnels"},
		{func() { n.Status("refused: a\nREADY=1\x1b[31m\xff") }, "STATUS=refused: a"},
		{func() { n.Status("a\x1b[31m\xff\u0085") }, "STATUS=a?[31m??"},
		{func() { n.Status(strings.Repeat("é", 200)) }, "STATUS=" + strings.Repeat("é", 148) + "…"},
	} {
		c.say()
		if got := m.next(t); got != c.want {
			t.Errorf("systemd hears %q, want %q", got, c.want)
		}
	}
}

// systemd tells by the time whether a READY=1 belongs to this reload.
func TestAReloadHasItsTime(t *testing.T) {
	m := listen(t)
	n := newNotifier(t, slog.New(slog.DiscardHandler))
	before := monotonic().Microseconds()
	n.Reloading()
	var at int64
	if _, err := fmt.Sscanf(m.next(t), "RELOADING=1\nMONOTONIC_USEC=%d", &at); err != nil || at < before || at > monotonic().Microseconds() {
		t.Errorf("%d (%v), want from %d on", at, err, before)
	}
}

func TestAStuckSystemdHoldsUpNobodyAndHearsTheNewest(t *testing.T) {
	m := listen(t)
	n := newNotifier(t, slog.New(slog.DiscardHandler))
	const many = 20_000 // more than any queue of the kernel has
	for i := range many {
		n.Reloading()
		n.Ready()
		n.Alive(0)
		n.Status(fmt.Sprint(i))
	}
	last := fmt.Sprintf("STATUS=%d", many-1)
	state, said := "", 0
	for heard := ""; !strings.Contains(heard, last); said++ {
		heard = m.next(t)
		if strings.Contains(heard, "READY=1") || strings.Contains(heard, "RELOADING=1") {
			state = heard
		}
	}
	if !strings.HasPrefix(state, "READY=1") {
		t.Errorf("the last that systemd heard is %q", state)
	}
	if said >= many {
		t.Errorf("%d messages: nothing was left out", said)
	}
}

func TestAnEndWaitsForAStuckSystemdForAMomentOnly(t *testing.T) {
	m := listen(t)
	n := NewNotifier(slog.New(slog.DiscardHandler))
	fill, err := net.DialUnix("unixgram", nil, m.LocalAddr().(*net.UnixAddr))
	if err != nil {
		t.Fatal(err)
	}
	defer fill.Close()
	fill.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
	for err == nil {
		_, err = fill.Write([]byte("X=1"))
	}
	n.Stopping()
	n.Close(time.Millisecond)
	for m.next(t) != "STOPPING=1" { // so that the goroutine ends
	}
	<-n.done
}

func TestWhatCannotBeSaidIsSaidLater(t *testing.T) {
	m := listen(t)
	path := m.LocalAddr().String()
	if err := errors.Join(m.Close(), os.Remove(path)); err != nil {
		t.Fatal(err)
	}
	log := new(lockedBuffer)
	n := newNotifier(t, slog.New(slog.NewTextHandler(log, nil)))
	n.Ready()
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
	n.Alive(0)
	if got := (manager{again}).next(t); got != "READY=1\nWATCHDOG=1" {
		t.Errorf("systemd hears %q", got)
	}
	if lines := strings.Count(log.String(), "\n"); lines != 1 {
		t.Errorf("the log has %d lines, want one:\n%s", lines, log)
	}
}

func TestWithoutSystemdNothingIsSaid(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "")
	n := NewNotifier(slog.New(slog.DiscardHandler))
	if n != nil {
		t.Error("somebody listens")
	}
	n.Ready()
	n.Reloading()
	n.Stopping()
	n.Alive(time.Second)
	n.Status("x")
	n.Close(0)
}

func TestTheWatchdogsIntervalOutlivesAChangeOfPID(t *testing.T) {
	t.Setenv("WATCHDOG_PID", "1")
	for usec, want := range map[string]time.Duration{"30000000": 30 * time.Second, "": 0, "0": 0, "-1": 0, "soon": 0} {
		t.Setenv("WATCHDOG_USEC", usec)
		if got := WatchdogInterval(); got != want {
			t.Errorf("WATCHDOG_USEC=%s is %s, want %s", usec, got, want)
		}
	}
}

type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}
