package route

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
)

// A set of networks contains what one of them contains.
func TestNetworksAreTheirUnion(t *testing.T) {
	t.Parallel()
	random := rand.New(rand.NewPCG(1, 2))
	address := func() netip.Addr { // few bits differ, so that many are in some network
		if random.IntN(2) == 0 {
			return netip.AddrFrom4([4]byte{10, byte(random.IntN(4)) << 6, byte(random.IntN(4)), byte(random.IntN(256))})
		}
		a := [16]byte{0x20, 1, 0xd, 0xb8, byte(random.IntN(4)) << 6, byte(random.IntN(4))}
		a[15] = byte(random.IntN(256))
		return netip.AddrFrom16(a)
	}
	inside := 0
	for range 200 {
		var prefixes []netip.Prefix
		for range random.IntN(8) {
			a := address()
			prefixes = append(prefixes, netip.PrefixFrom(a, 1+random.IntN(a.BitLen())).Masked())
		}
		n := newNetworks(prefixes)
		for range 200 {
			a := address()
			want := slices.ContainsFunc(prefixes, func(p netip.Prefix) bool { return p.Contains(a) })
			if want {
				inside++
			}
			if n.contain(a) != want {
				t.Fatalf("%v in %v: %v, want %v", a, prefixes, !want, want)
			}
		}
	}
	if inside < 1000 {
		t.Errorf("only %d were inside", inside)
	}
}

func TestDenyWinsOverAllow(t *testing.T) {
	t.Parallel()
	all, one := netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("10.0.0.0/8")
	inside, outside := netip.MustParseAddr("10.1.1.1"), netip.MustParseAddr("11.1.1.1")
	var unix netip.Addr
	for _, tt := range []struct {
		allow, deny             []netip.Prefix
		inside, outside, noAddr bool // denied
	}{
		{nil, nil, false, false, false},
		{[]netip.Prefix{one}, nil, false, true, true},
		{nil, []netip.Prefix{one}, true, false, false},
		{[]netip.Prefix{all}, []netip.Prefix{one}, true, false, false},
		{[]netip.Prefix{one}, []netip.Prefix{all}, true, true, true},
	} {
		a := NewAddresses(tt.allow, tt.deny)
		if a.Denies(inside) != tt.inside || a.Denies(outside) != tt.outside || a.Denies(unix) != tt.noAddr {
			t.Errorf("allow %v, deny %v: %v, %v, %v", tt.allow, tt.deny, a.Denies(inside), a.Denies(outside), a.Denies(unix))
		}
	}
}
