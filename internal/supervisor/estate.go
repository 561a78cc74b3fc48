package supervisor

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"holdfast/internal/control"
	"holdfast/internal/ledger"
	"holdfast/internal/logs"
	"holdfast/internal/pidfd"
	"holdfast/internal/runtimedir"
	"holdfast/internal/tickets"
)

// estate is what a supervisor leaves behind, however it ends: memory files that every
// generation has a duplicate of, and the service manager where there is one. Nobody but
// this process can write to them, so each supervisor has its own.
type estate struct {
	facts   *ledger.File
	totals  *ledger.File
	tickets *ledger.File
}

// facts are what only a supervisor knows.
type facts struct {
	Epoch    uint64 `json:"epoch"`
	Last     int    `json:"last"` // number of the newest generation
	LogLevel string `json:"log_level,omitempty"`
	ReadyOff bool   `json:"ready_off,omitempty"`

	LastReload *LastReload `json:"last_reload,omitempty"`

	Overrides     map[string]float64 `json:"overrides,omitempty"`      // that were set by command
	OverridesFile string             `json:"overrides_file,omitempty"` // path
	FileOverrides map[string]float64 `json:"file_overrides,omitempty"` // what the file has said last that could be believed
}

func newEstate() (estate, error) {
	facts, err := ledger.New()
	if err != nil {
		return estate{}, err
	}
	totals, err := ledger.New()
	if err != nil {
		return estate{}, errors.Join(err, facts.Close())
	}
	tickets, err := ledger.New()
	if err != nil {
		return estate{}, errors.Join(err, facts.Close(), totals.Close())
	}
	return estate{facts, totals, tickets}, nil
}

func (e *estate) close() {
	for _, f := range []*ledger.File{e.facts, e.totals, e.tickets} {
		if f != nil {
			_ = f.Close() // what it says is in the duplicates, too
		}
	}
}

// files are the memory files of ours, by the keys under which a generation keeps them, the
// [Store] has them, and a successor gets them.
func (s *Supervisor) files() map[string]int {
	return map[string]int{
		control.KeptLedger: s.estate.facts.FD(),
		control.KeptTotals: s.estate.totals.FD(),
		control.KeptStats:  s.stats.file.FD(),

		control.KeptTickets: s.estate.tickets.FD(),
	}
}

// What else lies in the [Store] has these keys, with the address or the number of the
// generation behind them. A successor gets listening sockets by the same.
const (
	storedListener = "listener "
	storedCounts   = "counts "
)

func countsOf(generation int) string { return storedCounts + strconv.Itoa(generation) }

// takeListeners takes the listening sockets out of fds, and returns them by their own keys.
func takeListeners(fds map[string]int) map[string]int {
	listeners := make(map[string]int)
	for key, fd := range fds {
		if address, ok := strings.CutPrefix(key, storedListener); ok {
			listeners[address] = fd
			delete(fds, key)
		}
	}
	return listeners
}

func (s *Supervisor) deposit(key string, fd int) {
	if s.opts.Store != nil {
		s.opts.Store.Store(key, fd)
	}
}

func (s *Supervisor) withdraw(key string) {
	if s.opts.Store != nil {
		s.opts.Store.Remove(key)
	}
}

// depositEstate puts ours in the place of a predecessor's. Called in the loop.
func (s *Supervisor) depositEstate() {
	for key, fd := range s.files() {
		s.deposit(key, fd)
	}
}

// keepTotals is told what ended generations have counted before anybody sees it.
func (s *Supervisor) keepTotals(export []byte) {
	if err := s.estate.totals.Write(export); err != nil {
		s.log.Error("what ended generations have counted is not kept for a successor", "err", err)
	}
}

// note writes down what a successor has to know, in the ledger and in the runtime
// directory. It is called before a generation is told what depends on it. Called in the
// loop.
func (s *Supervisor) note() {
	if s.succeeded {
		return // it is not ours any more
	}
	err := s.noteFacts()
	if s.opts.Directory != nil {
		state := &runtimedir.State{Epoch: s.epoch, Last: s.numbers}
		for _, g := range s.newestFirst() {
			state.Generations = append(state.Generations, runtimedir.Generation{Number: g.number, Identity: g.identity, State: g.state.String()})
		}
		err = errors.Join(err, s.opts.Directory.SaveState(state))
	}
	if err != nil && !s.unnoted {
		s.log.Error("what a successor has to know cannot be written down", "err", err)
	}
	s.unnoted = err != nil
}

// noteFacts is note for the ledger alone. Called in the loop.
func (s *Supervisor) noteFacts() error {
	return s.estate.facts.Write(facts{
		Epoch: s.epoch, Last: s.numbers, LogLevel: levelName(s.level), ReadyOff: s.readyOff, LastReload: s.last,
		Overrides: s.overrides.command, OverridesFile: s.overrides.file.path, FileOverrides: s.overrides.file.values,
	})
}

// startOf is what g's bundle says besides its release.
func (s *Supervisor) startOf(g *generation) (b control.Bundle) {
	b.Generation = g.number
	s.do(func() { b.Epoch = s.epoch })
	if s.opts.Rendezvous != nil {
		b.Rendezvous, b.Key = s.opts.Rendezvous.Path(), control.GenerationKey(s.opts.Secret, g.number)
	}
	return b
}

// handEstate has g keep what a successor will ask it for.
func (s *Supervisor) handEstate(g *generation) error {
	kept := s.files()
	s.do(func() {
		if g.counts != nil {
			kept[control.KeptCounts] = g.counts.FD()
		}
	})
	if g.release.startable() { // otherwise it keeps what it has
		bundle, err := g.release.bundle(s.startOf(g))
		if err != nil {
			return err
		}
		defer bundle.Close()
		kept[control.KeptBundle] = int(bundle.Fd())
		if kept[control.KeptBinary], err = descriptorOf(g.release.binary); err != nil {
			return fmt.Errorf("proxy binary: %w", err)
		}
	}
	return control.SendFiles(control.TypeKeep, kept, g.send)
}

// No supervisor gets as far as these: a generation that claims more must not make our
// own numbers overflow.
const (
	mostEpoch  = 1 << 62
	mostAhead  = 1 << 32 // of the highest epoch that we know: more supervisors than there can have been since
	mostNumber = 1 << 30
)

// legacy is what a supervisor finds of an earlier one.
type legacy struct {
	facts  facts
	totals []byte
	stats  int // descriptor; -1: it is not there

	tickets     tickets.Keys // none: they are not known
	ticketsKept bool         // there is something in which they should be
}

// legacyIn reads what is under the keys of an estate. What cannot be read is left out;
// the error says so. now is by the clock of ticket keys.
func legacyIn(fds map[string]int, now time.Duration) (l legacy, err error) {
	l.stats = -1
	if fd, ok := fds[control.KeptLedger]; ok {
		_, err = ledger.Read(fd, &l.facts)
		if l.facts.Epoch > mostEpoch || l.facts.Last < 0 || l.facts.Last > mostNumber {
			l.facts, err = facts{}, fmt.Errorf("epoch %d and generation %d are beyond all bounds", l.facts.Epoch, l.facts.Last)
		}
	}
	if fd, ok := fds[control.KeptTotals]; ok {
		_, e := ledger.Read(fd, &l.totals)
		err = errors.Join(err, e)
	}
	if fd, ok := fds[control.KeptStats]; ok {
		l.stats = fd
	}
	if fd, ok := fds[control.KeptTickets]; ok {
		var e error
		l.ticketsKept = true
		if l.tickets, e = ticketsIn(fd, now); e != nil {
			err = errors.Join(err, fmt.Errorf("ticket keys: %w", e))
		}
	}
	return l, err
}

// apply makes what an earlier supervisor knew ours. Called in the loop.
func (s *Supervisor) apply(l legacy) {
	s.epoch = max(s.epoch, l.facts.Epoch)
	s.numbers = max(s.numbers, l.facts.Last)
	s.readyOff = l.facts.ReadyOff
	s.last = l.facts.LastReload
	s.overrides.apply(&l.facts)
	if level, err := logs.ParseLevel(l.facts.LogLevel); l.facts.LogLevel != "" && err == nil {
		s.level = &level
	}
}

// identified looks for the process of a generation.
func (s *Supervisor) identified(pid int) (process, pidfd.Identity, error) {
	id, err := s.kernel.identify(pid)
	if err != nil {
		return nil, id, err
	}
	p, err := s.kernel.find(id)
	return p, id, err
}

// dropAll closes descriptors that nobody wants, whoever has sent them.
func dropAll(fds map[string]int) { control.Discard(slices.Collect(maps.Values(fds))) }
