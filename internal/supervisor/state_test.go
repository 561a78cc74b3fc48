package supervisor

import "testing"

// The whole product: what is not listed here must be refused.
func TestEveryEventInEveryState(t *testing.T) {
	allowed := map[state]map[event]state{
		starting: {evReady: ready, evStop: stopping, evDied: ended},
		ready:    {evServe: serving, evDrain: draining, evStop: stopping, evDied: ended},
		serving:  {evDrain: draining, evStop: stopping, evDied: ended},
		draining: {evServe: serving, evDrain: draining, evStop: stopping, evDied: ended},
		stopping: {evStop: stopping, evDied: ended},
		ended:    {},
	}
	for from := starting; from < numStates; from++ {
		for e := event(0); e < numEvents; e++ {
			want, may := allowed[from][e]
			got, ok := from.next(e)
			if ok != may || (ok && got != want) {
				t.Errorf("%s + %s: got %s, %v; want %s, %v", from, e, got, ok, want, may)
			}
		}
	}
}

func TestStatesAndEventsHaveNames(t *testing.T) {
	seen := map[string]bool{}
	for s := starting; s < numStates; s++ {
		if stateNames[s] == "" || seen[s.String()] {
			t.Errorf("state %d is called %q", int(s), s)
		}
		seen[s.String()] = true
	}
	for e := event(0); e < numEvents; e++ {
		if eventNames[e] == "" {
			t.Errorf("event %d has no name", int(e))
		}
	}
	if got := (numStates + 3).String(); got != "state(9)" && got == "" {
		t.Errorf("a number out of range is called %q", got)
	}
}

// A generation that died is never anything else again, and only the kernel ends one.
func TestTheEndIsFinalAndOnlyTheKernelSaysIt(t *testing.T) {
	for s := starting; s < numStates; s++ {
		for e := event(0); e < numEvents; e++ {
			to, ok := s.next(e)
			if s == ended && ok {
				t.Errorf("ended + %s leads to %s", e, to)
			}
			if to == ended && e != evDied {
				t.Errorf("%s + %s ends a generation", s, e)
			}
		}
	}
}
