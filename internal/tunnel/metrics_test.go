package tunnel_test

import (
	"io"
	"log/slog"
	"strings"
	"testing"

	"holdfast/internal/metrics"
	"holdfast/internal/tunnel"
)

// figures are all values of a registry that are not 0; of histograms, the number of
// values.
func figures(r *metrics.Registry) map[string]int64 {
	all := map[string]int64{}
	for _, f := range r.Families() {
		for _, s := range f.Series {
			v := s.Value
			for _, n := range s.Buckets {
				v += int64(n)
			}
			if v != 0 {
				all[strings.Join(append([]string{strings.TrimPrefix(f.Desc.Name, "holdfast_")}, s.Labels...), " ")] = v
			}
		}
	}
	return all
}

func wantFigures(t *testing.T, r *metrics.Registry, want map[string]int64) {
	t.Helper()
	got := figures(r)
	for name, v := range want {
		if got[name] != v {
			t.Errorf("%s is %d, want %d", name, got[name], v)
		}
	}
	for name, v := range got {
		if _, ok := want[name]; !ok {
			t.Errorf("%s is %d, want 0", name, v)
		}
	}
}

func TestTunnelsAndTheirBytesAreCountedWhileTheyLive(t *testing.T) {
	onAllRelays(t, func(t *testing.T, r relay) {
		counted := metrics.NewRegistry()
		var e ends
		set := r.newSetWith(t, tunnel.Options{OnEnd: e.add, Metrics: counted})
		client, server := open(t, set, tunnel.Spec{UpEarly: []byte("early"), Tag: "the starter's own"})
		if _, err := io.WriteString(client, "to the server"); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, len("to the server"))
		if _, err := io.ReadFull(server, buf); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(client, buf[:len("early")]); err != nil {
			t.Fatal(err)
		}
		// What the receiver has may not have been counted yet.
		eventually(t, "both directions are counted", func() bool {
			got := figures(counted)
			return got["tunnel_relayed_bytes_total upstream"] == int64(len("to the server")) && got["tunnel_relayed_bytes_total downstream"] == int64(len("early"))
		})
		wantFigures(t, counted, map[string]int64{
			"tunnels_started_total": 1, "tunnels_active": 1,
			"tunnel_relayed_bytes_total upstream": int64(len("to the server")), "tunnel_relayed_bytes_total downstream": int64(len("early")),
		})
		server.CloseWrite()
		if _, err := client.Read(buf); err != io.EOF {
			t.Errorf("got %v, want the end", err)
		}
		client.CloseWrite()
		record := wantEnd(t, set, &e, tunnel.UpstreamClosed)
		if record.Tag != "the starter's own" {
			t.Errorf("the tag is %v", record.Tag)
		}
		wantFigures(t, counted, map[string]int64{
			"tunnels_started_total": 1, "tunnels_ended_total upstream closed": 1, "tunnel_duration_seconds": 1,
			"tunnel_relayed_bytes_total upstream": int64(len("to the server")), "tunnel_relayed_bytes_total downstream": int64(len("early")),
		})
	})
}

func TestEveryReasonHasASeriesFromTheStart(t *testing.T) {
	t.Parallel()
	counted := metrics.NewRegistry()
	tunnel.NewSet(tunnel.Options{Log: slog.New(slog.DiscardHandler), Metrics: counted})
	var reasons []string
	for _, f := range counted.Families() {
		if f.Desc.Name != "holdfast_tunnels_ended_total" {
			continue
		}
		for _, s := range f.Series {
			reasons = append(reasons, s.Labels...)
		}
	}
	var want []string
	for r := tunnel.Open + 1; r.String() != "unknown"; r++ {
		want = append(want, r.String())
	}
	if got := strings.Join(reasons, ", "); got != strings.Join(want, ", ") || len(want) < 10 {
		t.Errorf("got %s, want %s", got, strings.Join(want, ", "))
	}
}

// A receiver that does not read holds a buffer, and that is to be seen.
func TestBuffersInUseAreShown(t *testing.T) {
	onAllRelays(t, func(t *testing.T, r relay) {
		counted := metrics.NewRegistry()
		r.loops.pipes = 0
		set := r.newSetWith(t, tunnel.Options{Metrics: counted})
		client, server := open(t, set, tunnel.Spec{})
		filling := make(chan struct{})
		go func() {
			defer close(filling)
			data := make([]byte, 1<<20)
			for {
				if _, err := client.Write(data); err != nil {
					return
				}
			}
		}()
		eventually(t, "a buffer is held", func() bool {
			set.Sample()
			return figures(counted)["tunnel_buffer_bytes"] == int64(r.buffer)
		})
		server.Close()
		client.Close()
		<-filling
		waitEmpty(t, set)
		set.Sample()
		if n := figures(counted)["tunnel_buffer_bytes"]; n != 0 {
			t.Errorf("%d bytes are shown when nothing moves", n)
		}
	})
}
