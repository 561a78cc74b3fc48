package systemd

import (
	"cmp"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"
)

// maxStatus bounds a status in bytes: it is one line of `systemctl status`.
const maxStatus = 300

// A Notifier tells systemd how the service is, by sd_notify(3), and leaves descriptors
// with it. Its methods may be called concurrently, and work on a nil one.
//
// None of them but Relieve blocks, although systemd may be stuck: they only note what
// is to be said, and one goroutine says it. What was not said yet when something newer
// comes is not said at all, so that systemd hears how things are, and nothing piles up.
type Notifier struct {
	log  *slog.Logger
	line line          // the goroutine's
	wake chan struct{} // has a value when there may be something to say
	stop chan struct{}
	done chan struct{}

	mu     sync.Mutex
	silent bool // nothing is to be said: not yet, or never more
	unsaid message
	store  store
	relief *relief // asked for, and not begun
}

// A message is what there is to say, "" where that is nothing.
type message struct {
	state  string // READY=1, RELOADING=1 with its time, or STOPPING=1
	alive  string // WATCHDOG=1, and how long systemd shall wait on at least
	status string // STATUS=
}

// over returns m, and of old what m says nothing about.
func (m message) over(old message) message {
	return message{cmp.Or(m.state, old.state), cmp.Or(m.alive, old.alive), cmp.Or(m.status, old.status)}
}

func (m message) String() string {
	lines := slices.DeleteFunc([]string{m.state, m.alive, m.status}, func(l string) bool { return l == "" })
	return strings.Join(lines, "\n")
}

// NewNotifier returns a Notifier, or nil where nobody wants to hear anything.
func NewNotifier(log *slog.Logger) *Notifier {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return nil
	}
	n := &Notifier{
		log: log, line: line{path: path}, store: newStore(),
		wake: make(chan struct{}, 1), stop: make(chan struct{}), done: make(chan struct{}),
	}
	go n.run()
	return n
}

// Hold keeps back what is to be said, until Release. For a process that systemd does
// not believe yet: what it said would be thrown away (NotifyAccess=main).
func (n *Notifier) Hold() { n.hold(true) }

// Release says what Hold has kept back.
func (n *Notifier) Release() { n.hold(false) }

func (n *Notifier) hold(on bool) {
	if n == nil {
		return
	}
	n.mu.Lock()
	n.silent = on
	n.mu.Unlock()
	n.nudge()
}

// Ready says that the service serves: after its start, and after each reload.
func (n *Notifier) Ready() { n.note(message{state: daemon.SdNotifyReady}) }

// Reloading says that a reload has begun. Ready follows, however it ends.
func (n *Notifier) Reloading() {
	n.note(message{state: fmt.Sprintf("%s\nMONOTONIC_USEC=%d", daemon.SdNotifyReloading, monotonic().Microseconds())})
}

// Stopping says that the service has begun to end.
func (n *Notifier) Stopping() { n.note(message{state: daemon.SdNotifyStopping}) }

// Alive says that the service lives, which satisfies the watchdog. A patience other
// than 0 is for a start, a reload or a stop that is under way: systemd's own limit
// for it does not end before that time is over.
func (n *Notifier) Alive(patience time.Duration) {
	alive := daemon.SdNotifyWatchdog
	if patience > 0 {
		alive += fmt.Sprintf("\nEXTEND_TIMEOUT_USEC=%d", patience.Microseconds())
	}
	n.note(message{alive: alive})
}

// Status says what `systemctl status` shows. Of a text of several lines it is the
// first one.
func (n *Notifier) Status(text string) { n.note(message{status: "STATUS=" + oneLine(text)}) }

func (n *Notifier) note(m message) {
	if n == nil {
		return
	}
	n.mu.Lock()
	n.unsaid = m.over(n.unsaid)
	n.mu.Unlock()
	n.nudge()
}

func (n *Notifier) nudge() {
	select {
	case n.wake <- struct{}{}:
	default:
	}
}

// Close says what is left to be said, for which it waits no longer than within. The
// other methods must not be called afterwards.
func (n *Notifier) Close(within time.Duration) {
	if n == nil {
		return
	}
	close(n.stop)
	select {
	case <-n.done:
	case <-time.After(within): // systemd is stuck; the end of the process ends the goroutine
	}
}

func (n *Notifier) run() {
	defer close(n.done)
	defer n.line.close()
	failing := false
	for {
		ending := false
		select {
		case <-n.wake:
		case <-n.stop:
			ending = true
		}
		err := n.say()
		if err != nil && !failing {
			n.log.Error("systemd cannot be told how the service is", "err", err)
		}
		failing = err != nil
		if ending {
			n.store.forget()
			return
		}
	}
}

// say blocks while systemd is stuck, without a limit: only run waits for it. What it
// cannot say is said with what comes next.
func (n *Notifier) say() error {
	n.mu.Lock()
	silent := n.silent
	n.mu.Unlock()
	if silent {
		return nil
	}
	if err := n.sayState(); err != nil {
		return err
	}
	if err := n.makeDeposits(); err != nil {
		return err
	}
	n.hand()
	return nil
}

func (n *Notifier) sayState() error {
	n.mu.Lock()
	m := n.unsaid
	n.unsaid = message{}
	n.mu.Unlock()
	if m == (message{}) {
		return nil
	}
	err := n.line.send(m.String())
	if err != nil {
		n.mu.Lock()
		n.unsaid = n.unsaid.over(m)
		n.mu.Unlock()
	}
	return err
}

// oneLine is the first line of text without what systemd would refuse or a terminal
// would obey.
func oneLine(text string) string {
	text, _, _ = strings.Cut(text, "\n")
	text = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) || r == utf8.RuneError {
			return '?'
		}
		return r
	}, text)
	if len(text) <= maxStatus {
		return text
	}
	const more = "…"
	end := maxStatus - len(more)
	for !utf8.RuneStart(text[end]) {
		end--
	}
	return text[:end] + more
}

// monotonic is CLOCK_MONOTONIC, which systemd compares with its own.
func monotonic() time.Duration {
	var now unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &now) // fails for an unknown clock only
	return time.Duration(now.Nano())
}
