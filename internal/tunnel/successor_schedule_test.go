package tunnel_test

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"holdfast/internal/tunnel"
)

// voyage is a schedule of tunnels whose Sets die, and from which they move.
type voyage struct {
	schedule
	choices
	*keeper
	at *guest // where tunnels are started
}

// TestRandomSchedulesOutliveSets is [TestRandomSchedules] with Sets that die at random
// moments and hand tunnels to others: it makes no difference to what the peers see.
func TestRandomSchedulesOutliveSets(t *testing.T) {
	t.Parallel()
	n := 60
	if testing.Short() {
		n = 25
	}
	seeds := []uint64{*seed}
	if *seed == 0 {
		seeds = nil
		for range n {
			seeds = append(seeds, rand.Uint64())
		}
	}
	next := make(chan uint64)
	var workers sync.WaitGroup
	for range 4 {
		workers.Go(func() {
			for seed := range next {
				t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
					runVoyage(t, rand.New(rand.NewPCG(seed, 2)))
					if t.Failed() {
						t.Logf("again with -run '^%s$' -seed %d", t.Name(), seed)
					}
				})
			}
		})
	}
	for _, seed := range seeds {
		next <- seed
	}
	close(next)
	workers.Wait()
}

func runVoyage(t *testing.T, c choices) {
	aborts := abortsForMemory(t)
	v := &voyage{schedule: newSchedule(c, onLoops), choices: c, keeper: newKeeper(t)}
	v.moves = true
	if v.closing > 0 {
		v.closing *= 4
	}
	v.at = v.guest(v.shape())
	saw := make([]struct{ client, server outcome }, len(v.tunnels))
	var players sync.WaitGroup
	for i := range v.tunnels {
		p := &v.tunnels[i]
		p.down.plain, p.up.plain = false, false
		p.down.early, p.up.early = min(p.down.early, 64<<10), min(p.up.early, 64<<10)
		client, server := v.start(t, p, i)
		players.Go(func() { saw[i].client = p.down.play(client) })
		players.Go(func() { saw[i].server = p.up.play(server) })
		v.happen()
	}
	for range 2 + c.IntN(6) {
		v.happen()
	}
	if v.closing > 0 {
		v.each(func(s *tunnel.Set) { s.CloseAll(tunnel.Operator, 0) })
	}
	for range c.IntN(4) {
		v.happen()
	}
	players.Wait()
	for _, g := range v.living() {
		waitEmpty(t, g.set)
	}
	eventually(t, "all reports are written", func() bool { return len(v.records()) >= len(v.tunnels) })
	var mistakes []string
	all := v.records()
	for _, record := range all {
		i := record.Tag.(int)
		m := model{schedule: &v.schedule, pair: &v.tunnels[i], client: saw[i].client, server: saw[i].server, record: record}
		mistakes = append(mistakes, m.check()...)
	}
	if mistakes != nil && abortsForMemory(t) != aborts {
		t.Skip("the kernel has run out of memory for TCP and cut connections")
	}
	for _, m := range mistakes {
		t.Error(m)
	}
	if len(all) != len(v.tunnels) {
		t.Errorf("%d tunnels were reported, want %d", len(all), len(v.tunnels))
	}
}

// shape is that of the loops of any Set: each has room for all.
func (v *voyage) shape() shape {
	return shape{loops: 1 + v.IntN(2), tunnels: 8, buffers: 3 + v.IntN(6), pipes: v.IntN(3)}
}

func (v *voyage) start(t *testing.T, p *pair, i int) (client, server tcpConn) {
	client, down := tcpPair(t, p.down.small)
	server, up := tcpPair(t, p.up.small)
	v.at.set.Start(tunnel.Spec{
		Down: down, Up: up, Origin: lasting(v.limits), Tag: i,
		Head: pattern(0, p.up.head), DownEarly: pattern(0, p.down.early), UpEarly: pattern(p.up.head, p.up.early-p.up.head),
	})
	for _, l := range v.at.loops { // it is on one of them now
		freeze(l)()
	}
	return client, server
}

func (v *voyage) living() (all []*guest) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, g := range v.guests {
		if !g.dead {
			all = append(all, g)
		}
	}
	return all
}

func (v *voyage) each(do func(*tunnel.Set)) {
	for _, g := range v.living() {
		do(g.set)
	}
}

// happen has something happen to the Sets.
func (v *voyage) happen() {
	time.Sleep(time.Duration(v.IntN(8)) * time.Millisecond)
	living := v.living()
	g := living[v.IntN(len(living))]
	switch v.IntN(6) {
	case 0, 1:
		v.crash(g, v.IntN(3))
	case 2, 3:
		v.reload()
	case 4:
		g.set.Deposit(v.IntN(1000)) // another keeper
	case 5:
		g.saying(v.busy())
	}
}

// busy returns a mood of a vault that sometimes has no room.
func (v *voyage) busy() func(string) error {
	every, n := 2+v.IntN(4), 0
	return func(string) error {
		if n++; n%every == 0 {
			return tunnel.ErrVaultBusy
		}
		return nil
	}
}

// crash has a Set die and another one go on, and as often as said that one as well, at
// whatever it does then.
func (v *voyage) crash(g *guest, again int) {
	if g == v.at {
		v.replace()
	}
	g.waitDeposited()
	// A report may be lost between a withdrawal and its being written.
	call, after := []string{"release", "taken", "declined", "withdraw"}[v.IntN(4)], v.IntN(2) == 0
	if v.IntN(2) == 0 || !g.dieIn(call, after && call != "withdraw", time.Duration(v.IntN(5))*time.Millisecond) {
		g.die()
	}
	for range again {
		g = g.resume(true)
		if v.IntN(2) == 0 {
			time.Sleep(time.Duration(v.IntN(1000)) * time.Microsecond)
		}
		g.die()
	}
	r := g.resume(true)
	if v.IntN(2) == 0 {
		r.set.Move(true)
	}
}

// reload has a new Set take tunnels, to which all others release theirs.
func (v *voyage) reload() {
	old := v.at
	v.replace()
	old.set.Move(true)
}

func (v *voyage) replace() {
	g := v.guest(v.shape())
	v.mu.Lock()
	defer v.mu.Unlock()
	v.at, v.takes = g, g
}

// waitDeposited waits until nothing would be lost if the Set died.
func (g *guest) waitDeposited() {
	eventually(g.t, "all is deposited", func() bool {
		n, _ := g.set.Summary()
		return figures(g.counts)["tunnels_deposited"] == int64(n)
	})
}
