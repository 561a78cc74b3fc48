package proxy

import (
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/control"
	"holdfast/internal/http1"
	"holdfast/internal/metrics"
	"holdfast/internal/stream"
)

// How idle connections get from a generation that drains to the one that serves, so that
// the next request on each is the new configuration's, and no client sees an end of its
// connection because of a reload.
//
// A generation that drains keeps them, and says "close" to nobody, until the supervisor
// sends it one end of a passage ([control.Passage]), which it does when what serves has
// passed its probation. Then every connection goes that is idle, and each that becomes so
// later: 32 at a time, as they come up in a turn of their loop. Whatever is between two
// generations is in the queue of the passage; what there is no room for stays where it is
// and is served there until it is offered again.

const (
	// takerPatience is how long idle connections wait for another passage when whoever has
	// taken them is gone. A replacement serves in less.
	takerPatience = 30 * time.Second

	// While whoever takes does not, connections are offered again after leastOfferPause, and
	// then after twice the pause before.
	leastOfferPause = 10 * time.Millisecond
	mostOfferPause  = time.Second

	// giving is how long a connection may stay idle while there is a passage: for ever,
	// but for what the listener's limits say.
	giving = 10 * 365 * 24 * time.Hour
)

// What is counted of connections that go from one generation to another.
var (
	connectionsPassed = metrics.Define(metrics.Desc{
		Name: "holdfast_downstream_connections_passed_total",
		Help: "Idle connections of clients that a draining generation has passed to the serving one.",
		Type: metrics.TypeCounter, Labels: []string{"listener"},
	})
	connectionsReceived = metrics.Define(metrics.Desc{
		Name: "holdfast_downstream_connections_received_total",
		Help: "Idle connections of clients that a generation was passed. They count as accepted only in the generation that accepted them.",
		Type: metrics.TypeCounter, Labels: []string{"listener"},
	})
	connectionsDeclined = metrics.Define(metrics.Desc{
		Name: "holdfast_downstream_connections_declined_total",
		Help: "Idle connections of clients that a generation was passed and has closed, because there was no descriptor left for them.",
		Type: metrics.TypeCounter, Labels: []string{"listener"},
	})
)

// handover is a generation's part in that. Its loop owns the fields without a remark.
type handover struct {
	g       *generation
	metrics map[*listener]handoverMetrics // set by build
	events  chan handoverEvent
	done    chan struct{} // closed by close
	talks   sync.WaitGroup
	pending atomic.Int64 // connections that no server has and that are not sent

	patience *time.Timer   // with the passage that does not come
	until    time.Time     // when that ends, as the supervisor says
	least    time.Duration // how long it lasts in any case when there was a passage
	alone    map[*listener]bool
	gives    *giver // nil: there is no passage to give anything into
	takes    map[*taker]bool
}

type handoverMetrics struct{ passed, received, declined *metrics.Counter }

// handoverEvent is what happens to a passage.
type handoverEvent struct {
	gives *giver
	takes *taker
	keys  []string // of the listeners that the other side has
	err   error    // the end; nil: not yet
}

func newHandover(g *generation) *handover {
	return &handover{
		g: g, metrics: make(map[*listener]handoverMetrics), events: make(chan handoverEvent), done: make(chan struct{}),
		patience: stoppedTimer(), least: takerPatience, alone: make(map[*listener]bool), takes: make(map[*taker]bool),
	}
}

// add makes a listener one of those whose connections are passed on.
func (h *handover) add(l *listener) {
	r := h.g.registry
	h.metrics[l] = handoverMetrics{r.Counter(connectionsPassed, l.cfg.Name), r.Counter(connectionsReceived, l.cfg.Name), r.Counter(connectionsDeclined, l.cfg.Name)}
}

// busy says whether there are connections that no listener knows of, or may be.
func (h *handover) busy() bool { return len(h.takes) > 0 || h.pending.Load() > 0 }

// drain is what becomes of idle connections when the generation stops accepting, and when
// it is told so once more: they are kept for a passage that may come in so long a time; 0:
// none does. Those of removed listeners have nowhere to go.
func (h *handover) drain(removed []string, passage time.Duration) {
	h.stopTaking()
	again := h.g.phase != serving
	for _, l := range h.g.listeners {
		if slices.Contains(removed, l.key) || passage <= 0 && !again {
			h.leaveAlone(l)
		}
	}
	if passage > 0 {
		h.until = time.Now().Add(passage)
		if h.gives == nil {
			h.await(passage)
		}
	}
}

// leaveAlone has the idle connections of a listener closed after their grace.
func (h *handover) leaveAlone(l *listener) {
	if !h.alone[l] {
		h.alone[l] = true
		l.server.Drain(h.g.cfg.Drain.IdleGrace)
	}
}

// await keeps idle connections for so long.
func (h *handover) await(wait time.Duration) {
	h.patience.Reset(wait)
	for _, l := range h.g.listeners {
		if !h.alone[l] {
			l.server.Retire(wait + h.g.cfg.Drain.IdleGrace)
		}
	}
}

// losePatience is called when no passage has come in time: it is a drain like any other
// from now on, until one does.
func (h *handover) losePatience() {
	if h.g.phase != draining || h.gives != nil && h.gives.begun {
		return
	}
	h.g.drainServers(h.g.cfg.Drain.IdleGrace)
	h.g.log.Warn("no generation takes the idle connections: they are closed after drain.idle_grace")
}

// stay ends all of that: the generation serves again, or stops.
func (h *handover) stay() {
	h.stopTaking()
	h.stopGiving()
	h.patience.Stop()
	clear(h.alone)
}

// give takes over one end of a passage, into which connections go from now on.
func (h *handover) give(fds []int) error {
	if h.g.phase != draining {
		control.Discard(fds)
		return errors.New("only a generation that drains gives connections away")
	}
	p, err := passageOf(fds)
	if err != nil {
		return err
	}
	h.stopGiving()
	v := &giver{h: h, p: p, batches: make([]batch, len(h.g.loops.streams))}
	h.gives = v
	h.await(max(time.Until(h.until), h.least)) // to learn what the other side takes
	h.talks.Go(v.talk)
	return nil
}

// take takes over one end of a passage, out of which connections come.
func (h *handover) take(fds []int) error {
	if h.g.phase != serving {
		control.Discard(fds)
		return errors.New("only a generation that serves takes connections")
	}
	p, err := passageOf(fds)
	if err != nil {
		return err
	}
	t := &taker{h: h, p: p, listeners: make(map[string]*listener)}
	for _, l := range h.g.listeners {
		if l.passes {
			t.listeners[l.key] = l
		}
	}
	h.takes[t] = true
	h.talks.Go(t.talk)
	return nil
}

func passageOf(fds []int) (*control.Passage, error) {
	if len(fds) != 1 {
		control.Discard(fds)
		return nil, errors.New("no passage has come with it")
	}
	return control.NewPassage(fds[0])
}

// on does what has to be done when something happens to a passage.
func (h *handover) on(e handoverEvent) {
	switch {
	case e.takes != nil:
		delete(h.takes, e.takes)
	case e.gives != h.gives: // it was replaced
	case e.err == nil:
		h.begin(e.keys)
	default:
		h.g.log.Info("the generation that took the idle connections takes no more", "why", e.err)
		h.stopGiving()
		h.await(max(time.Until(h.until), h.least))
	}
}

// begin gives away what the other side takes. The rest has nowhere to go.
func (h *handover) begin(keys []string) {
	h.patience.Stop()
	var from []*listener
	for _, l := range h.g.listeners {
		if slices.Contains(keys, l.key) {
			from = append(from, l)
			delete(h.alone, l)
			l.server.Retire(giving)
		} else {
			h.leaveAlone(l)
		}
	}
	h.g.log.Info("idle connections go to the generation that serves")
	h.gives.begin(from)
}

func (h *handover) stopGiving() {
	if h.gives != nil {
		h.gives.stop()
		h.gives = nil
	}
}

// stopTaking ends all passages out of which connections come: what was given before is
// still taken.
func (h *handover) stopTaking() {
	for t := range h.takes {
		t.p.End()
	}
}

// tell hands the loop an event.
func (h *handover) tell(e handoverEvent) {
	select {
	case h.events <- e:
	case <-h.done:
	}
}

// close ends all passages and waits for whoever receives from them.
func (h *handover) close() {
	close(h.done)
	h.stopGiving()
	h.stopTaking()
	h.talks.Wait()
}

// giver is one end of a passage into which connections go. give, send and flush are called
// on loops.
type giver struct {
	h       *handover
	p       *control.Passage
	begun   bool    // the other side has said what it takes. Owned by the generation's loop
	batches []batch // by loop, whose own they are

	full     atomic.Bool  // there is no room: nothing is given until it is offered again
	failures atomic.Int32 // for want of room, in a row
	broken   atomic.Bool  // nothing is given any more

	mu   sync.Mutex  // held to offer
	from []*listener // nil: nothing is offered
}

// batch is what goes into one packet.
type batch struct {
	conns []control.Passed
	from  []*listener
	posts bool // send was posted
}

// talk waits for what the other side takes, and for its end.
func (v *giver) talk() {
	keys, err := v.p.ReceiveKeys()
	if err == nil {
		v.h.tell(handoverEvent{gives: v, keys: keys})
		if _, err = v.p.ReceiveKeys(); err == nil {
			err = errors.New("it has said twice what it takes")
		}
	}
	v.h.tell(handoverEvent{gives: v, err: err})
}

// begin gives away what is idle, and what becomes so.
func (v *giver) begin(from []*listener) {
	v.begun = true
	v.mu.Lock()
	v.from = from
	v.mu.Unlock()
	v.offer()
}

// offer has servers give away all that is idle.
func (v *giver) offer() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.full.Store(false)
	for _, l := range v.from {
		l.server.HandOver(func(on *stream.Loop, i http1.Idle) bool { return v.give(l, on, i) })
	}
}

// stop ends the passage. What was not sent goes back to where it was, before anybody else
// is offered it.
func (v *giver) stop() {
	v.broken.Store(true)
	v.mu.Lock()
	for _, l := range v.from {
		l.server.HandOver(nil)
	}
	v.from = nil
	v.mu.Unlock()
	var left atomic.Int32
	left.Store(int32(len(v.batches)))
	leave := func() {
		if left.Add(-1) == 0 {
			v.p.Close()
		}
	}
	for _, on := range v.h.g.loops.streams {
		if !on.Post(func() { v.flush(on); leave() }) {
			leave()
		}
	}
}

// give has a connection go with the next packet. It says whether that is so.
func (v *giver) give(l *listener, on *stream.Loop, i http1.Idle) bool {
	b := &v.batches[on.Index]
	c := control.Passed{Key: l.key, Remote: i.Remote, Early: i.Early, Idle: max(0, time.Since(i.Since)), FD: i.FD}
	if len(b.conns) > 0 && !control.PassageTakes(b.conns, &c) {
		v.send(b)
	}
	if v.full.Load() || v.broken.Load() || !control.PassageTakes(b.conns, &c) || !v.post(b, on) {
		return false
	}
	b.conns, b.from = append(b.conns, c), append(b.from, l)
	v.h.pending.Add(1)
	return true
}

// post has the batch sent when the loop has done what it does.
func (v *giver) post(b *batch, on *stream.Loop) bool {
	b.posts = b.posts || on.Post(func() { v.flush(on) })
	return b.posts
}

// send sends a batch if there is room for it.
func (v *giver) send(b *batch) {
	if len(b.conns) == 0 || v.full.Load() || v.broken.Load() {
		return
	}
	switch err := v.p.TrySend(b.conns); {
	case err == nil:
		v.failures.Store(0)
		for i := range b.conns {
			v.h.metrics[b.from[i]].passed.Inc()
			_ = unix.Close(b.conns[i].FD) // there is another one: nothing is lost by it
		}
		v.empty(b)
	case !errors.Is(err, control.ErrPassageBusy):
		v.broken.Store(true) // talk hears why
	case v.full.CompareAndSwap(false, true):
		pause := min(leastOfferPause<<min(v.failures.Add(1)-1, 10), mostOfferPause)
		time.AfterFunc(pause, v.offer)
	}
}

func (v *giver) empty(b *batch) {
	clear(b.conns)
	n := len(b.conns)
	b.conns, b.from = b.conns[:0], b.from[:0]
	v.h.pending.Add(int64(-n))
	v.h.g.notice()
}

// flush sends the batch of a loop. What there is no room for goes back to where it was.
func (v *giver) flush(on *stream.Loop) {
	b := &v.batches[on.Index]
	b.posts = false
	v.send(b)
	if len(b.conns) == 0 {
		return
	}
	for i := range b.conns {
		c := &b.conns[i]
		b.from[i].takeBack(on, http1.Idle{FD: c.FD, Remote: c.Remote, Early: c.Early, Since: time.Now().Add(-c.Idle)})
	}
	v.empty(b)
}

// taker is one end of a passage out of which connections come.
type taker struct {
	h         *handover
	p         *control.Passage
	listeners map[string]*listener // by key
	said      bool                 // that something came which does not belong there
}

// talk says which connections are taken, and takes them until the passage has ended.
func (t *taker) talk() {
	if err := t.p.SendKeys(t.keys()); err != nil {
		t.complain("connections cannot be asked for", "err", err)
	}
	for {
		all, err := t.p.Receive()
		for i := range all {
			t.take(&all[i])
		}
		switch {
		case errors.Is(err, control.ErrProtocol):
			t.complain("connections that were passed here are lost", "err", err)
		case err != nil:
			t.p.Close()
			t.h.tell(handoverEvent{takes: t, err: err})
			return
		}
	}
}

// complain says once for each passage what is wrong with it.
func (t *taker) complain(text string, attrs ...any) {
	if !t.said {
		t.said = true
		t.h.g.log.Error(text+"; more of that will not be logged", attrs...)
	}
}

func (t *taker) keys() (keys []string) {
	for key := range t.listeners {
		keys = append(keys, key)
	}
	return keys
}

// take has a connection served here.
func (t *taker) take(c *control.Passed) {
	l := t.listeners[c.Key]
	err := usable(c.FD)
	if l == nil || err != nil {
		control.Discard([]int{c.FD})
		t.complain("a connection that was passed here cannot be served", "key", c.Key, "err", err)
		return
	}
	counts := t.h.metrics[l]
	if !l.descriptors.allow(c.FD) {
		control.Discard([]int{c.FD})
		counts.declined.Inc()
		return
	}
	setOptions(c.FD) // another version may have set others
	counts.received.Inc()
	l.adopt(http1.Idle{FD: c.FD, Remote: c.Remote, Early: c.Early, Since: time.Now().Add(-c.Idle)})
}

// usable says whether a descriptor that another process has sent is what a loop can have.
func usable(fd int) error {
	kind, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil {
		return err
	}
	listens, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	if err != nil {
		return err
	}
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	if err != nil {
		return err
	}
	if kind != unix.SOCK_STREAM || listens != 0 || flags&unix.O_NONBLOCK == 0 {
		return errors.New("it is no connection that does not block")
	}
	// Its close must not wait (socket(7), SO_LINGER).
	return unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, new(unix.Linger))
}
