package supervisor

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/control"
	"holdfast/internal/fence"
	"holdfast/internal/runtimedir"
)

// The model is a small world in which real supervisors run, with generations that have
// the real fence: processes, control channels, the rendezvous, the runtime directory and
// the clock are simulated, and nothing happens in it unless the explorer says so.
//
// Between two moves the world stands still: every goroutine waits for a message, for the
// end of a process, or for the clock ([synctest.Wait]), and that is where the invariants
// are looked at. Descriptors are real ones, duplicated where the kernel would, so that
// who has which listening socket can be told from the sockets themselves.

// simWorld is one run. Its fields are guarded by mu, as supervisors call into it.
type simWorld struct {
	scenario *scenario
	place    *place
	began    time.Time
	slept    atomic.Int64 // for how long the machine was asleep

	mu          sync.Mutex
	moved       int // moves so far
	changes     int // grows with everything that a supervisor or a generation does
	supervisors []*simSupervisor
	generations []*simGeneration
	travellers  []*link    // of which ends travel
	pending     []*pending // in the order in which it is sent
	commands    []string   // of the scenario that are still to come
	saved       *runtimedir.State
	clients     []*simClient
	over        bool // the run has ended: nothing works any more
	telling     bool
	story       []string // what happened, if it is to be told
	violation   string   // the first one

	facts simFacts
}

// pending is something that is on its way: a message, the end of a channel, a signal,
// the news that a process has ended.
type pending struct {
	stream string // what it may not overtake in, and who is in it
	what   string
	at     string // the component that it reaches
	since  int    // how many moves came before
	fds    []int
	reach  func() // called with mu held
}

func newSimWorld(sc *scenario, at *place, telling bool) *simWorld {
	return &simWorld{
		scenario: sc, place: at, began: time.Now(), commands: sc.commands, telling: telling,
	}
}

// tell adds to the story. Called with mu held.
func (w *simWorld) tell(format string, args ...any) {
	if w.telling {
		w.story = append(w.story, fmt.Sprintf("%8.3fs  ", time.Since(w.began).Seconds())+fmt.Sprintf(format, args...))
	}
}

// fail notes the first violation of an invariant. Called with mu held.
func (w *simWorld) fail(format string, args ...any) {
	if w.violation == "" && !w.over {
		w.violation = fmt.Sprintf(format, args...)
		w.tell("VIOLATION of %s", w.violation)
	}
}

// put puts something on its way. Called with mu held.
func (w *simWorld) put(p *pending) {
	w.changes++
	p.since = w.moved
	w.pending = append(w.pending, p)
}

// due returns what is first in its stream, the oldest first. What was sent between two
// moves is ordered by name: goroutines have sent it in any order.
func (w *simWorld) due() []*pending {
	var heads []*pending
	for _, p := range w.pending {
		if !slices.ContainsFunc(heads, func(o *pending) bool { return o.stream == p.stream }) {
			heads = append(heads, p)
		}
	}
	slices.SortFunc(heads, func(a, b *pending) int {
		return cmp.Or(cmp.Compare(a.since, b.since), cmp.Compare(a.stream, b.stream))
	})
	return heads
}

// giveUp drops what is on its way and fits. Called with mu held.
func (w *simWorld) giveUp(fits func(*pending) bool) {
	w.pending = slices.DeleteFunc(w.pending, func(p *pending) bool {
		if !fits(p) {
			return false
		}
		control.CloseAll(p.fds)
		return true
	})
}

// duplicates are what the kernel makes of descriptors that are sent.
func duplicates(fds []int) (all []int, err error) {
	for _, fd := range fds {
		d, err := control.Duplicate(fd)
		if err != nil {
			control.CloseAll(all)
			return nil, fmt.Errorf("duplicate descriptor %d: %w", fd, err)
		}
		all = append(all, d)
	}
	return all, nil
}

// copied is m as it arrives at the other side.
func copied(m *control.Message) *control.Message {
	data, err := json.Marshal(m)
	if err != nil || len(data) > control.MaxMessage {
		panic(fmt.Sprintf("message %+v cannot be sent: %v", m, err))
	}
	c := new(control.Message)
	if err := json.Unmarshal(data, c); err != nil {
		panic(err)
	}
	return c
}

// link is a control channel. Its supervisor's end is a [channel].
type link struct {
	w  *simWorld
	s  *simSupervisor // nil: nobody has that end yet
	g  *simGeneration // as s
	id fence.Channel  // as the generation knows it

	inbox      chan packet   // what has reached the supervisor
	cut        chan struct{} // closed when nothing more can
	closedS    bool          // the supervisor has closed its end, or never had it
	closedG    bool          // as closedS
	endS, endG *travelling   // nil: that end does not travel
	toldS      bool          // that the generation's end is gone is on its way
	toldG      bool          // as toldS
	toS, toG   int           // messages sent so far
}

// The directions are streams.
func (l *link) down() string { return fmt.Sprintf("%s→%s.%d", l.s, l.g, l.id) }
func (l *link) up() string   { return fmt.Sprintf("%s.%d→%s", l.g, l.id, l.s) }

// travelling is an end of a channel as a descriptor: there are duplicates of it, and the
// end is not closed before the last of them is.
type travelling struct {
	watch int // the other end of a pair of sockets: it hangs up then
	ino   uint64
}

// packet is a message with its descriptors; without one it is the end of the channel.
type packet struct {
	m   *control.Message
	fds []int
}

func (w *simWorld) newLink() *link {
	return &link{w: w, inbox: make(chan packet, 1024), cut: make(chan struct{})}
}

// connect makes a channel between two processes. Called with mu held.
func (w *simWorld) connect(p *simSupervisor, g *simGeneration, id fence.Channel) *link {
	l := w.newLink()
	l.s, l.g, l.id = p, g, id
	p.links = append(p.links, l)
	g.links = append(g.links, l)
	return l
}

// travel makes an end of l a descriptor. Called with mu held.
func (w *simWorld) travel(l *link) (*travelling, int) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		panic(err)
	}
	t := &travelling{watch: fds[0], ino: inode(fds[1])}
	return t, fds[1]
}

// at returns the link of which a descriptor is an end.
func (w *simWorld) at(fd int) *link {
	ino := inode(fd)
	for _, l := range w.travellers {
		if l.endS.ino == ino || l.endG.ino == ino {
			return l
		}
	}
	return nil
}

// gone says whether the last descriptor is closed.
func (t *travelling) gone() bool {
	if t == nil {
		return true
	}
	if t.watch >= 0 {
		fds := []unix.PollFd{{Fd: int32(t.watch)}}
		if n, err := unix.Poll(fds, 0); err != nil || n == 0 || fds[0].Revents&unix.POLLHUP == 0 {
			return false
		}
		t.close()
	}
	return true
}

func (t *travelling) close() {
	if t != nil && t.watch >= 0 {
		unix.Close(t.watch)
		t.watch = -1
	}
}

// sweep finds the ends of channels that are closed by now, and clients that are in a
// passage. Called with mu held.
func (w *simWorld) sweep() {
	for _, l := range w.travellers {
		l.settle()
	}
	for _, g := range w.generations {
		g.takeClients()
	}
}

// settle has each side hear that the other is gone. Called with mu held.
func (l *link) settle() {
	w := l.w
	if w.over {
		return
	}
	if l.closedS && l.g != nil && !l.toldG && l.endS.gone() {
		l.toldG = true
		if !l.closedG {
			w.put(&pending{
				stream: l.down(), what: "end of the channel", at: l.g.name,
				reach: func() { l.g.channelEnd(l) },
			})
		}
	}
	if l.closedG && l.s != nil && !l.toldS && l.endG.gone() {
		l.toldS = true
		if !l.closedS {
			w.put(&pending{
				stream: l.up(), what: "end of the channel", at: l.s.name,
				reach: func() { l.inbox <- packet{} },
			})
		}
	}
}

// Send is the supervisor's.
func (l *link) Send(m *control.Message, _ time.Duration, fds ...int) error {
	w := l.w
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.over || l.s.dead || l.closedS || l.closedG || l.g == nil {
		return fmt.Errorf("send %s: %w", m.Type, syscall.EPIPE)
	}
	if l.talksOfClusters(m, fds) {
		return nil
	}
	sent, err := duplicates(fds)
	if err != nil {
		w.fail("5: %s sends %s with a descriptor that is not open: %v", l.s.name, m.Type, err)
		return err
	}
	m = copied(m)
	l.toG++
	sender, when := l.s, w.moved
	w.put(&pending{
		stream: l.down(), what: fmt.Sprintf("%s (%d)", m.Type, l.toG), at: l.g.name, fds: sent,
		reach: func() { l.g.receive(l, m, sent, sending{sender, when}) },
	})
	return nil
}

// sending is who has sent a message, and after how many moves.
type sending struct {
	by   *simSupervisor
	when int
}

// say is the generation's Send. Called with mu held.
func (l *link) say(m *control.Message, fds ...int) {
	if l.closedG {
		return
	}
	m = copied(m)
	l.toS++
	if l.closedS || l.s == nil {
		return // nobody reads it
	}
	sent, err := duplicates(fds)
	if err != nil {
		panic(err)
	}
	p := packet{m, sent}
	l.w.put(&pending{
		stream: l.up(), what: fmt.Sprintf("%s (%d)", m.Type, l.toS), at: l.s.name, fds: sent,
		reach: func() { l.inbox <- p },
	})
}

// Receive is the supervisor's.
func (l *link) Receive() (*control.Message, []int, error) {
	select {
	case <-l.cut:
		return nil, nil, io.EOF
	default:
	}
	select {
	case p := <-l.inbox:
		if p.m == nil {
			return nil, nil, io.EOF
		}
		return p.m, p.fds, nil
	case <-l.cut:
		return nil, nil, io.EOF
	}
}

// Close is the supervisor's.
func (l *link) Close() error {
	l.w.mu.Lock()
	defer l.w.mu.Unlock()
	l.closeS()
	return nil
}

// closeS closes the supervisor's end. Called with mu held.
func (l *link) closeS() {
	if l.closedS {
		return
	}
	l.closedS = true
	l.w.changes++
	close(l.cut)
	l.w.giveUp(func(p *pending) bool { return p.stream == l.up() })
	for len(l.inbox) > 0 {
		control.CloseAll((<-l.inbox).fds)
	}
	l.settle()
}

// closeG closes the generation's end. Called with mu held.
func (l *link) closeG() {
	if l.closedG {
		return
	}
	l.closedG = true
	l.w.giveUp(func(p *pending) bool { return p.stream == l.down() })
	l.settle()
}

// handle is a supervisor's hold on the process of a generation.
type handle struct {
	s     *simSupervisor
	g     *simGeneration
	child bool        // of the supervisor: it learns how it ended
	ended chan string // has room for the one word on that
}

func (h *handle) PID() int { return h.g.pid }

func (h *handle) Signal(sig os.Signal) error {
	w := h.s.w
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.over || h.s.dead {
		return nil
	}
	if h.g.dead {
		return os.ErrProcessDone
	}
	w.changes++
	w.tell("%s sends %v to %s", h.s.name, sig, h.g.name)
	switch sig {
	case syscall.SIGKILL:
		h.g.die("signal: killed")
	case syscall.SIGTERM:
		w.put(&pending{stream: h.s.name + "↯" + h.g.name, what: "SIGTERM", at: h.g.name, reach: h.g.terminate})
	}
	return nil
}

func (h *handle) Wait() string { return <-h.ended }

// alive returns the supervisors' processes that live.
func (w *simWorld) alive() []*simSupervisor {
	return slices.DeleteFunc(slices.Clone(w.supervisors), func(p *simSupervisor) bool { return p.dead })
}

// elapse lets time pass until something happens, at most for so long. It says whether
// something did.
func (w *simWorld) elapse(most time.Duration) bool {
	before := w.standStill()
	for passed, grain := time.Duration(0), time.Duration(0); passed < most; passed += grain {
		grain = 10 * time.Millisecond << min(passed/time.Second, 9)
		time.Sleep(grain)
		if w.standStill() != before {
			return true
		}
	}
	return false
}

// standStill waits until nothing moves any more by itself, and returns the pulse.
func (w *simWorld) standStill() int {
	synctest.Wait()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.sweep()
	return w.pulse()
}

// finish ends the run: all that lives is let go, so that no goroutine is left.
func (w *simWorld) finish() {
	w.mu.Lock()
	w.over = true
	for _, g := range w.generations {
		g.die("the run is over")
	}
	for _, l := range w.travellers {
		l.endS.close()
		l.endG.close()
	}
	for _, c := range w.clients {
		c.end.close()
	}
	w.giveUp(func(*pending) bool { return true })
	for _, p := range w.alive() {
		p.die()
		p.end()
	}
	w.mu.Unlock()
	time.Sleep(time.Hour) // whatever only waited for its time
	synctest.Wait()
}

// simLog puts a supervisor's log into the story.
type simLog struct {
	p     *simSupervisor
	attrs string
}

func (l *simLog) Enabled(context.Context, slog.Level) bool { return l.p.w.telling }

func (l *simLog) Handle(_ context.Context, r slog.Record) error {
	text := r.Message + l.attrs
	r.Attrs(func(a slog.Attr) bool { text += " " + a.String(); return true })
	l.p.w.mu.Lock()
	defer l.p.w.mu.Unlock()
	if !l.p.dead && !l.p.w.over {
		l.p.w.tell("    %s: %s", l.p.name, text)
	}
	return nil
}

func (l *simLog) WithAttrs(attrs []slog.Attr) slog.Handler {
	c := *l
	for _, a := range attrs {
		c.attrs += " " + a.String()
	}
	return &c
}

func (l *simLog) WithGroup(string) slog.Handler { return l }
