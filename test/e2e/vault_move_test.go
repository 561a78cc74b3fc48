package e2e

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"holdfast/internal/drill/canary"
)

// movedEnv says how many tunnels the test has moved, if not as usual: see `make
// soak-vault`.
const movedEnv = "HOLDFAST_SOAK_MOVED"

// startCanary starts the process in which a canary's clients and servers live.
func startCanary(t *testing.T) *canary.Client {
	t.Helper()
	c, err := canary.NewClient(startChild(t, exec.Command(program("plain/holdfast"), "drill-canary"), "canary"))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// With tunnels that move, there are never more than two generations once a reload has
// settled, however many there were before, and nobody notices.
func TestTunnelsAreMovedAtEveryReload(t *testing.T) {
	t.Parallel()
	const reloads, ofEach = 50, 4
	quiet := 1000
	if n, err := strconv.Atoi(os.Getenv(movedEnv)); err == nil {
		quiet = n
	}
	all := quiet + ofEach*canary.Kinds
	needDescriptors(t, 2*all+1000)
	c := startCanary(t)
	config := func(n int) string {
		all := simple(c.Upstream, fmt.Sprintf(`
[reload]
probation = "1ms"
[tunnels]
on_reload = "move"
[process]
proxy = %q
# %d
`, program("plain/holdfast-proxy"), n))
		return strings.Replace(all, `"/ws"`, strconv.Quote(canary.TunnelPath), 1)
	}
	i := newInstance(t, config(0))
	i.program = program("plain/holdfast")
	i.start(nil)
	do := func(cmd canary.Command) *canary.Report {
		t.Helper()
		r, err := c.Do(cmd)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range r.Failures {
			t.Error(f)
		}
		if r.Broken() > 0 {
			t.Fatalf("%+v", r)
		}
		return r
	}
	do(canary.Command{Do: "start", Address: i.address("public"), Tunnels: ofEach, Quiet: quiet})
	eventually(t, func() bool { return do(canary.Command{Do: "report"}).Open >= int64(all)*9/10 }, func() string { return "tunnels" })

	var moving, longest time.Duration
	var pauses canary.Pauses
	for n := range reloads {
		i.reload(config(n + 1))
		began := time.Now()
		i.wait("the tunnels to be where requests are, and two generations at most", func(s *status) bool {
			return s.serving() != nil && s.serving().Tunnels >= quiet && len(s.Generations) <= 2
		})
		took := time.Since(began)
		moving, longest = moving+took, max(longest, took)
		pauses = pauses.Longest(do(canary.Command{Do: "report"}).Pauses)
	}
	i.wait("one generation", func(s *status) bool { return len(s.Generations) == 1 })
	moved := i.mustScrape()["holdfast_tunnels_moved_total{direction=in}"]
	r := do(canary.Command{Do: "end"})
	if moved < float64(reloads*quiet) || r.Bytes == 0 {
		t.Errorf("%v tunnels were moved, want %d at least; %d bytes", moved, reloads*quiet, r.Bytes)
	}
	t.Logf("%d reloads with %d tunnels: %v moved, %v to settle on average, %v at most; %d bytes; longest pauses: connection %v, request %v, tunnel %v",
		reloads, all, moved, (moving / reloads).Round(time.Millisecond), longest.Round(time.Millisecond), r.Bytes, pauses.Connection, pauses.Request, pauses.Tunnel)
}

// A tunnel that is moved by a reload goes on to the byte, and nothing that was said of it
// changes. What it leaves behind has nothing to do any more, and ends.
func TestAReloadMovesTunnels(t *testing.T) { // not parallel: see sailing
	s, voyages := sailing(t, noProbation+"[tunnels]\non_reload = \"move\"\n")
	i := s.service
	before := i.status().Generations[0]
	if code, _, errs := i.holdfast("reload"); code != 0 {
		t.Fatal(errs)
	}
	after := i.wait("one generation with all tunnels", func(s *status) bool {
		return s.states() == "2 serving" && s.Generations[0].Tunnels == len(voyages)
	})
	if g := after.Generations[0]; !g.OldestTunnel.Equal(before.OldestTunnel) {
		t.Errorf("the oldest tunnel is from %v, and was from %v", g.OldestTunnel, before.OldestTunnel)
	}
	i.wantSeries(series{"holdfast_tunnels_moved_total{direction=in}": float64(len(voyages))})
	s.wantArrival(voyages, "access.log")
}

// What a reload does to tunnels whose route is gone is for the configuration to say.
func TestTunnelsWhoseRouteIsGone(t *testing.T) { // not parallel: see sailing
	for _, then := range []string{"keep", "close"} {
		t.Run(then, func(t *testing.T) {
			more := noProbation + "[drain]\nclose_spread = \"0s\"\n[tunnels]\non_reload = \"move\"\non_route_removed = \"" + then + "\"\n"
			s, voyages := sailing(t, more)
			i := s.service
			config, err := os.ReadFile(i.config())
			if err != nil {
				t.Fatal(err)
			}
			i.reload(strings.Replace(string(config), `match = { prefix = "/ws" }`, `match = { prefix = "/elsewhere" }`, 1))
			if then == "keep" {
				i.wait("one generation with all tunnels", func(s *status) bool {
					return s.states() == "2 serving" && s.Generations[0].Tunnels == len(voyages)
				})
				s.wantArrival(voyages, "access.log")
				return
			}
			for _, v := range voyages {
				io.Copy(io.Discard, v.client.r)
				io.Copy(io.Discard, v.server.r)
				v.client.close()
				v.server.close()
			}
			for _, a := range i.wantRecords("access.log", 2*len(voyages))[len(voyages):] {
				if a.Event != "tunnel_close" || a.Reason != "route removed" {
					t.Errorf("%+v", a)
				}
			}
			i.wantStates("2 serving")
		})
	}
}

// What an operator has asked for outlives the supervisor that was asked.
func TestAMoveGoesOnUnderTheNextSupervisor(t *testing.T) {
	t.Parallel()
	for name, next := range map[string]func(*instance){
		"upgraded": func(i *instance) { i.upgrade() },
		"killed": func(i *instance) {
			i.crash()
			i.launch(nil)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := staged(t, func(up string) string { return simple(up, noProbation) })
			i := s.service
			const n = 200
			all := s.tunnels(n)
			config, err := os.ReadFile(i.config())
			if err != nil {
				t.Fatal(err)
			}
			i.reload(string(config))
			i.wantKept(n)
			if code, _, errs := i.holdfast("move", "--generation", "1"); code != 0 {
				t.Fatal(errs)
			}
			next(i)
			i.wait("one generation with all tunnels", func(s *status) bool {
				return s.states() == "2 serving" && s.Generations[0].Tunnels == n
			})
			wantTunnels(all)
		})
	}
}

// A generation that dies while it gives its tunnels away loses none, and none is said to
// be lost.
func TestADeathInAMoveLosesNoTunnel(t *testing.T) {
	t.Parallel()
	s := staged(t, func(up string) string { return simple(up, noProbation) })
	i := s.service
	const n = 100
	all := s.tunnels(n)
	config, err := os.ReadFile(i.config())
	if err != nil {
		t.Fatal(err)
	}
	for range 5 {
		giver := i.wantKept(n).serving().Number
		i.reload(string(config))
		i.wantKept(n)
		p := i.process(giver)
		if code, _, errs := i.holdfast("move", "--generation", strconv.Itoa(giver)); code != 0 {
			t.Fatal(errs)
		}
		if err := errors.Join(p.Signal(syscall.SIGKILL), p.Wait()); err != nil && !errors.Is(err, os.ErrProcessDone) { // it was faster
			t.Fatal(err)
		}
		i.wantKept(n)
		for _, g := range i.status().Generations { // all to the one that serves
			if g.State != "serving" {
				i.holdfast("move", "--wait", "--generation", strconv.Itoa(g.Number))
			}
		}
		i.wait("all tunnels with the one that serves", func(s *status) bool {
			return len(s.Generations) == 1 && s.Generations[0].Tunnels == n
		})
	}
	wantTunnels(all)
	i.wantSeries(series{"holdfast_tunnels_lost_total": 0, "holdfast_tunnels_active": n, "holdfast_tunnels_started_total": n})
}
