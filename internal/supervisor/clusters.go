package supervisor

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"time"

	"holdfast/internal/control"
)

// What generations know of their clusters. While several live, each hears what the others have
// with endpoints and of limits, so that both count all. And what the serving one knows is kept
// for the next, which may have to begin without asking a dead one. All of it are memory files
// that are passed on as they came: nothing here looks into them.

const (
	// shareEvery is how often generations hear of each other, shareTimeout how long one may
	// take to say or to hear it, and shareGrace how long the others wait for that.
	shareEvery   = time.Second
	shareTimeout = time.Second
	shareGrace   = 250 * time.Millisecond

	// statesEvery is how often the serving generation is asked for what it knows, and
	// statesTimeout how long it may take, also when a reload waits for it.
	statesEvery   = 10 * time.Second
	statesTimeout = time.Second
)

// sharing is the part of the supervisor that does so.
type sharing struct {
	turn sync.Mutex    // held during a round
	wake chan struct{} // has room for one: something has changed

	// Owned by the loop.
	running bool
	asking  bool        // the serving generation is asked for its states
	loads   map[int]int // descriptors of what generations had last, by number
	states  int         // the descriptor of what the one knew that serves or has served last; -1: nobody has said
}

func newSharing() sharing {
	return sharing{wake: make(chan struct{}, 1), loads: make(map[int]int), states: -1}
}

// close lets go of everything. The loop has ended.
func (h *sharing) close() {
	for number := range h.loads {
		h.drop(number)
	}
	h.keep(-1)
}

func (h *sharing) drop(number int) {
	if fd, ok := h.loads[number]; ok {
		control.Discard([]int{fd})
		delete(h.loads, number)
	}
}

// keep has fd in the place of the states so far. Called in the loop, as all that follows of it.
func (h *sharing) keep(fd int) {
	if h.states >= 0 {
		control.Discard([]int{h.states})
	}
	h.states = fd
}

// sharesClusters says whether g is of a build that talks of its clusters as this one expects it.
func (g *generation) sharesClusters() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.clustersVersion == control.ClustersVersion
}

// sharers are the living generations that can be asked about clusters, newest first. Called in
// the loop.
func (s *Supervisor) sharers() (all []*generation) {
	for _, g := range s.newestFirst() {
		if ch, _ := g.channel(); g.state != starting && ch != (unattached{}) && g.sharesClusters() {
			all = append(all, g)
		}
	}
	return all
}

// share has generations share what they have, as long as there are any. It is called whenever
// one has another state. Called in the loop.
func (s *Supervisor) share() {
	if s.succeeded || s.stopping || len(s.sharers()) == 0 {
		return
	}
	offer(s.sharing.wake, struct{}{})
	if !s.sharing.running {
		s.sharing.running = true
		s.workers.Go(s.keepSharing)
	}
}

// keepSharing ends when nobody is left who shares.
func (s *Supervisor) keepSharing() {
	var due time.Time // when states are asked for again
	for {
		s.shareLoads()
		if now := time.Now(); !now.Before(due) {
			due = now.Add(statesEvery)
			s.do(s.askStates)
			s.do(s.askCopies) // where it did not answer before
		}
		several, over := false, true
		s.do(func() {
			all := s.sharers()
			over = len(all) == 0 || s.succeeded || s.stopping
			several = len(all) > 1 || len(all) == 1 && all[0].crowded
			s.sharing.running = !over
		})
		if over {
			return
		}
		wait := time.Until(due)
		if several {
			wait = min(wait, shareEvery)
		}
		select {
		case <-time.After(wait):
		case <-s.sharing.wake:
		case <-s.work.Done():
			s.do(func() { s.sharing.running = false })
			return
		}
	}
}

// shareLoads has every generation hear what all others have. Who takes long to say or to hear
// something holds up nobody: it has what it had last, and is left alone until it is done. It
// blocks for shareGrace, twice at the most, and for a round that is under way.
func (s *Supervisor) shareLoads() {
	h := &s.sharing
	h.turn.Lock()
	defer h.turn.Unlock()
	var all []*generation
	needless := true
	s.do(func() {
		for number := range h.loads {
			if s.living[number] == nil && s.resuming[number] == nil { // its tunnels live until others have them
				h.drop(number)
			}
		}
		if s.upgrading != nil || s.succeeded || s.stopping {
			return
		}
		all = s.sharers()
		if len(all) == 1 && !all[0].crowded {
			h.drop(all[0].number) // nobody wants to hear of it
		}
		needless = len(all) == 0 || len(all) == 1 && len(h.loads) == 0 && !all[0].crowded
	})
	if needless {
		return
	}
	s.withEach(all, func(g *generation) *bool { return &g.askedLoads }, s.askLoads)
	s.withEach(all, func(g *generation) *bool { return &g.tellingElsewhere }, s.tellElsewhere)
}

// withEach does something with each generation with which it is not being done, and waits for
// shareGrace at the most. Whether it is, busy has, which the loop owns.
func (s *Supervisor) withEach(all []*generation, busy func(*generation) *bool, f func(*generation)) {
	over := make(chan struct{}, len(all))
	under := 0
	s.do(func() {
		for _, g := range all {
			if *busy(g) {
				continue
			}
			*busy(g) = true
			under++
			s.workers.Go(func() {
				f(g)
				s.do(func() { *busy(g) = false })
				over <- struct{}{}
			})
		}
	})
	limit := time.NewTimer(shareGrace)
	defer limit.Stop()
	for range under {
		select {
		case <-over:
		case <-limit.C:
			return
		}
	}
}

// askLoads asks g what it has, and keeps the answer.
func (s *Supervisor) askLoads(g *generation) {
	fd, err := g.payload(s.work, control.TypeLoads, shareTimeout, control.MaxClusters)
	if err != nil {
		g.log.Debug("generation does not say what it has with its clusters", "err", err)
		return
	}
	kept := s.do(func() {
		s.sharing.drop(g.number)
		s.sharing.loads[g.number] = fd
	})
	if !kept {
		control.Discard([]int{fd})
	}
}

// tellElsewhere tells g what all others have.
func (s *Supervisor) tellElsewhere(g *generation) {
	others := make(map[string]int) // our own, as those that are kept may be replaced meanwhile
	defer func() { control.CloseNamed(others) }()
	s.do(func() {
		for number, fd := range s.sharing.loads {
			if number == g.number {
				continue
			}
			dup, err := control.Duplicate(fd)
			if err != nil {
				g.log.Error("what another generation has is not told", "other", number, "err", err)
				continue
			}
			others[strconv.Itoa(number)] = dup
		}
		g.crowded = g.crowded || len(others) > 0
	})
	err := control.SendFiles(control.TypeElsewhere, others, func(m *control.Message, fds ...int) error {
		_, err := g.ask(s.work, *m, shareTimeout, fds...)
		return err
	})
	if err != nil {
		g.log.Debug("generation has not confirmed what others have with its clusters", "err", err)
		return
	}
	s.do(func() { g.crowded = len(others) > 0 })
}

// shareNow is a round of which whoever waits for it waits for a moment only.
func (s *Supervisor) shareNow(ctx context.Context) {
	several := false
	s.do(func() { several = len(s.sharers()) > 1 })
	if !several {
		return
	}
	over := make(chan struct{})
	s.workers.Go(func() {
		defer close(over)
		s.shareLoads()
	})
	limit := time.NewTimer(4 * shareGrace) // a round that is under way, and this one
	defer limit.Stop()
	select {
	case <-over:
	case <-limit.C:
	case <-ctx.Done():
	}
}

// shareSoon has the next round be soon.
func (s *Supervisor) shareSoon() { offer(s.sharing.wake, struct{}{}) }

// payload asks g for something that is one payload of at most so many bytes, which is the caller's.
func (g *generation) payload(ctx context.Context, t control.Type, within time.Duration, most int64) (fd int, err error) {
	a, err := g.question(ctx, control.Message{Type: t}, within)
	if err != nil {
		return -1, err
	}
	if len(a.fds) != 1 {
		control.Discard(a.fds)
		return -1, errors.New("an answer without a payload")
	}
	if err := control.CheckPayload(a.fds[0], most); err != nil {
		control.Discard(a.fds)
		return -1, fmt.Errorf("generation %d: %w", g.number, err)
	}
	return a.fds[0], nil
}

// askStates has the serving generation asked for its states, unless it is. Called in the loop.
func (s *Supervisor) askStates() {
	if s.sharing.asking || s.upgrading != nil || s.stopping || s.serving == nil || !s.serving.sharesClusters() {
		return
	}
	s.sharing.asking = true
	s.workers.Go(func() {
		s.keepStates(s.work)
		s.do(func() { s.sharing.asking = false })
	})
}

// keepStates asks the serving generation for its states, and keeps them.
func (s *Supervisor) keepStates(ctx context.Context) {
	var g *generation
	s.do(func() {
		if g = s.serving; g != nil && !g.sharesClusters() {
			g = nil
		}
	})
	if g == nil {
		return
	}
	fd, err := g.payload(ctx, control.TypeClusters, statesTimeout, control.MaxClusters)
	if err != nil {
		g.log.Debug("generation does not say what it knows of its clusters", "err", err)
		return
	}
	kept := false
	s.do(func() {
		if kept = s.serving == g || s.serving == nil; kept {
			s.sharing.keep(fd)
		}
	})
	if !kept {
		control.Discard([]int{fd})
	}
}

// mostCrashesWithStates is after how many crashes in a row nothing is handed on: what one knew
// may be what the next dies of.
const mostCrashesWithStates = 1

// statesFor returns what a generation is to begin with that p is for, as the caller's own
// descriptor, or -1. It is urgent where nobody serves, or tunnels wait.
func (s *Supervisor) statesFor(p *plan) (fd int, urgent bool) {
	fd = -1
	s.do(func() {
		urgent = p.resumes != 0 || s.serving == nil && s.pinned != nil
		b := s.resuming[p.resumes]
		if s.sharing.states < 0 || s.crashes > mostCrashesWithStates || b != nil && b.failing {
			return
		}
		if dup, err := control.Duplicate(s.sharing.states); err == nil {
			fd = dup
		}
	})
	return fd, urgent
}
