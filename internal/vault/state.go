package vault

import "fmt"

// state is where a tunnel is, as its deposit in a generation's name tells.
type state int

const (
	_       state = iota
	absent        // not here: not deposited, or not any more
	kept          // its generation relays it; or is dead, and this is what is left
	asked         // it stands still, and another generation was asked to take it
	left          // the same, and its generation has withdrawn it meanwhile
	waiting       // it stands still since the time of an earlier vault; others may have it
	numStates
)

var stateNames = [numStates]string{
	absent: "absent", kept: "kept", asked: "asked", left: "left", waiting: "waiting",
}

func (s state) String() string {
	if s > 0 && s < numStates {
		return stateNames[s]
	}
	return fmt.Sprintf("state(%d)", int(s))
}

// event is what can happen to a tunnel.
type event int

const (
	evDeposited event = iota // its generation relays it
	evRestated               // its generation has released it, and has had no answer
	evWithdrawn              // it has ended
	evAsked                  // it was released, and another generation is asked
	evTaken                  // that has taken it
	evDeclined               // that has not, and never will
	evFound                  // another generation has it since before
	evUnclaimed              // no other generation has it
	numEvents
)

var eventNames = [numEvents]string{
	evDeposited: "deposited", evRestated: "restated", evWithdrawn: "withdrawn", evAsked: "asked",
	evTaken: "taken", evDeclined: "declined", evFound: "found", evUnclaimed: "unclaimed",
}

func (e event) String() string {
	if e >= 0 && e < numEvents {
		return eventNames[e]
	}
	return fmt.Sprintf("event(%d)", int(e))
}

// transitions is the whole life of a deposit. An empty cell is a refusal: the event is
// not meant for that state, and nothing changes. A tunnel that was taken begins another
// life, as kept, in the name of the generation that has it then.
var transitions = [numStates][numEvents]state{
	// What was refused may be withdrawn before its generation has read so.
	absent: {evDeposited: kept, evRestated: waiting, evWithdrawn: absent},
	kept:   {evDeposited: kept, evRestated: waiting, evWithdrawn: absent, evAsked: asked},
	// Whether it relays the tunnel is not its generation's to say.
	asked: {evRestated: asked, evWithdrawn: left, evTaken: absent, evDeclined: kept},
	left:  {evTaken: absent, evDeclined: absent},
	// Who releases it has had an answer, perhaps of an earlier vault: it relays it.
	waiting: {evDeposited: kept, evRestated: waiting, evWithdrawn: absent, evAsked: asked, evFound: absent, evUnclaimed: kept},
}

// next returns the state after e. ok is false for a refusal.
func (s state) next(e event) (_ state, ok bool) {
	to := transitions[s][e]
	return to, to != 0
}
