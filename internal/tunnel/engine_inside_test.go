package tunnel

import (
	"fmt"
	"math"
	"math/rand/v2"
	"reflect"
	"slices"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"holdfast/internal/metrics"
)

func TestASlotIsSmallAndHasNoPointers(t *testing.T) {
	t.Parallel()
	slotSize, labelSize := unsafe.Sizeof(slot{}), unsafe.Sizeof(label{})
	t.Logf("a slot has %d bytes, a label %d", slotSize, labelSize)
	if slotSize > 256 {
		t.Errorf("a slot has %d bytes, want 256 at most", slotSize)
	}
	if hasPointers(reflect.TypeFor[slot]()) {
		t.Error("the garbage collector has to look at slots")
	}
	if chunkSize*slotSize%8192 != 0 || chunkSize*labelSize%8192 != 0 {
		t.Error("chunks are not whole pages of Go's heap")
	}
	// With 2 entries of 16 bytes in the poller.
	if all := slotSize + labelSize + 32; all > 350 {
		t.Errorf("an idle tunnel has %d bytes, want 350 at most", all)
	}
}

func hasPointers(t reflect.Type) bool {
	switch t.Kind() {
	case reflect.Struct:
		for i := range t.NumField() {
			if hasPointers(t.Field(i).Type) {
				return true
			}
		}
		return false
	case reflect.Array:
		return hasPointers(t.Elem())
	case reflect.Bool, reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64,
		reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		return false
	}
	return true
}

// Each phase with each event, also those that must change nothing.
func TestTheEndOfAFlowInAllItsPhases(t *testing.T) {
	t.Parallel()
	names := map[phase]string{
		same: "-", relaying: "relaying", finished: "finished", closing: "closing",
		discarding: "discarding", delivering: "delivering", over: "over",
	}
	got := ""
	for p := relaying; p < numPhases; p++ {
		got += fmt.Sprintf("%-10s", names[p])
		for ev := range numEvents {
			got += fmt.Sprintf(" %-10s", names[transitions[p][ev]])
		}
		got += "\n"
	}
	//           ended      emptied    cut        srcLost    dstLost    givenUp
	const want = `
relaying   finished   -          closing    delivering over       over      
finished   -          -          over       over       over       over      
closing    -          discarding -          -          discarding over      
discarding over       -          -          over       -          over      
delivering over       -          -          -          over       over      
over       -          -          -          -          -          -         
`
	if "\n"+got != want {
		t.Errorf("got\n%s", got)
	}
}

func TestATableTakesLowSlotsFirstAndKeepsTheOrderOfTheStart(t *testing.T) {
	t.Parallel()
	table := newTable()
	var model []uint32 // slots in the order of the start
	random := rand.New(rand.NewPCG(1, 1))
	taken := map[uint32]bool{}
	for number := range uint64(9000) {
		if random.IntN(3) > 0 || len(model) == 0 {
			n, s := table.take()
			for free := range n {
				if !taken[free] {
					t.Fatalf("slot %d was taken though %d is free", n, free)
				}
			}
			s.number, taken[n] = number+1, true
			s.started = time.Duration(number)
			at := len(model)
			if random.IntN(8) == 0 { // it was started before, elsewhere
				at = random.IntN(len(model) + 1)
				s.started = 0
				if at > 0 {
					s.started = table.at(model[at-1]).started
				}
				for at < len(model) && table.at(model[at]).started == s.started {
					at++
				}
			}
			table.join(n)
			model = slices.Insert(model, at, n)
		} else {
			i := random.IntN(len(model))
			table.retire(model[i])
			table.release(model[i])
			delete(taken, model[i])
			model = slices.Delete(model, i, i+1)
		}
		if number%500 == 0 {
			table.trim()
		}
	}
	var order []uint32
	for n := range table.all() {
		order = append(order, n)
	}
	if !slices.Equal(order, model) || table.used != len(model) {
		t.Error("the order of the start is lost")
	}
	inChunks := 0
	for c := range table.chunks {
		for range table.inChunk(c) {
			inChunks++
		}
	}
	if inChunks != len(model) {
		t.Errorf("%d tunnels are in the chunks, want %d", inChunks, len(model))
	}
	for _, n := range model {
		table.retire(n)
		if at, _ := table.take(); at == n {
			t.Error("a slot is taken before it is free")
		} else {
			table.at(at).number = 1
			table.join(at)
			table.retire(at)
			table.release(at)
		}
		table.release(n)
	}
	if table.trim(); len(table.chunks) != 0 || table.oldest != nobody || table.newest != nobody {
		t.Errorf("%d chunks are left of an empty table", len(table.chunks))
	}
}

func TestOriginsAreKeptOnceAndCountedOncePerTurn(t *testing.T) {
	t.Parallel()
	registry := metrics.NewRegistry()
	m := newSetMetrics(registry)
	o := newOrigins(&m, new(Verdict))
	var mine, both metrics.Counter
	a := &Origin{UpBytes: []*metrics.Counter{&mine, &both}}
	b := &Origin{UpBytes: []*metrics.Counter{&both}, DownBytes: []*metrics.Counter{&both}}
	first, second := o.take(a), o.take(b)
	if o.take(a) != first || first == second {
		t.Fatal("an origin has two numbers, or two have one")
	}
	o.moved(first, down, 1)
	o.moved(first, down, 2)
	o.moved(second, down, 10)
	o.moved(second, up, 100)
	if m.toUpstream.Value() != 0 {
		t.Error("counted before the end of the turn")
	}
	o.flush()
	o.flush()
	o.moved(second, up, 1000)
	o.release(second) // nothing may get lost
	if n := o.take(new(Origin)); n != second {
		t.Errorf("number %d was taken, want %d again", n, second)
	}
	o.flush()
	if up, down := m.toUpstream.Value(), m.toDownstream.Value(); up != 13 || down != 1100 {
		t.Errorf("counted %d and %d in all, want 13 and 1100", up, down)
	}
	if mine.Value() != 3 || both.Value() != 1113 {
		t.Errorf("counted %d and %d, want 3 and 1113", mine.Value(), both.Value())
	}
}

func TestWhoIsSilentAndWasAskedIsDead(t *testing.T) {
	t.Parallel()
	const patience = 60 * time.Second
	type look struct {
		at                  int // seconds
		lastAck             int // seconds before
		retransmits, probes uint8
		want                bool
	}
	for name, looks := range map[string][]look{
		"bytes that nobody acknowledges":              {{10, 12, 3, 0, false}, {20, 22, 4, 0, false}, {69, 71, 5, 0, false}, {70, 72, 6, 0, true}},
		"probes that nobody answers":                  {{10, 10, 0, 2, false}, {40, 40, 0, 3, false}, {75, 75, 0, 4, true}},
		"one that does not read, whose probe is rare": {{10, 5, 0, 0, false}, {60, 55, 0, 0, false}, {90, 85, 0, 0, false}, {120, 115, 0, 1, false}, {130, 9, 0, 0, false}},
		"the first bytes after an hour, one lost":     {{10, 3600, 1, 0, false}, {20, 3610, 1, 0, false}, {30, 1, 0, 0, false}},
		"answers between the looks":                   {{10, 9, 1, 0, false}, {80, 60, 1, 0, false}, {130, 55, 1, 0, false}, {141, 66, 1, 0, true}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var s silence
			for _, l := range looks {
				info := unix.TCPInfo{Last_ack_recv: uint32(l.lastAck * 1000), Retransmits: l.retransmits, Probes: l.probes}
				if got := s.dead(&info, time.Duration(l.at)*time.Second, patience); got != l.want {
					t.Errorf("after %d s: %t, want %t", l.at, got, l.want)
				}
			}
		})
	}
}

// What comes up while a sweep is under way, which may take several turns, must neither
// set the timer that goes on with it nor be forgotten.
func TestASweepPlansTheNextOneAtItsEnd(t *testing.T) {
	t.Parallel()
	var set []time.Duration
	s := sweeps{set: func(at time.Duration) { set = append(set, at) }}
	s.by(100)
	s.by(200) // later: the one at 100 will see
	s.by(0)
	s.by(50)
	s.begin()
	s.seen(900)
	s.by(700)
	s.seen(800)
	set = append(set, -1)
	s.end(60, 10)
	s.by(710)
	s.begin()
	s.seen(701)
	s.end(700, 10)
	s.begin()
	s.end(720, 10) // nothing is due ever
	if want := []time.Duration{100, 50, -1, 700, 710}; !slices.Equal(set, want) {
		t.Errorf("sweeps at %d, want %d", set, want)
	}
}

func TestAnIDComesBackAsItWas(t *testing.T) {
	t.Parallel()
	e := &engine{ids: map[uint32]string{}}
	for _, id := range []string{
		"", "x", "0190163d-8694-739b-aea5-966c26f8ad91", "ffffffff-ffff-ffff-ffff-ffffffffffff",
		"0190163D-8694-739b-aea5-966c26f8ad91", "0190163d-8694-739b-aea5-966c26f8ad9", "0190163d-8694-739b-aea5-966c26f8ad911",
		"0190163d:8694-739b-aea5-966c26f8ad91", "0190163d-8694-739b-aea5-966c26f8ad9-", "0190163d-8694-739b-aea5-966c26f8ad9g",
	} {
		var s slot
		e.setID(7, &s, id)
		if got := e.id(7, &s); got != id {
			t.Errorf("%q became %q", id, got)
		}
	}
	if _, ok := parseUUID("0190163d-8694-739b-aea5-966c26f8ad91"); !ok {
		t.Error("a UUID is not taken for one")
	}
}

// Whatever a tunnel's counters are counted from is found again, and nothing of it by the
// next one in its place.
func TestABaseIsKeptWhateverItsSize(t *testing.T) {
	t.Parallel()
	table := newTable()
	n, _ := table.take()
	for _, want := range []base{
		{},
		{taken: [2]uint64{1, 2}, given: [2]uint64{3, 4}, moved: [2]uint64{5, math.MaxUint32}},
		{given: [2]uint64{0, math.MaxUint32 + 1}},
		{taken: [2]uint64{math.MaxUint64 - 1}}, // fewer were counted than were found in flight
		{moved: [2]uint64{7, 1 << 40}},
		{taken: [2]uint64{9, 9}},
	} {
		if table.at(n).based {
			t.Fatal("it has the base of another")
		}
		table.join(n)
		table.setBase(n, want)
		if got := table.base(n); got != want || !table.at(n).based {
			t.Errorf("got %v, want %v", got, want)
		}
		table.retire(n)
		table.release(n)
		if again, _ := table.take(); again != n {
			t.Fatalf("slot %d, want %d", again, n)
		}
	}
	if len(table.large) != 0 {
		t.Errorf("%d are left", len(table.large))
	}
}
