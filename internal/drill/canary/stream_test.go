package canary

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
)

func TestAWordSaysItsNumber(t *testing.T) {
	t.Parallel()
	for _, s := range []stream{0, 1, streamOf(4711)} {
		for n := range uint64(1000) {
			if got := s.number(s.word(n)); got != n {
				t.Fatalf("word %d of stream %d says it is %d", n, s, got)
			}
		}
	}
}

func TestAStreamIsTheSameFromEveryOffset(t *testing.T) {
	t.Parallel()
	s := streamOf(1)
	whole := make([]byte, 100)
	s.fill(whole, 0)
	for from := range whole {
		for to := from; to <= len(whole); to++ {
			part := make([]byte, to-from)
			if s.fill(part, int64(from)); !slices.Equal(part, whole[from:to]) {
				t.Fatalf("bytes %d to %d differ", from, to)
			}
		}
	}
}

// TestDamageIsToldApart spoils a stream in every way and at all kinds of places.
func TestDamageIsToldApart(t *testing.T) {
	t.Parallel()
	s := streamOf(7)
	const size = 4000
	sent := make([]byte, size)
	s.fill(sent, 0)
	foreign := make([]byte, size)
	streamOf(8).fill(foreign, 0)
	for name, spoil := range map[string]func(from, to int) ([]byte, Damage){
		"nothing": func(int, int) ([]byte, Damage) { return sent, Damage{} },
		"lost": func(from, to int) ([]byte, Damage) {
			return slices.Delete(slices.Clone(sent), from, to), Damage{Lost: int64(to - from)}
		},
		"doubled": func(from, to int) ([]byte, Damage) {
			return slices.Insert(slices.Clone(sent), to, sent[from:to]...), Damage{Doubled: int64(to - from)}
		},
		// A piece out of its place is known if two words of it are complete, and if
		// it does not, by coincidence, begin or end as what should stand there.
		"doubled later": func(from, to int) ([]byte, Damage) {
			for to = max(to, from+3*wordSize); sent[to] == sent[to+100]; to++ {
			}
			return slices.Insert(slices.Clone(sent), to+100, sent[from:to]...), Damage{Doubled: int64(to - from)}
		},
		"swapped": func(from, to int) ([]byte, Damage) {
			for to = max(to, from+3*wordSize); sent[from] == sent[to] || sent[to] == sent[to+50] || sent[to+50] == sent[from]; to++ {
			}
			late := slices.Concat(sent[:from], sent[to:to+50], sent[from:to], sent[to+50:])
			return late, Damage{Reordered: int64(to - from)}
		},
		"changed": func(from, _ int) ([]byte, Damage) {
			got := slices.Clone(sent)
			got[from] ^= 1
			return got, Damage{Changed: 1}
		},
		"changed twice": func(from, _ int) ([]byte, Damage) {
			got := slices.Clone(sent)
			got[from] ^= 0x80
			got[from+40] ^= 0x10
			return got, Damage{Changed: 2}
		},
		"cut short": func(from, _ int) ([]byte, Damage) {
			return sent[:from], Damage{Lost: int64(size - from)}
		},
		"too long": func(from, to int) ([]byte, Damage) {
			more := make([]byte, size+to-from)
			s.fill(more, 0)
			return more, Damage{Doubled: int64(to - from)}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := rand.New(rand.NewPCG(1, 2))
			for range 500 {
				from := r.IntN(size - 600)
				to := from + 1 + r.IntN(300)
				got, want := spoil(from, to)
				c := checker{stream: s}
				for b := got; len(b) > 0; {
					n := min(1+r.IntN(200), len(b))
					c.feed(b[:n])
					b = b[n:]
				}
				if d := c.end(size); d != want {
					t.Fatalf("bytes %d to %d: damage is %+v, want %+v", from, to, d, want)
				}
			}
		})
	}
	t.Run("another stream's", func(t *testing.T) {
		t.Parallel()
		c := checker{stream: s}
		c.feed(slices.Concat(sent[:1000], foreign[1000:1200], sent[1200:]))
		if d := c.end(size); d.Changed < 190 || d.Lost+d.Doubled+d.Reordered > 0 {
			t.Errorf("damage is %+v", d)
		}
	})
	t.Run("added", func(t *testing.T) {
		t.Parallel()
		c := checker{stream: s}
		c.feed(slices.Concat(sent[:1000], foreign[1000:1200], sent[1000:]))
		if d := c.end(size); d.Doubled != 200 || d.Changed < 190 || d.Lost > 0 {
			t.Errorf("damage is %+v", d)
		}
	})
}

func BenchmarkCheck(b *testing.B) {
	s := streamOf(1)
	buf := make([]byte, 32<<10)
	c := checker{stream: s}
	b.SetBytes(int64(len(buf)))
	for b.Loop() {
		s.fill(buf, c.at)
		c.feed(buf)
	}
	if d := c.end(c.at); d != (Damage{}) {
		b.Fatal(fmt.Sprint(d))
	}
}
