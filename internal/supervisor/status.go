package supervisor

import (
	"cmp"
	"context"
	"os"
	"slices"
	"sync"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/control"
	"holdfast/internal/version"
)

// statusTimeout bounds how long a generation may take to say what it holds; after
// that its last figures stand.
const statusTimeout = 250 * time.Millisecond

// Status implements [Commands].
func (s *Supervisor) Status(ctx context.Context) (*Status, error) {
	s.refresh(ctx)
	st := &Status{
		Version: version.String(), PID: os.Getpid(), Started: s.started,
		ConfigPath: s.opts.ConfigPath, LogsDropped: s.opts.LogsDropped(),
	}
	if err := s.try(ctx, func() { s.fill(st) }); err != nil {
		return nil, err
	}
	var err error
	if st.FileDiffers, err = s.fileDiffers(st.ConfigHash); err != nil {
		st.FileError = err.Error()
	}
	return st, nil
}

// fileDiffers says whether the file is not, byte for byte, the configuration that has
// this hash. Of none ("") it does not differ.
func (s *Supervisor) fileDiffers(hash string) (bool, error) {
	data, err := config.ReadFile(s.opts.ConfigPath)
	return err == nil && hash != "" && hashOf(data) != hash, err
}

// refresh has all generations say what they hold. However many ask at a time, one
// round of questions is under way, and those who came after its beginning share the
// next: nobody can make a generation look silent by asking a lot.
func (s *Supervisor) refresh(ctx context.Context) {
	s.rounds.mu.Lock()
	next := s.rounds.next
	if next == nil {
		next = make(chan struct{})
		s.rounds.next = next
		go func() {
			s.rounds.turn.Lock()
			defer s.rounds.turn.Unlock()
			s.rounds.mu.Lock()
			s.rounds.next = nil
			s.rounds.mu.Unlock()
			s.askAll()
			close(next)
		}()
	}
	s.rounds.mu.Unlock()
	select {
	case <-next:
	case <-ctx.Done():
	}
}

// rounds are those of questions to all generations.
type rounds struct {
	turn sync.Mutex // held during a round

	mu   sync.Mutex    // taken after turn, for moments only
	next chan struct{} // closed at the end of the round that has not begun; nil: nobody waits for one
}

// askAll asks all generations at once what they hold.
func (s *Supervisor) askAll() {
	ctx := context.Background() // statusTimeout bounds it
	var all []*generation
	s.do(func() {
		// One that is starting expects its bundle first, and holds nothing yet.
		all = slices.DeleteFunc(s.newestFirst(), func(g *generation) bool { return g.state == starting })
	})
	var asked sync.WaitGroup
	for _, g := range all {
		asked.Go(func() {
			a, err := g.ask(ctx, control.Message{Type: control.TypeStatus}, statusTimeout)
			s.do(func() {
				g.silent = g.cutOff != nil || err != nil && !g.done.Load() // one that is about to end need not
				if err == nil && a.Status != nil {
					g.lastSeen = *a.Status
				}
			})
		})
	}
	asked.Wait()
}

// fill adds what the loop knows. Called in the loop.
func (s *Supervisor) fill(st *Status) {
	st.ConfigHash = s.hash()
	st.Listeners, st.Generations = []ListenerStatus{}, []GenerationStatus{}
	st.Ready, st.ReadyOff = s.Ready(), s.readyOff
	st.Stopping, st.Reloading, st.LastReload = s.stopping, s.reloading, s.last
	st.LogLevel, st.Epoch, st.Upgrading = levelName(s.level), s.epoch, s.upgrading != nil
	if st.Crashes = s.crashesNow(); st.Crashes > 0 {
		st.LastCrash = s.lastCrash
	}
	st.Overridden = s.overridden()
	for key, o := range s.sockets {
		st.Listeners = append(st.Listeners, ListenerStatus{Name: o.Config().Name, Key: key, Address: o.Address()})
	}
	slices.SortFunc(st.Listeners, func(a, b ListenerStatus) int { return cmp.Compare(a.Name, b.Name) })
	for _, g := range s.newestFirst() {
		status := g.status()
		status.Deposits = s.vault.Deposits(g.number)
		st.Generations = append(st.Generations, status)
	}
	kept := s.vault.Totals()
	st.Vault = VaultStatus{
		Deposits: kept.Deposits, Resuming: len(s.resuming), Bereft: s.bereft(),
		Refused: s.stats.vaultRefused.counter.Value(), Resumed: s.stats.resumed.Value(), Moved: s.stats.vaultMoved.counter.Value(),
	}
}

// hash names the configuration that serves, or that what crashed is replaced with;
// "" before anything has served. Called in the loop.
func (s *Supervisor) hash() string {
	switch {
	case s.serving != nil:
		return s.serving.release.hash
	case s.pinned != nil:
		return s.pinned.hash
	}
	return ""
}

// crashesNow is how many serving generations crashed in a row: none, once one has
// served for a while. Called in the loop.
func (s *Supervisor) crashesNow() int {
	if s.serving != nil && time.Since(s.serving.served) > steadyAfter {
		return 0
	}
	return s.crashes
}

// status says what was last seen of g. Called in the loop.
func (g *generation) status() GenerationStatus {
	l := g.lastSeen
	return GenerationStatus{
		Number: g.number, State: g.state.String(), NotAnswering: g.silent, PID: g.proc.PID(),
		Version: g.versionNow(), ConfigHash: g.release.hash, Started: g.started,
		Connections: l.Connections, Requests: l.Requests, Tunnels: l.Tunnels, OldestTunnel: l.OldestTunnel,
		RSS: l.RSS, RequestsTotal: l.RequestsTotal, TunnelsTotal: l.TunnelsTotal, LogsDropped: l.LogsDropped,
		EmptyBy: l.EmptyBy,
	}
}
