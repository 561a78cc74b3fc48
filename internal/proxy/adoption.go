package proxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"time"

	"holdfast/internal/control"
	"holdfast/internal/fence"
)

// How a generation gets another supervisor. Who commands is decided by the fence; here
// is what follows.

const (
	// firstPause and mostPause bound the wait before a supervisor is sought again.
	firstPause = 20 * time.Millisecond
	mostPause  = 500 * time.Millisecond

	// mostPatience is how long a generation without a supervisor waits for the
	// candidate to command before it seeks another one. To adopt takes a supervisor
	// seconds, with those that it waits for in vain.
	mostPatience = time.Minute

	// absence is how long a generation that has nothing left and no supervisor stays
	// for the next one: with the process goes the last descriptor of what it has
	// counted, and no figure is to go backwards. A supervisor is restarted in seconds.
	absence = time.Minute
)

// channel is one to a supervisor that commands or may come to.
type channel struct {
	id      fence.Channel
	conn    *control.Conn
	refused bool // that something was is logged. Owned by the loop
}

// open adds a channel and has what comes there handed to the loop.
func (g *generation) open(ctx context.Context, id fence.Channel, conn *control.Conn) {
	c := &channel{id: id, conn: conn}
	g.channels[id] = c
	g.talks.Go(func() { g.receive(ctx, c) })
}

// receive hands messages to the loop until the channel or the loop ends.
func (g *generation) receive(ctx context.Context, c *channel) {
	for {
		m, fds, err := c.conn.Receive()
		if err != nil {
			if !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
				g.log.Error("the supervisor's message cannot be read", "err", err)
			}
			m = nil
		}
		select {
		case g.messages <- received{c, m, fds}:
		case <-ctx.Done():
			control.Discard(fds)
			return
		}
		if m == nil {
			return
		}
	}
}

// commander is the channel that commands. Until the generation serves there is one.
func (g *generation) commander() *control.Conn { return g.channels[g.fence.Commander()].conn }

// reply sends the answer to a message where the message came from. An error was
// logged.
func (g *generation) reply(r received, a control.Message, fds ...int) error {
	a.Type, a.Re = control.TypeAnswer, r.m.ID
	err := r.from.conn.Send(&a, sendTimeout, fds...)
	if err != nil {
		g.log.Error("cannot answer the supervisor", "to", r.m.Type, "err", err)
	}
	return err
}

// answer is reply for the loop, with what went wrong if anything did.
func (g *generation) answer(r received, a control.Message, err error) {
	if err != nil {
		a.Error = err.Error()
	}
	if g.reply(r, a) != nil {
		g.distrust(r.from)
	}
}

// distrust closes the channel of a candidate that does not take what it has asked for:
// the loop does not wait for it twice.
func (g *generation) distrust(c *channel) {
	if c.id != g.fence.Commander() {
		c.conn.Close() // receive tells the loop
	}
}

// refuse says no to what a supervisor may not say.
func (g *generation) refuse(r received, err error) {
	control.Discard(r.fds)
	if !r.from.refused {
		r.from.refused = true
		g.log.Warn("refused what a supervisor says; more of that will not be logged", "message", r.m.Type, "err", err)
	}
	if r.m.ID != 0 {
		g.answer(r, control.Message{}, err)
	}
}

// prepare opens the channel of the candidate that the supervisor brings.
func (g *generation) prepare(ctx context.Context, r received) {
	g.dropChannels() // the one of a former candidate
	g.vault.dropCandidate()
	id := g.fence.Candidate()
	err := errors.New("no channel has come with it")
	if len(r.fds) > 0 {
		var conn *control.Conn
		if conn, err = control.NewConn(r.fds[0]); err == nil {
			g.open(ctx, id, conn)
		}
		g.prepareVault(r.fds[1:], err)
	}
	if err != nil {
		g.fence.Ended(id)
	}
	g.answer(r, control.Message{}, err)
}

// prepareVault opens the candidate's vault channel, if it has sent one. Without it the
// candidate may come to command all the same. err: it may not.
func (g *generation) prepareVault(fds []int, err error) {
	switch {
	case len(fds) == 0:
	case err != nil:
		control.Discard(fds)
	default:
		if err := g.vault.connect(fds[0], true); err != nil {
			g.log.Error("the next supervisor's vault channel cannot be used", "err", err)
		}
	}
}

// obey: the fence has made the channel that r comes from the one that commands. That may
// be the one that did before: the candidate that it had brought does not come.
func (g *generation) obey(r received, former fence.Channel) {
	control.Discard(r.fds)
	g.dropChannels()
	if r.from.id == former {
		g.vault.dropCandidate()
	} else {
		g.vault.obeyed()
	}
	g.seek.pause, g.lost = 0, time.Time{}
	g.log.Info("a supervisor commands", "epoch", r.m.Epoch)
	// What has changed since it asked is said again: a signal may have come.
	g.answer(r, control.Message{Report: g.describe()}, nil)
}

// handBack gives a supervisor all that it needs to command.
func (g *generation) handBack(r received) {
	deadline := time.Now().Add(sendTimeout)
	send := func(m *control.Message, fds ...int) error {
		return r.from.conn.Send(m, time.Until(deadline), fds...)
	}
	err := control.SendFiles(control.TypeListeners, g.listening(), send)
	if err == nil {
		err = control.SendFiles(control.TypeKept, g.kept, send)
	}
	if err != nil {
		g.log.Error("cannot hand back what a supervisor asks for", "err", err)
		g.distrust(r.from)
		return
	}
	g.answer(r, control.Message{Report: g.describe()}, nil)
}

// listening are the listening sockets that the generation has: those that it accepts
// from, and those that it was sent to accept from next. Nobody else may have them.
func (g *generation) listening() map[string]int {
	all := make(map[string]int)
	for key, fd := range g.sockets {
		all[key] = fd
	}
	for _, l := range g.listeners {
		if l.fd >= 0 {
			all[l.key] = l.fd
		}
	}
	return all
}

func (g *generation) describe() *control.Report {
	phases := map[phase]control.Phase{serving: control.PhaseServing, draining: control.PhaseDraining, stopping: control.PhaseStopping}
	return &control.Report{
		Generation: g.number, Epoch: g.fence.Epoch(), Phase: phases[g.phase], Started: g.started, Served: g.served, Vault: control.VaultVersion, MovesAll: g.vault.movesAll(),
		Passage: control.PassageVersion, Runtime: control.RuntimeVersion, Clusters: control.ClustersVersion, Tickets: control.TicketsVersion, Copies: control.CopiesVersion, Clear: control.ClearVersion,
	}
}

// replace takes descriptors with their keys, in the place of those of the same keys.
func replace(named map[string]int, r received) error {
	if len(r.m.Keys) != len(r.fds) {
		control.CloseAll(r.fds)
		return fmt.Errorf("%d keys and %d descriptors do not match", len(r.m.Keys), len(r.fds))
	}
	for i, key := range r.m.Keys {
		if old, ok := named[key]; ok {
			control.CloseAll([]int{old})
		}
		named[key] = r.fds[i]
	}
	return nil
}

// drop closes descriptors.
func drop(named map[string]int) {
	control.CloseNamed(named)
	clear(named)
}

// onLost goes on without a supervisor.
func (g *generation) onLost(ctx context.Context, verdict fence.Verdict) {
	switch {
	case verdict == fence.Wait:
		g.log.Warn("the supervisor is gone; another one is there and does not command yet")
		g.patience.Reset(mostPatience)
		g.expect(time.Now())
	case !g.seek.possible():
		g.log.Error("the supervisor is gone; this generation goes on by itself, SIGTERM drains it")
	default:
		g.log.Error("the supervisor is gone; this generation goes on and looks for another one", "rendezvous", g.seek.path)
		g.expect(time.Now())
		hello := newHello()
		hello.Generation, hello.Epoch = g.number, g.fence.Epoch()
		g.talks.Go(func() { g.seek.run(ctx, g, hello) })
	}
}

// expect begins to reckon with another supervisor.
func (g *generation) expect(now time.Time) {
	if g.lost.IsZero() {
		g.lost = now
		time.AfterFunc(absence, g.notice)
	}
}

// expected says whether the generation stays for a supervisor although it has nothing
// left. One that was told to stop does not.
func (g *generation) expected() bool {
	return g.phase == draining && !g.lost.IsZero() && time.Since(g.lost) < absence
}

// onFound makes a supervisor that was sought the candidate.
func (g *generation) onFound(ctx context.Context, conn *control.Conn) {
	id, ok := g.fence.Found()
	if !ok {
		conn.Close()
		return
	}
	g.open(ctx, id, conn)
	g.patience.Reset(mostPatience)
}

// losePatience gives the candidate up that nobody commands in the place of.
func (g *generation) losePatience() {
	if c := g.channels[g.fence.Candidate()]; c != nil && g.fence.Commander() == fence.None {
		g.log.Error("the supervisor that was found does not command", "after", mostPatience)
		g.distrust(c)
	}
}

// leave tells the supervisor that we end without its having said so: another must
// accept in our place. One that adopts us later learns it from the report.
func (g *generation) leave() {
	c := g.channels[g.fence.Commander()]
	if c == nil {
		return
	}
	if err := c.conn.Send(&control.Message{Type: control.TypeLeaving}, sendTimeout); err != nil {
		g.log.Error("cannot tell the supervisor", "err", err)
	}
}

// sayDone tells whoever listens that the generation has ended as it should: one that
// adopts it cannot wait for the process.
func (g *generation) sayDone() {
	for _, c := range g.channels {
		_ = c.conn.Send(&control.Message{Type: control.TypeDone}, doneTime) // who does not hear it sees the end
	}
}

// dropChannels closes the channels that can never command again.
func (g *generation) dropChannels() {
	for id, c := range g.channels {
		if id != g.fence.Commander() && id != g.fence.Candidate() {
			c.conn.Close()
			delete(g.channels, id)
		}
	}
}

// closeChannels closes all and waits for who receives from them or seeks one.
func (g *generation) closeChannels() {
	for _, c := range g.channels {
		c.conn.Close()
	}
	g.vault.close()
	g.talks.Wait()
}

// seeking is the search for a supervisor at the rendezvous.
type seeking struct {
	reunite func(ctx context.Context, path string, key []byte, hello control.Hello) (*control.Conn, error)
	path    string // "": there is none
	key     []byte

	// pause is the last wait. It belongs to run while that runs, to the loop otherwise,
	// and only a supervisor that commands makes it short again: one that lets us in and
	// goes away is not asked at full speed.
	pause time.Duration
}

func (s *seeking) possible() bool { return s.reunite != nil && s.path != "" }

// run tries until a supervisor is there, and hands the loop its channel.
func (s *seeking) run(ctx context.Context, g *generation, hello control.Hello) {
	said := ""
	for {
		s.pause = min(max(2*s.pause, firstPause), mostPause)
		select {
		case <-time.After(s.pause/2 + rand.N(s.pause/2)): // all generations look at once
		case <-ctx.Done():
			return
		}
		conn, err := s.reunite(ctx, s.path, s.key, hello)
		if err != nil {
			if said != err.Error() {
				said = err.Error()
				g.log.Info("no supervisor at the rendezvous yet", "err", err)
			}
			continue
		}
		select {
		case g.found <- conn:
		case <-ctx.Done():
			conn.Close()
		}
		return
	}
}
