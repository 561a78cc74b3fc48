package filter

import (
	"math"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// However many take tokens at once, none is given twice and none is lost.
func TestNoTokenIsGivenTwice(t *testing.T) {
	t.Parallel()
	const takers, each, burst = 4, 100_000, 250_000
	p := newPace(1, time.Hour, burst)
	var b bucket
	own := newBuckets(func() {})
	for name, take := range map[string]func() int64{
		"one for all": func() int64 { return b.take(p, 1) },
		"of a client": func() int64 { return own.take(7, p, 1) },
	} {
		var given atomic.Int64
		var work sync.WaitGroup
		for range takers {
			work.Go(func() {
				for range each {
					if take() == 0 {
						given.Add(1)
					}
				}
			})
		}
		work.Wait()
		if given.Load() != burst {
			t.Errorf("%s: %d tokens are given, want %d", name, given.Load(), burst)
		}
	}
}

func TestNoRateOverflows(t *testing.T) {
	t.Parallel()
	for _, tokens := range []int64{1, 1_000_000_000} {
		for _, per := range []time.Duration{time.Millisecond, 24 * time.Hour} {
			for _, burst := range []int64{1, 1_000_000_000} {
				p := newPace(tokens, per, burst)
				if p.token <= 0 || p.room <= 0 || p.room < p.token {
					t.Errorf("%d per %v, burst %d: %+v", tokens, per, burst, p)
				}
				now := int64(100 * 365 * 24 * time.Hour)
				if next, wait := p.take(now, now); wait != 0 || next <= now {
					t.Errorf("%d per %v, burst %d: the first waits %d", tokens, per, burst, wait)
				}
				if _, wait := p.take(math.MaxInt64, now); wait <= 0 || wait > p.token {
					t.Errorf("%d per %v, burst %d: who is more than empty waits %d", tokens, per, burst, wait)
				}
			}
		}
	}
}

// A crowd of clients takes no more memory than there is, refuses nobody who comes for the
// first time, and is noticed.
func TestTheMemoryOfClientsIsBounded(t *testing.T) {
	t.Parallel()
	var forgotten int
	b := newBuckets(func() { forgotten++ })
	p := newPace(1, time.Hour, 1)
	const crowd = 4 * mostKnown
	for n := range uint64(crowd) {
		if wait := b.take(n, p, 1); wait != 0 {
			t.Fatalf("client %d has to wait", n)
		}
	}
	known := 0
	for i := range b.shards {
		for _, s := range b.shards[i].sets {
			known += len(s)
		}
	}
	if known != mostKnown {
		t.Errorf("there is room for %d, want %d", known, mostKnown)
	}
	if forgotten != crowd-mostKnown {
		t.Errorf("%d were forgotten, want %d", forgotten, crowd-mostKnown)
	}
}

// Of clients that have no room together, those stay that have taken the most: who floods is
// not forgotten because of others who come once.
func TestTheFullestBucketIsForgotten(t *testing.T) {
	t.Parallel()
	b := newBuckets(func() {})
	p := newPace(1, time.Second, 10)
	now := int64(time.Hour)
	const flooder = 1 << 40
	for range 10 {
		b.take(flooder, p, now)
	}
	for n := range uint64(4 * mostKnown) {
		b.take(n, p, now)
	}
	if wait := b.take(flooder, p, now); wait == 0 {
		t.Error("a crowd has made the limit forget who floods")
	}
}

func TestClients(t *testing.T) {
	t.Parallel()
	same := [][2]string{{"2001:db8::1", "2001:db8::ffff:1"}, {"10.0.0.1", "10.0.0.1"}}
	apart := [][2]string{{"10.0.0.1", "10.0.0.2"}, {"2001:db8::1", "2001:db8:0:1::1"}, {"::1", "0.0.0.1"}, {"::", "0.0.0.0"}}
	of := func(s string) uint64 { return clientOf(netip.MustParseAddr(s)) }
	for _, p := range same {
		if of(p[0]) != of(p[1]) {
			t.Errorf("%s and %s are two clients", p[0], p[1])
		}
	}
	for _, p := range apart {
		if of(p[0]) == of(p[1]) || clientOf(netip.Addr{}) == of(p[0]) {
			t.Errorf("%s and %s are one client, or one with unix sockets", p[0], p[1])
		}
	}
}

func BenchmarkBuckets(b *testing.B) {
	p := newPace(1_000_000_000, time.Second, 1_000_000_000)
	b.Run("one for all", func(b *testing.B) {
		var own bucket
		for b.Loop() {
			own.take(p, 1)
		}
	})
	b.Run("of a client", func(b *testing.B) {
		own := newBuckets(func() {})
		for b.Loop() {
			own.take(7, p, 1)
		}
	})
}
