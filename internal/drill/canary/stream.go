package canary

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
)

// A stream is bytes of which each eight say where they belong: they are their own
// number, scrambled. So whoever reads them can tell bytes that are missing from those
// that came twice, later than others, or as something else than they were sent, and
// can find out where a broken stream goes on. What belongs to another stream is
// noise: its numbers make no sense here.
type stream uint64 // what is added to the numbers

const (
	wordSize = 8

	// longest is more words than any stream has.
	longest = 1 << 40
)

// The scrambling is the finalizer of SplitMix64, each step of which can be undone.
const (
	mix1, mix2     = 0xbf58476d1ce4e5b9, 0x94d049bb133111eb
	unmix1, unmix2 = 0x96de1b173f119089, 0x319642b2d24d8ec3 // their inverses modulo 2^64
)

func (s stream) word(n uint64) uint64 {
	x := n + uint64(s)
	x = (x ^ x>>30) * mix1
	x = (x ^ x>>27) * mix2
	return x ^ x>>31
}

// number is the inverse of word.
func (s stream) number(w uint64) uint64 {
	w = (w ^ w>>31 ^ w>>62) * unmix2
	w = (w ^ w>>27 ^ w>>54) * unmix1
	return (w ^ w>>30 ^ w>>60) - uint64(s)
}

// fill fills b with what the stream has from offset on.
func (s stream) fill(b []byte, offset int64) {
	var word [wordSize]byte
	for len(b) > 0 {
		binary.LittleEndian.PutUint64(word[:], s.word(uint64(offset)/wordSize))
		n := copy(b, word[offset%wordSize:])
		b, offset = b[n:], offset+int64(n)
	}
}

// Damage is what became of the bytes of streams on their way.
type Damage struct {
	Lost      int64 `json:"lost"`
	Doubled   int64 `json:"doubled"`
	Reordered int64 `json:"reordered"` // came after others that were sent behind them
	Changed   int64 `json:"changed"`
}

func (d Damage) String() string {
	return fmt.Sprintf("%d lost, %d doubled, %d reordered, %d changed", d.Lost, d.Doubled, d.Reordered, d.Changed)
}

// replace takes old out of the sum and puts now in.
func (d *Damage) replace(old, now Damage) {
	d.Lost += now.Lost - old.Lost
	d.Doubled += now.Doubled - old.Doubled
	d.Reordered += now.Reordered - old.Reordered
	d.Changed += now.Changed - old.Changed
}

// span is bytes of a stream by their offsets, without the one at to.
type span struct{ from, to int64 }

// checker compares what arrives of a stream with what was sent.
type checker struct {
	stream  stream
	at      int64  // where the next byte belongs
	high    int64  // all in front of it has arrived, or is in missing
	missing []span // in order
	unclear []byte // what has arrived and nobody can place yet
	damage  Damage // without what is missing
	want    []byte
}

// feed takes what has arrived. It keeps nothing of b.
func (c *checker) feed(b []byte) {
	if len(c.unclear) > 0 {
		b = append(c.unclear, b...)
	}
	c.unclear = nil
	for len(b) > 0 {
		c.expect(c.at, len(b))
		if c.at == c.high && bytes.Equal(b, c.want) { // as nearly always
			c.at += int64(len(b))
			c.high = c.at
			return
		}
		n := c.agreeing(b)
		c.place(b[:n])
		if b = b[n:]; len(b) == 0 {
			return
		}
		skipped, at, ok := c.resume(b)
		if !ok {
			c.unclear = slices.Clone(b)
			return
		}
		// What is skipped stands right in front of the place where the stream goes on.
		c.at = max(at-int64(skipped), 0)
		c.place(b[:skipped])
		c.at = at
		b = b[skipped:]
	}
}

// soFar is the damage as it looks now: what is missing may still come.
func (c *checker) soFar() Damage {
	d := c.damage
	for _, m := range c.missing {
		d.Lost += m.to - m.from
	}
	return d
}

// end returns the damage of a stream of which so much was sent and no more arrives.
func (c *checker) end(sent int64) Damage {
	c.place(c.unclear)
	c.unclear = nil
	d := c.soFar()
	d.Lost += max(sent-c.high, 0)
	d.Doubled += max(c.high-sent, 0) // what nobody has sent
	return d
}

// agreeing is how many bytes at the beginning of b are as expected.
func (c *checker) agreeing(b []byte) int {
	n := 0
	for n < len(b) && b[n] == c.want[n] {
		n++
	}
	return n
}

// expect renders n bytes of the stream from offset on.
func (c *checker) expect(offset int64, n int) {
	c.want = slices.Grow(c.want[:0], n)[:n]
	c.stream.fill(c.want, offset)
}

// resume finds the place from which on b is the stream again: so many bytes are
// skipped, and the one behind them belongs to at. Two words in succession are no
// coincidence.
func (c *checker) resume(b []byte) (skipped int, at int64, ok bool) {
	for i := 0; i+2*wordSize <= len(b); i++ {
		n := c.stream.number(binary.LittleEndian.Uint64(b[i:]))
		if n < longest && c.stream.number(binary.LittleEndian.Uint64(b[i+wordSize:])) == n+1 {
			return i, int64(n) * wordSize, true
		}
	}
	return 0, 0, false
}

// place notes that b arrived where we are.
func (c *checker) place(b []byte) {
	if len(b) == 0 {
		return
	}
	c.expect(c.at, len(b))
	for i := range b {
		if b[i] != c.want[i] {
			c.damage.Changed++
		}
	}
	from, to := c.at, c.at+int64(len(b))
	c.at = to
	if from > c.high {
		c.missing = append(c.missing, span{c.high, from})
	}
	if old := min(to, c.high) - from; old > 0 { // there was something behind these already
		late := c.found(span{from, from + old})
		c.damage.Reordered += late
		c.damage.Doubled += old - late
	}
	c.high = max(c.high, to)
}

// found takes what has arrived after all out of what is missing and returns how
// much of it was.
func (c *checker) found(s span) (late int64) {
	var left []span
	for _, m := range c.missing {
		from, to := max(m.from, s.from), min(m.to, s.to)
		if from >= to {
			left = append(left, m)
			continue
		}
		late += to - from
		if m.from < from {
			left = append(left, span{m.from, from})
		}
		if to < m.to {
			left = append(left, span{to, m.to})
		}
	}
	c.missing = left
	return late
}

// streamOf returns a stream that has no word in common with those of other numbers.
func streamOf(number uint64) stream { return stream(stream(0).word(number + 1)) }
