package service

import (
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"time"

	"holdfast/internal/admin"
	"holdfast/internal/control"
	"holdfast/internal/runtimedir"
	"holdfast/internal/socket"
	"holdfast/internal/supervisor"
	"holdfast/internal/systemd"
)

// The keys of what goes to a successor beside the supervisor's own and that of the
// admin surface.
const (
	keyLock       = "lock"
	keyRendezvous = "rendezvous"
	keySystemd    = "systemd " // and a number, a space and the name of the socket unit
)

// holdings are what the service has beside its supervisor. In an upgrade they go from
// one process to the next, and for a while both have them. It implements [heir].
type holdings struct {
	flip        flip
	predecessor *predecessor // nil: there was none
	succession  *succession

	dir        *runtimedir.Dir
	lock       *runtimedir.Lock
	secret     []byte
	fresh      bool // nobody has the secret yet
	rendezvous *control.Rendezvous
	inherited  *socket.Inherited // of systemd
	surface    *admin.Server
	notifier   *systemd.Notifier
}

// occupy makes the runtime directory this process's, or this process one of the two
// that have it where there is a predecessor. After an error nothing is to be closed.
func occupy(path string, from origin) (h *holdings, err error) {
	h = &holdings{flip: from.flip, predecessor: from.predecessor, inherited: from.inherited}
	if h.dir, err = runtimedir.Prepare(path); err != nil {
		return nil, err
	}
	if h.lock, err = h.takeLock(); err != nil {
		return nil, err
	}
	if h.secret, h.fresh, err = h.dir.Secret(); err == nil {
		h.rendezvous, err = h.takeRendezvous()
	}
	if err != nil {
		return nil, errors.Join(err, h.lock.Close())
	}
	return h, nil
}

func (h *holdings) takeLock() (*runtimedir.Lock, error) {
	if h.predecessor == nil {
		return h.dir.Lock()
	}
	fd, err := h.predecessor.takeOne(keyLock)
	if err != nil {
		return nil, err
	}
	return runtimedir.InheritLock(fd, h.dir)
}

func (h *holdings) takeRendezvous() (*control.Rendezvous, error) {
	if h.predecessor == nil {
		return control.ListenRendezvous(h.dir.Rendezvous())
	}
	fd, err := h.predecessor.takeOne(keyRendezvous)
	if err != nil {
		return nil, err
	}
	return control.NewRendezvous(fd, h.dir.Rendezvous())
}

// takeSystemd returns the sockets that systemd has passed to the first supervisor.
func takeSystemd(p *predecessor) *socket.Inherited {
	all := make(map[string][]int)
	for key, fd := range p.take(keySystemd) {
		_, name, _ := strings.Cut(strings.TrimPrefix(key, keySystemd), " ")
		all[name] = append(all[name], fd)
	}
	return socket.InheritDescriptors(all)
}

// settle makes what needs a log, and completes o by it and by those who come before and
// after this process.
func (h *holdings) settle(log *slog.Logger, o *supervisor.Options) {
	h.surface, h.notifier = admin.New(log), systemd.NewNotifier(log)
	o.Admin = h.surface
	h.succession = newSuccession(h.flip, h, log)
	o.Successor = h.succession.start
	if h.notifier != nil {
		o.Store = h.notifier
	}
	if p := h.predecessor; p != nil {
		h.surface.Inherit(p.take(admin.KeyPrefix))
		h.notifier.Hold()
		p.log, p.takeOver, p.known, p.supervised = log, h.takeOver, h.notifier.Release, h.notifier != nil
		o.Predecessor = p
	}
}

// ours says whether nobody else has what this process has, after its supervisor has
// ended with err.
func (h *holdings) ours(err error) bool {
	return !errors.Is(err, supervisor.ErrSucceeded) && (h.predecessor == nil || h.predecessor.commands)
}

// parting is what is wrong although another supervisor commands, or should, and for a
// service manager to mend: it wraps supervisor.ErrSucceeded.
func (h *holdings) parting() error {
	err := h.succession.lost
	if p := h.predecessor; p != nil && p.parted != nil {
		err = p.parted
	}
	if err == nil {
		return nil
	}
	return fmt.Errorf("%w: %w", supervisor.ErrSucceeded, err)
}

// belongings implements [heir].
func (h *holdings) belongings() (map[string]int, error) {
	fds, err := h.surface.Listeners()
	if err != nil {
		return nil, err
	}
	ours := map[string]int{keyLock: h.lock.FD(), keyRendezvous: h.rendezvous.FD()}
	for name, all := range h.inherited.All() {
		for _, fd := range all {
			ours[keySystemd+strconv.Itoa(len(ours))+" "+name] = fd
		}
	}
	for key, fd := range ours {
		dup, err := control.Duplicate(fd)
		if err != nil {
			control.CloseNamed(fds)
			return nil, fmt.Errorf("%s: %w", key, err)
		}
		fds[key] = dup
	}
	return fds, nil
}

func (h *holdings) hold() { h.surface.Hold() }
func (h *holdings) open() { h.surface.Open() }

func (h *holdings) relieve(pid int, within time.Duration) error {
	return h.notifier.Relieve(pid, within)
}

// takeOver makes everything this process's alone.
func (h *holdings) takeOver() error {
	h.surface.Open()
	return h.lock.Sign()
}

// close gives everything up, and removes what leads here if it is ours alone. The
// order: first the paths, and only then the lock, so that whoever comes next never meets
// a path that is about to be removed. Whoever waits for the end hears of it after that,
// and can start another supervisor at once.
func (h *holdings) close(ours bool) error {
	if ours {
		h.surface.CloseListeners()
	} else {
		h.surface.Leave()
	}
	err := errors.Join(h.rendezvous.Close(ours), h.lock.Close())
	h.surface.Close()
	return err
}
