package drill

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"syscall"
	"time"

	"holdfast/internal/supervisor"
)

// A kind of round is something that befalls the instance.
type kind struct {
	name string
	do   func(*stage, context.Context) error

	// mend: it may leave a file that does not serve, because the reload, or the
	// generation that served it, was killed.
	mend bool
}

var kinds = []kind{
	{name: "reload", do: (*stage).reload},
	{name: "reload refused", do: (*stage).reloadRefused},
	{name: "upgrade", do: (*stage).upgrade},
	{name: "reload during an upgrade", do: (*stage).reloadDuringUpgrade, mend: true},
	{name: "supervisor killed", do: (*stage).killSupervisor},
	{name: "supervisor killed, and its successor", do: (*stage).killSuccessor},
	{name: "supervisor killed during a reload", do: (*stage).killDuringReload, mend: true},
	{name: "supervisor killed during an upgrade", do: (*stage).killDuringUpgrade},
	{name: "supervisor stopped for a moment", do: (*stage).stopSupervisor},
	{name: "serving generation killed after a reload", do: (*stage).killServing, mend: true},
	{name: "serving generation crashed", do: (*stage).crashServing, mend: true},
	{name: "draining generation killed", do: (*stage).killDraining},
	{name: "draining generation killed during an upgrade", do: (*stage).killDrainingDuringUpgrade},
	{name: "tunnels moved", do: (*stage).moveTunnels},
	{name: "generation killed while tunnels are moved", do: (*stage).killDuringMove, mend: true},
	{name: "generations killed in a storm", do: (*stage).storm, mend: true},
}

// between is the longest time between two rounds.
const between = 300 * time.Millisecond

// deck gives each kind once, in random order, before any comes again.
type deck struct {
	random *rand.Rand
	all    []int
	left   []int
	given  int
}

// newDeck has the kinds of these names, as often as they are named, or all where none
// is.
func newDeck(random *rand.Rand, only []string) *deck {
	d := &deck{random: random}
	for i, k := range kinds {
		if len(only) == 0 {
			d.all = append(d.all, i)
		}
		for _, name := range only {
			if name == k.name {
				d.all = append(d.all, i)
			}
		}
	}
	return d
}

func (d *deck) next() int {
	if len(d.left) == 0 {
		d.left = slices.Clone(d.all)
		d.random.Shuffle(len(d.left), func(i, j int) { d.left[i], d.left[j] = d.left[j], d.left[i] })
	}
	k := d.left[0]
	d.left = d.left[1:]
	d.given++
	return k
}

// through says whether each kind has come once.
func (d *deck) through() bool { return d.given >= len(d.all) }

// within is a random time, so that what happens hits others at all kinds of moments.
func (s *stage) within(most time.Duration) { time.Sleep(time.Duration(s.random.Int64N(int64(most)))) }

// reload puts another configuration into service.
func (s *stage) reload(ctx context.Context) error {
	s.config.change(s.random)
	if err := s.writeConfig(s.config.String()); err != nil {
		return err
	}
	if code, said := s.holdfast(ctx, "reload"); code != 0 {
		return fmt.Errorf("reload: exit code %d: %s", code, said)
	}
	return s.checkMark(ctx)
}

// reloadRefused tries to put a broken file into service.
func (s *stage) reloadRefused(ctx context.Context) error {
	before, err := s.status(ctx)
	if err != nil {
		return err
	}
	broken := s.config.broken()
	if err := s.writeConfig(broken[s.random.IntN(len(broken))]); err != nil {
		return err
	}
	code, said := s.holdfast(ctx, "reload")
	if code != 1 && code != 2 {
		return fmt.Errorf("reload of a broken file: exit code %d: %s", code, said)
	}
	if err := s.writeConfig(s.config.String()); err != nil {
		return err
	}
	after, err := s.status(ctx)
	if err != nil {
		return err
	}
	if a, b := servingOf(before), servingOf(after); a.PID != b.PID {
		return fmt.Errorf("generation %d served before a refused reload, and %d after it", a.Number, b.Number)
	}
	return nil
}

// upgrade replaces the supervisor.
func (s *stage) upgrade(ctx context.Context) error {
	before := s.supervisor.PID
	if code, said := s.holdfast(ctx, "upgrade"); code != 0 {
		return fmt.Errorf("upgrade: exit code %d: %s", code, said)
	}
	if err := s.awaitEnd(ctx, before); err != nil {
		return err
	}
	after, err := s.status(ctx)
	if err == nil && after.PID == before {
		err = errors.New("the old supervisor commands after an upgrade")
	}
	return err
}

// killSupervisor kills it and starts another, as systemd does.
func (s *stage) killSupervisor(ctx context.Context) error {
	if err := s.kill(ctx, s.supervisor.PID); err != nil {
		return err
	}
	s.kills.Supervisors++
	s.within(400 * time.Millisecond)
	return s.launch()
}

// killSuccessor also kills the one that comes next, while it finds out what there is.
func (s *stage) killSuccessor(ctx context.Context) error {
	if err := s.killSupervisor(ctx); err != nil {
		return err
	}
	s.within(200 * time.Millisecond)
	s.launched.Kill()
	s.kills.Supervisors++
	return s.launch()
}

// killDuringReload kills the supervisor at any moment of a reload.
func (s *stage) killDuringReload(ctx context.Context) error {
	s.config.change(s.random)
	if err := s.writeConfig(s.config.String()); err != nil {
		return err
	}
	said := s.begun(ctx, "reload")
	s.within(100 * time.Millisecond)
	return errors.Join(s.killSupervisor(ctx), <-said)
}

// killDuringUpgrade kills the old supervisor at any moment of an upgrade. Whether there
// is a new one afterwards, that commands, depends on the moment.
func (s *stage) killDuringUpgrade(ctx context.Context) error {
	said := s.begun(ctx, "upgrade")
	s.within(150 * time.Millisecond)
	err := s.kill(ctx, s.supervisor.PID)
	if err == nil {
		s.kills.Supervisors++
	}
	return errors.Join(unlessEnded(err), <-said) // it may have been relieved before
}

// reloadDuringUpgrade commands both at once. Each may be refused.
func (s *stage) reloadDuringUpgrade(ctx context.Context) error {
	s.config.change(s.random)
	if err := s.writeConfig(s.config.String()); err != nil {
		return err
	}
	first, second := "reload", "upgrade"
	if s.random.IntN(2) == 0 {
		first, second = second, first
	}
	said := s.begun(ctx, first)
	s.within(100 * time.Millisecond)
	return errors.Join(<-s.begun(ctx, second), <-said)
}

// begun begins a command that may be done, refused or cut short. The error is that it
// was something else.
func (s *stage) begun(ctx context.Context, command ...string) <-chan error {
	said := make(chan error, 1)
	go func() {
		code, text := s.holdfast(ctx, command...)
		if code != 0 && code != 1 && code != 3 {
			said <- fmt.Errorf("%s: exit code %d: %s", command, code, text)
		}
		close(said)
	}()
	return said
}

// stopSupervisor has it stand still. A reload that comes meanwhile waits.
func (s *stage) stopSupervisor(ctx context.Context) error {
	pid := s.supervisor.PID
	if err := s.signal(pid, syscall.SIGSTOP); err != nil {
		return err
	}
	said := make(chan error, 1)
	go func() { said <- s.reload(ctx) }()
	time.Sleep(300 * time.Millisecond)
	return errors.Join(s.signal(pid, syscall.SIGCONT), <-said)
}

// killServing kills the generation that has just come into service.
func (s *stage) killServing(ctx context.Context) error {
	g, err := s.serveAnother(ctx)
	if err != nil {
		return err
	}
	return s.killGeneration(ctx, g, syscall.SIGKILL)
}

// crashServing has it end by a fault.
func (s *stage) crashServing(ctx context.Context) error {
	g, err := s.serveAnother(ctx)
	if err != nil {
		return err
	}
	return s.killGeneration(ctx, g, syscall.SIGSEGV)
}

// serveAnother has another generation serve, and returns it after a moment.
func (s *stage) serveAnother(ctx context.Context) (g supervisor.GenerationStatus, err error) {
	if err := s.reload(ctx); err != nil {
		return g, err
	}
	s.within(400 * time.Millisecond)
	status, err := s.status(ctx)
	if err != nil {
		return g, err
	}
	return servingOf(status), nil
}

// killDraining kills one of the generations that drain.
func (s *stage) killDraining(ctx context.Context) error {
	g, err := s.drainOne(ctx)
	if err != nil {
		return err
	}
	return unlessEnded(s.killGeneration(ctx, g, syscall.SIGKILL))
}

// killDrainingDuringUpgrade does so at any moment of an upgrade, which may be refused
// then.
func (s *stage) killDrainingDuringUpgrade(ctx context.Context) error {
	g, err := s.drainOne(ctx)
	if err != nil {
		return err
	}
	said := s.begun(ctx, "upgrade")
	s.within(150 * time.Millisecond)
	return errors.Join(unlessEnded(s.killGeneration(ctx, g, syscall.SIGKILL)), <-said)
}

// moveTunnels has a generation that drains pass its tunnels to the one that serves. So
// it ends.
func (s *stage) moveTunnels(ctx context.Context) error {
	g, err := s.drainOne(ctx)
	if err != nil {
		return err
	}
	if err := s.move(ctx, g); err != nil {
		return err
	}
	return s.awaitEnd(ctx, g.PID)
}

// killDuringMove kills, while tunnels are passed on, the generation that has them or
// the one that gets them.
func (s *stage) killDuringMove(ctx context.Context) error {
	g, err := s.drainOne(ctx)
	if err != nil {
		return err
	}
	if err := s.move(ctx, g); err != nil {
		return err
	}
	s.within(20 * time.Millisecond)
	if s.random.IntN(2) == 0 {
		status, err := s.status(ctx)
		if err != nil {
			return err
		}
		g = servingOf(status)
	}
	return unlessEnded(s.killGeneration(ctx, g, syscall.SIGKILL))
}

// move has g's tunnels moved. That is refused until the generation that serves has
// passed its probation, and once g has ended.
func (s *stage) move(ctx context.Context, g supervisor.GenerationStatus) error {
	return s.until(ctx, "tunnels to be moved", func(ctx context.Context) error {
		code, said := s.holdfast(ctx, "move", "--generation", strconv.Itoa(g.Number))
		if code == 0 || s.lives(g.PID) != nil {
			return nil
		}
		return fmt.Errorf("move: exit code %d: %s", code, said)
	})
}

// drainOne has a generation drain and returns one that does, or an empty one where none
// has anything left to do.
func (s *stage) drainOne(ctx context.Context) (g supervisor.GenerationStatus, err error) {
	if err := s.reload(ctx); err != nil {
		return g, err
	}
	status, err := s.status(ctx)
	if err != nil {
		return g, err
	}
	draining := slices.DeleteFunc(status.Generations, func(g supervisor.GenerationStatus) bool { return g.State != "draining" })
	if len(draining) == 0 {
		return g, nil
	}
	return draining[s.random.IntN(len(draining))], nil
}

// unlessEnded leaves out that a process could not be killed because it had ended, as
// those do that have nothing left to do.
func unlessEnded(err error) error {
	if errors.Is(err, os.ErrProcessDone) {
		return nil
	}
	return err
}

// servingOf returns the generation that serves, or an empty one.
func servingOf(s *supervisor.Status) supervisor.GenerationStatus {
	for _, g := range s.Generations {
		if g.State == "serving" {
			return g
		}
	}
	return supervisor.GenerationStatus{}
}
