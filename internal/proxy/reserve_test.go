package proxy

import (
	"io"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/config"
	"holdfast/internal/stream/streamtest"
)

func TestDescriptorsAreKeptFreeForWhatTheSupervisorSends(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		limit           uint64
		listeners, logs int
		most            int64
	}{
		{20_000, 1, 0, 20_000 - 64 - 2},
		{20_000, 100, 10, 20_000 - 64 - 200 - 20},
		{256, 1, 1, 256 - 64 - 4},
		{100, 1, 1, 50},
		{0, 1, 1, 1<<31 - 1},                // not known
		{1 << 63, 1, 1, 1<<31 - 1 - 64 - 4}, // more than there can be
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

// What was accepted beyond the bound waits until there is room below, and goes there. Who
// stands behind waits, too.
//
// Not parallel: it must know which descriptors are free.
func TestAConnectionBeyondTheBoundMovesBelowIt(t *testing.T) {
	a := acceptOn(t, 2, 0)
	clock := streamtest.NewClock(a.loops...)
	client, second := a.dial(), a.dial()
	fd, below, bound := copyOf(t, a.socket), anyDescriptor(t), anyDescriptor(t)
	unix.Close(bound) // it is the lowest that is free now
	a.l.descriptors = &descriptors{limit: func() uint64 { return uint64(bound) }}
	a.l.descriptors.measure()
	if err := a.l.accept(fd); err != nil {
		t.Fatal(err)
	}
	until(t, "it waits", func() bool { return a.failures() == 1 })
	for range 3 {
		clock.Advance(2 * time.Second)
		a.wantNobody()
	}
	if n := a.failures(); n != 4 {
		t.Errorf("it has tried %d times, want 4", n)
	}
	unix.Close(below)
	clock.Advance(2 * time.Second)
	g := a.next()
	if !a.l.descriptors.allow(g.fd) || g.remote != addrPort(client.LocalAddr()) {
		t.Errorf("the server is given %+v, with a bound of %d", g, bound)
	}
	if _, err := io.WriteString(client, "hello"); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 5)
	until(t, "it is the same connection", func() bool { n, _ := unix.Read(g.fd, got); return n == 5 })
	if n := strings.Count(a.log.String(), "no descriptor is left for connections"); n != 1 {
		t.Errorf("%d lines:\n%s", n, a.log.String())
	}
	a.end(g)
	clock.Advance(2 * time.Second)
	if g := a.next(); g.remote != addrPort(second.LocalAddr()) {
		t.Errorf("the server is given %+v", g)
	}
}

// Who is accepted when accepting ends is served, wherever it is: nobody else will.
//
// Not parallel: it must know which descriptors are free.
func TestAConnectionBeyondTheBoundIsServedAtTheEnd(t *testing.T) {
	for _, empty := range []bool{false, true} {
		a := acceptOn(t, 1, 0)
		client := a.dial()
		fd, bound := copyOf(t, a.socket), anyDescriptor(t)
		unix.Close(bound) // it is the lowest that is free now
		a.l.descriptors = &descriptors{limit: func() uint64 { return uint64(bound) }}
		a.l.descriptors.measure()
		if err := a.l.accept(fd); err != nil {
			t.Fatal(err)
		}
		until(t, "it waits", func() bool { return a.failures() == 1 })
		second := a.dial()
		a.l.stop(empty)
		g := a.next()
		if g.fd != bound || g.remote != addrPort(client.LocalAddr()) {
			t.Errorf("the server is given %+v, want the descriptor %d", g, bound)
		}
		a.end(g)
		if !empty {
			a.wantQueued(second)
			continue
		}
		a.wantNobody()
		if _, err := second.Read(make([]byte, 1)); err == nil {
			t.Error("it is served")
		}
		if !strings.Contains(a.log.String(), "connections in the queue are lost") {
			t.Errorf("the log says\n%s", a.log.String())
		}
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
