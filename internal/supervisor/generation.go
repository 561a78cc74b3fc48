package supervisor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unicode"

	"holdfast/internal/control"
	"holdfast/internal/metrics"
	"holdfast/internal/pidfd"
)

// sendTimeout bounds how long a message may wait in front of a full queue: the
// queue of a process that reads is never full.
const sendTimeout = 2 * time.Second

// caller is the sending half of a control channel.
type caller interface {
	Send(m *control.Message, within time.Duration, fds ...int) error
}

// generation is one proxy process.
type generation struct {
	number   int
	proc     process
	identity pidfd.Identity
	log      *slog.Logger

	hello chan *control.Hello // what it said first
	ready chan error          // nil, or why it cannot serve
	died  chan struct{}       // closed when the process is gone; how is set then
	how   string

	killed atomic.Bool // by us
	done   atomic.Bool // it said that nothing is left to do

	ticketing chan struct{} // held, by putting into it, while it is told of ticket keys

	leaves func() // called when it says that it leaves; set before it is heard
	copied func() // called when it says that its copies of files are others; set before it is heard

	// Owned by the supervisor's loop. The release is set once for one that was started,
	// and when it is adopted for one that was found.
	release     *release
	started     time.Time
	state       state
	served      time.Time // when it began to serve
	cutOff      error     // why its channel was closed
	lost        losses    // what went with it
	silent      bool      // did not answer the last question
	movesTo     int       // the generation for which it was told to move tunnels last
	movesAll    bool      // the operator wants all of them to go
	givesTo     int       // the generation to which it was given a passage; 0: none
	bequests    int       // times in a row that the tunnels that it resumes were left by one that had died soon
	deaths      int       // of those, how many nobody had killed
	lastSeen    control.Status
	movedBefore int64 // tunnels that went elsewhere before this supervisor knew it

	passageFailures int // in a row, to the same generation

	told      uint64   // the newest revision of overrides that it has confirmed
	telling   bool     // somebody is about to tell it of another one
	keepsBack *release // what it keeps for a rollback; nil: nothing of ours

	file *fileOverrides // that the release which it was started for brings, while that is not installed; nil: the one that holds

	crowded          bool // it may believe that other generations have something with its clusters
	askedLoads       bool // what it has with them
	tellingElsewhere bool // it is being told what others have

	ticketsTold    uint64 // the newest revision of ticket keys that it has confirmed
	tellingTickets bool   // somebody is about to tell it of another one

	counts *metrics.File // that it counts in, which belongs to the totals; nil: not known

	overriding  sync.Mutex // held while it is told of overrides
	handingBack sync.Mutex // held while it is handed what a rollback needs

	mu      sync.Mutex // guards what follows
	ch      channel
	heard   chan struct{} // closed when all that came over ch was taken
	version string
	lastID  uint64

	vaultVersion   int // as it says; 0: it knows no vault
	passageVersion int // the same of passages
	runtimeVersion int // the same of runtime values

	clustersVersion int // the same of what is told of clusters
	ticketsVersion  int // the same of ticket keys
	copiesVersion   int // the same of copies of files
	clearVersion    int // the same of clearing

	waiting map[uint64]chan answer

	// unanswered is how many questions it was sent since it last answered one.
	unanswered int
}

func newGeneration(number int, r *release, proc process, ch channel, log *slog.Logger) *generation {
	return &generation{
		number: number, release: r, proc: proc, ch: ch,
		started: time.Now(), state: starting,
		log:     log.With("of_generation", number, "of_pid", proc.PID()),
		hello:   make(chan *control.Hello, 1),
		ready:   make(chan error, 1),
		heard:   make(chan struct{}),
		died:    make(chan struct{}),
		waiting: make(map[uint64]chan answer),

		ticketing: make(chan struct{}, 1),
	}
}

// channel returns what the generation is spoken to over, and a channel that is closed
// when all that came over it was taken.
func (g *generation) channel() (channel, chan struct{}) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.ch, g.heard
}

// attach has the generation spoken to over ch from now on. It returns the channel until
// now, which is the caller's to close.
func (g *generation) attach(ch channel) (old channel) {
	g.mu.Lock()
	defer g.mu.Unlock()
	old, g.ch, g.heard = g.ch, ch, make(chan struct{})
	g.unanswered = 0
	return old
}

// unattached is the channel of a generation that has none at present.
type unattached struct{}

var errUnattached = errors.New("it has no control channel at present")

func (unattached) Send(*control.Message, time.Duration, ...int) error { return errUnattached }
func (unattached) Receive() (*control.Message, []int, error)          { return nil, nil, io.EOF }
func (unattached) Close() error                                       { return nil }

// receive takes what the generation says over ch until that breaks. It returns nil
// at the proper end, otherwise why the channel had to be closed.
func (g *generation) receive(ch channel) error {
	for {
		m, fds, err := ch.Receive()
		if err != nil {
			if errors.Is(err, control.ErrProtocol) {
				return err
			}
			return nil
		}
		if err := g.take(m, fds); err != nil {
			return err
		}
	}
}

// closeChannel does not wait: what the generation has sent and nobody has received is
// closed with the channel; see [control.Discard].
func (g *generation) closeChannel() {
	ch, _ := g.channel()
	go ch.Close()
}

// versionNow is what it said it is, "" before.
func (g *generation) versionNow() string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.version
}

// take does what a message says, and closes its descriptors.
func (g *generation) take(m *control.Message, fds []int) error {
	switch m.Type {
	case control.TypeHello:
		if m.Hello == nil || !presentable(m.Hello.Version) {
			return fmt.Errorf("%w: a hello without a version that can be shown", control.ErrProtocol)
		}
		g.mu.Lock()
		g.version, g.vaultVersion, g.passageVersion, g.runtimeVersion = m.Hello.Version, m.Hello.Vault, m.Hello.Passage, m.Hello.Runtime
		g.clustersVersion, g.ticketsVersion, g.copiesVersion = m.Hello.Clusters, m.Hello.Tickets, m.Hello.Copies
		g.clearVersion = m.Hello.Clear
		g.mu.Unlock()
		offer(g.hello, m.Hello)
	case control.TypeReady:
		if m.Error != "" {
			offer(g.ready, errors.New(m.Error))
			break
		}
		// Only the first one of the release is kept, so no other is read: a process
		// that was taken over may send as many as it likes.
		if len(fds) == 1 && g.release.learnt.Load() == nil {
			learnt, err := control.ReadLearnt(fds[0])
			if err != nil {
				return fmt.Errorf("%w: %w", control.ErrProtocol, err)
			}
			g.release.learnt.CompareAndSwap(nil, learnt)
			fds = nil
		}
		offer(g.ready, nil)
	case control.TypeAnswer:
		g.mu.Lock()
		if to := g.waiting[m.Re]; to != nil {
			to <- answer{m, fds} // has room for its one answer
			fds = nil
		}
		delete(g.waiting, m.Re)
		g.unanswered = 0
		g.mu.Unlock()
	case control.TypeLeaving:
		g.leaves()
	case control.TypeCopied:
		g.copied()
	case control.TypeDone:
		g.done.Store(true)
	default:
		g.log.Debug("message of an unknown type", "type", m.Type)
	}
	control.Discard(fds)
	return nil
}

// oneLine makes what a generation says harmless to whoever reads it.
func oneLine(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return '\uFFFD'
	}, s)
}

// presentable says whether a text is short and does nothing to a terminal.
func presentable(s string) bool {
	return len(s) <= 128 && !strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) })
}

// offer gives v to whoever waits for the first one; repetitions are dropped.
func offer[T any](to chan T, v T) {
	select {
	case to <- v:
	default:
	}
}

// errSilent says that a generation lives but does not answer.
var errSilent = errors.New("no answer")

// mostUnanswered is how many questions may lie before a process that does not read
// until it is asked nothing any more, but to serve or to drain: its queue keeps room
// for what it must hear when it goes on.
const mostUnanswered = 8

// answer is what came to a question. Whoever takes it discards the descriptors.
type answer struct {
	*control.Message
	fds []int
}

// ask is question for an answer without descriptors.
func (g *generation) ask(ctx context.Context, m control.Message, within time.Duration, fds ...int) (*control.Message, error) {
	a, err := g.question(ctx, m, within, fds...)
	control.Discard(a.fds)
	return a.Message, err
}

// question sends m and waits for its answer, for the process to end, or for the time
// to pass. With an error there is no answer.
func (g *generation) question(ctx context.Context, m control.Message, within time.Duration, fds ...int) (answer, error) {
	answers := make(chan answer, 1)
	g.mu.Lock()
	if m.Type != control.TypeServe && m.Type != control.TypeDrain && g.unanswered >= mostUnanswered {
		g.mu.Unlock()
		return answer{}, fmt.Errorf("generation %d: %w to %d questions", g.number, errSilent, mostUnanswered)
	}
	g.unanswered++
	g.lastID++
	m.ID = g.lastID
	g.waiting[m.ID] = answers
	ch := g.ch
	g.mu.Unlock()
	defer func() {
		g.mu.Lock()
		delete(g.waiting, m.ID)
		g.mu.Unlock()
		select {
		case late := <-answers:
			control.Discard(late.fds)
		default:
		}
	}()
	if err := ch.Send(&m, min(within, sendTimeout), fds...); err != nil {
		g.mu.Lock()
		g.unanswered = max(g.unanswered-1, 0) // it was not sent
		g.mu.Unlock()
		return answer{}, err
	}
	timer := time.NewTimer(within)
	defer timer.Stop()
	select {
	case a := <-answers:
		if a.Error != "" {
			control.Discard(a.fds)
			return answer{}, errors.New(oneLine(a.Error))
		}
		return a, nil
	case <-g.died:
		return answer{}, fmt.Errorf("generation %d has ended: %s", g.number, g.how)
	case <-timer.C:
		return answer{}, fmt.Errorf("generation %d: %w to %s within %s", g.number, errSilent, m.Type, within)
	case <-ctx.Done():
		return answer{}, context.Cause(ctx)
	}
}

// prepare brings a started process to ready: hello, bundle, what provide gives it, and
// listeners. states is what it begins with of its clusters, and copies are those of files; -1:
// nothing.
func (g *generation) prepare(ctx context.Context, listeners map[string]int, start control.Bundle, states, copies int, provide func() error) error {
	hello, err := await(ctx, g, g.hello, "did not say hello")
	if err != nil {
		return err
	}
	if !hello.Meets(control.Core, control.CoreMin) {
		return fmt.Errorf("speaks control protocol %d to %d, this supervisor %d to %d", hello.CoreMin, hello.Core, control.CoreMin, control.Core)
	}
	bundle, err := g.release.bundle(start)
	if err != nil {
		return err
	}
	defer bundle.Close()
	files := []int{int(bundle.Fd()), g.counts.FD()}
	if states >= 0 && g.sharesClusters() {
		files = append(files, states)
	}
	if copies >= 0 && g.hasCopies() {
		err = g.send(&control.Message{Type: control.TypeLegacy}, copies)
	}
	if err == nil {
		err = g.send(&control.Message{Type: control.TypeBundle}, files...)
	}
	if err == nil {
		err = provide()
	}
	if err == nil {
		err = g.handLogs(g.send)
	}
	if err == nil {
		err = g.sendListeners(listeners)
	}
	if err != nil && !errors.Is(err, syscall.EPIPE) { // a process that ended is explained by its last words
		return err
	}
	problem, err := await(ctx, g, g.ready, "was not ready")
	return errors.Join(err, problem)
}

// sendListeners hands over duplicates of the listening sockets, by key.
func (g *generation) sendListeners(listeners map[string]int) error {
	return control.SendFiles(control.TypeListeners, listeners, g.send)
}

// A sender sends a message with duplicates of descriptors.
type sender = func(m *control.Message, fds ...int) error

// send is the sender that awaits no answer.
func (g *generation) send(m *control.Message, fds ...int) error {
	ch, _ := g.channel()
	return ch.Send(m, sendTimeout, fds...)
}

// asking is the sender that awaits the answer to each message.
func (g *generation) asking(ctx context.Context) sender {
	return func(m *control.Message, fds ...int) error {
		_, err := g.ask(ctx, *m, answerTimeout, fds...)
		return err
	}
}

// await waits for what a starting generation says next.
func await[T any](ctx context.Context, g *generation, from chan T, missing string) (v T, err error) {
	select {
	case v = <-from:
		return v, nil
	case <-g.died:
		// What it said before it ended explains more than how it ended.
		select {
		case v = <-from:
			return v, nil
		default:
		}
		return v, fmt.Errorf("the proxy ended while it was starting: %s", g.how)
	case <-ctx.Done():
		if errors.Is(context.Cause(ctx), context.DeadlineExceeded) {
			return v, fmt.Errorf("the proxy %s within %s", missing, g.release.config.Reload.ReadyTimeout)
		}
		return v, context.Cause(ctx)
	}
}

// signal signals the process, and remembers that it was killed by us.
func (g *generation) signal(sig os.Signal) error {
	if sig == os.Kill {
		g.killed.Store(true)
	}
	return g.proc.Signal(sig)
}

// killPatience is how long a killed process may take to be gone. One that takes
// longer is stuck in the kernel, and nothing may wait for that.
const killPatience = 10 * time.Second

// kill ends the process at once and waits until it is gone. What goes wrong is
// logged too.
func (g *generation) kill(ctx context.Context) error {
	if err := g.signal(os.Kill); err != nil && !errors.Is(err, os.ErrProcessDone) {
		g.log.Error("cannot kill", "err", err)
		return fmt.Errorf("kill generation %d: %w", g.number, err)
	}
	select {
	case <-g.died:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("generation %d was killed and is not gone yet: %w", g.number, context.Cause(ctx))
	case <-time.After(killPatience):
		g.log.Error("a killed process does not end: it is stuck in the kernel", "after", killPatience)
		return fmt.Errorf("generation %d was killed and is not gone after %s: it is stuck in the kernel", g.number, killPatience)
	}
}
