package supervisor

import (
	"context"

	"holdfast/internal/control"
)

// tellReadiness has all generations answer health checks as /readyz does, and waits until
// they do. One of an older version does not know how.
func (s *Supervisor) tellReadiness(ctx context.Context) {
	if _, err := s.tellAll(ctx, "the readiness", s.handReadiness); err != nil {
		s.log.Warn("health checks of listeners may be answered as before", "err", err)
	}
}

// handReadiness tells g how to answer health checks, if that is not as it begins with.
func (s *Supervisor) handReadiness(g *generation, send sender) error {
	m := &control.Message{Type: control.TypeReadiness}
	known := false
	s.do(func() {
		switch {
		case s.stopping:
			m.Unready = control.UnreadyStopping
		case s.readyOff:
			m.Unready = control.UnreadyOff
		}
		known = m.Unready == "" && g.state == starting
	})
	if known {
		return nil
	}
	return send(m)
}
