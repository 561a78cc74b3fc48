package tunnel_test

import (
	"math/rand/v2"
	"testing"
)

// spelled are choices that a fuzzer makes: one or more bytes each, and 0 once there are
// none left.
type spelled struct{ bytes []byte }

func (s *spelled) IntN(n int) int {
	v := 0
	for most := 1; most < n; most <<= 8 {
		v = v<<8 | int(s.next())
	}
	return v % n
}

func (s *spelled) next() (b byte) {
	if len(s.bytes) > 0 {
		b, s.bytes = s.bytes[0], s.bytes[1:]
	}
	return b
}

// FuzzSchedules is [TestRandomSchedules] with schedules that a fuzzer makes up.
func FuzzSchedules(f *testing.F) {
	for seed := range uint64(8) {
		bytes := make([]byte, 40*seed) // a script takes some 40
		rand.NewChaCha8([32]byte{byte(seed)}).Read(bytes)
		f.Add(true, bytes)
		f.Add(false, bytes)
	}
	f.Fuzz(func(t *testing.T, loops bool, bytes []byte) {
		r := onGoroutines
		if loops {
			r = onLoops
		}
		s := newSchedule(&spelled{bytes}, r)
		for i := range s.tunnels {
			s.tunnels[i].down.shorten()
			s.tunnels[i].up.shorten()
		}
		s.run(t)
	})
}

// shorten makes sure that a script is over in far less than the 10 seconds after which
// a fuzzer gives it up.
func (s *script) shorten() {
	const most = 256 << 10
	s.early = min(s.early, most)
	for i := range s.writes {
		s.writes[i] = min(s.writes[i], most)
	}
}
