package proxy

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"holdfast/internal/accesslog"
	"holdfast/internal/accesslog/flags"
	"holdfast/internal/accesslog/format"
	"holdfast/internal/control"
	"holdfast/internal/tunnel"
	"holdfast/internal/tunnel/inflight"
	"holdfast/internal/upstream"
)

// opened is the tag of a tunnel with a target of so many bytes.
func opened(t testing.TB, target int) *accesslog.Tunnel {
	t.Helper()
	r := &accesslog.Record{RequestID: "id", Target: strings.Repeat("x", target), Status: 101}
	if target > 1000 { // everything that it shows is long
		r.Authority, r.Route, r.Endpoint = r.Target, r.Target, r.Target
		r.Method, r.Listener, r.VirtualHost, r.Cluster, r.RequestID = r.Target, r.Target, r.Target, r.Target, r.Target
	}
	if target > 5000 {
		r.Client = netip.AddrPortFrom(netip.MustParseAddr("fe80::1").WithZone(r.Target), 1)
	}
	custom, err := format.Text("%REQ(X-A)% %RESP(X-B)%")
	if err != nil {
		t.Fatal(err)
	}
	l := accesslog.New([]accesslog.Output{{Path: "a", File: discard(t), Custom: custom}}, 1, nil)
	defer l.Close(time.Second)
	fields := []accesslog.Value{{Text: r.Target, Present: true}}
	r.RequestFields, r.ResponseFields, r.Flags = fields, fields, flags.Known
	return l.TunnelOpened(r)
}

// whole is a provenance in which everything is set.
func whole() provenance {
	return provenance{
		listener: "public", virtualHost: "chat", route: "chat:prefix=/socket", cluster: "web", endpoint: "app.internal:9000",
		address: netip.MustParseAddrPort("[2001:db8::1]:9000"),
		limits: tunnel.Limits{
			IdleTimeout: time.Hour, MaxAge: 1<<63 - 1, DrainTimeout: time.Minute, Buffer: 64 << 20,
			KeepAlive: tunnel.KeepAlive{Idle: time.Second, Interval: 2 * time.Second, Count: 127},
		},
		surviveCrash: true, move: true, closeRemoved: true, endpointPolicy: endpointPolicy{closeLeft: true, closeUnhealthy: true},
	}
}

func deposit(p provenance, tag any) *tunnel.Deposit {
	return &tunnel.Deposit{
		Record: tunnel.Record{
			Origin: newOrigin(&p, routeTunnels{}, upstream.TunnelMetrics{}),
			Number: 7, ID: "an id", Client: netip.MustParseAddrPort("192.0.2.1:40000"), Tag: tag, Started: time.Unix(1_800_000_000, 123_456_789),
		},
		Place: tunnel.Place{Loop: 65535, Slot: 1<<32 - 1, Taken: [2]uint64{1, 1 << 63}, Given: [2]uint64{3, 4}, Moved: [2]uint64{5, 6}},
	}
}

func TestARecordIsReadAsItWasWritten(t *testing.T) {
	t.Parallel()
	moved, closes := whole(), whole()
	moved.surviveCrash, moved.closeRemoved, moved.closeLeft = false, false, false
	closes.surviveCrash, closes.move, closes.closeUnhealthy = false, false, false
	for _, p := range []provenance{whole(), moved, closes, {}} {
		for _, tag := range []*accesslog.Tunnel{nil, opened(t, 10)} {
			d := deposit(p, tag)
			if tag == nil {
				d.Tag = nil
			}
			data := appendRecord([]byte("before"), d)[len("before"):]
			r, err := parseRecord(data)
			if err != nil {
				t.Fatal(err)
			}
			want := &record{p, d.ID, d.Client, d.Started, d.Place, tag}
			if !reflect.DeepEqual(r, want) {
				t.Errorf("\n got %+v\nwant %+v", r, want)
			}
			clear(data) // it keeps nothing of that
			if !reflect.DeepEqual(r, want) {
				t.Error("it has changed with the data")
			}
			for n := range data {
				if r, err := parseRecord(appendRecord(nil, d)[:n]); err == nil && (tag != nil && r.tag != nil || tag == nil) {
					t.Fatalf("%d of %d bytes are a record", n, len(data))
				}
			}
		}
	}
}

// Whatever the configuration and the client choose, a record is not longer than may be.
// What is given up first is that the end is recorded; never who the tunnel is.
func TestARecordIsNeverTooLong(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("y", 5000)
	for _, tt := range []struct {
		name, id string
		target   int
		keeps    bool
	}{
		{"chat", "id", 10, true},
		{"chat", "id", 1000, true},
		{"chat", long, 1000, true},
		{long, long, 1000, true},
		{long, long, 5000, true},
		{long, long, 5001, false}, // no interface has such a name
	} {
		p := whole()
		p.listener, p.virtualHost, p.route, p.cluster, p.endpoint = tt.name, tt.name, tt.name, tt.name, tt.name
		d := deposit(p, opened(t, tt.target))
		d.ID = tt.id
		data := appendRecord(nil, d)
		if len(data) > control.MaxVaultRecord {
			t.Errorf("%d bytes", len(data))
		}
		r, err := parseRecord(data)
		if err != nil {
			t.Fatal(err)
		}
		if (r.tag != nil) != tt.keeps {
			t.Errorf("of %d bytes: its end is recorded: %t", len(data), r.tag != nil)
		}
		if r.route != brief(tt.name) || r.started != d.Started || r.place != d.Place {
			t.Errorf("got %+v", r)
		}
	}
}

func TestALongNameTravelsAsOneOfItsOwn(t *testing.T) {
	t.Parallel()
	a, b := strings.Repeat("x", 4000)+"a", strings.Repeat("x", 4000)+"b"
	if brief(a) == brief(b) || len(brief(a)) != mostName || brief(a) != brief(strings.Clone(a)) || brief(brief(a)) != brief(a) {
		t.Errorf("%q\n%q", brief(a), brief(b))
	}
	if short := a[:mostName]; brief(short) != short {
		t.Error("a name that fits was changed")
	}
}

func standings() []tunnel.Standing {
	full := bytes.Repeat([]byte("z"), inflight.BufferSize)
	return []tunnel.Standing{
		{},
		{Idle: time.Hour, Moved: [2]uint64{1<<64 - 1, 2}, FinSent: [2]bool{true, false}, Ended: [2]bool{false, true}, ClosedFirst: tunnel.UpstreamClosed},
		{Held: [2][]byte{full, full}, FinSent: [2]bool{false, true}, Ended: [2]bool{true, false}, ClosedFirst: tunnel.DownstreamClosed},
		{Held: [2][]byte{nil, []byte("x")}, Pipe: [2]int{11, 0}, Piped: [2]int{largestPipe, 0}},
		{Held: [2][]byte{[]byte("x"), nil}, Pipe: [2]int{0, 12}, Piped: [2]int{0, 1}},
		{Pipe: [2]int{11, 12}, Piped: [2]int{3, 4}},
	}
}

func TestAStateIsReadAsItWasWritten(t *testing.T) {
	t.Parallel()
	for i, want := range standings() {
		data, files := appendState(nil, &want)
		if len(data) > control.MaxVaultState {
			t.Errorf("%d: %d bytes", i, len(data))
		}
		got, err := parseState(data, files)
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%d: %v\n got %.300v\nwant %.300v", i, err, got, want)
		}
		if _, err := parseState(data, append(slices.Clone(files), 13)); err == nil {
			t.Errorf("%d: with a pipe too many it is a state", i)
		}
		if len(files) > 0 {
			if _, err := parseState(data, files[1:]); err == nil {
				t.Errorf("%d: without a pipe it is a state", i)
			}
		}
		for n := range min(len(data), 100) {
			if _, err := parseState(data[:n], files); err == nil {
				t.Fatalf("%d: %d of %d bytes are a state", i, n, len(data))
			}
		}
	}
}

func TestAStateThatCannotBeIsRefused(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*tunnel.Standing){
		"more in a buffer than one has": func(s *tunnel.Standing) { s.Held[0] = make([]byte, inflight.BufferSize+1) },
		"more in a pipe than one has":   func(s *tunnel.Standing) { s.Pipe[1], s.Piped[1] = 11, largestPipe+1 },
		"nothing in a pipe":             func(s *tunnel.Standing) { s.Pipe[1] = 11 },
		"another reason":                func(s *tunnel.Standing) { s.ClosedFirst = tunnel.Operator },
	} {
		s := tunnel.Standing{Idle: time.Second}
		change(&s)
		data, files := appendState(nil, &s)
		if _, err := parseState(data, files); err == nil {
			t.Errorf("%s: it was read", name)
		}
	}
	data, _ := appendState(nil, new(tunnel.Standing))
	for name, at := range map[string]int{"another version": 0, "flags that nobody knows": 1} {
		other := slices.Clone(data)
		other[at] |= 0x80
		if _, err := parseState(other, nil); err == nil {
			t.Errorf("%s: it was read", name)
		}
	}
	if _, err := parseState(append(data, 0), nil); err == nil {
		t.Error("with a byte behind it: it was read")
	}
}

func TestARecordOfAnotherVersionIsNotRead(t *testing.T) {
	t.Parallel()
	for at := range 2 {
		data := appendRecord(nil, deposit(whole(), nil))
		data[at] |= 0x80
		if _, err := parseRecord(data); err == nil {
			t.Errorf("with another byte %d it was read", at)
		}
	}
}

// FuzzVaultRecord: whatever comes is refused, or is a record like those that are written.
func FuzzVaultRecord(f *testing.F) {
	f.Add(appendRecord(nil, deposit(whole(), nil)))
	f.Add(appendRecord(nil, deposit(whole(), opened(f, 10))))
	f.Add([]byte{recordVersion})
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := parseRecord(data)
		if err != nil {
			return
		}
		l := &r.limits
		if min(l.IdleTimeout, l.MaxAge, l.DrainTimeout, l.KeepAlive.Idle, l.KeepAlive.Interval) < 0 || l.Buffer < 0 || l.KeepAlive.Count < 0 {
			t.Errorf("limits are %+v", l)
		}
		d := deposit(r.provenance, nil)
		d.ID, d.Client, d.Started, d.Place = r.id, r.client, r.started, r.place
		if r.tag != nil {
			d.Tag = r.tag
		}
		again, err := parseRecord(appendRecord(nil, d))
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range []*string{&r.id, &r.listener, &r.virtualHost, &r.route, &r.cluster, &r.endpoint} {
			*s = brief(*s)
		}
		if again.tag == nil {
			r.tag = nil // too long
		}
		if !reflect.DeepEqual(r, again) {
			t.Errorf("%+v\nbecame %+v", r, again)
		}
	})
}

// FuzzVaultState is the same for states.
func FuzzVaultState(f *testing.F) {
	for _, s := range standings() {
		data, files := appendState(nil, &s)
		f.Add(data[:min(len(data), 1000)], len(files))
	}
	f.Fuzz(func(t *testing.T, data []byte, files int) {
		fds := make([]int, min(max(files, 0), 2))
		for i := range fds {
			fds[i] = 11 + i
		}
		s, err := parseState(data, fds)
		if err != nil {
			return
		}
		if len(s.Held[0]) > inflight.BufferSize || len(s.Held[1]) > inflight.BufferSize || s.Idle < 0 {
			t.Errorf("got %.300v", s)
		}
		again, theirs := appendState(nil, &s)
		same, err := parseState(again, theirs)
		if err != nil || !reflect.DeepEqual(s, same) || !slices.Equal(fds, theirs) && len(fds)+len(theirs) > 0 {
			t.Errorf("%.300v with %v\nbecame %.300v with %v, %v", s, fds, same, theirs, err)
		}
	})
}

// What a record costs the loop that makes it.
func BenchmarkRecord(b *testing.B) {
	d := deposit(whole(), opened(b, 100))
	buffer := make([]byte, 0, control.MaxVaultRecord)
	b.Run("make", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			appendRecord(buffer, d)
		}
	})
	data := appendRecord(nil, d)
	b.Run(fmt.Sprintf("read %d bytes", len(data)), func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := parseRecord(data); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// discard is a file that keeps nothing.
func discard(t testing.TB) *os.File {
	t.Helper()
	f, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	return f
}
