package supervisor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestReloadRelievesTheServingGeneration(t *testing.T) {
	w := start(t, base)
	r := w.mustReload(base + "# changed\n")
	if r.Generation != 2 || r.Previous != 1 || r.Probation != "pending" || len(r.Warnings) > 0 {
		t.Errorf("got %+v", r)
	}
	st := w.wantStates("2 serving, 1 draining") // 1 is the fallback of the probation
	if st.FileDiffers || st.ConfigHash != hashOf([]byte(base+"# changed\n")) || !st.Ready {
		t.Errorf("got %+v", st)
	}
}

func TestRefusalsChangeNothing(t *testing.T) {
	for _, c := range []struct{ name, file, mood, step, text string }{
		{"the supervisor's part of the file is wrong", base + "[stop]\nx = 1\n", "", "configuration", "a.toml:"},
		{"no listener", "[log]\n", "", "configuration", "listener"},
		{"the proxy refuses the file", base + "#! check refuses\n", "", "configuration", "first mistake\na.toml:2: second mistake"},
		{"check crashes", base + "#! check crashes\n", "", "proxy binary", "panic: crash"},
		{"check hangs", strings.Replace(base, "10s", "3s", 1) + "#! check hangs\n", "", "proxy binary", "no answer within 3s"},
		{"the proxy crashes at its start", base, "crash", "start", "exit status 7"},
		{"the proxy hangs", strings.Replace(base, "10s", "5s", 1), "hang", "start", "did not say hello within 5s"},
		{"the proxy speaks another protocol", base, "foreign", "start", "speaks control protocol 90 to 99"},
		{"the proxy sends rubbish", base, "rubbish", "start", "cut off: control protocol violated"},
		{"the proxy cannot be ready", base + "#! cannot be ready\n", "", "start", "no such host"},
		{"the proxy is never ready", strings.Replace(base, "10s", "5s", 1) + "#! never ready\n", "", "start", "was not ready within 5s"},
		{"the proxy dies before it is ready", base + "#! dies before ready\n", "", "start", "exit status 9"},
		{"the proxy will not serve", base + "#! refuses to serve\n", "", "serve", "will not"},
		{"another proxy binary", base + "[process]\nproxy = \"/bin/true\"\n", "", "configuration", "restart"},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := start(t, base)
			w.mood(c.mood)
			w.wantRefused(c.file, c.step, c.text)
			if st := w.status(); st.LastReload == nil || st.LastReload.Error == "" {
				t.Errorf("the status does not show it: %+v", st.LastReload)
			}
		})
	}
}

func TestAMissingProxyBinaryIsRefused(t *testing.T) {
	w := start(t, base)
	os.Remove(filepath.Join(w.dir, "proxy"))
	w.wantRefused(base, "proxy binary", "no such file")
}

func TestAProxyBinaryThatCannotBeExecutedIsNamedByItsPath(t *testing.T) {
	w := start(t, base)
	proxy := filepath.Join(w.dir, "proxy")
	os.Remove(proxy)
	if err := os.WriteFile(proxy, []byte("no program"), 0o700); err != nil {
		t.Fatal(err)
	}
	_, err := w.reload(base)
	if want := "proxy binary: " + proxy + " check: cannot be executed: exec format error"; err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

func TestAFileThatNeverEndsIsRefused(t *testing.T) {
	w := start(t, base)
	path := filepath.Join(w.dir, "a.toml")
	if err := errors.Join(os.Remove(path), os.Symlink("/dev/zero", path)); err != nil {
		t.Fatal(err)
	}
	if _, err := w.reload(""); err == nil || !strings.Contains(err.Error(), "more than 16 MiB") {
		t.Errorf("got %v", err)
	}
	if st := w.status(); !strings.Contains(st.FileError, "more than 16 MiB") {
		t.Errorf("status: %q", st.FileError)
	}
}

func TestATakenPortIsRefused(t *testing.T) {
	other, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	w := start(t, base)
	added := "[[listeners]]\nname = \"b\"\naddress = \"127.0.0.1:0\"\n[[listeners]]\nname = \"c\"\naddress = \"" + other.Addr().String() + "\"\n"
	w.wantRefused(base+added, "listeners", "another process has taken it")
}

func TestAFirstStartThatCannotBeEndsTheService(t *testing.T) {
	w := prepare(t, base+"#! cannot be ready\n")
	log := new(bytes.Buffer) // read when the service has ended
	w.s.log = slog.New(slog.NewTextHandler(log, nil))
	w.run()
	select {
	case err := <-w.done:
		if r, ok := errors.AsType[*Refusal](err); !ok || r.Step != "start" {
			t.Errorf("got %v", err)
		}
	case <-time.After(patience):
		t.Fatal("still runs")
	}
	if said := log.String(); !strings.Contains(said, "the service cannot start") || strings.Contains(said, "nothing has changed") {
		t.Errorf("the log:\n%s", said)
	}
}

func TestNothingDiffersFromTheFileBeforeAnythingServes(t *testing.T) {
	w := prepare(t, base)
	w.mood("hang")
	w.run()
	if st := w.wantStates("1 starting"); st.FileDiffers {
		t.Error("the status says that the file differs from what runs; nothing runs")
	}
}

func TestListenersKeepTheirSocketWhateverTheyAreCalled(t *testing.T) {
	two := func(first, second string, p, q string) string {
		return strings.SplitN(base, "[[listeners]]", 2)[0] + fmt.Sprintf("[[listeners]]\nname=%q\naddress=%q\n[[listeners]]\nname=%q\naddress=%q\n", first, p, second, q)
	}
	p, q := freeAddress(t), freeAddress(t)
	w := start(t, two("a", "b", p, q))
	before := inodes(t, w)
	w.mustReload(two("b", "a", p, q)) // swapped
	if got := w.address("a"); got != q {
		t.Errorf("a is at %s, want %s", got, q)
	}
	if after := inodes(t, w); !slices.Equal(before, after) {
		t.Errorf("sockets %v became %v", before, after)
	}
	r := w.mustReload(two("b", "c", p, "127.0.0.1:0"))
	if len(r.Added) != 1 || !slices.Equal(r.Removed, []string{q}) {
		t.Errorf("added %v, removed %v", r.Added, r.Removed)
	}
	w.wantClosed(q)
	w.wantOpen(p)
	w.wantOpen(w.address("c"))
}

// freeAddress is one that only the test takes. A port that is merely free now can be
// another process's a moment later. What is bound and does not listen keeps the kernel
// from choosing it for others, but not who asks for it with SO_REUSEADDR.
func freeAddress(t *testing.T) string {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1),
		unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}),
	); err != nil {
		t.Fatal(err)
	}
	at, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("127.0.0.1:%d", at.(*unix.SockaddrInet4).Port)
}

// inodes identifies the supervisor's sockets in the order of their keys.
func inodes(t *testing.T, w *world) []uint64 {
	var all []uint64
	w.s.do(func() {
		for _, o := range w.s.sockets {
			var st syscall.Stat_t
			if err := syscall.Fstat(o.FD(), &st); err != nil {
				t.Error(err)
			}
			all = append(all, st.Ino)
		}
	})
	slices.Sort(all)
	return all
}

func TestReloadsThatAreAskedForMeanwhileAreOne(t *testing.T) {
	w := start(t, base)
	var all sync.WaitGroup
	results := make([]*ReloadResult, 20)
	for i := range results {
		all.Go(func() {
			var err error
			if results[i], err = w.reload(""); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	seen := map[int]bool{}
	for _, r := range results {
		seen[r.Generation] = true
	}
	if len(seen) > 5 { // two, unless a goroutine came late
		t.Errorf("20 callers got %d reloads", len(seen))
	}
}

func TestAnAnswerIsFromAReloadThatReadTheFileAfterTheRequest(t *testing.T) {
	w := start(t, base)
	for i := range 10 {
		old := make(chan struct{})
		go func() { w.reload(""); close(old) }()
		file := fmt.Sprintf("%s# %d\n", base, i)
		r := w.mustReload(file)
		var hash string
		w.s.do(func() {
			if g := w.s.living[r.Generation]; g != nil {
				hash = g.release.hash
			}
		})
		if hash != "" && hash != hashOf([]byte(file)) {
			t.Errorf("the answer is from generation %d, which has read an older file", r.Generation)
		}
		<-old
	}
}

func TestAKilledGenerationIsReplacedAndItsSocketsStayOpen(t *testing.T) {
	w := start(t, base)
	addr := w.address("a")
	before := inodes(t, w)
	for i := range 3 {
		st := w.wantServing(i + 1)
		syscall.Kill(st.Generations[0].PID, syscall.SIGKILL)
		w.wantOpen(addr)
		w.wantServing(i + 2)
	}
	if after := inodes(t, w); !slices.Equal(before, after) {
		t.Errorf("sockets %v became %v", before, after)
	}
}

func TestACrashIsMendedFromWhatIsPinnedNotFromTheDisk(t *testing.T) {
	w := start(t, base)
	w.write("broken [")
	os.Remove(filepath.Join(w.dir, "proxy"))
	syscall.Kill(w.status().Generations[0].PID, syscall.SIGKILL)
	st := w.wantServing(2)
	if st.ConfigHash != hashOf([]byte(base)) || !st.FileDiffers {
		t.Errorf("got %+v", st)
	}
}

func TestAReplacementNeedsNoResolver(t *testing.T) {
	w := start(t, base+"#! names do not resolve any more\n")
	syscall.Kill(w.status().Generations[0].PID, syscall.SIGKILL)
	w.wantServing(2) // the first attempt
}

func TestACrashOnProbationReinstatesTheOldProcess(t *testing.T) {
	w := start(t, base)
	passed(w)
	pid := w.status().Generations[0].PID
	addr := w.address("a")
	w.write(base + "[[listeners]]\nname = \"b\"\naddress = \"127.0.0.1:0\"\n#! dies when serving\n")
	r, err := w.s.Reload(t.Context(), true)
	if err != nil || r.Probation != "crashed" {
		t.Errorf("got %+v, %v", r, err)
	}
	st := w.wantServing(1)
	if st.Generations[0].PID != pid {
		t.Errorf("pid %d, want the same process %d", st.Generations[0].PID, pid)
	}
	if len(st.Listeners) != 1 || !st.FileDiffers {
		t.Errorf("got %+v", st)
	}
	w.wantOpen(addr)
}

// passed ends the probation of what serves.
func passed(w *world) {
	w.s.do(func() {
		w.s.pass(w.s.serving)
		w.s.endProbation("passed")
	})
}

func TestTheFirstGenerationNeedsNoProbation(t *testing.T) {
	w := start(t, base)
	pid := w.status().Generations[0].PID
	w.mustReload(base + "#! dies when serving\n")
	if st := w.wantServing(1); st.Generations[0].PID != pid {
		t.Error("generation 1 is another process")
	}
}

func TestReinstatingOpensRemovedListenersAgain(t *testing.T) {
	addr := freeAddress(t)
	file := base + fmt.Sprintf("[[listeners]]\nname = \"b\"\naddress = %q\n", addr)
	w := start(t, file)
	passed(w)
	r := w.mustReload(base + "#! dies when serving\n")
	if !slices.Equal(r.Removed, []string{addr}) {
		t.Errorf("removed %v", r.Removed)
	}
	w.wantServing(1)
	w.wantOpen(addr)
}

func TestOnlyWhatPassedLastIsReinstated(t *testing.T) {
	w := start(t, base)
	passed(w)
	w.mustReload(base + "# second\n#! holds tunnels\n")
	w.mustReload(base + "# third\n#! dies when serving\n")
	w.wantStates("2 draining, 1 serving")
}

func TestWithoutTheOldProcessItsReleaseIsStartedAgain(t *testing.T) {
	w := start(t, base)
	passed(w)
	w.mustReload(base + "# second\n")
	st := w.wantStates("2 serving, 1 draining")
	syscall.Kill(st.Generations[1].PID, syscall.SIGKILL)
	w.wantServing(2)
	syscall.Kill(st.Generations[0].PID, syscall.SIGKILL)
	if st := w.wantServing(3); st.ConfigHash != hashOf([]byte(base)) {
		t.Errorf("serves %s, what passed is %s", st.ConfigHash, hashOf([]byte(base)))
	}
}

func TestReloadWaitsProbationOut(t *testing.T) {
	w := start(t, base)
	w.write(strings.Replace(base, "1h", "50ms", 1))
	r, err := w.s.Reload(t.Context(), true)
	if err != nil || r.Probation != "passed" {
		t.Errorf("got %+v, %v", r, err)
	}
}

func TestALaterReloadSupersedesAProbation(t *testing.T) {
	w := start(t, base)
	result := make(chan *ReloadResult)
	go func() {
		r, _ := w.s.Reload(t.Context(), true)
		result <- r
	}()
	w.wait("2 serving", func(st *Status) bool {
		return st.Generations[0].Number == 2 && st.Generations[0].State == "serving" && !st.Reloading
	})
	w.mustReload("")
	if r := <-result; r.Probation != "superseded" {
		t.Errorf("got %+v", r)
	}
}

func TestDrainingGenerationsSurviveACrash(t *testing.T) {
	w := start(t, base+"#! holds tunnels\n")
	w.mustReload(base)
	passed(w)
	st := w.wantStates("2 serving, 1 draining")
	syscall.Kill(st.Generations[0].PID, syscall.SIGKILL)
	after := w.wantStates("3 serving, 1 draining")
	if after.Generations[1].PID != st.Generations[1].PID {
		t.Error("the draining generation is another process")
	}
}

func TestAtTheLimitOfGenerationsAReloadIsRefusedWithTheHolders(t *testing.T) {
	file := strings.Replace(base, "[reload]\n", "[reload]\nmax_generations = 2\n", 1) + "#! holds tunnels\n"
	w := start(t, file)
	passed(w)
	w.mustReload(file)
	w.wantStates("2 serving, 1 draining")
	_, err := w.reload(file)
	if err == nil || !strings.Contains(err.Error(), "generation 1 is draining with 3 tunnels") {
		t.Errorf("got %v", err)
	}
	w.wantStates("2 serving, 1 draining")
}

func TestTheHoldersOfARefusalAreAskedForIt(t *testing.T) {
	file := strings.Replace(base, "[reload]\n", "[reload]\nmax_generations = 2\n", 1) + "#! holds tunnels\n#! fills up\n"
	w := start(t, file)
	w.mustReload(file)
	st := w.wantStates("2 serving, 1 draining")
	_, err := w.reload(file)
	if stale := fmt.Sprintf("with %d tunnels", st.Generations[1].Tunnels); err == nil || strings.Contains(err.Error(), stale) {
		t.Errorf("got %v; %s is what it held before", err, stale)
	}
}

func TestAHungGenerationIsSeenAndCanBeKilled(t *testing.T) {
	w := start(t, base)
	pid := w.status().Generations[0].PID
	freeze(t, pid)
	w.wait("not answering", func(st *Status) bool { return st.Generations[0].NotAnswering && st.Generations[0].Tunnels == 3 })
	if err := w.s.Kill(t.Context(), 1); err != nil {
		t.Error(err)
	}
	w.wantServing(2)
	if err := w.s.Kill(t.Context(), 1); err == nil {
		t.Error("killed a generation that is gone")
	}
}

// What comes before its bundle ends a generation. A status did, once, and took the
// reload along.
func TestAStartingGenerationIsNotAskedWhatItHolds(t *testing.T) {
	w := start(t, base)
	w.mood("hang")
	go w.s.Reload(t.Context(), false)
	st := w.wantStates("2 starting, 1 serving")
	if st.Generations[0].NotAnswering {
		t.Error("it was asked")
	}
}

func TestStopEndsEverythingAndClosesTheSockets(t *testing.T) {
	w := start(t, base+"#! holds tunnels\n")
	w.mustReload(base)
	addr := w.address("a")
	pids := w.status().Generations
	w.s.Stop()
	if err := <-w.done; err != nil {
		t.Error(err)
	}
	w.wantClosed(addr)
	for _, g := range pids {
		if err := syscall.Kill(g.PID, 0); err != syscall.ESRCH {
			t.Errorf("generation %d still lives: %v", g.Number, err)
		}
	}
	if _, err := w.reload(""); !errors.Is(err, ErrStopping) {
		t.Errorf("a reload after the end: %v", err)
	}
}

func TestStopDelayTurnsReadinessAndKeepsAccepting(t *testing.T) {
	w := start(t, strings.Replace(base, "[stop]\n", "[stop]\ndelay = \"1h\"\n", 1))
	w.s.Stop()
	if w.s.Ready() || !w.s.Alive() {
		t.Error("ready while stopping")
	}
	if err := w.s.SetReady(t.Context(), true); !errors.Is(err, ErrStopping) || w.s.Ready() {
		t.Errorf("ready again while stopping: %v", err)
	}
	w.wantOpen(w.address("a"))
	w.s.Stop() // a second one ends the delay too
	if err := <-w.done; err != nil {
		t.Error(err)
	}
}

func TestASecondStopKills(t *testing.T) {
	w := start(t, strings.Replace(base, "5s", "1h", 1)+"#! does not stop\n")
	w.s.Stop()
	w.wantStates("1 stopping")
	w.s.Stop()
	if err := <-w.done; err != nil {
		t.Error(err)
	}
}

func TestStopWinsOverAReload(t *testing.T) {
	w := start(t, base)
	w.write(base + "#! never ready\n")
	refused := make(chan error)
	go func() {
		_, err := w.s.Reload(context.Background(), false)
		refused <- err
	}()
	w.wantStates("2 starting, 1 serving")
	w.s.Stop()
	if err := <-refused; !errors.Is(err, ErrStopping) {
		t.Errorf("got %v", err)
	}
	if err := <-w.done; err != nil {
		t.Error(err)
	}
}

func TestReadinessCanBeTurnedOff(t *testing.T) {
	w := start(t, base)
	w.s.SetReady(t.Context(), false)
	if w.s.Ready() || !w.s.Alive() || w.status().Ready {
		t.Error("still ready")
	}
	w.mustReload("")
	if w.s.Ready() {
		t.Error("a reload has turned readiness on again")
	}
	w.s.SetReady(t.Context(), true)
	if !w.s.Ready() {
		t.Error("not ready again")
	}
}

func TestAGenerationThatBreaksTheProtocolIsReplaced(t *testing.T) {
	w := start(t, base)
	var g *generation
	w.s.do(func() { g = w.s.serving })
	w.s.do(func() { w.s.onCutOff(g, errors.New("test")) })
	w.wantServing(2)
}

// The version is shown in a terminal.
func TestAGenerationWithAVersionOfControlCharactersIsRefused(t *testing.T) {
	w := start(t, base)
	w.mood("escapes")
	w.wantRefused(base, "start", "a version that can be shown")
}

// What is kept comes from the first that is ready; reading more would let a process
// that was taken over fill the supervisor's memory.
func TestWhatAGenerationLearnsAgainIsNotRead(t *testing.T) {
	w := start(t, base+"#! is ready again\n")
	for range 3 { // it has said it before it answers
		w.wantServing(1)
	}
}

// shutdown(2) in one process ends the listening for all that have the socket.
func TestASocketThatAGenerationShutDownListensAgain(t *testing.T) {
	w := start(t, base)
	shut := func() {
		w.s.do(func() {
			for _, o := range w.s.sockets {
				if err := syscall.Shutdown(o.FD(), syscall.SHUT_RDWR); err != nil {
					t.Error(err)
				}
			}
		})
		w.wantClosed(w.address("a"))
	}
	shut()
	w.mustReload("")
	w.wantOpen(w.address("a"))
	shut()
	w.s.Kill(t.Context(), 2)
	w.wantServing(1)
	w.wantOpen(w.address("a"))
}

func TestTheStatusShowsAServiceThatCrashes(t *testing.T) {
	w := start(t, base)
	w.mood("crash") // of every replacement
	w.s.Kill(t.Context(), 1)
	w.wait("a failed replacement in the status", func(st *Status) bool {
		return !st.Ready && st.Crashes > 1 && strings.Contains(st.LastCrash, "cannot replace the crashed generation: ") && strings.Contains(st.LastCrash, "exit status 7")
	})
	w.mood("")
	st := w.wait("a replacement", func(st *Status) bool { return st.Ready })
	if st.Crashes < 2 {
		t.Error("it is forgotten as soon as something serves")
	}
}

func TestReplacementsBackOff(t *testing.T) {
	for _, c := range []struct {
		crashes int
		want    time.Duration
	}{{0, 0}, {1, 0}, {2, 100 * time.Millisecond}, {3, 200 * time.Millisecond}, {8, 6400 * time.Millisecond}, {9, 10 * time.Second}, {1 << 30, 10 * time.Second}} {
		if got := backOff(c.crashes); got != c.want {
			t.Errorf("after %d crashes: %s, want %s", c.crashes, got, c.want)
		}
	}
}

func TestGenerationsInheritNothingThatWasMeantForUs(t *testing.T) {
	got := environment([]string{"PATH=/bin", "NOTIFY_SOCKET=/x", "LISTEN_FDS=3", "LISTEN_PID=1", "WATCHDOG_USEC=1", "TABLEFLIP_HAS_PARENT_7DIU3=yes", "SECRET=1", "TZ=UTC", "PATHOLOGY=x"})
	if want := []string{"PATH=/bin", "TZ=UTC"}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// After many reloads nothing is left of them: no process, no descriptor.
func TestReloadsLeakNothing(t *testing.T) {
	w := start(t, strings.Replace(base, "1h", "1ms", 1))
	settled := func(number int) int {
		w.wait("settled", func(st *Status) bool { return states(st) == fmt.Sprintf("%d serving", number) })
		n := 0
		w.s.do(func() { n = len(w.s.living) })
		return n
	}
	for i := range 5 {
		w.mustReload("")
		_ = i
	}
	settled(6)
	r := w.s.pinned
	if _, err := r.binary.Stat(); err != nil {
		t.Errorf("the pinned binary is closed: %v", err)
	}
}

func TestAReloadWorksAlthoughTheOldGenerationHangs(t *testing.T) {
	w := start(t, base)
	pid := w.status().Generations[0].PID
	freeze(t, pid)
	r := w.mustReload("")
	if r.Generation != 2 || len(r.Warnings) != 1 {
		t.Errorf("got %+v", r)
	}
	st := w.wantStates("2 serving, 1 draining")
	if !st.Generations[1].NotAnswering {
		t.Errorf("got %+v", st.Generations[1])
	}
	syscall.Kill(pid, syscall.SIGCONT)
	w.wait("generation 1 to answer", func(st *Status) bool { return !st.Generations[len(st.Generations)-1].NotAnswering })
}
