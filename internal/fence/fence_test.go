package fence

import (
	"strings"
	"testing"

	"holdfast/internal/control"
)

// situation is a fence of epoch 5 with two channels, besides one that was closed: the
// highest number.
type situation struct {
	name                 string
	commander, candidate Channel
}

var situations = []situation{
	{"commanded", 1, None},
	{"commanded, prepared", 1, 2},
	{"waiting", None, 2},
	{"seeking", None, None},
}

const closed, last = Channel(3), Channel(3)

func (s situation) fence() *Fence {
	return &Fence{epoch: 5, commander: s.commander, candidate: s.candidate, last: last}
}

// outcome is what an input leads to.
type outcome struct {
	verdict              Verdict
	epoch                uint64
	commander, candidate Channel
}

func (f *Fence) outcome(v Verdict) outcome { return outcome{v, f.epoch, f.commander, f.candidate} }

// The whole product of situations, channels, kinds of messages and epochs.
func TestWhatAMessageMeansDependsOnWhoSaysItAndWithWhatEpoch(t *testing.T) {
	t.Parallel()
	for _, s := range situations {
		for _, from := range []Channel{None, 1, 2, closed, 99} {
			for _, m := range []control.Type{
				control.TypeStatus, control.TypeAdopt, control.TypePrepare, control.TypeObey,
				control.TypeServe, control.TypeDrain, control.TypeStop, control.TypeListeners, control.TypeLogs,
				control.TypeLevel, control.TypeProfile, control.TypeKeep, control.TypeBundle, "riddle", "",
			} {
				for _, epoch := range []uint64{0, 4, 5, 6, 1 << 63} {
					f := s.fence()
					v, err := f.Message(from, m, epoch)
					got, want := f.outcome(v), s.want(from, m, epoch)
					if got != want {
						t.Errorf("%s: %q of epoch %d from %d: got %+v, want %+v", s.name, m, epoch, from, got, want)
					}
					if (err != nil) != (v == Refuse) || err != nil && !strings.Contains(err.Error(), string(m)) {
						t.Errorf("%s: %q of epoch %d from %d: %v with the error %v", s.name, m, epoch, from, v, err)
					}
				}
			}
		}
	}
}

// want says in the words of the protocol what the table says.
func (s situation) want(from Channel, m control.Type, epoch uint64) outcome {
	same := func(v Verdict) outcome { return outcome{v, 5, s.commander, s.candidate} }
	commands := from != None && from == s.commander
	switch {
	case from == None || from != s.commander && from != s.candidate:
		return same(Ignore)
	case m == control.TypeStatus || m == control.TypeAdopt:
		return same(Do)
	case m == control.TypeObey && epoch > 5:
		return outcome{Commit, epoch, from, None}
	case m == control.TypePrepare && epoch > 5 && commands:
		return outcome{Admit, 5, from, last + 1}
	case m == control.TypeObey || m == control.TypePrepare || !commands:
		return same(Refuse)
	}
	return same(Do)
}

func TestTheEndOfAChannelLeavesTheOthers(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		from situation
		c    Channel
		want outcome
	}{
		{situations[0], 1, outcome{Seek, 5, None, None}},
		{situations[0], closed, outcome{Ignore, 5, 1, None}},
		{situations[0], None, outcome{Ignore, 5, 1, None}},
		{situations[1], 1, outcome{Wait, 5, None, 2}},
		{situations[1], 2, outcome{Ignore, 5, 1, None}},
		{situations[1], closed, outcome{Ignore, 5, 1, 2}},
		{situations[1], None, outcome{Ignore, 5, 1, 2}},
		{situations[2], 2, outcome{Seek, 5, None, None}},
		{situations[2], closed, outcome{Ignore, 5, None, 2}},
		{situations[2], None, outcome{Ignore, 5, None, 2}},
		{situations[3], closed, outcome{Ignore, 5, None, None}},
		{situations[3], None, outcome{Ignore, 5, None, None}},
	} {
		f := tt.from.fence()
		if got := f.outcome(f.Ended(tt.c)); got != tt.want {
			t.Errorf("%s, %d ends: got %+v, want %+v", tt.from.name, tt.c, got, tt.want)
		}
	}
}

func TestASupervisorIsFoundOnlyWhereNoneIsLeft(t *testing.T) {
	t.Parallel()
	for _, s := range situations {
		f := s.fence()
		c, ok := f.Found()
		if want := s.name == "seeking"; ok != want || ok != (c != None) {
			t.Errorf("%s: found %d, %v", s.name, c, ok)
		}
		want := outcome{0, 5, s.commander, s.candidate}
		if ok {
			want.candidate = last + 1
		}
		if got := f.outcome(0); got != want {
			t.Errorf("%s: got %+v, want %+v", s.name, got, want)
		}
	}
}

// An upgrade that fails, and one that works: what the channels of the former say later
// does not count.
func TestAnUpgradeThatFailedIsFencedOff(t *testing.T) {
	t.Parallel()
	f := New(1)
	message := func(from Channel, m control.Type, epoch uint64, want Verdict) {
		t.Helper()
		if v, err := f.Message(from, m, epoch); v != want {
			t.Fatalf("%s %d from %d: %v, %v; want %v", m, epoch, from, v, err, want)
		}
	}
	message(First, control.TypePrepare, 2, Admit)
	failed := f.Candidate()
	message(failed, control.TypeAdopt, 0, Do)
	message(First, control.TypeObey, 3, Commit) // it goes on itself
	message(failed, control.TypeObey, 2, Ignore)
	message(failed, control.TypeObey, 9, Ignore)
	message(First, control.TypePrepare, 4, Admit)
	next := f.Candidate()
	message(next, control.TypeObey, 3, Refuse)
	message(next, control.TypeObey, 4, Commit)
	message(First, control.TypeServe, 0, Ignore)
	message(next, control.TypeServe, 0, Do)
	if next == failed || f.Commander() != next || f.Candidate() != None || f.Epoch() != 4 {
		t.Errorf("got %+v", f)
	}
}

func TestVerdictsHaveNames(t *testing.T) {
	t.Parallel()
	for v := range numVerdicts {
		if s := v.String(); s == "" || strings.Contains(s, "(") {
			t.Errorf("verdict %d is called %q", int(v), s)
		}
	}
	if got := numVerdicts.String(); got != "verdict(7)" {
		t.Errorf("got %q", got)
	}
}

// Whatever is said and whatever ends: two channels never command one after the other
// without an obey of a higher epoch between them, epochs only grow, numbers are never
// given twice, and what the fence has let go never counts again.
func FuzzFence(f *testing.F) {
	f.Add([]byte{0x23, 1, 2, 0x30, 2, 2, 0x40, 1, 0})
	f.Add([]byte{0x40, 1, 0, 0x50, 0, 0, 0x30, 2, 9, 0x00, 2, 0})
	f.Add([]byte{0x20, 1, 1, 0x20, 1, 1, 0x30, 2, 5, 0x30, 3, 5, 0x30, 1, 4})
	types := []control.Type{control.TypeStatus, control.TypeDrain, control.TypePrepare, control.TypeObey}
	f.Fuzz(func(t *testing.T, script []byte) {
		fence := New(1)
		gone := map[Channel]bool{None: true} // what the fence has let go
		given := map[Channel]bool{None: true, First: true}
		for ; len(script) >= 3; script = script[3:] {
			before := *fence
			from, epoch := Channel(script[1]%16), uint64(script[2])
			what, v := int(script[0]>>4)%6, Ignore
			switch what {
			case 4:
				v = fence.Ended(from)
			case 5:
				fence.Found()
			default:
				v, _ = fence.Message(from, types[what], epoch)
			}
			wantSound(t, fence)
			commanderNow, candidateNow := fence.Commander(), fence.Candidate()
			switch {
			case fence.Epoch() < before.epoch:
				t.Fatalf("the epoch goes from %d to %d", before.epoch, fence.Epoch())
			case (fence.Epoch() > before.epoch) != (v == Commit):
				t.Fatalf("%v with the epochs %d and %d", v, before.epoch, fence.Epoch())
			case v == Commit && commanderNow != from:
				t.Fatalf("%d is obeyed, %d commands", from, commanderNow)
			case commanderNow != before.commander && commanderNow != None && v != Commit:
				t.Fatalf("%v makes %d command", v, commanderNow)
			case gone[from] && v != Ignore:
				t.Fatalf("%d was let go: %v", from, v)
			case gone[commanderNow] && commanderNow != None || gone[candidateNow] && candidateNow != None:
				t.Fatalf("let go and back: %+v", fence)
			case candidateNow != before.candidate && given[candidateNow] && candidateNow != None:
				t.Fatalf("the number %d is given twice", candidateNow)
			}
			given[candidateNow] = true
			for _, c := range []Channel{before.commander, before.candidate} {
				if c != commanderNow && c != candidateNow {
					gone[c] = true
				}
			}
		}
	})
}

// wantSound checks what always holds.
func wantSound(t *testing.T, f *Fence) {
	t.Helper()
	if f.commander != None && f.commander == f.candidate {
		t.Fatalf("one channel is both: %+v", f)
	}
	commanding := 0
	for c := range f.last + 2 {
		if verdicts[f.role(c)][order] == Do {
			commanding++
		}
	}
	if commanding > 1 || (commanding == 1) != (f.commander != None) {
		t.Fatalf("%d channels command: %+v", commanding, f)
	}
}
