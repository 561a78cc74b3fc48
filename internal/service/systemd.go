package service

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"holdfast/internal/supervisor"
	"holdfast/internal/systemd"
)

const (
	// statusEvery is how old the status that systemd shows may be.
	statusEvery = 5 * time.Second

	// patience is how long systemd waits on in a start, a reload or a stop from the
	// last moment on at which the supervisor's loop ran. Our own limits end these, as
	// the configuration says; systemd's are for a supervisor that hangs.
	patience = 30 * time.Second

	// notifyTimeout bounds how long the end waits for a systemd that hears nothing.
	notifyTimeout = time.Second
)

// A herald tells systemd how the service is.
type herald struct {
	notifier *systemd.Notifier
	changed  chan struct{} // has a value when the status has become another

	settled bool // nothing is under way that systemd has a limit for; owned by the supervisor's loop
}

func newHerald(n *systemd.Notifier) *herald {
	return &herald{notifier: n, changed: make(chan struct{}, 1)}
}

// instruct has the supervisor's loop tell h what it does, and that it runs: often
// enough that a watchdog of this interval hears of it three times.
func (h *herald) instruct(o *supervisor.Options, watchdog time.Duration) {
	if h.notifier == nil {
		return
	}
	o.Phase, o.Pulse, o.PulseEvery = h.phase, h.pulse, statusEvery
	if watchdog > 0 {
		o.PulseEvery = min(watchdog/3, statusEvery)
	}
}

// phase is called in the supervisor's loop.
func (h *herald) phase(p supervisor.Phase) {
	h.settled = p == supervisor.Serving
	switch p {
	case supervisor.Serving:
		h.notifier.Ready()
	case supervisor.Reloading:
		h.notifier.Reloading()
	case supervisor.Stopping:
		h.notifier.Stopping()
	}
	h.pulse() // a limit that systemd has begins now
	select {
	case h.changed <- struct{}{}:
	default:
	}
}

// pulse is called in the supervisor's loop.
func (h *herald) pulse() {
	if h.settled {
		h.notifier.Alive(0)
	} else {
		h.notifier.Alive(patience)
	}
}

// report keeps the status that systemd shows until ctx ends. It does not run in the
// loop: it asks generations, which may not answer.
func (h *herald) report(ctx context.Context, sup supervisor.Commands) {
	if h.notifier == nil {
		return
	}
	ticker := time.NewTicker(statusEvery)
	defer ticker.Stop()
	last := ""
	for {
		if st, err := sup.Status(ctx); err == nil {
			if now := summary(st); now != last {
				h.notifier.Status(now)
				last = now
			}
		}
		select {
		case <-ticker.C:
		case <-h.changed:
		case <-ctx.Done():
			return
		}
	}
}

// end says why the service could not start, unless err is nil or another supervisor
// commands, which is the last that systemd hears: report must have ended.
func (h *herald) end(err error) {
	if err != nil && !errors.Is(err, supervisor.ErrSucceeded) {
		h.notifier.Status("cannot start: " + err.Error())
	}
	h.notifier.Close(notifyTimeout)
}

// summary says st in one line: "generation 8 serving 1,988 tunnels; 2 draining with
// 1,207 tunnels".
func summary(st *supervisor.Status) string {
	var parts []string
	others, theirs, starting := 0, 0, false
	for _, g := range st.Generations {
		switch {
		case g.State == "serving" && !st.Stopping:
			parts = append(parts, fmt.Sprintf("generation %d serving %s", g.Number, count(g.Tunnels, "tunnel")))
		case g.State == "starting" || g.State == "ready":
			starting = true
		default:
			others++
			theirs += g.Tunnels
		}
	}
	switch {
	case st.Stopping:
		return fmt.Sprintf("stopping; %s left with %s", count(others, "generation"), count(theirs, "tunnel"))
	case len(parts) > 0:
	case st.LastCrash != "":
		parts = append(parts, "no generation serves; the last one died: "+st.LastCrash)
	case starting || st.LastReload == nil:
		parts = append(parts, "starting")
	default:
		parts = append(parts, "no generation serves")
	}
	if others > 0 {
		parts = append(parts, fmt.Sprintf("%d draining with %s", others, count(theirs, "tunnel")))
	}
	if st.LastReload != nil && st.LastReload.Error != "" {
		parts = append(parts, "last reload refused: "+st.LastReload.Error)
	}
	return strings.Join(parts, "; ")
}

// count says how many there are of something, its digits in groups of three.
func count(n int, noun string) string {
	if n != 1 {
		noun += "s"
	}
	s := strconv.Itoa(n)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s + " " + noun
}
