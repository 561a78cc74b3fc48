package inflight_test

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"testing"

	"holdfast/internal/tunnel/inflight"
)

// model is one direction: what the kernel has of it, and what the file and the pipe have.
type model struct {
	stream []byte // all that the source sends
	taken  int    // of it, from the source's queue
	given  []byte // to the receiver

	hold      inflight.Hold
	filled    int
	buffer    [100]byte
	pipe      []byte
	completed int
}

// step is what happens between two moments at which a process may die.
type step func(*model)

func (m *model) clone() *model {
	c := *m
	c.given, c.pipe = slices.Clone(m.given), slices.Clone(m.pipe)
	return &c
}

func claimBuffer(m *model) { m.hold, m.filled = inflight.HoldBuffer, 0 }
func claimPipe(m *model)   { m.hold = inflight.HoldPipe }
func release(m *model)     { m.hold, m.filled = inflight.HoldNothing, 0 }
func peek(m *model)        { copy(m.buffer[:], m.stream[m.taken:]) }

func read(n int) step {
	return func(m *model) { m.taken += copy(m.buffer[:], m.stream[m.taken:m.taken+n]) }
}
func fill(n int) step { return func(m *model) { m.filled = n } }
func discardBytes(n int) step {
	return func(m *model) { m.taken += n }
}
func give(from, to int) step {
	return func(m *model) { m.given = append(m.given, m.buffer[from:to]...) }
}
func complete(n int) step { return func(m *model) { m.completed += n } }
func spliceIn(n int) step {
	return func(m *model) { m.pipe = append(m.pipe, m.stream[m.taken:m.taken+n]...); m.taken += n }
}
func spliceOut(n int) step {
	return func(m *model) { m.given = append(m.given, m.pipe[:n]...); m.pipe = m.pipe[n:] }
}

// What a relay does with n bytes, of which the receiver takes so many at a time.

func copying(n int, parts ...int) []step {
	steps := []step{claimBuffer, read(n), fill(n)}
	at := 0
	for _, p := range parts {
		steps = append(steps, give(at, at+p))
		at += p
	}
	return append(steps, release, complete(n))
}

func peeking(n int, parts ...int) []step {
	steps := []step{claimBuffer, peek, give(0, n)}
	for _, p := range parts {
		steps = append(steps, discardBytes(p))
	}
	return append(steps, release, complete(n))
}

func splicing(n int, parts ...int) []step {
	steps := []step{claimPipe, spliceIn(n)}
	for _, p := range parts {
		steps = append(steps, spliceOut(p), complete(p))
	}
	return append(steps, release)
}

// early are bytes that were read before the direction began.
func early(n int) []step {
	return []step{
		func(m *model) { read(n)(m); claimBuffer(m); fill(n)(m) },
		give(0, 1), give(1, n), release, complete(n),
	}
}

// nothing is to find nothing to read.
func nothing(claim step) []step { return []step{claim, release} }

// recovering is what a successor does with a finding, step by step.
func recovering(m *model, f inflight.Finding) []step {
	var steps []step
	count := func(m *model) { m.completed = int(f.Completed) }
	switch {
	case f.From < f.To:
		mid := (f.From + f.To) / 2
		return append(steps, fill(f.To), give(f.From, mid), give(mid, f.To), release, complete(f.To))
	case f.Piped > 0:
		one := min(1, f.Piped)
		return append(steps, count, spliceOut(one), complete(one), spliceOut(f.Piped-one), complete(f.Piped-one), release)
	case f.Discard > 0:
		one := min(1, f.Discard)
		steps = append(steps, discardBytes(one), discardBytes(f.Discard-one))
	}
	return append(steps, release, count)
}

// world is what the kernel says at the death of a process, and what the file knows of it.
type world struct {
	name    string
	source  inflight.Counters
	fin     uint64 // what Gone counts too much
	unknown bool   // nobody knows that it was reset, but by the counters; never while a buffer may hold something
	wiped   bool   // the counters say nothing: we have reset it
}

var worlds = []world{
	{name: "alive"},
	{name: "half-closed", source: inflight.Counters{FinReceived: true}},
	{name: "gone by both FINs", source: inflight.Counters{Gone: true}, fin: 1},
	{name: "reset", source: inflight.Counters{Gone: true, Failed: true}},
	{name: "reset after its FIN", source: inflight.Counters{Gone: true, Failed: true}, fin: 1},
	{name: "reset, and the error was taken a moment ago", source: inflight.Counters{Gone: true}, unknown: true},
	{name: "reset by us", source: inflight.Counters{Gone: true, Failed: true}, wiped: true},
}

func (w world) reset() bool { return w.source.Gone && (w.source.Failed || w.unknown) }

func (w world) trace(m *model) inflight.Trace {
	t := inflight.Trace{
		Hold:      m.hold,
		Bytes:     uint64(m.filled),
		Completed: uint64(m.completed),
		Source:    w.source,
		Receiver:  inflight.Counters{Given: uint64(len(m.given))},
		Reset:     w.reset() && !w.unknown,
	}
	t.Source.Taken = uint64(m.taken) + w.fin
	t.Source.Unread = len(m.stream) - m.taken
	if w.wiped {
		t.Source.Taken -= 1 << 40
		t.Source.Unread = 0
	}
	if m.hold == inflight.HoldPipe {
		t.Bytes = uint64(len(m.pipe))
	}
	return t
}

// A process dies between any two steps of what it does, and its successor between any two
// steps of finding out what that was. Every time the receiver gets the stream.
func TestWhatIsInFlightIsFoundWhereverARelayStops(t *testing.T) {
	t.Parallel()
	for name, steps := range map[string][]step{
		"copy":            copying(20, 20),
		"slow copy":       copying(20, 1, 18, 1),
		"copy one byte":   copying(1, 1),
		"peek":            peeking(20, 20),
		"slow peek":       peeking(20, 1, 18, 1),
		"peek one byte":   peeking(1, 1),
		"splice":          splicing(20, 20),
		"slow splice":     splicing(20, 1, 18, 1),
		"splice one byte": splicing(1, 1),
		"early bytes":     early(9),
		"nothing":         slices.Concat(nothing(claimBuffer), nothing(claimPipe)),
		"all": slices.Concat(early(5), copying(10, 3, 7), peeking(2, 1, 1), splicing(30, 10, 20), nothing(claimBuffer),
			copying(4, 4), copying(1, 1), splicing(1, 1), peeking(7, 3, 4), nothing(claimPipe), copying(3, 1, 2)),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := &model{stream: pattern(100)}
			for i := 0; ; i++ {
				for _, w := range worlds {
					recoverIn(t, fmt.Sprintf("%s, after step %d", w.name, i), w, m.clone(), 2)
				}
				if i == len(steps) {
					break
				}
				steps[i](m)
			}
			if m.taken != m.completed || len(m.given) != m.taken || m.taken == 0 && name != "nothing" {
				t.Errorf("at the end, taken %d, given %d, completed %d", m.taken, len(m.given), m.completed)
			}
		})
	}
}

// pattern returns bytes that are all different.
func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i + 1)
	}
	return b
}

// recoverIn is what a successor does, who also dies after each of its steps while there
// are more.
func recoverIn(t *testing.T, when string, w world, m *model, more int) {
	if w.unknown && m.hold == inflight.HoldBuffer && m.filled == 0 && (m.taken > m.completed || len(m.given) > m.completed) {
		return
	}
	f, err := inflight.Recover(w.trace(m))
	if err != nil {
		t.Errorf("%s: %v", when, err)
		return
	}
	if f.Given != uint64(len(m.given)) {
		t.Errorf("%s: %d bytes were given, not %d", when, len(m.given), f.Given)
	}
	if f.Reset != w.reset() {
		t.Errorf("%s: the source was reset: %v", when, f.Reset)
	}
	if f.Lost {
		if !w.reset() || m.hold != inflight.HoldBuffer || m.filled != 0 {
			t.Errorf("%s: what is in flight is lost", when)
		}
		return
	}
	for i, s := range recovering(m, f) {
		if more > 0 {
			recoverIn(t, fmt.Sprintf("%s, and %d", when, i), w, m.clone(), more-1)
		}
		s(m)
	}
	if m.completed != len(m.given) || m.completed != m.taken || m.hold != inflight.HoldNothing || len(m.pipe) > 0 {
		t.Errorf("%s: at the end, taken %d, given %d, completed %d", when, m.taken, len(m.given), m.completed)
	}
	if got := append(m.given, m.stream[m.taken:]...); !bytes.Equal(got, m.stream) {
		t.Errorf("%s: the receiver gets\n%v", when, got)
	}
}

func TestWhatCannotBeIsNotContinued(t *testing.T) {
	t.Parallel()
	const size = inflight.BufferSize
	type trace = inflight.Trace
	source := func(taken uint64) inflight.Counters { return inflight.Counters{Taken: taken, Unread: 100} }
	given := func(n uint64) inflight.Counters { return inflight.Counters{Given: n} }
	ended := func(n uint64) inflight.Counters { return inflight.Counters{Given: n, FinSent: true} }
	both := func(taken uint64) inflight.Counters { return inflight.Counters{Taken: taken, Gone: true} }
	for name, tr := range map[string]trace{
		"broken":                          {Hold: inflight.HoldBroken},
		"taken, and nothing claimed":      {Source: source(1)},
		"given, and nothing claimed":      {Source: source(10), Receiver: given(11), Completed: 10},
		"completed, and not given":        {Source: source(10), Receiver: given(10), Completed: 11},
		"more not counted than possible":  {Source: source(size + 1), Receiver: given(size + 1)},
		"ended, and taken too much":       {Source: both(12), Receiver: given(10), Completed: 10},
		"ended, and taken too little":     {Source: both(9), Receiver: given(10), Completed: 10},
		"filled, and not taken":           {Hold: inflight.HoldBuffer, Bytes: 5, Source: source(14), Receiver: given(10), Completed: 10},
		"filled, and taken more":          {Hold: inflight.HoldBuffer, Bytes: 5, Source: source(16), Receiver: given(10), Completed: 10},
		"filled, and given more":          {Hold: inflight.HoldBuffer, Bytes: 5, Source: source(15), Receiver: given(16), Completed: 10},
		"filled, and given less":          {Hold: inflight.HoldBuffer, Bytes: 5, Source: source(15), Receiver: given(9), Completed: 10},
		"filled, and the FIN was sent":    {Hold: inflight.HoldBuffer, Bytes: 5, Source: source(15), Receiver: ended(10), Completed: 10},
		"a buffer, and taken too much":    {Hold: inflight.HoldBuffer, Source: source(size + 1)},
		"a buffer, and given too much":    {Hold: inflight.HoldBuffer, Source: source(size + 1), Receiver: given(size + 1)},
		"a buffer, and taken too little":  {Hold: inflight.HoldBuffer, Source: source(9), Receiver: given(10), Completed: 10},
		"a buffer, and given too little":  {Hold: inflight.HoldBuffer, Source: source(10), Receiver: given(9), Completed: 10},
		"copied and given, but not known": {Hold: inflight.HoldBuffer, Source: source(15), Receiver: given(12), Completed: 10},
		"copied, and the FIN was sent":    {Hold: inflight.HoldBuffer, Source: source(15), Receiver: ended(10), Completed: 10},
		"peeked, and nothing is left":     {Hold: inflight.HoldBuffer, Source: source(10), Receiver: given(111), Completed: 10},
		"peeked, and the FIN was sent":    {Hold: inflight.HoldBuffer, Source: source(10), Receiver: ended(12), Completed: 10},
		"a pipe, and taken more":          {Hold: inflight.HoldPipe, Bytes: 5, Source: source(16), Receiver: given(10), Completed: 10},
		"a pipe, and taken less":          {Hold: inflight.HoldPipe, Bytes: 5, Source: source(14), Receiver: given(10), Completed: 10},
		"a pipe, and given less":          {Hold: inflight.HoldPipe, Bytes: 5, Source: source(14), Receiver: given(9), Completed: 10},
		"a pipe, and the FIN was sent":    {Hold: inflight.HoldPipe, Bytes: 5, Source: source(15), Receiver: ended(10), Completed: 10},
		"a pipe of a source that ended":   {Hold: inflight.HoldPipe, Bytes: 5, Source: both(17), Receiver: given(10), Completed: 10},
	} {
		if f, err := inflight.Recover(tr); !errors.Is(err, inflight.ErrContradiction) {
			t.Errorf("%s: %+v, %v", name, f, err)
		}
	}
}

// What nobody will get is not looked for, and what is thrown away is not missed.
func TestADirectionThatIsPastItsEnd(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		trace inflight.Trace
		want  inflight.Finding
	}{
		"thrown away after our FIN": {
			inflight.Trace{Completed: 5, Source: inflight.Counters{Taken: 1000}, Receiver: inflight.Counters{Given: 7, FinSent: true}},
			inflight.Finding{Completed: 7, Given: 7},
		},
		"nothing was read after our FIN": {
			inflight.Trace{Hold: inflight.HoldBuffer, Completed: 5, Source: inflight.Counters{Taken: 5, FinReceived: true}, Receiver: inflight.Counters{Given: 5, FinSent: true}},
			inflight.Finding{Completed: 5, Given: 5},
		},
		"the receiver is gone": {
			inflight.Trace{Hold: inflight.HoldBuffer, Bytes: 8, Completed: 5, Source: inflight.Counters{Taken: 13}, Receiver: inflight.Counters{Given: 1 << 60, Gone: true}},
			inflight.Finding{Completed: 5, Given: 5},
		},
		"both are gone": {
			inflight.Trace{Hold: inflight.HoldPipe, Bytes: 8, Completed: 5, Reset: true, Source: inflight.Counters{Taken: 1, Gone: true}, Receiver: inflight.Counters{Given: 1, Gone: true}},
			inflight.Finding{Completed: 5, Given: 5, Reset: true},
		},
	} {
		if got, err := inflight.Recover(c.trace); err != nil || got != c.want {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
}
