package health

import (
	"errors"

	"holdfast/internal/config"
)

// State is what is known of an endpoint's health.
type State uint8

// The states. The first check decides by itself; from then on the thresholds do.
const (
	Unknown State = iota // no check has ended
	Healthy
	Failing
)

func (s State) String() string { return [...]string{"unknown", "healthy", "failing"}[s] }

// verdict is a state, and how many checks in a row speak against it.
type verdict struct {
	state  State
	streak int64
}

// note takes the result of a check into account. It says whether that changes the state.
func (v *verdict) note(err error, cfg *config.EndpointCheck) (changed bool) {
	to, needed := Healthy, cfg.HealthyThreshold
	if err != nil {
		to, needed = Failing, cfg.UnhealthyThreshold
		if f, ok := errors.AsType[*Failure](err); ok && f.AtOnce {
			needed = 1
		}
	}
	if v.state == to {
		v.streak = 0
		return false
	}
	if v.streak++; v.streak < needed && v.state != Unknown {
		return false
	}
	v.state, v.streak = to, 0
	return true
}

// calm says that nothing speaks against an endpoint that does well.
func (v *verdict) calm() bool { return v.state == Healthy && v.streak == 0 }
