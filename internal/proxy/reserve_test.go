package proxy

import (
	"io"
	"log/slog"
	"net"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/config"
	"holdfast/internal/metrics"
)

func TestDescriptorsAreKeptFreeForWhatTheSupervisorSends(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		limit           uint64
		listeners, logs int
		most            int64
	}{
		{20_000, 1, 0, 20_000 - 64 - 3},
		{20_000, 100, 10, 20_000 - 64 - 300 - 20},
		{256, 1, 1, 256 - 64 - 5},
		{100, 1, 1, 50},
		{0, 1, 1, 1<<31 - 1},                // not known
		{1 << 63, 1, 1, 1<<31 - 1 - 64 - 5}, // more than there can be
	} {
		cfg := new(config.Config)
		cfg.Listeners, cfg.AccessLogs = make([]config.Socket, tt.listeners), make([]config.AccessLog, tt.logs)
		d := newDescriptors(cfg)
		d.limit = func() uint64 { return tt.limit }
		if most := d.measure(); most != tt.most {
			t.Errorf("of %d descriptors, with %d listeners and %d access logs, connections have those below %d, want %d",
				tt.limit, tt.listeners, tt.logs, most, tt.most)
		}
	}
}

// Each client counts as two: it may want a connection to an endpoint.
func TestAClientIsLetInWhereItCanBeServed(t *testing.T) {
	t.Parallel()
	limit := uint64(200)
	d := &descriptors{limit: func() uint64 { return limit }, reserve: 100}
	d.measure()
	d.own.Store(20)
	admit := func() (n int) {
		for n < 1000 && d.room() {
			d.count(1)
			n++
		}
		return n
	}
	if n := admit(); n != 40 {
		t.Errorf("%d clients are let in, want 40", n)
	}
	d.count(-3)
	if n := admit(); n != 3 {
		t.Errorf("3 have gone, %d are let in", n)
	}
	if d.allow(100) || !d.allow(99) {
		t.Error("descriptor 100 is kept free, and 99 is not")
	}
	limit = 210 // prlimit(1)
	if n := admit(); n != 5 || !d.allow(109) || d.allow(110) {
		t.Errorf("there are ten more, and %d clients are let in", n)
	}
	var always *descriptors
	if always.count(1); !always.room() || !always.allow(1<<20) {
		t.Error("without a bound something is refused")
	}
}

// What was accepted beyond the bound waits until there is room below, and goes there.
//
// Not parallel: it must know which descriptors are free.
func TestAConnectionBeyondTheBoundMovesBelowIt(t *testing.T) {
	var below [2]int // the standard library needs a second one for a moment
	for i := range below {
		below[i] = anyDescriptor(t)
	}
	server, client := connected(t)
	defer client.Close()
	var at int
	raw, err := server.(*net.TCPConn).SyscallConn()
	if err == nil {
		err = raw.Control(func(fd uintptr) { at = int(fd) })
	}
	if err != nil {
		t.Fatal(err)
	}
	for fd := 0; fd <= at; { // takes what else is free below
		fd = anyDescriptor(t)
		defer unix.Close(fd)
	}
	var log strings.Builder
	registry := metrics.NewRegistry()
	l := newListener(config.Listener{Name: "public"}, "public", nil, slog.New(slog.NewTextHandler(&log, nil)), registry, func() {})
	l.descriptors = &descriptors{limit: func() uint64 { return uint64(at) }}
	l.descriptors.measure()

	stopped, settled := make(chan struct{}), make(chan net.Conn, 1)
	go func() { settled <- l.settle(server, stopped) }()
	failures := registry.Counter(acceptFailures, "public")
	for begin := time.Now(); failures.Value() < 2; time.Sleep(time.Millisecond) {
		if time.Since(begin) > 20*time.Second {
			t.Fatal("it does not wait")
		}
	}
	for _, fd := range below {
		unix.Close(fd)
	}
	var conn net.Conn
	select {
	case conn = <-settled:
	case <-time.After(20 * time.Second):
		t.Fatal("it waits although there is room")
	}
	defer conn.Close()
	if !l.descriptors.allowConn(conn) {
		t.Error("it has a descriptor that it may not have")
	}
	if _, err := io.WriteString(client, "hello"); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 5)
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := io.ReadFull(conn, got); err != nil || string(got) != "hello" {
		t.Errorf("it reads %q, %v", got, err)
	}
	if n := strings.Count(log.String(), "no descriptor is left for connections"); n != 1 {
		t.Errorf("%d lines:\n%s", n, log.String())
	}
}

// Who is accepted when accepting ends is served, wherever it is: nobody else will.
func TestAConnectionBeyondTheBoundIsServedAtTheEnd(t *testing.T) {
	t.Parallel()
	server, client := connected(t)
	defer client.Close()
	l := newListener(config.Listener{Name: "public"}, "public", nil, slog.New(slog.DiscardHandler), nil, func() {})
	l.descriptors = &descriptors{limit: func() uint64 { return 2 }}
	l.descriptors.measure()
	stopped := make(chan struct{})
	close(stopped)
	conn := l.settle(server, stopped)
	defer conn.Close()
	if conn != server {
		t.Error("it is another connection")
	}
}

// anyDescriptor returns the lowest that is free.
func anyDescriptor(t *testing.T) int {
	t.Helper()
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	return fd
}

// connected returns the two ends of a TCP connection.
func connected(t *testing.T) (server, client net.Conn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if client, err = net.Dial("tcp", ln.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if server, err = ln.Accept(); err != nil {
		client.Close()
		t.Fatal(err)
	}
	return server, client
}
