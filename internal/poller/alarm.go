package poller

import (
	"container/heap"
	"time"
)

// Alarm is a time at which something is to be done, to the millisecond: a wait of which each
// one is noticed, where a [Deadline] is a limit that nobody comes near and a [Timer] one of the
// few that a loop has. The zero value is ready, and not set. Only the loop's goroutine uses it.
type Alarm struct {
	at    time.Time
	ring  func()
	place int // in the heap, from 1; 0: it is not set
}

// IsSet says whether the alarm is to ring.
func (a *Alarm) IsSet() bool { return a.place > 0 }

// SetAlarm has ring called once, at a time, and no longer at the one that was set before.
func (l *Loop) SetAlarm(a *Alarm, at time.Time, ring func()) {
	l.DropAlarm(a)
	if l.alarm == nil {
		l.alarm = l.NewTimer(l.ringAlarms)
	}
	a.at, a.ring = at, ring
	heap.Push(&l.alarms, a)
	l.windAlarms()
}

// DropAlarm has an alarm not ring, if it was to.
func (l *Loop) DropAlarm(a *Alarm) {
	if a.IsSet() {
		heap.Remove(&l.alarms, a.place-1)
		a.ring = nil
		l.windAlarms()
	}
}

// ringAlarms rings those whose time has come.
func (l *Loop) ringAlarms() {
	for len(l.alarms) > 0 && !l.now.Before(l.alarms[0].at) {
		a := heap.Pop(&l.alarms).(*Alarm)
		ring := a.ring
		a.ring = nil
		ring()
	}
	l.windAlarms()
}

// windAlarms sets their timer to the first one.
func (l *Loop) windAlarms() {
	if len(l.alarms) == 0 {
		l.alarm.Set(time.Time{})
	} else {
		l.alarm.Set(l.alarms[0].at)
	}
}

// alarmHeap implements [heap.Interface]; the first one is due first.
type alarmHeap []*Alarm

func (h alarmHeap) Len() int           { return len(h) }
func (h alarmHeap) Less(i, j int) bool { return h[i].at.Before(h[j].at) }
func (h alarmHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].place, h[j].place = i+1, j+1
}

func (h *alarmHeap) Push(v any) {
	a := v.(*Alarm)
	*h = append(*h, a)
	a.place = len(*h)
}

func (h *alarmHeap) Pop() any {
	last := len(*h) - 1
	a := (*h)[last]
	(*h)[last] = nil
	*h = (*h)[:last]
	a.place = 0
	return a
}
