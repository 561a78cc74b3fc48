package supervisor

import "fmt"

// state is where a generation is in its life, as the supervisor sees it.
type state int

const (
	_        state = iota
	starting       // started; building what its configuration wants
	ready          // could serve; accepts nothing
	serving        // accepts
	draining       // has been told to stop accepting; finishes what it has
	stopping       // has been told to be gone within a time, or killed
	ended          // the process is gone
	numStates
)

var stateNames = [numStates]string{
	starting: "starting", ready: "ready", serving: "serving",
	draining: "draining", stopping: "stopping", ended: "ended",
}

func (s state) String() string {
	if s > 0 && s < numStates {
		return stateNames[s]
	}
	return fmt.Sprintf("state(%d)", int(s))
}

// event is what can happen to a generation.
type event int

const (
	evReady event = iota // it said so
	evServe              // it accepts: at first, or reinstated
	evDrain              // it was told to stop accepting
	evStop               // it was told to end, or was killed
	evDied               // the kernel said so
	numEvents
)

var eventNames = [numEvents]string{
	evReady: "ready", evServe: "serve", evDrain: "drain", evStop: "stop", evDied: "died",
}

func (e event) String() string {
	if e >= 0 && e < numEvents {
		return eventNames[e]
	}
	return fmt.Sprintf("event(%d)", int(e))
}

// transitions is the whole life of a generation. An empty cell is a refusal: the
// event is not meant for that state, and nothing changes.
var transitions = [numStates][numEvents]state{
	starting: {evReady: ready, evStop: stopping, evDied: ended},
	ready:    {evServe: serving, evDrain: draining, evStop: stopping, evDied: ended}, // drained at once: it resumes tunnels
	serving:  {evDrain: draining, evStop: stopping, evDied: ended},
	// Drained once more: only how long it must stay at hand changes.
	draining: {evServe: serving, evDrain: draining, evStop: stopping, evDied: ended},
	stopping: {evStop: stopping, evDied: ended},
}

// next returns the state after e. ok is false for a refusal.
func (s state) next(e event) (_ state, ok bool) {
	to := transitions[s][e]
	return to, to != 0
}

// stateNamed returns the state that is called so; one that nobody knows is draining,
// which promises nothing.
func stateNamed(name string) state {
	for s := starting; s < ended; s++ {
		if stateNames[s] == name {
			return s
		}
	}
	return draining
}
