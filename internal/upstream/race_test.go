package upstream_test

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"holdfast/internal/exchange"
	"holdfast/internal/stream/streamtest"
	"holdfast/internal/task"
	"holdfast/internal/upstream"
)

// track is where a race takes place: what each address does, and when it was tried.
type track struct {
	*endpoint
	network *fakeNetwork
	begin   time.Time
	does    map[string]func(*pending) error // nil: it answers at once
	tried   []string
	waiting int // attempts
	most    int // at the same time
}

func newTrack(t *testing.T, addresses ...string) *track {
	n := new(fakeNetwork)
	r := &track{network: n, begin: time.Now(), does: make(map[string]func(*pending) error)}
	n.fail = func(p *pending, address string) error {
		r.tried = append(r.tried, fmt.Sprintf("%s after %dms", strings.TrimSuffix(address, ":80"), time.Since(r.begin).Milliseconds()))
		r.waiting++
		r.most = max(r.most, r.waiting)
		defer func() { r.waiting-- }()
		if does := r.does[strings.TrimSuffix(address, ":80")]; does != nil {
			return does(p)
		}
		return nil
	}
	r.endpoint = one(t, n, web("10.0.0.1:80"))
	var addrs []netip.AddrPort
	for _, a := range addresses {
		addrs = append(addrs, netip.AddrPortFrom(netip.MustParseAddr(a), 80))
	}
	r.SetTargets(addrs...)
	return r
}

func refuse(*pending) error { return syscall.ECONNREFUSED }
func hang(p *pending) error { return p.never() }

// answer comes after a while, unless the attempt is given up.
func answer(after time.Duration) func(*pending) error {
	return func(p *pending) error {
		until := p.until
		p.until = p.loop.Now().Add(after)
		p.attempt.Wait(p)
		p.loop.SetDeadline(&p.deadline, p, p.until)
		defer p.loop.Forget(&p.deadline)
		for p.err == nil {
			p.task.Wait()
		}
		if errors.Is(p.err, os.ErrDeadlineExceeded) && p.until.Before(until) {
			return nil
		}
		return p.err
	}
}

// run tries to connect, and says where the connection is.
func (r *track) run() (string, error) {
	a := new(upstream.Attempt)
	l := r.loops[0]
	var err error
	streamtest.Go(l, func(t *task.Task) {
		var up exchange.Upstream
		if up, err = r.Get(t, l, a); err == nil {
			up.Close()
		}
	})
	streamtest.Do(l, func() {})
	if err != nil {
		if a.Remote().IsValid() {
			r.t.Errorf("nothing is connected, and yet %v is", a.Remote())
		}
		return "", err
	}
	return a.Remote().Addr().String(), nil
}

func (r *track) want(where string, tried ...string) {
	r.t.Helper()
	got, err := r.run()
	if err != nil || got != where {
		r.t.Errorf("connected to %q, %v; want %q", got, err, where)
	}
	r.wantTried(tried...)
	if open := r.network.open(); open != 1 {
		r.t.Errorf("%d connections are open", open)
	}
}

func (r *track) wantTried(tried ...string) {
	r.t.Helper()
	if !slices.Equal(r.tried, tried) {
		r.t.Errorf("tried %q\n want %q", r.tried, tried)
	}
	if r.waiting != 0 || r.loops[0].Tasks.Live() != 0 {
		r.t.Errorf("%d attempts and %d tasks are under way", r.waiting, r.loops[0].Tasks.Live())
	}
}

// in has a test take place in a bubble.
func in(t *testing.T, fn func(*testing.T)) {
	t.Parallel()
	synctest.Test(t, fn)
}

func TestTheFirstAddressIsAloneWhereItAnswers(t *testing.T) {
	in(t, func(t *testing.T) {
		r := newTrack(t, "10.0.0.1", "2001:db8::1", "10.0.0.2")
		r.want("2001:db8::1", "[2001:db8::1] after 0ms")
	})
}

func TestFamiliesTakeTurns(t *testing.T) {
	in(t, func(t *testing.T) {
		r := newTrack(t, "10.0.0.1", "10.0.0.2", "2001:db8::1", "10.0.0.3", "2001:db8::2")
		for _, a := range []string{"[2001:db8::1]", "[2001:db8::2]", "10.0.0.1", "10.0.0.2"} {
			r.does[a] = refuse
		}
		r.want("10.0.0.3",
			"[2001:db8::1] after 0ms", "10.0.0.1 after 0ms", "[2001:db8::2] after 0ms", "10.0.0.2 after 0ms", "10.0.0.3 after 0ms")
	})
}

// An address that does not answer holds up the next one for a moment only, and is given up
// when that has answered.
func TestASilentAddressIsOvertaken(t *testing.T) {
	in(t, func(t *testing.T) {
		r := newTrack(t, "2001:db8::1", "10.0.0.1")
		r.does["[2001:db8::1]"] = hang
		r.want("10.0.0.1", "[2001:db8::1] after 0ms", "10.0.0.1 after 250ms")
		if d := time.Since(r.begin); d > 300*time.Millisecond {
			t.Errorf("it took %v", d)
		}
	})
}

// One that answers late wins nevertheless, if it is the first one that does.
func TestTheFirstAnswerWins(t *testing.T) {
	in(t, func(t *testing.T) {
		r := newTrack(t, "2001:db8::1", "10.0.0.1")
		r.does["[2001:db8::1]"] = answer(500 * time.Millisecond)
		r.does["10.0.0.1"] = hang
		r.want("2001:db8::1", "[2001:db8::1] after 0ms", "10.0.0.1 after 250ms")
	})
}

// Of two that answer at once one is closed.
func TestOneOfTwoAnswersIsClosed(t *testing.T) {
	in(t, func(t *testing.T) {
		r := newTrack(t, "2001:db8::1", "10.0.0.1")
		r.does["[2001:db8::1]"] = answer(time.Second)
		r.does["10.0.0.1"] = answer(750 * time.Millisecond)
		if _, err := r.run(); err != nil {
			t.Fatal(err)
		}
		if open := r.network.open(); open != 1 {
			t.Errorf("%d connections are open", open)
		}
	})
}

func TestOnlySoManyAddressesAreTriedAtOnce(t *testing.T) {
	in(t, func(t *testing.T) {
		var addresses []string
		for i := range 100 {
			addresses = append(addresses, fmt.Sprintf("10.0.0.%d", i+1))
		}
		r := newTrack(t, addresses...)
		for _, a := range addresses {
			r.does[a] = hang
		}
		_, err := r.run()
		var failed *upstream.ConnectError
		if !errors.As(err, &failed) || !failed.Timeout || !strings.Contains(err.Error(), "no answer within 2s") {
			t.Errorf("%v", err)
		}
		if d := time.Since(r.begin); d < 2*time.Second || d > 3*time.Second {
			t.Errorf("it took %v", d)
		}
		if r.most != 4 || len(r.tried) != 4 {
			t.Errorf("%d at once, %d in all", r.most, len(r.tried))
		}
	})
}

// An address for which there is no descriptor is one that fails like any other.
func TestARaceGoesOnWithoutADescriptor(t *testing.T) {
	in(t, func(t *testing.T) {
		r := newTrack(t, "10.0.0.1", "10.0.0.2", "10.0.0.3")
		r.does["10.0.0.1"] = answer(time.Second)
		for _, a := range []string{"10.0.0.2", "10.0.0.3"} {
			r.does[a] = func(*pending) error { return os.NewSyscallError("socket", syscall.EMFILE) }
		}
		r.want("10.0.0.1", "10.0.0.1 after 0ms", "10.0.0.2 after 250ms", "10.0.0.3 after 250ms")
	})
}

func TestEveryAddressMayFail(t *testing.T) {
	in(t, func(t *testing.T) {
		r := newTrack(t, "10.0.0.1", "2001:db8::1")
		r.does["10.0.0.1"], r.does["[2001:db8::1]"] = refuse, refuse
		_, err := r.run()
		if !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("%v", err)
		}
		r.wantTried("[2001:db8::1] after 0ms", "10.0.0.1 after 0ms")
	})
}

// Whoever does not want the connection any more leaves nothing behind.
func TestARaceIsCancelled(t *testing.T) {
	in(t, func(t *testing.T) {
		r := newTrack(t, "2001:db8::1", "10.0.0.1", "10.0.0.2")
		r.does["[2001:db8::1]"], r.does["10.0.0.1"] = hang, hang
		a, gone := new(upstream.Attempt), errors.New("gone")
		l := r.loops[0]
		var err error
		ended := streamtest.Begin(l, func(t *task.Task) { _, err = r.Get(t, l, a) })
		time.Sleep(300 * time.Millisecond)
		streamtest.Do(l, func() { a.Cancel(gone) })
		<-ended
		streamtest.Do(l, func() {})
		if err != gone {
			t.Errorf("%v", err)
		}
		time.Sleep(time.Minute)
		r.wantTried("[2001:db8::1] after 0ms", "10.0.0.1 after 250ms")
		if open := r.network.open(); open != 0 {
			t.Errorf("%d connections are open", open)
		}
	})
}

// What is connected in the very moment in which nobody wants it any more is closed, and counts
// no more: neither is there a connection that no limit knows, nor one too many that was given back.
func TestARaceIsWonAndCancelledAtOnce(t *testing.T) {
	in(t, func(t *testing.T) {
		r := newTrack(t, "2001:db8::1", "10.0.0.1")
		a, gone := new(upstream.Attempt), errors.New("gone")
		r.does["[2001:db8::1]"] = func(*pending) error { a.Cancel(gone); return nil }
		l := r.loops[0]
		var err error
		streamtest.Go(l, func(t *task.Task) { _, err = r.Get(t, l, a) })
		streamtest.Do(l, func() {})
		if err != gone {
			t.Errorf("%v", err)
		}
		r.wantTried("[2001:db8::1] after 0ms")
		if open := r.network.open(); open != 0 {
			t.Errorf("%d connections are open", open)
		}
		if used := r.Connections(); used != 0 {
			t.Errorf("%d connections are counted", used)
		}
	})
}

// Who connects from an address of one family tries no other one.
func TestTheSourceChoosesTheFamily(t *testing.T) {
	in(t, func(t *testing.T) {
		n := new(fakeNetwork)
		var from []string
		n.fail = func(p *pending, address string) error {
			from = append(from, p.attempt.Source().String()+" to "+address)
			return syscall.ECONNREFUSED
		}
		c := web("10.0.0.1:80")
		c.Connecting.Source = netip.MustParseAddr("10.0.0.9")
		e := one(t, n, c)
		e.SetTargets(netip.MustParseAddrPort("[2001:db8::1]:80"), netip.MustParseAddrPort("10.0.0.2:80"))
		if _, err := e.try((*upstream.Endpoint).Get, 0); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Error(err)
		}
		e.SetTargets(netip.MustParseAddrPort("[2001:db8::1]:80"))
		want := "connect to 10.0.0.1:80: the cluster's source_address 10.0.0.9 and 2001:db8::1 are of two families"
		if _, err := e.try((*upstream.Endpoint).Get, 0); err == nil || err.Error() != want {
			t.Error(err)
		}
		e.SetTargets()
		if _, err := e.try((*upstream.Endpoint).Get, 0); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Error(err)
		}
		if want := []string{"10.0.0.9 to 10.0.0.2:80", "10.0.0.9 to 10.0.0.1:80"}; !slices.Equal(from, want) {
			t.Errorf("%q", from)
		}
	})
}
