package drill

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"syscall"
	"time"

	"holdfast/internal/drill/canary"
	"holdfast/internal/supervisor"
)

const (
	// stormKills is how many generations a storm kills, and stormPause the longest time
	// between two of them: most processes that it meets are in the middle of something.
	stormKills = 12
	stormPause = 100 * time.Millisecond
)

// storm kills one generation after the other, whatever they are doing, also those that
// were started just then to replace others and to resume their tunnels. Meanwhile it has
// tunnels moved, and the service reloaded and upgraded.
func (s *stage) storm(ctx context.Context) error {
	if _, err := s.canary.Do(canary.Command{Do: "storm"}); err != nil {
		return err
	}
	w := weather{stage: s}
	var wrong error
	for n := 0; n < stormKills && wrong == nil && ctx.Err() == nil; n++ {
		wrong = w.strike(ctx)
	}
	wrong = errors.Join(wrong, w.clearUp())
	if wrong == nil {
		wrong = s.settle(ctx, true)
	}
	_, err := s.canary.Do(canary.Command{Do: "calm"})
	return errors.Join(wrong, err)
}

// weather is what goes on in a storm beside the kills.
type weather struct {
	*stage
	command string // that is under way; "": none
	said    <-chan error
}

// strike kills a generation.
func (w *weather) strike(ctx context.Context) error {
	status, victims, err := w.victims(ctx)
	if err != nil {
		return err
	}
	if err := w.change(ctx, status); err != nil {
		return err
	}
	w.within(stormPause)
	victim := victims[w.random.IntN(len(victims))]
	sig := syscall.SIGKILL
	// Faults hit who serves. What another has resumed after a fault may be under
	// suspicion, and another fault would be its end.
	if victim.State == "serving" && w.random.IntN(8) == 0 {
		sig = syscall.SIGSEGV
	}
	if err := w.end(victim.PID, sig); err != nil {
		return unlessEnded(err)
	}
	w.kills.note(victim.State, sig, w.command, status.Vault.Bereft > 0)
	return nil
}

// victims are the generations that live and were not killed yet.
func (w *weather) victims(ctx context.Context) (status *supervisor.Status, victims []supervisor.GenerationStatus, err error) {
	err = w.until(ctx, "a generation that can be killed", func(ctx context.Context) error {
		status, err = w.status(ctx)
		if err != nil {
			return err
		}
		w.mu.Lock()
		victims = slices.DeleteFunc(slices.Clone(status.Generations), func(g supervisor.GenerationStatus) bool {
			return w.processes[g.PID] == nil || w.killed[g.PID]
		})
		w.mu.Unlock()
		if len(victims) == 0 {
			return errors.New("there is none")
		}
		return nil
	})
	return status, victims, err
}

// change begins something, now and then, if nothing is under way.
func (w *weather) change(ctx context.Context, status *supervisor.Status) error {
	if w.command != "" {
		select {
		case err := <-w.said:
			w.command = ""
			return err
		default:
			return nil
		}
	}
	switch w.random.IntN(6) {
	case 0:
		w.config.change(w.random)
		if err := w.writeConfig(w.config.String()); err != nil {
			return err
		}
		w.have(ctx, "reload")
	case 1:
		w.have(ctx, "upgrade")
	case 2:
		g := status.Generations[w.random.IntN(len(status.Generations))]
		w.have(ctx, "move", "--generation", strconv.Itoa(g.Number))
	}
	return nil
}

func (w *weather) have(ctx context.Context, command ...string) {
	w.command, w.said = command[0], w.begun(ctx, command...)
}

// clearUp waits for what is under way.
func (w *weather) clearUp() error {
	if w.command == "" {
		return nil
	}
	return <-w.said
}

// Kills is how many processes were killed, and in the middle of what.
type Kills struct {
	Supervisors int `json:"supervisors"`
	Starting    int `json:"starting"` // generations, by their states
	Serving     int `json:"serving"`
	Draining    int `json:"draining"`
	Faults      int `json:"faults"` // of these: they were made to crash

	During map[string]int `json:"during,omitempty"` // of the generations, by command
	Bereft int            `json:"bereft,omitempty"` // of the generations: while tunnels of others had no process
}

// note counts a generation.
func (k *Kills) note(state string, sig os.Signal, command string, bereft bool) {
	switch state {
	case "serving":
		k.Serving++
	case "draining":
		k.Draining++
	default:
		k.Starting++
	}
	if sig != syscall.SIGKILL {
		k.Faults++
	}
	if command != "" {
		if k.During == nil {
			k.During = make(map[string]int)
		}
		k.During[command]++
	}
	if bereft {
		k.Bereft++
	}
}

// Generations is how many of them.
func (k *Kills) Generations() int { return k.Starting + k.Serving + k.Draining }

func (k *Kills) String() string {
	return fmt.Sprintf("Killed: %d supervisors; %d generations that served, %d that drained and %d that were starting,\n"+
		"%d of them by a fault, %d during a reload, %d during an upgrade, %d while tunnels were moved,\n%d while tunnels of another one had no process.",
		k.Supervisors, k.Serving, k.Draining, k.Starting, k.Faults, k.During["reload"], k.During["upgrade"], k.During["move"], k.Bereft)
}
