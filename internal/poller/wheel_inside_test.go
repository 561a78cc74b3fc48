package poller

import (
	"math/rand/v2"
	"testing"
	"time"
	"unsafe"
)

// dated is something with a deadline.
type dated struct {
	Deadline
	m    *wheelModel
	want time.Time // zero: never
	told int
}

func (d *dated) Expire(*Deadline) {
	now := d.m.l.now
	switch {
	case d.want.IsZero():
		d.m.t.Errorf("%v: one was told that has no deadline", now)
	case now.Before(d.want):
		d.m.t.Errorf("told %v too early", d.want.Sub(now))
	case now.Sub(d.want) > tick+d.m.late:
		d.m.t.Errorf("told %v too late", now.Sub(d.want))
	}
	d.told++
	d.want = time.Time{}
	if d.m.random.IntN(4) == 0 {
		d.m.set(d)
	}
}

// wheelModel turns a loop's wheel by a clock of its own.
type wheelModel struct {
	t      *testing.T
	random *rand.Rand
	l      *Loop
	late   time.Duration // of this turn, behind the moment that was asked for
	all    []*dated
}

func (m *wheelModel) set(d *dated) {
	scale := []time.Duration{time.Millisecond, time.Second, time.Minute, time.Hour}[m.random.IntN(4)]
	d.want = m.l.now.Add(time.Duration(m.random.Int64N(int64(2*scale))) - scale/100)
	m.l.SetDeadline(&d.Deadline, d, d.want)
	if d.want.Before(m.l.now) {
		d.want = m.l.now // which is when it can be told
	}
}

func (m *wheelModel) act() {
	d := m.all[m.random.IntN(len(m.all))]
	switch m.random.IntN(6) {
	case 0:
		d.want = time.Time{}
		m.l.SetDeadline(&d.Deadline, d, d.want)
	case 1:
		d.want = time.Time{}
		m.l.Forget(&d.Deadline)
	default:
		m.set(d)
	}
}

// pass lets time pass, to the moment for which the wheel has asked or beyond.
func (m *wheelModel) pass() {
	w := m.l.wheel
	if w == nil || w.timer.at.IsZero() || m.random.IntN(8) == 0 && w.filed == 0 {
		m.l.now = m.l.now.Add(time.Duration(m.random.Int64N(int64(10 * time.Hour))))
		return
	}
	asked := w.timer.at
	if !asked.After(m.l.now) {
		asked = m.l.now
	}
	m.late = time.Duration(m.random.Int64N(int64(3 * tick)))
	if m.random.IntN(50) == 0 {
		m.late = 5 * time.Minute // the machine has slept
	}
	m.l.now = asked.Add(m.late)
	w.timer.at = time.Time{}
	w.turn(m.l.now)
}

func TestDeadlinesAreToldInTime(t *testing.T) {
	t.Parallel()
	for seed := range uint64(20) {
		m := &wheelModel{t: t, random: rand.New(rand.NewPCG(seed, 7)), l: &Loop{now: time.Unix(1_000_000, 0)}}
		for range 50 {
			m.all = append(m.all, &dated{m: m})
		}
		told := 0
		for range 3000 {
			for range m.random.IntN(4) {
				m.act()
			}
			m.pass()
		}
		for _, d := range m.all { // all that is left comes
			d.m.random = rand.New(rand.NewPCG(3, 3))
		}
		for range 100_000 {
			if w := m.l.wheel; w.filed == 0 {
				break
			}
			for _, d := range m.all {
				if d.told > 0 && m.random.IntN(3) == 0 {
					d.want = time.Time{}
					m.l.Forget(&d.Deadline)
				}
			}
			m.pass()
		}
		for _, d := range m.all {
			told += d.told
			if !d.want.IsZero() {
				t.Errorf("seed %d: one was never told", seed)
			}
		}
		if told < 500 {
			t.Errorf("seed %d: only %d were told", seed, told)
		}
		if m.l.wheel.used != [len(m.l.wheel.used)]uint64{} {
			t.Errorf("seed %d: slots are said to be used", seed)
		}
	}
}

// A deadline that is put off again and again costs a store each time, and is looked at
// once in the time that it was first set for.
func TestToPutADeadlineOffIsAStore(t *testing.T) { // not parallel: it counts allocations
	l := &Loop{now: time.Unix(1_000_000, 0)}
	d := &dated{}
	l.SetDeadline(&d.Deadline, d, l.now.Add(time.Minute))
	slot := d.slot
	for range 1000 {
		l.now = l.now.Add(10 * time.Millisecond)
		l.SetDeadline(&d.Deadline, d, l.now.Add(time.Minute))
		if d.slot != slot {
			t.Fatal("it was filed anew")
		}
	}
	if size := unsafe.Sizeof(Deadline{}); size > 48 {
		t.Errorf("a deadline has %d bytes", size)
	}
	if n := testing.AllocsPerRun(100, func() {
		l.SetDeadline(&d.Deadline, d, l.now.Add(time.Second))
		l.Forget(&d.Deadline)
	}); n > 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkPutOff(b *testing.B) {
	l := &Loop{now: time.Unix(1_000_000, 0)}
	d := &dated{}
	at := l.now.Add(time.Minute)
	for b.Loop() {
		at = at.Add(time.Microsecond)
		l.SetDeadline(&d.Deadline, d, at)
	}
}
