package poller

import (
	"math"
	"math/bits"
	"time"
)

const (
	// tick is how exact a [Deadline] is: it is never early, and late by a tick and what a
	// [Timer] is late.
	tick = 250 * time.Millisecond

	// wheelSlots times tick, two minutes, is how far ahead the wheel sees. What is due
	// later is looked at once in this time.
	wheelSlots = 512
)

// An Expirer is told that its deadline has come, on the loop's goroutine. It must not
// block. It may set the deadline again.
type Expirer interface {
	Expire(*Deadline)
}

// A Deadline is one of many: unlike a [Timer] it costs nothing while it waits, so every
// connection may have some. It is a part of what it is for, which must not be copied while
// the deadline is set. The zero value is not set.
type Deadline struct {
	next, prev *Deadline // in its slot; nil: it is in none
	whom       Expirer
	due        uint32 // the tick in which it is told; never: it is not set
	slot       int16
}

// never is the tick of what is not set.
const never = 0

// lastTick is some thirty years from the first one: what is due later is due then.
const lastTick = math.MaxUint32

// wheel files deadlines by the tick in which they are to be looked at. To put a deadline
// off is a store: it is filed anew when its slot comes up, which is what makes deadlines
// cheap that are put off with every request.
type wheel struct {
	epoch time.Time
	now   int64 // the tick up to which all was told
	slots [wheelSlots]Deadline
	used  [wheelSlots / 64]uint64 // slots in which something is filed
	filed int
	timer *Timer

	looking Deadline // the list of those that are just looked at
}

// wheelOf returns the loop's wheel, which is made when it is needed.
func (l *Loop) wheelOf() *wheel {
	if l.wheel == nil {
		w := &wheel{epoch: l.now, now: 1}
		for i := range w.slots {
			s := &w.slots[i]
			s.next, s.prev = s, s
		}
		w.timer = l.NewTimer(func() { w.turn(l.now) })
		l.wheel = w
	}
	return l.wheel
}

// SetDeadline has whom told once, at the given time and no longer at the one that was set
// before. The zero time: never.
func (l *Loop) SetDeadline(d *Deadline, whom Expirer, at time.Time) {
	if at.IsZero() {
		d.due = never // it is forgotten when its slot comes up
		if d.next == nil {
			d.whom = nil
		}
		return
	}
	w := l.wheelOf()
	if w.filed == 0 { // nobody has counted the ticks meanwhile
		w.now = w.present(l.now)
	}
	d.whom = whom
	d.due = uint32(w.tickOf(at))
	switch {
	case d.next == nil:
		w.file(d)
	case w.comesUp(d) > int64(d.due): // it is looked at too late
		w.unfile(d)
		w.file(d)
	}
}

// Forget takes a deadline out at once: what it is a part of is to be used for something
// else, or collected.
func (l *Loop) Forget(d *Deadline) {
	if d.next != nil {
		l.wheel.unfile(d)
	}
	d.due, d.whom = never, nil
}

// tickOf returns the first tick that does not end before a time.
func (w *wheel) tickOf(at time.Time) int64 {
	d := at.Sub(w.epoch)
	n := int64(d/tick) + 1
	if d%tick > 0 {
		n++
	}
	return min(max(n, w.now+1), lastTick)
}

// present returns the tick that has begun last.
func (w *wheel) present(now time.Time) int64 { return int64(now.Sub(w.epoch))/int64(tick) + 1 }

// comesUp returns the tick in which the slot of d is looked at.
func (w *wheel) comesUp(d *Deadline) int64 {
	ahead := (int64(d.slot) - w.now) & (wheelSlots - 1)
	if ahead == 0 {
		ahead = wheelSlots
	}
	return w.now + ahead
}

// file puts d where it is looked at when it is due, or as late before that as the wheel
// sees.
func (w *wheel) file(d *Deadline) {
	at := min(int64(d.due), w.now+wheelSlots)
	d.slot = int16(at & (wheelSlots - 1))
	head := &w.slots[d.slot]
	d.next, d.prev = head, head.prev
	head.prev.next, head.prev = d, d
	w.filed++
	w.used[d.slot/64] |= 1 << (d.slot % 64)
	if begin := w.begin(at); w.timer.at.IsZero() || begin.Before(w.timer.at) {
		w.timer.Set(begin)
	}
}

func (w *wheel) unfile(d *Deadline) {
	d.prev.next, d.next.prev = d.next, d.prev
	d.next, d.prev = nil, nil
	w.filed--
	if head := &w.slots[d.slot]; head.next == head {
		w.used[d.slot/64] &^= 1 << (d.slot % 64)
	}
}

// begin is when a tick is worked on.
func (w *wheel) begin(n int64) time.Time { return w.epoch.Add(time.Duration(n-1) * tick) }

// turn tells all whose time has come.
func (w *wheel) turn(now time.Time) {
	last := w.present(now)
	for w.now < last {
		next := w.nextUsed()
		if next > last {
			w.now = last
			break
		}
		w.now = next
		w.look(next)
	}
	if next := w.nextUsed(); next != math.MaxInt64 {
		w.timer.Set(w.begin(next))
	}
}

// look tells those in the slot of a tick who are due then, and files the others anew. Who
// is filed meanwhile is not for this tick.
func (w *wheel) look(n int64) {
	slot := n & (wheelSlots - 1)
	head, due := &w.slots[slot], &w.looking
	due.next, due.prev = head.next, head.prev
	due.next.prev, due.prev.next = due, due
	head.next, head.prev = head, head
	w.used[slot/64] &^= 1 << (slot % 64)
	for d := due.next; d != due; d = due.next {
		w.unfile(d)
		switch {
		case d.due == never:
			d.whom = nil
		case int64(d.due) > n:
			w.file(d)
		default:
			whom := d.whom
			d.due, d.whom = never, nil
			whom.Expire(d)
		}
	}
}

// nextUsed returns the next tick in which there is something to look at; the greatest
// number: none.
func (w *wheel) nextUsed() int64 {
	from := (w.now + 1) & (wheelSlots - 1)
	for i := range int64(len(w.used) + 1) {
		word := (from/64 + i) % int64(len(w.used))
		bitsOf := w.used[word]
		switch i {
		case 0:
			bitsOf &= ^uint64(0) << (from % 64)
		case int64(len(w.used)):
			bitsOf &= 1<<(from%64) - 1
		}
		if bitsOf != 0 {
			slot := word*64 + int64(bits.TrailingZeros64(bitsOf))
			return w.now + 1 + (slot-from)&(wheelSlots-1)
		}
	}
	return math.MaxInt64
}
