package metrics

import (
	"errors"
	"fmt"
	"math"
	"strings"
	"unicode/utf8"
)

// read returns the families in a memory file, which may be written meanwhile, by
// anybody. So a record is copied before it is looked at, what it says is checked
// like a stranger's request, and only its cells are read in place.
func read(mem []byte) ([]Family, error) {
	start := cell(mem, 0).Load()
	if start == 0 {
		return nil, nil // no generation has opened it yet
	}
	if start != order.Uint64([]byte(magic)) {
		return nil, errors.New("metrics: not a memory file of ours")
	}
	if v := cell(mem, atVersion).Load(); v != version {
		return nil, fmt.Errorf("metrics: layout version %d is not known", v)
	}
	used := cell(mem, atUsed).Load()
	if used < headerSize || used > uint64(len(mem)) || used%8 != 0 {
		return nil, fmt.Errorf("metrics: %d bytes in use", used)
	}
	r := reader{mem: mem, names: make(map[string]bool)}
	r.records(int(used))
	families := make([]Family, 0, len(r.families))
	for _, f := range r.families {
		if f != nil {
			families = append(families, *f)
		}
	}
	return families, r.problems.err()
}

type reader struct {
	mem      []byte
	families []*Family // by number; nil: not valid
	names    map[string]bool
	series   int
	copied   []byte // the record that is looked at, used again for the next
	problems problems
}

func (r *reader) records(used int) {
	for at := headerSize; at < used; {
		head := cell(r.mem, at).Load()
		kind, length := kindAndLength(head)
		if length < 8 || length%8 != 0 || length > used-at {
			// Where the next one begins is not known.
			r.problems.add(fmt.Errorf("a record of %d bytes at %d", length, at))
			return
		}
		var err error
		switch kind {
		case kindFamily:
			if len(r.families) == maxFamilies {
				r.problems.add(errors.New("too many definitions"))
				return
			}
			err = r.family(at, length)
		case kindSeries:
			if r.series == maxSeries {
				r.problems.add(errors.New("too many series"))
				return
			}
			r.series++
			err = r.oneSeries(at, length)
		}
		if err != nil {
			r.problems.add(fmt.Errorf("record at %d: %w", at, err))
		}
		at += length
	}
}

// meta returns a copy of the part of a record that may be something else than cells.
func (r *reader) meta(at, length int) *cursor {
	length = min(length, maxMeta)
	r.copied = append(r.copied[:0], r.mem[at+8:at+length]...)
	return &cursor{rest: r.copied}
}

// family reads a definition. It takes its number even when it is not valid.
func (r *reader) family(at, length int) error {
	r.families = append(r.families, nil)
	var d Desc
	if err := d.UnmarshalBinary(r.meta(at, length).rest); err != nil {
		return err
	}
	if r.names[d.Family()] {
		return fmt.Errorf("metric %s: is defined twice", d.Name)
	}
	r.names[d.Family()] = true
	r.families[len(r.families)-1] = &Family{Desc: d}
	return nil
}

// UnmarshalBinary reads what AppendBinary gave, or anybody else. After an error d is of
// no use. What is behind the definition is not looked at.
func (d *Desc) UnmarshalBinary(b []byte) error {
	c := &cursor{rest: b}
	*d = Desc{Type: Type(c.byte()), Merge: Merge(c.byte()), Unit: Unit(c.byte())}
	labels, bounds := int(c.byte()), int(c.byte())
	d.Name, d.Help = c.string(), c.string()
	for range min(labels, maxLabels+1) {
		d.Labels = append(d.Labels, c.string())
	}
	for range min(bounds, maxBounds+1) {
		d.Bounds = append(d.Bounds, math.Float64frombits(c.uint64()))
	}
	if c.short {
		return errors.New("a definition is cut")
	}
	if err := d.Check(); err != nil {
		return fmt.Errorf("metric %.*q: %w", maxName, d.Name, err)
	}
	return nil
}

func (r *reader) oneSeries(at, length int) error {
	c := r.meta(at, length)
	number := int(c.uint32())
	if c.short || number >= len(r.families) {
		return errors.New("a series of no metric")
	}
	f := r.families[number]
	if f == nil {
		return nil // reported with its definition
	}
	labels := make([]string, 0, len(f.Desc.Labels))
	for range f.Desc.Labels {
		v := c.string()
		if !ValidValue(v) {
			return fmt.Errorf("metric %s: the value of a label is not valid", f.Desc.Name)
		}
		labels = append(labels, v)
	}
	n := f.Desc.cells()
	// The cells are what is left of the record, after less than 8 bytes of padding.
	if padding := length - 8 - c.at - 8*n; c.short || padding < 0 || padding >= 8 {
		return fmt.Errorf("metric %s: a series of the wrong length", f.Desc.Name)
	}
	f.Series = append(f.Series, f.Desc.read(labels, cells(r.mem, at+length-8*n, n)))
	return nil
}

// ValidValue returns whether a label can have this value.
func ValidValue(v string) bool { return len(v) <= maxValue && utf8.ValidString(v) }

// A cursor takes values off a record. Once there are too few bytes it is short, and
// all further values are zero.
type cursor struct {
	rest  []byte
	at    int // how many bytes were taken
	short bool
}

func (c *cursor) take(n int) []byte {
	if c.short || n > len(c.rest) {
		c.short = true
		return nil
	}
	b := c.rest[:n]
	c.rest = c.rest[n:]
	c.at += n
	return b
}

func (c *cursor) byte() byte {
	if b := c.take(1); b != nil {
		return b[0]
	}
	return 0
}

func (c *cursor) uint32() uint32 {
	if b := c.take(4); b != nil {
		return order.Uint32(b)
	}
	return 0
}

func (c *cursor) uint64() uint64 {
	if b := c.take(8); b != nil {
		return order.Uint64(b)
	}
	return 0
}

func (c *cursor) string() string {
	if b := c.take(2); b != nil {
		return string(c.take(int(order.Uint16(b))))
	}
	return ""
}

// problems keeps the first few errors: a hostile file has any number.
type problems struct {
	first []string
	more  int
}

func (p *problems) add(err error) {
	if len(p.first) < 5 {
		p.first = append(p.first, err.Error())
		return
	}
	p.more++
}

func (p *problems) err() error {
	switch {
	case len(p.first) == 0:
		return nil
	case p.more > 0:
		return fmt.Errorf("metrics: %s; and %d more", strings.Join(p.first, "; "), p.more)
	}
	return fmt.Errorf("metrics: %s", strings.Join(p.first, "; "))
}
