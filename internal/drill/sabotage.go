package drill

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"

	"holdfast/internal/drill/canary"
	"holdfast/internal/supervisor"
)

// sabotages break the promise, in the first round. What the drill then says shows that
// it can see.
var sabotages = map[string]func(*stage, context.Context) error{
	"listener": (*stage).closeListener,
	"byte":     func(s *stage, _ context.Context) error { return s.spoil("byte") },
	"tunnel":   func(s *stage, _ context.Context) error { return s.spoil("tunnel") },
	"vault":    (*stage).closeVault,
}

// closeListener closes the listening sockets in the only way that there is: whoever
// holds one is killed, first the supervisor, which would start others.
func (s *stage) closeListener(ctx context.Context) error {
	if err := s.kill(ctx, s.supervisor.PID); err != nil {
		return err
	}
	for _, pid := range s.living() {
		if err := s.kill(ctx, pid); err != nil && !errors.Is(err, os.ErrProcessDone) {
			return err
		}
	}
	return s.launch()
}

// spoil has a tunnel of the canary spoiled on its way.
func (s *stage) spoil(how string) error {
	_, err := s.canary.Do(canary.Command{Do: "spoil", How: how})
	return err
}

// closeVault kills a generation whose tunnels nobody keeps.
func (s *stage) closeVault(ctx context.Context) error {
	s.config.mortal = true
	if err := s.reload(ctx); err != nil {
		return err
	}
	var serving supervisor.GenerationStatus
	if err := s.until(ctx, "tunnels that nobody keeps", func(ctx context.Context) error {
		status, err := s.status(ctx)
		if err != nil {
			return err
		}
		serving = servingOf(status)
		if mortal := serving.Tunnels - serving.Deposits; mortal < s.tunnels { // others have moved there
			return fmt.Errorf("generation %d has %d tunnels, of which %d are kept", serving.Number, serving.Tunnels, serving.Deposits)
		}
		return nil
	}); err != nil {
		return err
	}
	return s.killGeneration(ctx, serving, syscall.SIGKILL)
}
