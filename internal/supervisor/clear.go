package supervisor

import (
	"context"
	"errors"
	"fmt"
	"time"

	"holdfast/internal/control"
)

// Clear implements [Commands].
func (s *Supervisor) Clear(ctx context.Context, number int, within time.Duration) error {
	var g *generation
	var refused error
	if err := s.change(ctx, func() {
		g = s.living[number]
		switch {
		case g == nil:
			refused = notFound(number)
		case g == s.serving:
			refused = fmt.Errorf("generation %d serves: it drains when another one does, after a reload or a rollback", number)
		case g.state != draining:
			refused = fmt.Errorf("generation %d is %s", number, g.state)
		case s.probation != nil && s.probation.fallback == g:
			refused = fmt.Errorf("generation %d stays at hand until %s: generation %d, which serves, is on probation until then",
				number, s.probation.until.Format(time.TimeOnly), s.serving.number)
		case !g.canBeCleared():
			refused = fmt.Errorf("generation %d is of a build that does not know how", number)
		}
	}); err != nil {
		return err
	}
	if refused != nil {
		return refused
	}
	_, err := g.ask(ctx, control.Message{Type: control.TypeClear, Within: within}, answerTimeout)
	if errors.Is(err, errSilent) {
		return fmt.Errorf("%w: %w", err, ErrUnanswered)
	}
	if err == nil {
		g.log.Info("generation is to be empty", "within", within)
	}
	return err
}

// canBeCleared says whether its build knows how.
func (g *generation) canBeCleared() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.clearVersion == control.ClearVersion
}
