package tunnel_test

import (
	"fmt"
	"math"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"holdfast/internal/tunnel"
)

// verdicts say of endpoints why their tunnels are to be closed.
type verdicts struct {
	mu  sync.Mutex
	are map[string]tunnel.Reason
}

func (v *verdicts) of(o *tunnel.Origin) tunnel.Reason {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.are[o.Endpoint]
}

func (v *verdicts) say(endpoint string, r tunnel.Reason) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.are == nil {
		v.are = make(map[string]tunnel.Reason)
	}
	v.are[endpoint] = r
}

func TestTunnelsOfAnOriginAreClosedByItsVerdictAndNoOthers(t *testing.T) {
	onAllRelays(t, func(t *testing.T, r relay) {
		const over, n = 600 * time.Millisecond, 8
		var v verdicts
		var e ends
		set := r.newSetWith(t, tunnel.Options{OnEnd: e.add, Verdict: tunnel.Verdict{Of: v.of, Over: over}})
		bad, good := &tunnel.Origin{Endpoint: "bad"}, &tunnel.Origin{Endpoint: "good"}
		other, otherServer := open(t, set, tunnel.Spec{Origin: good})
		for range n {
			client, server := open(t, set, tunnel.Spec{Origin: bad})
			yield(t, client, server)
		}
		begin := time.Now()
		v.say("bad", tunnel.EndpointRemoved)
		set.Reconsider()
		eventually(t, "the tunnels of the bad one have ended", func() bool { return len(e.all()) == n })
		var last time.Duration
		for _, record := range e.all() {
			if record.Endpoint != "bad" || record.Reason != tunnel.EndpointRemoved {
				t.Errorf("one of %q ended: %q", record.Endpoint, record.Reason)
			}
			last = max(last, record.Ended.Sub(begin))
		}
		if last < over/2 {
			t.Errorf("the last one ended after %v, want it to be in the last part of %v", last, over)
		}

		// One that comes later has a part in it.
		client, server := open(t, set, tunnel.Spec{Origin: &tunnel.Origin{Endpoint: "bad"}})
		yield(t, client, server)
		eventually(t, "the one that has come later has ended", func() bool { return len(e.all()) == n+1 })
		write(t, other, []byte("still here"))
		wantBytes(t, otherServer, "still here")
	})
}

func TestAVerdictThatIsTakenBackSparesTheTunnelsThatAreLeft(t *testing.T) {
	onAllRelays(t, func(t *testing.T, r relay) {
		var v verdicts
		var e ends
		set := r.newSetWith(t, tunnel.Options{OnEnd: e.add, Verdict: tunnel.Verdict{Of: v.of, Over: 2 * time.Second}})
		bad := &tunnel.Origin{Endpoint: "bad"}
		const n = 16
		for range n {
			client, server := open(t, set, tunnel.Spec{Origin: bad})
			yield(t, client, server)
		}
		v.say("bad", tunnel.EndpointUnhealthy)
		set.Reconsider()
		eventually(t, "one has ended", func() bool { return len(e.all()) > 0 })
		v.say("bad", tunnel.Open)
		set.Reconsider()
		set.List() // which comes behind it
		ended := len(e.all())
		clock, clockServer := open(t, set, tunnel.Spec{Origin: limited(tunnel.Limits{MaxAge: 2500 * time.Millisecond})})
		yield(t, clock, clockServer)
		eventually(t, "all would have ended", func() bool {
			for _, r := range e.all() {
				if r.Reason == tunnel.MaxAge {
					return true
				}
			}
			return false
		})
		// What was about to end at that moment may have.
		if now := len(e.all()) - 1; now > ended+2 || now >= n-2 && ended < n-4 {
			t.Errorf("%d tunnels ended after the endpoint was well again, of %d", now-ended, n-ended)
		}
	})
}

func TestOnAFakeClockClosesByAVerdictAreEvenAndOnlyTheOriginsOwn(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const endpoints, each, over = 10, 500, time.Minute
		var v verdicts
		var e ends
		set := tunnel.NewSet(tunnel.Options{OnEnd: e.add, Verdict: tunnel.Verdict{Of: v.of, Over: over}})
		var conns []memConn
		name := func(i int) string { return fmt.Sprint("endpoint ", i) }
		begin := func(i int) {
			client, server := memOpen(set, tunnel.Spec{Origin: &tunnel.Origin{Endpoint: name(i)}})
			polite(client, server)
			conns = append(conns, client, server)
		}
		for i := range endpoints {
			for range each {
				begin(i)
			}
		}
		seen := 0
		for i := range endpoints { // one after the other is replaced
			v.say(name(i), tunnel.EndpointRemoved)
			at := time.Now()
			set.Reconsider()
			time.Sleep(over + 10*time.Second)
			synctest.Wait()
			gone := e.all()[seen:]
			seen += len(gone)
			if len(gone) != each {
				t.Fatalf("%d tunnels ended when %s left, want %d", len(gone), name(i), each)
			}
			var tenths [10]int
			for _, r := range gone {
				if r.Endpoint != name(i) || r.Reason != tunnel.EndpointRemoved {
					t.Fatalf("a tunnel of %q ended when %s left: %s", r.Endpoint, name(i), r.Reason)
				}
				tenths[min(int(r.Ended.Sub(at)*10/over), 9)]++
			}
			for tenth, n := range tenths {
				if math.Abs(float64(n)-each/10) > each/20 {
					t.Errorf("%d of %d tunnels of %s ended in the part %d of 10 of the time", n, each, name(i), tenth)
				}
			}
			v.say(name(i), tunnel.Open) // it is back, with new tunnels
			set.Reconsider()
			for range each / 10 {
				begin(i)
			}
		}
		set.CloseAll(tunnel.Operator, 0)
		<-set.Empty()
		for _, c := range conns {
			c.Close()
		}
	})
}

func TestOnAFakeClockWhatIsForGoodIsNotTakenBackWithAVerdict(t *testing.T) {
	t.Parallel()
	for _, first := range []string{"verdict", "operator"} {
		t.Run(first+" first", func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var v verdicts
				var e ends
				set := tunnel.NewSet(tunnel.Options{OnEnd: e.add, Verdict: tunnel.Verdict{Of: v.of, Over: time.Minute}})
				const n = 20
				for range n {
					client, server := memOpen(set, tunnel.Spec{Origin: &tunnel.Origin{Endpoint: "e"}})
					polite(client, server)
					defer client.Close()
					defer server.Close()
				}
				judge := func() { v.say("e", tunnel.EndpointUnhealthy); set.Reconsider() }
				closeAll := func() { set.CloseAll(tunnel.Operator, 3*time.Minute) }
				if first == "verdict" {
					judge()
					closeAll()
				} else {
					closeAll()
					judge()
				}
				v.say("e", tunnel.Open)
				set.Reconsider()
				time.Sleep(4 * time.Minute)
				synctest.Wait()
				if len(e.all()) != n {
					t.Fatalf("%d of %d tunnels were closed", len(e.all()), n)
				}
				for _, r := range e.all() {
					if r.Reason != tunnel.Operator {
						t.Errorf("one ended with %q", r.Reason)
					}
				}
			})
		})
	}
}

func TestOnAFakeClockAnotherVerdictChangesTheReasonAndNotTheTurn(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var v verdicts
		var e ends
		set := tunnel.NewSet(tunnel.Options{OnEnd: e.add, Verdict: tunnel.Verdict{Of: v.of, Over: time.Minute}})
		client, server := memOpen(set, tunnel.Spec{Origin: &tunnel.Origin{Endpoint: "e"}})
		polite(client, server)
		defer client.Close()
		defer server.Close()
		begin := time.Now()
		for time.Since(begin) < 2*time.Minute { // it flaps between the two
			v.say("e", tunnel.EndpointUnhealthy)
			set.Reconsider()
			time.Sleep(time.Second / 2)
			v.say("e", tunnel.EndpointRemoved)
			set.Reconsider()
			time.Sleep(time.Second / 2)
		}
		synctest.Wait()
		if all := e.all(); len(all) != 1 || !all[0].Ended.Before(begin.Add(time.Minute+10*time.Second)) {
			t.Errorf("ended: %+v", all)
		}
	})
}

// It makes no difference whether a tunnel was started here, came from another Set, or from one
// that has died.
func TestTheVerdictHereHoldsForTunnelsThatCome(t *testing.T) {
	t.Parallel()
	for name, come := range map[string]func(*keeper, *guest) *guest{
		"moved":   func(k *keeper, a *guest) *guest { b := k.heir(roomy); a.set.Move(true); return b },
		"resumed": func(_ *keeper, a *guest) *guest { return a.succeed() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			k := newKeeper(t)
			var v verdicts
			k.options = func(o *tunnel.Options) { o.Verdict = tunnel.Verdict{Of: v.of, Over: 50 * time.Millisecond} }
			a := k.guest(roomy)
			origin := lasting(tunnel.Limits{MaxAge: 20 * time.Second}) // or else it would take long to see
			origin.Endpoint = "gone"
			client, server := a.open(tunnel.Spec{Origin: origin})
			a.settled()
			v.say("gone", tunnel.EndpointRemoved) // which nobody has told the first one
			b := come(k, a)
			wantEOF(t, client)
			wantEOF(t, server)
			client.Close()
			server.Close()
			waitEmpty(t, b.set)
			if all := k.records(); len(all) != 1 || all[0].Reason != tunnel.EndpointRemoved {
				t.Errorf("records are %+v", all)
			}
		})
	}
}

// What the configuration has no place for is closed whatever becomes of its endpoint.
func TestASentenceIsNotTakenBackWithAVerdict(t *testing.T) {
	t.Parallel()
	k := newKeeper(t)
	var v verdicts
	k.options = func(o *tunnel.Options) { o.Verdict = tunnel.Verdict{Of: v.of, Over: 50 * time.Millisecond} }
	k.sentence = tunnel.Sentence{Ends: tunnel.RouteRemoved, Within: 300 * time.Millisecond}
	v.say("", tunnel.Open)
	a := k.guest(roomy)
	client, server := a.open(tunnel.Spec{})
	b := k.heir(roomy)
	a.set.Move(true)
	eventually(t, "it has come", func() bool { return len(b.set.List()) == 1 })
	v.say("", tunnel.EndpointUnhealthy)
	b.set.Reconsider()
	v.say("", tunnel.Open)
	b.set.Reconsider()
	wantEOF(t, client)
	wantEOF(t, server)
	client.Close()
	server.Close()
	waitEmpty(t, b.set)
	if all := k.records(); len(all) != 1 || all[0].Reason != tunnel.RouteRemoved {
		t.Errorf("records are %+v", all)
	}
}
