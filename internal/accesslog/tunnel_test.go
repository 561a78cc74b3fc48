package accesslog_test

import (
	"bytes"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"holdfast/internal/accesslog"
	"holdfast/internal/accesslog/flags"
)

// passedOn is the tunnel as another process gets it.
func passedOn(t testing.TB, tunnel *accesslog.Tunnel) *accesslog.Tunnel {
	t.Helper()
	data, err := tunnel.AppendBinary(nil)
	if err != nil {
		t.Fatal(err)
	}
	again := new(accesslog.Tunnel)
	if err := again.UnmarshalBinary(data); err != nil {
		t.Fatal(err)
	}
	clear(data) // it keeps nothing of that
	return again
}

// awkward are records with strings of all kinds, also those that do not fit.
func awkward() []*accesslog.Record {
	records := []*accesslog.Record{upgrade(), {}}
	for _, c := range []string{"x", `"`, " ", "\x00", "\xff", "é", "\U0001f600"} {
		for _, n := range []int{1, 31, 127, 128, 129, 1 << 13} {
			r := everywhere(strings.Repeat(c, n))
			r.Status, r.Upstream = 1<<31, 1<<63-1
			records = append(records, r)
		}
	}
	return records
}

// A tunnel that ends in another process is recorded as it would have been here, in
// the formats of the log that is there.
func TestATunnelMayEndInAnotherLog(t *testing.T) {
	t.Parallel()
	for _, format := range formats {
		for _, r := range awkward() {
			var tunnel *accesslog.Tunnel
			here := written(t, format, func(l *accesslog.Log) {
				tunnel = l.TunnelOpened(r)
				l.TunnelClosed(tunnel, end())
			})
			for _, other := range formats {
				var elsewhere *accesslog.Tunnel
				written(t, other, func(l *accesslog.Log) { elsewhere = passedOn(t, l.TunnelOpened(r)) })
				there := written(t, format, func(l *accesslog.Log) { l.TunnelClosed(elsewhere, end()) })
				if len(there) != 1 || there[0] != here[1] {
					t.Errorf("opened in %s, closed in %s\n got %q\nwant %q", other, format, there, here[1])
				}
			}
		}
	}
}

// What a tunnel's two records have in common is the same in both, to the byte.
func TestTheEndOfATunnelSaysOfItsOpeningWhatThatHasSaid(t *testing.T) {
	t.Parallel()
	for _, r := range awkward() {
		lines := written(t, "json", func(l *accesslog.Log) { l.TunnelClosed(l.TunnelOpened(r), end()) })
		common := func(line string) string {
			from, to := strings.Index(line, `,"status":`), strings.Index(line, `,"user_agent":`)
			if to < 0 {
				to = len(line) - 1
			}
			return line[from:to]
		}
		if common(lines[0]) != common(lines[1]) {
			t.Errorf("opened %s\nclosed %s", lines[0], lines[1])
		}
	}
}

func TestATunnelOfAnotherGenerationEndsInThisOne(t *testing.T) {
	t.Parallel()
	var tunnel *accesslog.Tunnel
	written(t, "text", func(l *accesslog.Log) { tunnel = passedOn(t, l.TunnelOpened(upgrade())) })
	path := filepath.Join(t.TempDir(), "log")
	l := accesslog.New([]accesslog.Output{{Path: path, Format: "json", File: appending(t, path)}}, 8, nil)
	l.TunnelClosed(tunnel, end())
	l.Close(20 * time.Second)
	if lines := linesOf(t, path); len(lines) != 1 || !strings.Contains(lines[0], `"generation":8,"request_id":"9f2c"`) {
		t.Errorf("got %q", lines)
	}
}

func TestATunnelIsSmallWhatever(t *testing.T) {
	t.Parallel()
	const most = 3000
	for _, r := range awkward() {
		written(t, "text", func(l *accesslog.Log) {
			data, err := l.TunnelOpened(r).AppendBinary(nil)
			if err != nil || len(data) > most {
				t.Errorf("%d bytes, %v", len(data), err)
			}
		})
	}
}

func TestAPartOfATunnelIsNone(t *testing.T) {
	t.Parallel()
	data, err := discarding(t).TunnelOpened(upgrade()).AppendBinary(nil)
	if err != nil {
		t.Fatal(err)
	}
	for n := range data {
		if new(accesslog.Tunnel).UnmarshalBinary(data[:n]) == nil {
			t.Errorf("%d of %d bytes are one", n, len(data))
		}
	}
	if new(accesslog.Tunnel).UnmarshalBinary(append(data, 0)) == nil {
		t.Error("with a byte behind it, it is one")
	}
}

func TestWhatNobodyHasOpenedIsNotRecorded(t *testing.T) {
	t.Parallel()
	lines := written(t, "text", func(l *accesslog.Log) {
		l.TunnelClosed(new(accesslog.Tunnel), end())
		l.TunnelClosed(nil, end())
	})
	if len(lines) > 0 {
		t.Errorf("got %q", lines)
	}
}

// FuzzTunnel: whatever another process says is refused, or is the opening of a tunnel
// like any other.
func FuzzTunnel(f *testing.F) {
	l := discarding(f)
	for _, r := range awkward() {
		data, err := l.TunnelOpened(r).AppendBinary(nil)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	named, _ := output(f, accesslog.Output{Custom: textFormat(f, "%REQ(X-A)% %REQ(X-LONG)% %RESP(Content-Type)%")})
	defer named.Close(time.Second)
	r := sent.fill(named, upgrade())
	r.Flags = flags.DelayInjected
	data, _ := named.TunnelOpened(r).AppendBinary(nil)
	f.Add(data)
	f.Add([]byte(nil))
	f.Add(bytes.Repeat([]byte{0xff}, 40))
	f.Fuzz(func(t *testing.T, data []byte) {
		tunnel := new(accesslog.Tunnel)
		if tunnel.UnmarshalBinary(data) != nil {
			return
		}
		again, err := passedOn(t, tunnel).AppendBinary(nil)
		first, _ := tunnel.AppendBinary(nil)
		if err != nil || !slices.Equal(again, first) {
			t.Errorf("%x\nbecame %x, %v", first, again, err)
		}
		for _, format := range formats {
			line := accesslog.EndOf(format, tunnel, end())
			if len(line) > 4096 || strings.Count(line, "\n") != 1 {
				t.Fatalf("the line is %q", line)
			}
			checkLine(t, format, strings.TrimSuffix(line, "\n"))
		}
	})
}
