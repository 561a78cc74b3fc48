package poller_test

import (
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"holdfast/internal/poller"
)

func TestAgainCallsOnceInOrder(t *testing.T) {
	t.Parallel()
	l, o := newLoop(t), new(recorder)
	var handles []poller.Handle
	for i := range uint32(3) {
		near, _ := pair(t)
		handles = append(handles, add(t, l, near, o, i))
	}
	step(l)
	o.calls = nil
	for _, i := range []int{2, 0, 2, 1, 0} {
		l.Again(handles[i])
	}
	step(l)
	step(l)
	o.want(t, call{2, 0}, call{0, 0}, call{1, 0})
}

// Asked while an event is handled, it is in the same turn, after the events; asked
// while it is called, it is in the next.
func TestAgainIsOnceInATurn(t *testing.T) {
	t.Parallel()
	l, o := newLoop(t), new(recorder)
	near, _ := pair(t)
	h := add(t, l, near, o, 1)
	o.then = func(call) { l.Again(h); l.Again(h) }
	step(l)
	o.want(t, call{1, poller.Writable}, call{1, 0})
	for range 3 {
		l.Turn() // which does not wait
		o.want(t, call{1, 0})
	}
}

func TestAgainIsForgottenWithTheDescriptor(t *testing.T) {
	t.Parallel()
	l, o, other := newLoop(t), new(recorder), new(recorder)
	near, _ := pair(t)
	h := add(t, l, near, o, 1)
	step(l)
	o.calls = nil
	l.Again(h)
	l.Remove(h)
	step(l)
	o.want(t)

	h = add(t, l, near, o, 1)
	step(l)
	o.calls = nil
	l.Again(h)
	l.Remove(h)
	if reused := add(t, l, near, other, 2); reused != h {
		t.Fatal("the handle was not reused, so nothing is tested")
	}
	l.Again(h)
	step(l)
	o.want(t)
	other.want(t, call{2, poller.Writable}, call{2, 0})
}

// Two descriptors that always want to be called again, and two that are always ready:
// each gets its call in each turn.
func TestEventsAndAgainDoNotStarveEachOther(t *testing.T) {
	t.Parallel()
	l := newLoop(t)
	ready, queued := new(recorder), new(recorder)
	var near, far [2]int
	handles := map[uint32]poller.Handle{}
	for i := range uint32(2) {
		near[i], far[i] = pair(t)
		add(t, l, near[i], ready, i)
		other, _ := pair(t)
		handles[i] = add(t, l, other, queued, i)
	}
	step(l)
	ready.then = func(c call) { readAll(near[c.index]); write(t, far[c.index], "x") }
	queued.then = func(c call) { l.Again(handles[c.index]) }
	for i := range uint32(2) {
		write(t, far[i], "x")
		l.Again(handles[i])
	}
	ready.calls, queued.calls = nil, nil
	const turns = 1000
	for range turns {
		l.Turn()
	}
	for name, calls := range map[string][]call{"ready": ready.calls, "queued": queued.calls} {
		var n [2]int
		for _, c := range calls {
			n[c.index]++
		}
		if n != [2]int{turns, turns} {
			t.Errorf("%s: %d calls in %d turns", name, n, turns)
		}
	}
}

// Each call may take as long as much data takes, so what becomes ready need not wait for
// all of them; and all of them get their call, in turn.
func TestATurnTakesFewOfTheManyThatAreToBeCalledAgain(t *testing.T) {
	t.Parallel()
	l, o := newLoop(t), new(recorder)
	const n = 100
	handles := make([]poller.Handle, n)
	for i := range handles {
		near, _ := pair(t)
		handles[i] = add(t, l, near, o, uint32(i))
	}
	step(l)
	o.then = func(c call) { l.Again(handles[c.index]) }
	for _, h := range handles {
		l.Again(h)
	}
	o.calls = nil
	for range 3 * n {
		before := len(o.calls)
		l.Turn()
		if taken := len(o.calls) - before; taken < 1 || taken > 16 {
			t.Fatalf("%d calls in one turn", taken)
		}
	}
	for i, c := range o.calls {
		if c.index != uint32(i%n) {
			t.Fatalf("call %d is for %d", i, c.index)
		}
	}
}

// Who posts all the time is not in the way of events, nor the other way round.
func TestPostedFunctionsDoNotStarveEvents(t *testing.T) {
	t.Parallel()
	l, o := newLoop(t), new(recorder)
	near, far := pair(t)
	add(t, l, near, o, 1)
	posted := 0
	var again func()
	again = func() { posted++; l.Post(again) }
	again()
	o.then = func(call) { readAll(near); write(t, far, "x") }
	const turns = 1000
	for range turns {
		l.Turn()
	}
	if posted != turns+1 || len(o.calls) != turns {
		t.Errorf("%d posted functions and %d events in %d turns", posted, len(o.calls), turns)
	}
}

func TestATurnHasAnOrder(t *testing.T) {
	t.Parallel()
	l, o := newLoop(t), new(recorder)
	var got []string
	say := func(s string) func() { return func() { got = append(got, s) } }
	near, _ := pair(t)
	h := add(t, l, near, o, 1)
	o.then = func(c call) {
		if c.e == 0 {
			say("again")()
		} else {
			say("event")()
		}
	}
	l.Again(h)
	timer := l.NewTimer(say("timer"))
	timer.Set(l.Now())
	l.AfterTurn(say("end"))
	l.AfterTurn(say("end, too"))
	l.Post(say("posted"))
	l.Turn()
	want := []string{"event", "again", "posted", "timer", "end", "end, too"}
	if !slices.Equal(got, want) {
		t.Errorf("got %q", got)
	}
}

func TestNowIsTheBeginningOfTheTurn(t *testing.T) {
	t.Parallel()
	l, o := newLoop(t), new(recorder)
	a, _ := pair(t)
	b, _ := pair(t)
	add(t, l, a, o, 1)
	add(t, l, b, o, 2)
	before := l.Now()
	first := before
	o.then = func(c call) {
		switch {
		case first == before:
			first = l.Now()
		case l.Now() != first:
			t.Error("the clock went on within a turn")
		}
	}
	step(l)
	if !first.After(before) {
		t.Errorf("the clock stood still: %v, %v", before, first)
	}
}

// A loop in its steady state makes no work for the garbage collector.
//
// Not parallel: it counts what the process allocates.
func TestATurnDoesNotAllocate(t *testing.T) {
	l := newLoop(t)
	o := &repeater{l: l}
	o.near, o.far = pair(t)
	o.h = add(t, l, o.near, o, 1)
	l.AfterTurn(func() {})
	l.NewTimer(func() {}).Set(l.Now().Add(bound))
	step(l)
	if n := testing.AllocsPerRun(1000, func() { l.Turn() }); n != 0 {
		t.Errorf("%v allocations in a turn", n)
	}
	if o.events == 0 || o.again == 0 {
		t.Error("nothing was tested")
	}
}

type repeater struct {
	l             *poller.Loop
	h             poller.Handle
	near, far     int
	events, again int
	b             [1]byte
}

func (r *repeater) Ready(_ uint32, e poller.Events) {
	if e == 0 {
		r.again++
		return
	}
	r.events++
	r.l.Again(r.h)
	unix.Read(r.near, r.b[:])
	unix.Write(r.far, r.b[:])
}
