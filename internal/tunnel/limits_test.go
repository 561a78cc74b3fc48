package tunnel_test

import (
	"errors"
	"net"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"holdfast/internal/tunnel"
)

func TestATunnelThatCarriesNothingIsClosedAfterItsIdleTimeout(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		set, e := newSet(t)
		start := time.Now()
		limits := tunnel.Limits{IdleTimeout: time.Minute}
		client, server := memOpen(set, tunnel.Spec{ID: "quiet", Origin: limited(limits)})
		polite(client, server)
		client, server = memOpen(set, tunnel.Spec{ID: "chatty", Origin: limited(limits)})
		quiet, _ := memOpen(set, tunnel.Spec{ID: "unlimited"})
		defer quiet.Close()
		// Only one direction carries something; that is enough.
		for range 10 {
			time.Sleep(50 * time.Second)
			go client.Write([]byte("x"))
			wantBytes(t, server, "x")
		}
		all := e.all()
		if len(all) != 1 || all[0].ID != "quiet" || all[0].Reason != tunnel.IdleTimeout {
			t.Fatalf("after ten times 50 s: %+v", all)
		}
		wantWithin(t, all[0].Ended.Sub(start), time.Minute, time.Minute+time.Second)
		polite(client, server)
		time.Sleep(62 * time.Second)
		all = e.all()
		if len(all) != 2 || all[1].ID != "chatty" || all[1].Reason != tunnel.IdleTimeout {
			t.Fatalf("once it was quiet: %+v", all)
		}
		wantWithin(t, all[1].Ended.Sub(start), 560*time.Second, 561*time.Second)
	})
}

func TestADirectionTakesInNoMoreThanItsBuffer(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		set, _ := newSet(t)
		client, server := memOpen(set, tunnel.Spec{Origin: limited(tunnel.Limits{Buffer: 7})})
		defer server.Close()
		client.SetWriteDeadline(time.Now().Add(time.Minute))
		if n, _ := client.Write(make([]byte, 100)); n != 7 {
			t.Errorf("%d bytes were taken in while the server read none, want 7", n)
		}
		client.Close()
	})
}

func wantWithin(t *testing.T, got, from, to time.Duration) {
	t.Helper()
	if got < from || got > to {
		t.Errorf("took %v, want %v to %v", got, from, to)
	}
}

func TestATunnelIsClosedAtItsMaxAgeHoweverBusy(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		set, e := newSet(t)
		start := time.Now()
		client, server := memOpen(set, tunnel.Spec{Origin: limited(tunnel.Limits{MaxAge: time.Hour, IdleTimeout: 2 * time.Hour})})
		polite(server)
		go func() {
			wantEOF(t, client)
			client.Close()
		}()
		for err := error(nil); err == nil; time.Sleep(time.Second) {
			_, err = client.Write([]byte("x"))
		}
		r := wantEnd(t, set, e, tunnel.MaxAge)
		wantWithin(t, r.Ended.Sub(start), 54*time.Minute, time.Hour+2*time.Second)
	})
}

func TestTunnelsThatWereOpenedTogetherDoNotReachTheirMaxAgeTogether(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		set, e := newSet(t)
		start := time.Now()
		const n = 100
		for range n {
			client, server := memOpen(set, tunnel.Spec{Origin: limited(tunnel.Limits{MaxAge: time.Hour})})
			polite(client, server)
			time.Sleep(time.Microsecond)
		}
		<-set.Empty()
		var parts [6]int // of the six minutes that are taken off
		for _, r := range e.all() {
			after := r.Ended.Sub(start)
			wantWithin(t, after, 54*time.Minute, time.Hour+time.Minute)
			parts[min(int((after-54*time.Minute)/time.Minute), 5)]++
		}
		for i, ended := range parts {
			if ended < n/6/3 || ended > n/6*3 {
				t.Errorf("in minute %d of the last six ended %d of %d: %v", i, ended, n, parts)
			}
		}
	})
}

func TestADrainClosesLimitedTunnelsEvenlyOverTheSpread(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		set, e := newSet(t)
		const n = 200
		limits := tunnel.Limits{DrainTimeout: 10 * time.Minute}
		for range n - 20 {
			client, server := memOpen(set, tunnel.Spec{Origin: limited(limits)})
			polite(client, server)
		}
		unlimited, _ := memOpen(set, tunnel.Spec{ID: "unlimited"})
		defer unlimited.Close()

		start := time.Now()
		set.Drain(5 * time.Minute)
		time.Sleep(time.Minute)
		set.Drain(0) // no effect
		for range 20 {
			client, server := memOpen(set, tunnel.Spec{ID: "late", Origin: limited(limits)})
			polite(client, server)
		}
		time.Sleep(9*time.Minute - time.Millisecond)
		if ended := e.all(); len(ended) != 0 {
			t.Fatalf("%d tunnels were closed before the limit", len(ended))
		}
		time.Sleep(5*time.Minute + time.Second)
		ended := e.all()
		if len(ended) != n {
			t.Fatalf("%d tunnels were closed after limit and spread, want %d", len(ended), n)
		}
		perMinute := make(map[int]int)
		gaps := make(map[time.Duration]bool)
		last := start
		for _, r := range ended {
			if r.Reason != tunnel.DrainLimit || r.ID == "unlimited" {
				t.Fatalf("closed: %+v", r)
			}
			after := r.Ended.Sub(start) - 10*time.Minute
			wantWithin(t, after, 0, 5*time.Minute+time.Second)
			perMinute[int(after/time.Minute)]++
			gaps[r.Ended.Sub(last)] = true
			last = r.Ended
		}
		for minute := range 5 {
			if got := perMinute[minute]; got < n/5-20 || got > n/5+25 {
				t.Errorf("%d tunnels closed in minute %d, want about %d", got, minute, n/5)
			}
		}
		if len(gaps) < 6 {
			t.Errorf("tunnels were closed at a beat: only the gaps %v", gaps)
		}
		if count, _ := set.Summary(); count != 1 {
			t.Errorf("%d tunnels are left, want the one without a limit", count)
		}
	})
}

func TestUndrainLetsTheRestLive(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		set, e := newSet(t)
		for range 50 {
			client, server := memOpen(set, tunnel.Spec{Origin: limited(tunnel.Limits{DrainTimeout: time.Minute})})
			polite(client, server)
		}
		set.Drain(time.Minute)
		time.Sleep(90 * time.Second)
		set.Undrain()
		time.Sleep(time.Second)
		closed := len(e.all())
		if closed < 20 || closed > 30 {
			t.Errorf("%d of 50 tunnels closed at half time", closed)
		}
		client, server := memOpen(set, tunnel.Spec{Origin: limited(tunnel.Limits{DrainTimeout: time.Minute})})
		polite(client, server)
		time.Sleep(time.Hour)
		if n := len(e.all()); n != closed {
			t.Errorf("%d tunnels were closed after Undrain", n-closed)
		}
		set.Drain(0) // from now on, again
		time.Sleep(59 * time.Second)
		if n := len(e.all()); n != closed {
			t.Errorf("%d tunnels were closed before the limit of the second drain", n-closed)
		}
		time.Sleep(2 * time.Second)
		waitEmpty(t, set)
	})
}

func TestCloseAllSpreadsAndLeavesLaterTunnelsAlone(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		set, e := newSet(t)
		for range 60 {
			client, server := memOpen(set, tunnel.Spec{})
			polite(client, server)
		}
		set.CloseAll(tunnel.Operator, time.Minute)
		later, _ := memOpen(set, tunnel.Spec{})
		defer later.Close()
		time.Sleep(30 * time.Second)
		if n := len(e.all()); n < 25 || n > 35 {
			t.Errorf("%d of 60 tunnels closed at half time", n)
		}
		time.Sleep(31 * time.Second)
		if n := len(e.all()); n != 60 {
			t.Errorf("%d tunnels closed, want 60", n)
		}
		if count, _ := set.Summary(); count != 1 {
			t.Errorf("%d tunnels are left, want the later one", count)
		}
	})
}

func TestStoppingIsForGoodAndASecondStopIsSooner(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		set, e := newSet(t)
		start := time.Now()
		for range 10 {
			client, server := memOpen(set, tunnel.Spec{})
			polite(client, server)
		}
		set.CloseAll(tunnel.Stopped, time.Hour)
		client, server := memOpen(set, tunnel.Spec{ID: "handshake was under way"})
		polite(client, server)
		set.CloseAll(tunnel.Stopped, 0)
		client, server = memOpen(set, tunnel.Spec{ID: "so was this"})
		polite(client, server)
		waitEmpty(t, set)
		wantWithin(t, time.Since(start), 0, time.Second)
		all := e.all()
		if len(all) != 12 {
			t.Fatalf("%d tunnels ended, want 12", len(all))
		}
		for _, r := range all {
			if r.Reason != tunnel.Stopped {
				t.Errorf("reason of %q is %q", r.ID, r.Reason)
			}
		}
	})
}

func TestEmptyIsToldAfterTheLastTunnelWasReported(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		set, e := newSet(t)
		waitEmpty(t, set)
		a, b := memOpen(set, tunnel.Spec{})
		c, d := memOpen(set, tunnel.Spec{})
		empty := set.Empty()
		polite(a, b)
		a.CloseWrite()
		synctest.Wait()
		select {
		case <-empty:
			t.Fatal("told too early")
		default:
		}
		polite(c, d)
		c.CloseWrite()
		<-empty
		if n := len(e.all()); n != 2 {
			t.Errorf("%d tunnels were reported when Empty told, want 2", n)
		}
	})
}

func TestTheFirstCauseIsTheReason(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		set, e := newSet(t)
		client, server := memOpen(set, tunnel.Spec{Origin: limited(tunnel.Limits{IdleTimeout: time.Second})})
		time.Sleep(2 * time.Second)
		set.CloseAll(tunnel.Operator, 0)
		client.Close()
		server.Close()
		wantEnd(t, set, e, tunnel.IdleTimeout)
	})
}

func TestAResetOfATunnelThatIsBeingClosedIsNotTheReason(t *testing.T) {
	onAllRelays(t, func(t *testing.T, r relay) {
		set, e := r.newSet(t)
		client, server := open(t, set, tunnel.Spec{DownEarly: pattern(0, 8<<20)}) // more than the kernel takes
		eventually(t, "the receiver holds the tunnel up", func() bool { return set.List()[0].ToUp > 0 })
		set.CloseAll(tunnel.Operator, 0)
		eventually(t, "it is being closed", func() bool { return set.List()[0].Reason == tunnel.Operator })
		reset(server) // fails the write that waits
		client.Close()
		wantEnd(t, set, e, tunnel.Operator)
	})
}

// The peers close nothing, so a tunnel that is closed properly takes seconds.
func TestAbandonedTunnelsEndAtOnceAndAreReported(t *testing.T) {
	onAllRelays(t, func(t *testing.T, r relay) {
		set, e := r.newSet(t)
		client, server := openKept(t, set, tunnel.Spec{ID: "cut before"})
		set.CloseAll(tunnel.Operator, 0)
		other, otherServer := openKept(t, set, tunnel.Spec{ID: "still open"})
		begin := time.Now()
		set.Abandon()
		waitEmpty(t, set)
		if d := time.Since(begin); d > 3*time.Second {
			t.Errorf("it took %v", d)
		}
		for _, r := range e.all() {
			want := map[string]tunnel.Reason{"cut before": tunnel.Operator, "still open": tunnel.Stopped}[r.ID]
			if r.Reason != want {
				t.Errorf("%s ended with %q, want %q", r.ID, r.Reason, want)
			}
		}
		if n := len(e.all()); n != 2 {
			t.Errorf("%d ends were reported, want 2", n)
		}
		for _, peer := range []net.Conn{client, server, other, otherServer} {
			peer.SetReadDeadline(time.Now().Add(patience))
			if _, err := peer.Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) {
				t.Error("a peer does not learn of it")
			}
		}
	})
}
