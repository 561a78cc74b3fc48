package supervisor

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/control"
	"holdfast/internal/ledger"
	"holdfast/internal/tickets"
)

// The keys of session tickets. All generations have the same, so that the next one goes on with
// the TLS sessions of the one before, and a replacement with those of a dead one. They are kept
// as long as any generation lives, or the service manager has what was left with it, whatever
// becomes of supervisors.
//
// Which keys there are at which time is package tickets' affair. Here they are written down, told
// to every generation, and rotated. No generation makes tickets that another one does not
// understand: the key that is used next is part of what each has, so nothing has to happen at the
// same time, and a rotation waits for those that have not confirmed what there is.

const (
	// ticketsLook bounds how long nobody looks whether a rotation is due: timers stand still
	// while the machine sleeps, and the clock of the keys does not.
	ticketsLook = time.Minute

	// ticketsPatience is how long a rotation waits for generations that do not confirm what they
	// were told, and condemnedPatience the same where the keys are to be gone.
	ticketsPatience   = 10 * time.Minute
	condemnedPatience = 2 * time.Second

	// dropTimeout is how long a command to that end waits for all to have done so.
	dropTimeout = 2 * condemnedPatience
)

// ticketing is the part of the supervisor that does so.
type ticketing struct {
	wake chan struct{} // has room for one: something has changed

	// Owned by the loop.
	keys     tickets.Keys
	revision uint64        // grows with every change of keys
	rotation time.Duration // how often they are rotated; 0: nothing has served yet
	running  bool
	changed  chan struct{} // closed when there are other keys, or a generation has confirmed some
	waiting  time.Duration // since when, by uptime, a rotation waits for generations; 0: none does
}

func newTicketing() ticketing {
	return ticketing{wake: make(chan struct{}, 1), changed: make(chan struct{})}
}

// turned tells who waits for it that something has changed. Called in the loop.
func (t *ticketing) turned() {
	close(t.changed)
	t.changed = make(chan struct{})
}

// sharesTickets says whether g is of a build that takes ticket keys as this one gives them.
func (g *generation) sharesTickets() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.ticketsVersion == control.TicketsVersion
}

// ticketsIn reads what a supervisor has kept. The descriptor stays its owner's.
func ticketsIn(fd int, now time.Duration) (tickets.Keys, error) {
	var b []byte
	if _, err := ledger.Read(fd, &b); err != nil {
		return tickets.Keys{}, err
	}
	return tickets.Parse(b, now)
}

// ticketsOf looks for the keys of an earlier supervisor with the generations that it has left,
// where nobody else had them. lost: there are none, but there were.
func (s *Supervisor) ticketsOf(in *inheritance) (found tickets.Keys, lost bool) {
	if in.tickets.Known() {
		return in.tickets, false
	}
	lost = in.ticketsKept
	for _, v := range in.visitors {
		lost = lost || v.report.Tickets == control.TicketsVersion
		if fd, there := v.kept[control.KeptTickets]; there {
			k, err := ticketsIn(fd, s.kernel.uptime()) // what is wrong with it was logged
			if err == nil && (!found.Known() || k.Rotations() > found.Rotations()) {
				found = k
			}
		}
	}
	return found, lost
}

// takeTickets goes on with the keys of an earlier supervisor, or begins with new ones. lost: there
// must have been others. Called in the loop.
func (s *Supervisor) takeTickets(found tickets.Keys, lost bool) {
	if !found.Known() {
		found = tickets.New(s.kernel.uptime())
		if lost {
			s.stats.ticketsLost.Inc()
			s.log.Error("the keys of session tickets are lost: others are made, and TLS sessions that were begun before are not resumed")
		}
	}
	s.setTickets(found)
}

// setTickets has these keys hold. They are written down before any generation hears of them, and
// twice: nothing is left then of those that are gone. Called in the loop.
func (s *Supervisor) setTickets(k tickets.Keys) {
	s.tickets.keys = k
	s.tickets.revision++
	s.tickets.turned()
	record := k.Record()
	if err := errors.Join(s.estate.tickets.Write(record), s.estate.tickets.Write(record)); err != nil {
		s.log.Error("the keys of session tickets are not kept for a successor", "err", err)
	}
	s.spreadTickets()
}

// spreadTickets has those generations hear of the keys that have not yet. One that is starting is
// told before it is ready, one without a channel when it is adopted. Called in the loop.
func (s *Supervisor) spreadTickets() {
	if s.succeeded || s.stopping {
		return
	}
	shared := false
	for _, g := range s.living {
		shared = shared || g.sharesTickets()
		if !g.tellingTickets && s.untoldTickets(g) {
			g.tellingTickets = true
			s.workers.Go(func() { s.tellTicketsUntilTold(g) })
		}
	}
	if shared && !s.tickets.running {
		s.tickets.running = true
		s.workers.Go(s.keepTickets)
	}
	offer(s.tickets.wake, struct{}{})
}

// untoldTickets says whether g could be told of the keys that there are, and has not been. Called
// in the loop.
func (s *Supervisor) untoldTickets(g *generation) bool {
	ch, _ := g.channel()
	return g.state != starting && g.state != ended && ch != (unattached{}) && g.ticketsTold < s.tickets.revision && g.sharesTickets()
}

// tellTicketsUntilTold ends when g has confirmed which keys there are, or cannot be told any more.
func (s *Supervisor) tellTicketsUntilTold(g *generation) {
	for attempt := 2; ; attempt++ {
		err := s.tellTickets(g, g.asking(s.work))
		again := false
		s.do(func() {
			again = s.untoldTickets(g) && !s.succeeded && !s.stopping
			g.tellingTickets = again
		})
		switch {
		case !again:
			offer(s.tickets.wake, struct{}{})
			return
		case err == nil:
			attempt = 1 // there are others meanwhile
			continue
		case attempt == 2:
			g.log.Warn("generation has not confirmed the keys of session tickets; it is told again", "err", err)
		}
		if !sleep(s.work, backOff(attempt)) {
			return
		}
	}
}

// tellTickets sends g the keys that there are. Nobody else does so meanwhile, so that none come
// after later ones.
func (s *Supervisor) tellTickets(g *generation, send sender) error {
	if !g.sharesTickets() {
		return nil
	}
	g.ticketing <- struct{}{}
	defer func() { <-g.ticketing }()
	var keys tickets.Keys
	var revision uint64
	current := false
	s.do(func() {
		keys, revision = s.tickets.keys, s.tickets.revision
		current = g.ticketsTold == revision
	})
	if current || !keys.Known() {
		return nil
	}
	payload, err := control.Bytes(control.TicketKeys(keys.All()))
	if err != nil {
		return err
	}
	defer payload.Close()
	if err := send(&control.Message{Type: control.TypeTickets}, int(payload.Fd())); err != nil {
		return err
	}
	s.do(func() {
		g.ticketsTold = max(g.ticketsTold, revision)
		s.tickets.turned()
	})
	return nil
}

// keepTickets does what is due, and ends when no generation lives that shares keys.
func (s *Supervisor) keepTickets() {
	for {
		wait, over := ticketsLook, true
		s.do(func() {
			for _, g := range s.living {
				over = over && !g.sharesTickets()
			}
			over = over || s.succeeded || s.stopping
			if s.tickets.running = !over; !over {
				wait = min(s.turnTickets(), ticketsLook)
			}
		})
		if over {
			return
		}
		select {
		case <-time.After(wait):
		case <-s.tickets.wake:
		case <-s.work.Done():
			s.do(func() { s.tickets.running = false })
			return
		}
	}
}

// turnTickets does what is due, and says for how long nothing will be. Called in the loop.
func (s *Supervisor) turnTickets() time.Duration {
	if s.upgrading != nil {
		return time.Second // a successor may have read them already
	}
	t, now, rotation := &s.tickets, s.kernel.uptime(), s.ticketRotation()
	rotate, expire := t.keys.Wait(now, rotation)
	switch {
	case rotate == 0:
		if left := s.ticketsHeld(now); left > 0 {
			return left
		}
		s.rotateTickets(now)
	case expire == 0:
		k, _ := t.keys.Expire(now, rotation)
		s.setTickets(k)
	}
	return min(t.keys.Wait(now, rotation))
}

// ticketRotation is how often keys are rotated: as what serves says, or has served last. Called in
// the loop.
func (s *Supervisor) ticketRotation() time.Duration {
	if s.serving != nil { // what was adopted may not say it
		s.tickets.rotation = cmp.Or(s.serving.release.config.Tickets.Rotation, s.tickets.rotation)
	}
	return cmp.Or(s.tickets.rotation, config.DefaultTicketRotation)
}

// ticketsHeld says how much longer a rotation that is due waits for generations which have not
// confirmed the keys that there are, the next one among them. Called in the loop.
func (s *Supervisor) ticketsHeld(now time.Duration) time.Duration {
	behind := s.behindWithTickets()
	if len(behind) == 0 {
		return 0
	}
	t := &s.tickets
	if t.waiting == 0 {
		t.waiting = now
	}
	patience := ticketsPatience
	if t.keys.Condemned() {
		patience = condemnedPatience
	}
	left := patience - (now - t.waiting)
	if left <= 0 {
		s.log.Warn("the keys of session tickets are rotated although generations have not confirmed those that there are", "generations", behind)
		return 0
	}
	return left
}

// behindWithTickets returns the generations that have not confirmed the keys that there are, also
// those without a channel. Called in the loop.
func (s *Supervisor) behindWithTickets() (behind []int) {
	for _, g := range s.newestFirst() {
		if g.state != starting && g.ticketsTold < s.tickets.revision && g.sharesTickets() {
			behind = append(behind, g.number)
		}
	}
	return behind
}

// rotateTickets takes the next key into use. Called in the loop.
func (s *Supervisor) rotateTickets(now time.Duration) {
	counter, by := s.stats.ticketsRotated, "schedule"
	if s.tickets.keys.Condemned() {
		counter, by = s.stats.ticketsReplaced, "command"
	}
	s.tickets.waiting = 0
	s.setTickets(s.tickets.keys.Rotate(now))
	counter.Inc()
	s.log.Info("the keys of session tickets were rotated", "by", by)
}

// RotateTickets implements [Commands].
func (s *Supervisor) RotateTickets(ctx context.Context) error {
	if err := s.awaitBegin(ctx); err != nil {
		return err
	}
	var before uint64
	if err := s.change(ctx, func() {
		before = s.tickets.keys.Rotations()
		s.tickets.waiting = 0 // what a former rotation waits for
		s.setTickets(s.tickets.keys.Condemn())
		if !s.tickets.running {
			s.rotateTickets(s.kernel.uptime()) // nobody has any
		}
	}); err != nil {
		return err
	}
	s.log.Warn("the keys of session tickets are dropped by command")
	over := time.NewTimer(dropTimeout)
	defer over.Stop()
	for {
		var next chan struct{}
		var behind []int
		done := false
		if err := s.try(ctx, func() {
			next, behind = s.tickets.changed, s.behindWithTickets()
			done = s.tickets.keys.Rotations() > before && len(behind) == 0
		}); err != nil || done {
			return err
		}
		select {
		case <-next:
		case <-over.C:
			return fmt.Errorf("generations %v have not confirmed it: %w", behind, ErrUnanswered)
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
