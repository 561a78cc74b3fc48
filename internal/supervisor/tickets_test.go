package supervisor

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"holdfast/internal/control"
	"holdfast/internal/ledger"
	"holdfast/internal/tickets"
)

// fakeTickets is the version of ticket keys that this process says it knows.
var fakeTickets int

// fakeTicketed is the part of a fake generation that has ticket keys. It notes which ones it has.
type fakeTicketed struct {
	b    *control.Bundle
	note func(file, format string, args ...any)
}

func (f *fakeTicketed) take(conn *control.Conn, m *control.Message, fds []int) bool {
	switch m.Type {
	case control.TypeServe:
		if fakeTickets != 0 {
			f.note("tickets", "%d serves", f.b.Generation)
		}
		return false
	case control.TypeTickets:
		keys, _ := control.ReadTicketKeys(fds[0])
		f.note("tickets", "%d has %s", f.b.Generation, shortKeys(keys))
		if m.ID != 0 {
			conn.Send(&control.Message{Type: control.TypeAnswer, Re: m.ID}, time.Second)
		}
		return true
	}
	return false
}

// shortKeys are keys as they can be compared.
func shortKeys(keys [][32]byte) string {
	var all []string
	for _, k := range keys {
		all = append(all, hex.EncodeToString(k[:8]))
	}
	return strings.Join(all, " ")
}

// ticketKeys returns what a generation has been told last; nil: nothing.
func (w *world) ticketKeys(generation int) (keys []string) {
	text, _ := os.ReadFile(filepath.Join(w.dir, "tickets"))
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(strings.TrimSpace(line), fmt.Sprint(generation, " has ")); ok {
			keys = strings.Fields(rest)
		}
	}
	return keys
}

// wantKeys waits until a generation has keys that fit.
func (w *world) wantKeys(generation int, what string, fit func([]string) bool) []string {
	w.t.Helper()
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if keys := w.ticketKeys(generation); keys != nil && fit(keys) {
			return keys
		}
	}
	w.t.Fatalf("generation %d has keys %v, want %s", generation, w.ticketKeys(generation), what)
	return nil
}

// ticketWorld is a world whose generations share keys, with a clock of its own.
type ticketWorld struct {
	*world
	now atomic.Int64
	log struct {
		sync.Mutex
		bytes.Buffer
	}
}

func startTicketed(t *testing.T) *ticketWorld {
	t.Helper()
	w := &ticketWorld{world: prepare(t, base+"#! holds tunnels\n")}
	w.now.Store(int64(1000 * time.Hour))
	w.mood("knows tickets")
	w.lasting()
	w.adjust()
	w.run()
	w.wantServing(1)
	return w
}

// adjust is called for every new supervisor.
func (w *ticketWorld) adjust() {
	w.s.kernel.uptime = func() time.Duration { return time.Duration(w.now.Load()) }
	w.s.log = slog.New(slog.NewTextHandler(ticketLog{w}, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

type ticketLog struct{ w *ticketWorld }

func (l ticketLog) Write(p []byte) (int, error) {
	l.w.log.Lock()
	defer l.w.log.Unlock()
	return l.w.log.Write(p)
}

func (w *ticketWorld) said() string {
	w.log.Lock()
	defer w.log.Unlock()
	return w.log.String()
}

// pass has time pass for the keys alone.
func (w *ticketWorld) pass(d time.Duration) {
	w.now.Add(int64(d))
	w.s.do(func() { offer(w.s.tickets.wake, struct{}{}) })
}

func TestAllGenerationsHaveTheSameTicketKeys(t *testing.T) {
	w := startTicketed(t)
	first := w.wantKeys(1, "two", func(k []string) bool { return len(k) == 2 })
	w.mustReload(base + "#! holds tunnels\n# 2\n")
	if got := w.ticketKeys(2); !slices.Equal(got, first) {
		t.Errorf("the next generation has %v, want %v", got, first)
	}
	text, _ := os.ReadFile(filepath.Join(w.dir, "tickets"))
	if has, serves := strings.Index(string(text), "2 has"), strings.Index(string(text), "2 serves"); has < 0 || serves < has {
		t.Errorf("it has served before it had keys: %s", text)
	}
	w.pass(12 * time.Hour)
	for generation := 1; generation <= 2; generation++ {
		w.wantKeys(generation, "the next key in use", func(k []string) bool {
			return len(k) == 3 && k[0] == first[1] && k[1] == first[0] && !slices.Contains(first, k[2])
		})
	}
	w.wantSeries(w.scrape(), map[string]float64{
		"holdfast_tls_ticket_key_rotations_total{by=schedule}": 1, "holdfast_tls_ticket_key_rotations_total{by=command}": 0, "holdfast_tls_ticket_key_age_seconds": 0,
	})
	for _, key := range w.ticketKeys(2) {
		if strings.Contains(strings.ToLower(w.said()), key[:8]) {
			t.Error("a key is in the log")
		}
	}
}

func TestASuccessorGoesOnWithTheTicketKeys(t *testing.T) {
	w := startTicketed(t)
	first := w.wantKeys(1, "two", func(k []string) bool { return len(k) == 2 })
	w.vanish()
	w.now.Add(int64(30 * time.Hour)) // more than two rotations, which nobody has made
	w.newSupervisor()
	w.adjust()
	w.run()
	w.wantKeys(1, "one rotation", func(k []string) bool { return len(k) == 3 && k[0] == first[1] && k[1] == first[0] })
	if strings.Contains(w.said(), "are lost") {
		t.Error(w.said())
	}
}

// What is kept cannot be read: it was damaged, or is of a build that nobody knows.
func TestTicketKeysThatCannotBeReadAreReplaced(t *testing.T) {
	for name, content := range map[string][]byte{"too short": {1, 0}, "another layout": bytes.Repeat([]byte{9}, 400), "zeros": make([]byte, len(tickets.New(0).Record()))} {
		t.Run(name, func(t *testing.T) {
			w := startTicketed(t)
			first := w.wantKeys(1, "two", func(k []string) bool { return len(k) == 2 })
			if err := w.s.estate.tickets.Write(content); err != nil {
				t.Fatal(err)
			}
			w.vanish()
			w.newSupervisor()
			w.adjust()
			w.run()
			w.wantKeys(1, "others", func(k []string) bool { return len(k) == 2 && !slices.Contains(first, k[0]) })
			if said := w.said(); !strings.Contains(said, "keys of session tickets are lost") || !strings.Contains(said, "cannot be read") {
				t.Errorf("it says only:\n%s", said)
			}
			w.wantSeries(w.scrape(), map[string]float64{"holdfast_tls_ticket_keys_lost_total": 1})
			w.mustReload(base + "# 2\n")
			if got := w.ticketKeys(2); !slices.Equal(got, w.ticketKeys(1)) {
				t.Error("generations have different keys")
			}
		})
	}
}

// An earlier build has left no keys, and its generations know of none: nothing was lost.
func TestAnEstateWithoutTicketKeysIsNoComplaint(t *testing.T) {
	t.Parallel()
	facts, err := ledger.New()
	if err != nil {
		t.Fatal(err)
	}
	defer facts.Close()
	if err := facts.Write(map[string]any{"epoch": 3, "last": 7}); err != nil {
		t.Fatal(err)
	}
	l, err := legacyIn(map[string]int{control.KeptLedger: facts.FD()}, time.Hour)
	if err != nil || l.tickets.Known() || l.facts.Epoch != 3 {
		t.Errorf("%v, keys: %v", err, l.tickets.Known())
	}
	if found, lost := new(Supervisor).ticketsOf(&inheritance{legacy: l}); found.Known() || lost {
		t.Errorf("lost: %v", lost)
	}
}

func TestByCommandAllTicketKeysAreDroppedAtOnce(t *testing.T) {
	w := startTicketed(t)
	w.mustReload(base + "#! holds tunnels\n# 2\n")
	w.pass(12 * time.Hour)
	before := w.wantKeys(2, "a rotation", func(k []string) bool { return len(k) == 3 })
	if err := w.s.RotateTickets(t.Context()); err != nil {
		t.Fatal(err)
	}
	for generation := 1; generation <= 2; generation++ {
		keys := w.ticketKeys(generation) // the command has waited for it
		if len(keys) != 2 || slices.Contains(before, keys[0]) || slices.Contains(before, keys[1]) {
			t.Errorf("generation %d has %v, and there were %v", generation, keys, before)
		}
	}
	w.wantSeries(w.scrape(), map[string]float64{
		"holdfast_tls_ticket_key_rotations_total{by=schedule}": 1, "holdfast_tls_ticket_key_rotations_total{by=command}": 1,
	})
}

func TestAGenerationThatHangsDoesNotKeepCondemnedKeysInUse(t *testing.T) {
	w := startTicketed(t)
	first := w.wantKeys(1, "two", func(k []string) bool { return len(k) == 2 })
	before := w.wantStates("1 serving")
	w.mustReload(base + "#! holds tunnels\n# 2\n")
	freeze(t, before.Generations[0].PID)
	rotated := make(chan error, 1)
	go func() { rotated <- w.s.RotateTickets(t.Context()) }()
	w.wantKeys(2, "another next key", func(k []string) bool { return k[1] != first[1] })
	w.pass(condemnedPatience)
	w.wantKeys(2, "none of before", func(k []string) bool { return len(k) == 2 && !slices.Contains(first, k[0]) })
	if err := <-rotated; !errors.Is(err, ErrUnanswered) || !strings.Contains(err.Error(), "generations [1]") {
		t.Error(err)
	}
	if keys := w.ticketKeys(1); !slices.Equal(keys, first) {
		t.Errorf("who hangs has %v", keys)
	}
	if err := syscall.Kill(before.Generations[0].PID, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	w.wantKeys(1, "the same as the other", func(k []string) bool { return slices.Equal(k, w.ticketKeys(2)) })
}

// What was dropped is dropped from memory, too.
func TestNothingIsLeftOfKeysThatAreGone(t *testing.T) {
	w := startTicketed(t)
	var gone [][32]byte
	w.s.do(func() {
		gone = w.s.tickets.keys.All()
		w.s.setTickets(w.s.tickets.keys.Condemn().Rotate(0))
	})
	head := make([]byte, 64)
	f, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", w.s.estate.tickets.FD()))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.ReadAt(head, 0); err != nil {
		t.Fatal(err)
	}
	const slot = 24 + ledger.MostBytes
	for _, at := range []int64{64, 64 + slot} {
		b := make([]byte, 4096)
		if _, err := f.ReadAt(b, at); err != nil {
			t.Fatal(err)
		}
		for _, key := range gone {
			if bytes.Contains(b, key[:]) {
				t.Error("a key is still in the ledger")
			}
		}
	}
}
