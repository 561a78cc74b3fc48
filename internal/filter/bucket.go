package filter

import (
	"hash/maphash"
	"math"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

// pace is how fast tokens come back to a bucket, and how many it has room for, both in
// nanoseconds: a token is the time in which it comes back.
type pace struct{ token, room int64 }

func newPace(tokens int64, per time.Duration, burst int64) pace {
	token := max(int64(per)/tokens, 1)
	return pace{token, token * min(burst, math.MaxInt64/4/token)}
}

// take takes a token from a bucket that is full again at the time full. It returns when it is
// full from now on, and, if there is no token, how long it takes until there is one. (This is
// the generic cell rate algorithm: one number says all about a bucket.)
func (p pace) take(full, now int64) (next, wait int64) {
	full = min(max(full, now), now+p.room) // of slower tokens, it is full later than it can be
	if wait := full + p.token - now - p.room; wait > 0 {
		return full, wait
	}
	return full + p.token, 0
}

// bucket is one for all. Any number of goroutines may take tokens, and none is given twice.
type bucket struct{ full atomic.Int64 }

func (b *bucket) take(p pace, now int64) (wait int64) {
	for {
		full := b.full.Load()
		next, wait := p.take(full, now)
		if next == full || b.full.CompareAndSwap(full, next) {
			return wait
		}
	}
}

// How many buckets of clients there are at the most: shards, each with a lock of its own, of
// sets, in one of which a client's bucket is.
const (
	shards     = 64
	setsEach   = 128
	ways       = 8
	mostKnown  = shards * setsEach * ways
	wayOfIPv4  = 0xffff << 32 // no IPv6 network that is in use begins so
	wayOfUnix  = math.MaxUint64
	networkLen = 8 // bytes of an IPv6 address that are one client's
)

// buckets are one for each client. The memory that they take is bounded: of more clients
// than there is room for, those are forgotten whose buckets are the fullest, and theirs is full
// when they come again. So nobody is refused for what others do.
type buckets struct {
	seed      maphash.Seed // who chooses addresses cannot choose sets
	shards    [shards]shard
	forgotten func() // is called for each client whose bucket was not full
}

type shard struct {
	mu   sync.Mutex
	sets []set // nil until somebody needs one
}

type set [ways]known

// known is a client's bucket. The zero value is a full one, of nobody or of "::/64".
type known struct {
	client uint64
	full   int64
}

func newBuckets(forgotten func()) *buckets {
	return &buckets{seed: maphash.MakeSeed(), forgotten: forgotten}
}

// clientOf is who counts as one client: an IPv4 address, a network of 64 bits of IPv6, which
// is what a single customer has at the least, or everybody on unix sockets.
func clientOf(a netip.Addr) uint64 {
	switch {
	case !a.IsValid():
		return wayOfUnix
	case a.Is4():
		b := a.As4()
		return wayOfIPv4 | uint64(b[0])<<24 | uint64(b[1])<<16 | uint64(b[2])<<8 | uint64(b[3])
	}
	b := a.As16()
	var n uint64
	for _, c := range b[:networkLen] {
		n = n<<8 | uint64(c)
	}
	return n
}

func (b *buckets) take(client uint64, p pace, now int64) (wait int64) {
	h := maphash.Comparable(b.seed, client)
	s := &b.shards[h%shards]
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.sets == nil {
		s.sets = make([]set, setsEach)
	}
	k := b.find(&s.sets[h/shards%setsEach], client, now)
	k.full, wait = p.take(k.full, now)
	return wait
}

// find returns the client's bucket, another's if it has none.
func (b *buckets) find(s *set, client uint64, now int64) *known {
	fullest := &s[0]
	for i := range s {
		if s[i].client == client {
			return &s[i]
		}
		if s[i].full < fullest.full {
			fullest = &s[i]
		}
	}
	if fullest.full > now {
		b.forgotten()
	}
	*fullest = known{client: client}
	return fullest
}
