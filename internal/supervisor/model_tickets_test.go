package supervisor

import (
	"slices"
	"time"

	"holdfast/internal/control"
)

// The keys of session tickets in the model. What a generation is told of them takes its time as
// all else does, and a rotation may be due at any moment.

// ticketsVersion is what generations say of themselves.
func (w *simWorld) ticketsVersion() int {
	if w.scenario.tickets {
		return control.TicketsVersion
	}
	return 0
}

// uptime is the clock of the keys.
func (w *simWorld) uptime() time.Duration { return time.Since(w.began) + time.Duration(w.slept.Load()) }

// sleep has a rotation be due, and another one right behind it: the machine wakes and sleeps again.
func (w *simWorld) sleep(p *simSupervisor) {
	for range 2 {
		w.slept.Add(int64(12 * time.Hour))
		p.s.do(func() {
			if p.s.tickets.running {
				p.s.turnTickets()
			}
		})
	}
}

// takeTickets has the generation use keys. Called with mu held.
func (g *simGeneration) takeTickets(fds []int) {
	dup, err := control.Duplicate(fds[0])
	if err != nil {
		panic(err)
	}
	keys, err := control.ReadTicketKeys(dup)
	if err != nil {
		g.w.fail("tickets: %s cannot read its keys: %v", g, err)
		return
	}
	g.tickets = keys
}

// checkTickets: no generation makes tickets that another one does not understand which may get
// them next. Called with mu held.
func (w *simWorld) checkTickets() {
	if !w.scenario.tickets {
		return
	}
	var all []*simGeneration
	for _, g := range w.generations {
		if !g.dead && g.phase == simServing {
			all = append(all, g)
		}
	}
	for _, maker := range all {
		if len(maker.tickets) < 2 {
			w.fail("tickets: %s serves with %d keys", maker, len(maker.tickets))
			return
		}
		w.facts.tickets = maker.tickets[0]
		for _, reader := range all {
			if !slices.Contains(reader.tickets, maker.tickets[0]) {
				w.fail("tickets: %s makes tickets that %s does not understand", maker, reader)
			}
		}
	}
}

// checkTicketsKept: who serves in the end understands the tickets that were made last before.
// Called with mu held.
func (w *simWorld) checkTicketsKept(before [32]byte) {
	if g := w.servingNow(); w.scenario.tickets && g != nil && before != ([32]byte{}) && !slices.Contains(g.tickets, before) {
		w.fail("tickets: %s does not understand what was made last", g)
	}
}
