package tunnel_test

import (
	"io"
	"net"
	"testing"
	"time"

	"holdfast/internal/tunnel"
)

// Loops know only the real clock. These tests say that things happen, and not before
// their time; how soon after it is said by those on a fake clock.

// yield lets the ends of tunnels read what comes, and close when that ends.
func yield(t testing.TB, ends ...net.Conn) {
	for _, c := range ends {
		done := make(chan struct{})
		go func() {
			defer close(done)
			io.Copy(io.Discard, c)
			c.Close()
		}()
		t.Cleanup(func() { c.Close(); <-done })
	}
}

func TestOnTheRealClockEveryLimitEndsItsTunnels(t *testing.T) {
	const limit = 50 * time.Millisecond
	onAllRelays(t, func(t *testing.T, r relay) {
		for _, test := range []struct {
			name   string
			limits tunnel.Limits
			close  func(*tunnel.Set)
			want   tunnel.Reason
		}{
			{"idle timeout", tunnel.Limits{IdleTimeout: limit, MaxAge: time.Hour}, func(*tunnel.Set) {}, tunnel.IdleTimeout},
			{"max age", tunnel.Limits{MaxAge: limit, IdleTimeout: time.Hour}, func(*tunnel.Set) {}, tunnel.MaxAge},
			{"drain", tunnel.Limits{DrainTimeout: limit, MaxAge: time.Hour}, func(s *tunnel.Set) { s.Drain(limit) }, tunnel.DrainLimit},
		} {
			t.Run(test.name, func(t *testing.T) {
				t.Parallel()
				set, e := r.newSet(t)
				other, otherServer := open(t, set, tunnel.Spec{ID: "unlimited"})
				client, server := open(t, set, tunnel.Spec{Origin: limited(test.limits)})
				yield(t, client, server)
				test.close(set)
				eventually(t, "the tunnel has ended", func() bool { return len(e.all()) == 1 })
				record := e.all()[0]
				if record.Reason != test.want || record.ID != "" {
					t.Errorf("%q ended with %q, want %q", record.ID, record.Reason, test.want)
				}
				least := limit
				if test.want == tunnel.MaxAge {
					least -= limit / 10
				}
				if age := record.Ended.Sub(record.Started); age < least {
					t.Errorf("it ended after %v, want %v at least", age, least)
				}
				write(t, other, []byte("still here"))
				wantBytes(t, otherServer, "still here")
			})
		}
	})
}

func TestOnTheRealClockABusyTunnelIsNotIdle(t *testing.T) {
	onAllRelays(t, func(t *testing.T, r relay) {
		const limit = 300 * time.Millisecond
		set, e := r.newSet(t)
		client, server := open(t, set, tunnel.Spec{Origin: limited(tunnel.Limits{IdleTimeout: limit})})
		var last time.Time // at which a byte was passed on, or a little before
		for begin := time.Now(); time.Since(begin) < 3*limit; {
			at := time.Now()
			if _, err := client.Write([]byte("x")); err != nil {
				break // this machine was held up for longer than the limit
			}
			if n, err := server.Read(make([]byte, 1)); n != 1 || err != nil {
				break
			}
			last = at
			time.Sleep(limit / 20) // it chats; nothing is waited for
		}
		yield(t, client, server)
		record := wantEnd(t, set, e, tunnel.IdleTimeout)
		if quiet := record.Ended.Sub(last); quiet < limit {
			t.Errorf("it ended %v after its last byte, want %v at least", quiet, limit)
		}
	})
}

func TestOnTheRealClockADrainIsSpread(t *testing.T) {
	onAllRelays(t, func(t *testing.T, r relay) {
		const n, limit, over = 8, 20 * time.Millisecond, 600 * time.Millisecond
		set, e := r.newSet(t)
		for range n {
			client, server := open(t, set, tunnel.Spec{Origin: limited(tunnel.Limits{DrainTimeout: limit})})
			yield(t, client, server)
		}
		begin := time.Now()
		set.Drain(over)
		set.Drain(0) // no effect
		waitEmpty(t, set)
		var last time.Duration
		for _, record := range e.all() {
			at := record.Ended.Sub(begin)
			if record.Reason != tunnel.DrainLimit || at < limit {
				t.Errorf("one ended %v after the drain began: %q", at, record.Reason)
			}
			last = max(last, at)
		}
		// Each of the equal parts of the span has its tunnel.
		if last < over/2 {
			t.Errorf("the last one ended after %v, want it to be in the last part of %v", last, over)
		}
	})
}

func TestOnTheRealClockADrainIsTakenBack(t *testing.T) {
	onAllRelays(t, func(t *testing.T, r relay) {
		set, e := r.newSet(t)
		client, server := open(t, set, tunnel.Spec{Origin: limited(tunnel.Limits{DrainTimeout: 2 * time.Second})})
		set.Drain(0)
		set.Undrain()
		late, lateServer := open(t, set, tunnel.Spec{Origin: limited(tunnel.Limits{DrainTimeout: 2 * time.Second})})
		yield(t, late, lateServer)
		a, b := open(t, set, tunnel.Spec{ID: "clock", Origin: limited(tunnel.Limits{MaxAge: 2500 * time.Millisecond})})
		yield(t, a, b)
		eventually(t, "the drain would have closed them", func() bool { return len(e.all()) > 0 })
		write(t, client, []byte("still here"))
		wantBytes(t, server, "still here")
		if all := e.all(); len(all) != 1 || all[0].ID != "clock" {
			t.Errorf("ended: %+v", all)
		}
		client.Close()
		server.Close()
	})
}

func TestOnTheRealClockWhoIsStartedLateHasAPartInDrainAndStop(t *testing.T) {
	onAllRelays(t, func(t *testing.T, r relay) {
		set, e := r.newSet(t)
		start := func(l tunnel.Limits) {
			client, server := open(t, set, tunnel.Spec{Origin: limited(l)})
			yield(t, client, server)
		}
		set.Drain(10 * time.Millisecond)
		start(tunnel.Limits{DrainTimeout: 10 * time.Millisecond})
		wantEnd(t, set, e, tunnel.DrainLimit)
		set.CloseAll(tunnel.Operator, 0)
		start(tunnel.Limits{})
		set.CloseAll(tunnel.Stopped, time.Hour)
		set.CloseAll(tunnel.Stopped, 10*time.Millisecond)
		start(tunnel.Limits{})
		waitEmpty(t, set)
		all := e.all()
		if len(all) != 3 || all[1].Reason != tunnel.Stopped || all[2].Reason != tunnel.Stopped {
			t.Errorf("ended: %+v", all)
		}
	})
}

func TestWhoeverIsSlowToReportAnEndHoldsNobodyUp(t *testing.T) {
	onAllRelays(t, func(t *testing.T, r relay) {
		var e ends
		reporting, report := make(chan struct{}), make(chan struct{})
		set := r.newSetWith(t, tunnel.Options{OnEnd: func(r tunnel.Record) {
			if r.ID == "slow" {
				close(reporting)
				<-report
			}
			e.add(r)
		}})
		client, server := open(t, set, tunnel.Spec{ID: "slow"})
		others := make([][2]tcpConn, 4) // on each loop
		for i := range others {
			others[i][0], others[i][1] = open(t, set, tunnel.Spec{})
		}
		reset(client)
		wantReset(t, server)
		<-reporting
		if list := set.List(); len(list) != len(others) || list[0].Number != 2 {
			t.Errorf("the list is %+v while an end is reported", list)
		}
		for _, o := range others {
			write(t, o[0], []byte("question"))
			wantBytes(t, o[1], "question")
			o[0].Close()
			wantEOF(t, o[1])
			o[1].Close()
		}
		eventually(t, "all others have ended", func() bool { n, _ := set.Summary(); return n == 0 })
		close(report)
		waitEmpty(t, set)
		if n := len(e.all()); n != len(others)+1 {
			t.Errorf("%d ends were reported, want %d", n, len(others)+1)
		}
	})
}

func TestASetIsNotEmptyBeforeTheLastEndWasReported(t *testing.T) {
	onAllRelays(t, func(t *testing.T, r relay) {
		reporting, report := make(chan struct{}), make(chan struct{})
		set := r.newSetWith(t, tunnel.Options{OnEnd: func(tunnel.Record) {
			close(reporting)
			<-report
		}})
		client, _ := open(t, set, tunnel.Spec{})
		empty := set.Empty()
		reset(client)
		<-reporting
		select {
		case <-empty:
			t.Error("it is said to be empty while an end is reported")
		default:
		}
		close(report)
		<-empty
	})
}
