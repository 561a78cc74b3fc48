package drill

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/admin"
	"holdfast/internal/child"
	"holdfast/internal/drill/canary"
	"holdfast/internal/pidfd"
	"holdfast/internal/supervisor"
)

const (
	// patience bounds every step; each is a matter of milliseconds, unless crashes in
	// a row make the supervisor wait.
	patience = time.Minute

	// restartPause is RestartSec of the unit.
	restartPause = 100 * time.Millisecond

	// look is the time between two looks at what has no event.
	look = 10 * time.Millisecond
)

// stage is everything that the drill has started.
type stage struct {
	self   string // this program
	dir    string
	random *rand.Rand

	tunnels       int // of each kind of the canary's
	canaryProcess *child.Child
	canary        *canary.Client

	config  configuration
	client  *admin.Client
	address string // of the canary's listener, from the first start on

	launched   *child.Child       // the supervisor that was started last
	supervisor *supervisor.Status // as the last one said that answered; its PID is whom we command

	waiting sync.WaitGroup // for processes to end

	mu        sync.Mutex
	processes map[int]*pidfd.Process // of the instance, by number: those that were seen and live
	ours      int                    // the process that was launched last
	killed    map[int]bool           // those that we have killed
	strange   []string               // how others have ended

	counters counters // of the last scrape
	kills    Kills
}

func newStage(o Options) (*stage, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	// What a killed supervisor leaves becomes ours, as it would become init's: so it
	// can be waited for, and nothing is left when we end.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "holdfast-drill-")
	if err != nil {
		return nil, err
	}
	s := &stage{self: self, dir: dir, random: rand.New(rand.NewPCG(o.Seed, 0)), tunnels: o.Tunnels}
	s.processes, s.killed = make(map[int]*pidfd.Process), make(map[int]bool)
	return s, nil
}

func (s *stage) runtimeDir() string { return filepath.Join(s.dir, "run") }
func (s *stage) configPath() string { return filepath.Join(s.dir, "holdfast.toml") }
func (s *stage) logPath() string    { return filepath.Join(s.dir, "holdfast.log") }

// begin starts the canary, Holdfast in front of it, and the traffic.
func (s *stage) begin(ctx context.Context) error {
	if err := s.startCanary(); err != nil {
		return fmt.Errorf("start the canary: %w", err)
	}
	s.config = configuration{dir: s.dir, upstream: s.canary.Upstream, probation: "0s"}
	s.client = admin.Dial(s.runtimeDir())
	if err := s.writeConfig(s.config.String()); err != nil {
		return err
	}
	if err := s.launch(); err != nil {
		return fmt.Errorf("start holdfast: %w", err)
	}
	if err := s.settle(ctx, false); err != nil {
		return fmt.Errorf("start holdfast: %w", err)
	}
	if _, err := s.canary.Do(canary.Command{Do: "start", Address: s.address, Tunnels: s.tunnels}); err != nil {
		return err
	}
	return s.until(ctx, "all tunnels of the canary", func(context.Context) error {
		r, err := s.canary.Do(canary.Command{Do: "report"})
		if all := int64(s.tunnels * canary.Kinds); err == nil && r.Tunnels < all {
			err = fmt.Errorf("%d of %d tunnels were opened %q", r.Tunnels, all, r.Failures)
		}
		return err
	})
}

func (s *stage) startCanary() error {
	cmd := exec.Command(s.self, canaryCommand)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if s.canaryProcess, err = child.Start(cmd); err != nil {
		return err
	}
	s.canary, err = canary.NewClient(in, out)
	return err
}

// launch starts a supervisor, as systemd would.
func (s *stage) launch() error {
	log, err := os.OpenFile(s.logPath(), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(s.self, "run", "-c", s.configPath(), "--runtime-dir", s.runtimeDir())
	cmd.Stdout, cmd.Stderr = log, log
	if s.launched, err = child.Start(cmd); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ours = s.launched.PID()
	return nil
}

func (s *stage) writeConfig(text string) error {
	return os.WriteFile(s.configPath(), []byte(text), 0o600)
}

// holdfast runs a command as anybody would.
func (s *stage) holdfast(ctx context.Context, args ...string) (code int, said string) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, s.self, append(args, "--runtime-dir", s.runtimeDir())...)
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil {
		return -1, err.Error()
	}
	return cmd.ProcessState.ExitCode(), string(bytes.TrimSpace(out))
}

// hopeless is an error that does not go away.
type hopeless struct{ error }

func (h hopeless) Unwrap() error { return h.error }

// until calls f until it finds nothing amiss any more.
func (s *stage) until(ctx context.Context, what string, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	var amiss error
	for {
		err := f(ctx)
		if err == nil {
			return nil
		}
		if _, ok := errors.AsType[hopeless](err); ok {
			return err
		}
		if amiss == nil || ctx.Err() == nil { // otherwise it says no more than that
			amiss = err
		}
		select {
		case <-time.After(look):
		case <-ctx.Done():
			return fmt.Errorf("waited for %s: %w", what, amiss)
		}
	}
}

// settle waits until the instance is as it should be: somebody commands, one
// generation serves what the file says, and everything that lives is known to whoever
// commands. With mend, a file that does not serve is reloaded: what was killed may have
// taken the reload along.
func (s *stage) settle(ctx context.Context, mend bool) error {
	return s.until(ctx, "all to be well again", func(ctx context.Context) error {
		status, err := s.status(ctx)
		if err != nil {
			return err
		}
		if err := s.unwell(status); err != nil {
			return err
		}
		if !status.FileDiffers {
			return s.checkMark(ctx)
		}
		if !mend {
			return errors.New("the file is not what serves")
		}
		if code, said := s.holdfast(ctx, "reload"); code != 0 {
			return fmt.Errorf("reload: exit code %d: %s", code, said)
		}
		return errors.New("it was reloaded")
	})
}

// status asks whoever commands, and starts a supervisor where there was one and is
// none any more.
func (s *stage) status(ctx context.Context) (*supervisor.Status, error) {
	status, err := s.client.Status(ctx)
	if err == nil {
		s.supervisor = status
		return status, s.note(status)
	}
	select {
	case <-s.launched.Ended():
		if s.address == "" {
			return nil, hopeless{errors.New("it has ended")}
		}
		if errors.Is(err, admin.ErrNotRunning) {
			time.Sleep(restartPause)
			err = errors.Join(err, s.launch())
		}
	default:
	}
	return nil, err
}

// note remembers the processes that are there, and waits for their ends.
func (s *stage) note(status *supervisor.Status) error {
	pids := []int{status.PID}
	for _, g := range status.Generations {
		pids = append(pids, g.PID)
	}
	for _, pid := range pids {
		s.mu.Lock()
		_, known := s.processes[pid]
		s.mu.Unlock()
		if known {
			continue
		}
		var p *pidfd.Process
		id, err := pidfd.Of(pid)
		if err == nil {
			p, err = pidfd.Open(id)
		}
		if errors.Is(err, os.ErrProcessDone) {
			continue // it has ended since
		}
		if err != nil {
			return err
		}
		s.mu.Lock()
		s.processes[pid] = p
		s.mu.Unlock()
		s.waiting.Go(func() { s.await(p) })
	}
	return nil
}

// await forgets a process that has ended.
func (s *stage) await(p *pidfd.Process) {
	p.Wait() // nobody closes it before
	var status syscall.WaitStatus
	s.mu.Lock()
	ours := s.ours
	s.mu.Unlock()
	if p.PID() != ours { // for that one, package child waits
		// It is ours if its parent has died, or else its parent's to wait for.
		if pid, err := syscall.Wait4(p.PID(), &status, syscall.WNOHANG, nil); err != nil || pid == 0 {
			status = 0
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if status.Signaled() && !s.killed[p.PID()] {
		s.strange = append(s.strange, fmt.Sprintf("process %d was ended by a signal that nobody here has sent: %s", p.PID(), status.Signal()))
	}
	delete(s.killed, p.PID())
	delete(s.processes, p.PID())
	p.Close() // which nobody has any more
}

// strangeEnds returns what is not to be explained about processes that have ended since
// the last time.
func (s *stage) strangeEnds() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := s.strange
	s.strange = nil
	return all
}

// unwell says what is not as it should be.
func (s *stage) unwell(status *supervisor.Status) error {
	known := map[int]bool{status.PID: true}
	serving := 0
	for _, g := range status.Generations {
		known[g.PID] = true
		switch {
		case g.NotAnswering:
			return fmt.Errorf("generation %d does not answer", g.Number)
		case g.State == "serving":
			serving++
		case g.State != "draining":
			return fmt.Errorf("generation %d is %s", g.Number, g.State)
		case g.Deposits < g.Tunnels && !s.config.mortal: // some have begun or ended since they were counted
			return fmt.Errorf("generation %d has %d tunnels, and %d would outlive it", g.Number, g.Tunnels, g.Deposits)
		}
	}
	switch {
	case serving != 1 || !status.Ready:
		return fmt.Errorf("%d generations serve, and ready is %t", serving, status.Ready)
	case status.Reloading || status.Upgrading || status.Stopping:
		return errors.New("a command is under way")
	case status.Vault.Resuming > 0:
		return fmt.Errorf("%d tunnels have no process", status.Vault.Bereft)
	}
	for _, pid := range append(s.living(), s.orphans()...) {
		if !known[pid] {
			return fmt.Errorf("process %d lives, and whoever commands does not know it", pid)
		}
	}
	return s.checkListener(status)
}

// living are the processes of the instance that were seen and have not ended.
func (s *stage) living() (pids []int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for pid := range s.processes {
		pids = append(pids, pid)
	}
	return pids
}

// orphans are the processes that became ours because whoever started them has died. A
// supervisor that we started and that commands no more is among them.
func (s *stage) orphans() []int {
	return slices.DeleteFunc(childrenOf(os.Getpid()), func(pid int) bool { return pid == s.canaryProcess.PID() })
}

// checkListener looks whether the canary's listener is where it was.
func (s *stage) checkListener(status *supervisor.Status) error {
	for _, l := range status.Listeners {
		if l.Name != "canary" {
			continue
		}
		if s.address == "" {
			s.address = l.Address
		}
		if l.Address == s.address {
			return nil
		}
		return hopeless{fmt.Errorf("the listener of the canary was at %s and is at %s", s.address, l.Address)}
	}
	return hopeless{errors.New("the listener of the canary is gone")}
}

// checkMark asks for what only the present configuration has.
func (s *stage) checkMark(ctx context.Context) error {
	request, err := http.NewRequestWithContext(ctx, "GET", "http://"+s.address+s.config.mark(), nil)
	if err != nil {
		return err
	}
	fresh := &http.Transport{DisableKeepAlives: true}
	response, err := fresh.RoundTrip(request)
	if err != nil {
		return err
	}
	response.Body.Close()
	if response.StatusCode != http.StatusFound {
		return fmt.Errorf("%s answers %s, where the configuration redirects", s.config.mark(), response.Status)
	}
	return nil
}

// scrape compares counters with the scrape before, and returns how many there were and
// which have decreased.
func (s *stage) scrape(ctx context.Context) (compared int, decreased []string, err error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	text, err := s.client.Metrics(ctx)
	if err != nil {
		return 0, nil, fmt.Errorf("scrape: %w", err)
	}
	now, err := readCounters(text)
	if err != nil {
		return 0, nil, fmt.Errorf("scrape: %w", err)
	}
	before := s.counters
	s.counters = now
	return len(before), before.decreased(now), nil
}

// lives fails with os.ErrProcessDone if a process that was seen in the status has ended.
func (s *stage) lives(pid int) error { return s.with(pid, func(*pidfd.Process) error { return nil }) }

func (s *stage) signal(pid int, sig syscall.Signal) error {
	return s.with(pid, func(p *pidfd.Process) error { return p.Signal(sig) })
}

// with calls fn with a process, which is not closed meanwhile.
func (s *stage) with(pid int, fn func(*pidfd.Process) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	p, ok := s.processes[pid]
	if !ok {
		return fmt.Errorf("process %d: %w", pid, os.ErrProcessDone)
	}
	return fn(p)
}

// kill kills a process and waits until it is gone.
func (s *stage) kill(ctx context.Context, pid int) error {
	if err := s.end(pid, syscall.SIGKILL); err != nil {
		return err
	}
	return s.awaitEnd(ctx, pid)
}

// end sends a process a signal that ends it.
func (s *stage) end(pid int, sig syscall.Signal) error {
	s.mu.Lock()
	s.killed[pid] = true
	s.mu.Unlock()
	return s.signal(pid, sig)
}

func (s *stage) awaitEnd(ctx context.Context, pid int) error {
	return s.until(ctx, fmt.Sprintf("the end of process %d", pid), func(context.Context) error {
		if s.lives(pid) == nil {
			return errors.New("it lives")
		}
		return nil
	})
}

// killGeneration ends a generation by a signal, and tells the canary before which of its
// requests go with it. The process stands still in between, so that there are no others.
//
// One that is ended by a fault of its own has to go on for that, and may take connections in
// until it is dead: in this time the canary has tunnels alone.
func (s *stage) killGeneration(ctx context.Context, g supervisor.GenerationStatus, sig syscall.Signal) (err error) {
	if sig != syscall.SIGKILL {
		if _, err := s.canary.Do(canary.Command{Do: "storm"}); err != nil {
			return err
		}
		defer func() {
			_, calm := s.canary.Do(canary.Command{Do: "calm"})
			err = errors.Join(err, calm)
		}()
	}
	if err := s.signal(g.PID, syscall.SIGSTOP); err != nil {
		return err
	}
	if err := s.until(ctx, "a process to stand still", func(context.Context) error {
		if err := s.lives(g.PID); err != nil {
			return hopeless{err} // it was ending
		}
		if !stopped(g.PID) {
			return errors.New("it runs")
		}
		return nil
	}); err != nil {
		return err
	}
	sockets, err := socketsOf(g.PID)
	if err != nil {
		return err
	}
	// What is on its way to it from another generation ends with it, too.
	sockets = append(sockets, socketsOfNobody(s.address, s.living())...)
	if _, err := s.canary.Do(canary.Command{Do: "killed", Sockets: sockets}); err != nil {
		return err
	}
	if err := s.end(g.PID, sig); err != nil {
		return err
	}
	s.signal(g.PID, syscall.SIGCONT) // for which any signal but SIGKILL waits
	s.kills.note(g.State, sig, "", s.supervisor.Vault.Bereft > 0)
	return s.awaitEnd(ctx, g.PID)
}

// clear ends what was started, those in front first, and removes the files. It says
// what did not end by itself.
func (s *stage) clear() error {
	var wrong []error
	if s.launched != nil {
		code, said := s.holdfast(context.Background(), "stop", "--now")
		if code != 0 { // a round that was interrupted may have killed it
			code, said = s.holdfast(context.Background(), "stop", "--orphans", "--now")
		}
		if code != 0 && s.supervisor != nil {
			wrong = append(wrong, fmt.Errorf("stop: exit code %d: %s", code, said))
		}
		wrong = append(wrong, s.launched.Stop())
	}
	for _, pid := range s.living() {
		if err := s.awaitEnd(context.Background(), pid); err != nil {
			wrong = append(wrong, err)
			s.signal(pid, syscall.SIGKILL)
		}
	}
	s.waiting.Wait()
	if s.canaryProcess != nil {
		wrong = append(wrong, s.canaryProcess.Stop())
	}
	return errors.Join(wrong...)
}

// keepTraces writes down how things are, as far as anybody answers.
func (s *stage) keepTraces() {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for name, args := range map[string][]string{"status.json": {"status", "--json"}, "metrics.txt": {"metrics"}} {
		_, said := s.holdfast(ctx, args...)
		os.WriteFile(filepath.Join(s.dir, name), []byte(said), 0o600) // without it the rest is still there
	}
}

// remove removes the files.
func (s *stage) remove() error { return os.RemoveAll(s.dir) }
