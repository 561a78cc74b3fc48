package e2e

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// crash kills the supervisor as nothing but SIGKILL can, and returns how things were.
// Whatever of it still runs at the end of the test is ended then.
func (i *instance) crash() *status {
	i.t.Helper()
	before := i.status()
	i.t.Cleanup(func() {
		for _, g := range before.Generations {
			if runs(g.PID) {
				i.t.Errorf("generation %d (pid %d) has survived its supervisors", g.Number, g.PID)
				syscall.Kill(g.PID, syscall.SIGKILL)
			}
		}
	})
	i.signal(syscall.SIGKILL)
	i.awaitEnd()
	return before
}

// runs says whether the process is a generation that has not ended. Who has its parent's
// death behind it may never be waited for.
func runs(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && strings.Contains(string(stat), "(holdfast-proxy)") && !strings.Contains(string(stat), ") Z ")
}

// succeed starts another supervisor and waits until it has found everything as it was.
func (i *instance) succeed(before *status) {
	i.t.Helper()
	i.launch(nil)
	i.wantSame(before)
}

func (i *instance) wantSame(before *status) *status {
	i.t.Helper()
	return i.wait("the generations as they were: "+before.states(), func(s *status) bool {
		if s.states() != before.states() || fmt.Sprint(s.Listeners) != fmt.Sprint(before.Listeners) {
			return false
		}
		for n, g := range s.Generations {
			if g.PID != before.Generations[n].PID || g.NotAnswering || g.Tunnels != before.Generations[n].Tunnels {
				return false
			}
		}
		return true
	})
}

// wantTunnels waits until so many tunnels are open in each living generation, newest first.
func (i *instance) wantTunnels(numbers ...int) {
	i.t.Helper()
	i.wait(fmt.Sprintf("%d tunnels", numbers), func(s *status) bool {
		var have []int
		for _, g := range s.Generations {
			have = append(have, g.Tunnels)
		}
		return slices.Equal(have, numbers)
	})
}

// A supervisor that is killed is missed by nobody: its generations serve and drain on,
// and the next one goes on as if it had been there always.
func TestAKilledSupervisorIsSucceeded(t *testing.T) {
	t.Parallel()
	backend := newBackend(t)
	config := func(n int) string {
		return simple(backend, fmt.Sprintf("# %d\n[reload]\nprobation = \"1ms\"\n[admin]\nhttp = \"127.0.0.1:0\"\n", n))
	}
	i := serve(t, simple(backend, ""))
	address := i.address("public")
	load := startLoad(t, address, 20)
	for round := range 3 {
		i.reload(config(round)) // tunnels stay in the old one
		before := i.crash()
		load.awaitProgress() // without any supervisor
		wantAnswer(t, address)
		i.launch(nil)
		s := i.wait("a serving generation", func(s *status) bool { return len(s.Generations) > 0 && s.Generations[0].State == "serving" })
		if s.Generations[0].PID != before.Generations[0].PID || s.Generations[0].Number != before.Generations[0].Number {
			t.Fatalf("generation %d (pid %d) serves now, before it was %d (pid %d)", s.Generations[0].Number, s.Generations[0].PID,
				before.Generations[0].Number, before.Generations[0].PID)
		}
		load.awaitProgress()
	}
	if s := i.status(); s.Generations[0].Number != 4 {
		t.Errorf("generation %d serves after three reloads, want 4", s.Generations[0].Number)
	}
	load.stop()
	load.report()
	i.wantStates("4 serving") // the others have ended by themselves
	i.reload(config(9))
	i.wantStates("5 serving")
}

// What a successor knows is what the one before knew: states, listeners, tunnels,
// what was set by command, and what was counted.
func TestASuccessorKnowsEverything(t *testing.T) {
	t.Parallel()
	up := newUpstream(t)
	extra := "[[listeners]]\nname = \"second\"\naddress = \"unix:" + filepath.Join(t.TempDir(), "s") + "\"\n"
	config := simple(up.addr, "[reload]\nprobation = \"1ms\"\n"+extra)
	i := serve(t, config)
	first, firstServer := i.tunnel(up)
	i.reload(config + "# 2\n")
	i.wantStates("2 serving, 1 draining")
	second, secondServer := i.tunnel(up)
	i.wantTunnels(1, 1)
	if code, _, errs := i.holdfast("ready", "off"); code != 0 {
		t.Fatal(errs)
	}
	if code, _, errs := i.holdfast("log-level", "debug"); code != 0 {
		t.Fatal(errs)
	}
	_, counters, err := i.scrape()
	if err != nil {
		t.Fatal(err)
	}
	before := i.crash()
	i.succeed(before)
	if s := i.status(); s.Ready {
		t.Error("it is ready, although the operator has said it is not")
	}
	_, after, err := i.scrape()
	if err != nil {
		t.Fatal(err)
	}
	for name, v := range counters {
		if !strings.HasPrefix(name, "holdfast_") {
			continue // about the process of the supervisor, which is another one
		}
		if after[name] < v {
			t.Errorf("%s was %v and is %v", name, v, after[name])
		}
	}
	wantTunnel(first, firstServer)
	wantTunnel(second, secondServer)

	// It commands all of them.
	third, thirdServer := i.tunnel(up)
	i.wantTunnels(2, 1)
	first.close()
	firstServer.close()
	i.wantStates("2 serving")
	i.reload(config + "# 3\n")
	i.wantStates("3 serving, 2 draining")
	for _, c := range []*wire{second, secondServer, third, thirdServer} {
		c.close()
	}
	i.wantStates("3 serving")
}

// tunnel opens one through the listener "public".
func (i *instance) tunnel(up *upstream) (client, server *wire) {
	i.t.Helper()
	client = dialWire(i.t, "tcp", i.address("public"))
	client.send(request("GET /ws HTTP/1.1", "Host: x", "Upgrade: websocket", "Connection: Upgrade",
		"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13"))
	server = up.accept(i.t)
	server.head()
	server.send(agreement)
	client.wantStart(agreed)
	return client, server
}

// freeAddress is one that nobody listens on at the moment.
func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// A configuration file that is broken meanwhile harms nobody: what served serves on,
// and the complaint comes second.
func TestASuccessorThatMeetsABrokenFileAdoptsFirst(t *testing.T) {
	t.Parallel()
	backend := newBackend(t)
	i := serve(t, simple(backend, ""))
	address := i.address("public")
	before := i.crash()
	i.write("this is no configuration")
	i.succeed(before)
	wantAnswer(t, address)
	wantLog(t, i, "the configuration file would be refused", "holdfast.toml:1")
	if code, _, errs := i.holdfast("reload"); code == 0 || !strings.Contains(errs, "holdfast.toml:1") {
		t.Errorf("a reload of it: exit code %d: %s", code, errs)
	}
	i.wantSame(before)
	i.reload(simple(backend, "# mended\n"))
}

// What came back from the generation is what a crash is mended with: the binary that it
// is and the bytes that it was started from, whatever has become of the files.
func TestASuccessorMendsACrashFromWhatItWasHandedBack(t *testing.T) {
	t.Parallel()
	backend := newBackend(t)
	i := newInstance(t, "")
	proxy := filepath.Join(i.dir, "proxy")
	if err := copyExecutable(program("holdfast-proxy"), proxy); err != nil {
		t.Fatal(err)
	}
	access := filepath.Join(i.dir, "access.log")
	i.write(simple(backend, fmt.Sprintf("[process]\nproxy = %q\n[[access_logs]]\npath = %q\n", proxy, access)))
	i.start(nil)
	address := i.address("public")
	i.succeed(i.crash())
	if err := os.Remove(proxy); err != nil { // a running program cannot be written to
		t.Fatal(err)
	}
	if err := os.WriteFile(proxy, []byte("#!/bin/sh\nexit 1\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	i.write("")
	if err := os.Rename(access, access+".1"); err != nil {
		t.Fatal(err)
	}
	for n := range 2 {
		s := i.wait("a serving generation", func(s *status) bool { return s.states() == fmt.Sprintf("%d serving", n+1) })
		syscall.Kill(s.Generations[0].PID, syscall.SIGKILL)
		wantAnswer(t, address)
	}
	s := i.wantStates("3 serving")
	before := len(mustRead(t, access+".1"))
	wantAnswer(t, address)
	eventually(t, func() bool { return len(mustRead(t, access+".1")) > before }, func() string { return "a record in the log as it was opened" })
	_ = s
}

func mustRead(t *testing.T, path string) []byte {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// The supervisor and the generation that serves die at once. Who drains is adopted, and
// something serves again: the file, or, where that is broken, what drains.
func TestSupervisorAndServingGenerationDieAtOnce(t *testing.T) {
	t.Parallel()
	for _, broken := range []bool{false, true} {
		t.Run(fmt.Sprintf("file is broken: %t", broken), func(t *testing.T) {
			t.Parallel()
			up := newUpstream(t)
			address := freeAddress(t)
			config := strings.Replace(simple(up.addr, "[reload]\nprobation = \"1ms\"\n"), "127.0.0.1:0", address, 1)
			i := serve(t, config)
			client, server := i.tunnel(up)
			i.reload(config + "# 2\n")
			before := i.wantStates("2 serving, 1 draining")
			i.crash()
			syscall.Kill(before.Generations[0].PID, syscall.SIGKILL)
			if broken {
				i.write("broken")
			}
			i.launch(nil)
			if broken {
				i.wantStates("1 serving")
			} else {
				i.wantStates("3 serving, 1 draining")
			}
			wantTunnel(client, server)
			another, server2 := i.tunnel(up)
			wantTunnel(another, server2)
			for _, w := range []*wire{client, another} {
				w.close()
			}
		})
	}
}

// Processes that do not run are waited for, but not for ever; they are known, can be
// killed, and are adopted when they run again.
func TestGenerationsThatHangWhenTheirSupervisorIsKilled(t *testing.T) {
	t.Parallel()
	up := newUpstream(t)
	config := strings.Replace(simple(up.addr, "[reload]\nprobation = \"1ms\"\n"), "127.0.0.1:0", freeAddress(t), 1)
	i := serve(t, config)
	var clients, servers [3]*wire
	for n := range clients {
		clients[n], servers[n] = i.tunnel(up)
		i.reload(config + fmt.Sprintf("# %d\n", n))
	}
	before := i.wantStates("4 serving, 3 draining, 2 draining, 1 draining")
	pids := make(map[int]int)
	for _, g := range before.Generations {
		pids[g.Number] = g.PID
	}
	i.crash()
	// Not before: the kernel continues what is stopped in a process group of which the
	// last parent in the session ends (setpgid(2), orphaned process groups).
	syscall.Kill(pids[1], syscall.SIGSTOP)
	syscall.Kill(pids[2], syscall.SIGSTOP)
	i.launch(nil)
	hangs := func(n int) func(s *status) bool {
		return func(s *status) bool {
			return slices.ContainsFunc(s.Generations, func(g generation) bool { return g.Number == n && g.NotAnswering && g.State == "draining" })
		}
	}
	i.wait("generation 1 hangs", hangs(1))
	i.wait("generation 2 hangs", hangs(2))
	i.wantStates("4 serving, 3 draining, 2 draining, 1 draining")
	if code, _, errs := i.holdfast("kill", "--generation", "1"); code != 0 {
		t.Error(errs)
	}
	i.wantStates("4 serving, 3 draining, 2 draining")
	syscall.Kill(pids[2], syscall.SIGCONT)
	i.wait("generation 2 is back", func(s *status) bool {
		return len(s.Generations) == 3 && !s.Generations[2].NotAnswering && s.Generations[2].Tunnels == 1
	})
	for n, c := range clients {
		c.close()
		servers[n].close()
	}
	i.wantStates("4 serving")

	// The one that serves hangs: the addresses are its, so nothing can serve before it
	// is back.
	i.crash()
	syscall.Kill(pids[4], syscall.SIGSTOP)
	i.launch(nil)
	i.wait("generation 4 hangs", func(s *status) bool { return len(s.Generations) > 0 && s.Generations[0].NotAnswering })
	syscall.Kill(pids[4], syscall.SIGCONT)
	i.wait("a serving generation", func(s *status) bool {
		return len(s.Generations) == 1 && s.Generations[0].PID == pids[4] && s.Generations[0].State == "serving" && !s.Generations[0].NotAnswering
	})
	i.reload(config + "# at last\n")
}

// What lies in the runtime directory may be damaged, of another version, or about
// processes that are somebody else's by now.
func TestADamagedStateIsSurvived(t *testing.T) {
	t.Parallel()
	for name, damage := range map[string]func(string) string{
		"no JSON":             func(string) string { return "\x00\xff" },
		"truncated":           func(s string) string { return s[:len(s)/2] },
		"empty":               func(string) string { return "" },
		"of another version":  func(s string) string { return strings.Replace(s, `"version":1`, `"version":99`, 1) },
		"of other processes":  func(s string) string { return strings.ReplaceAll(s, `"start":`, `"start":1`) },
		"with an epoch of -1": func(s string) string { return strings.Replace(s, `"epoch":`, `"epoch":-`, 1) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			backend := newBackend(t)
			i := serve(t, simple(backend, ""))
			address := i.address("public")
			before := i.crash()
			path := filepath.Join(i.runtime(), "state")
			was := string(mustRead(t, path))
			if is := damage(was); is == was {
				t.Fatalf("nothing is damaged in %s", was)
			} else if err := os.WriteFile(path, []byte(is), 0o600); err != nil {
				t.Fatal(err)
			}
			i.succeed(before)
			wantAnswer(t, address)
			i.reload(simple(backend, "# 2\n"))
			i.wantStates("2 serving")
		})
	}
}

// Each supervisor that follows a killed one is succeeded in turn, also one that is killed
// while it adopts.
func TestManySupervisorsAreKilled(t *testing.T) {
	t.Parallel()
	backend := newBackend(t)
	i := serve(t, simple(backend, "[reload]\nprobation = \"1ms\"\n"))
	load := startLoad(t, i.address("public"), 10)
	i.reload(simple(backend, "# 2\n[reload]\nprobation = \"1ms\"\n"))
	before := i.crash()
	var lines sync.Once
	for n := range 20 {
		mark := len(i.log.String())
		i.launch(nil)
		// From hardly begun to all adopted.
		words := []string{"supervisor starts", "generation is adopted", "a supervisor commands", "supervisor starts"}[n%4]
		eventually(t, func() bool { return strings.Contains(i.log.String()[mark:], words) }, func() string { return words })
		i.signal(syscall.SIGKILL)
		i.awaitEnd()
		lines.Do(load.awaitProgress)
	}
	i.launch(nil)
	i.wait("a serving generation", func(s *status) bool {
		return len(s.Generations) > 0 && s.Generations[0].State == "serving" && s.Generations[0].PID == before.Generations[0].PID
	})
	load.stop()
	load.report()
	i.wantStates("2 serving")
}

// What a killed supervisor has noted may be older than what serves, since its disk was
// full: the one that serves keeps its place and its sockets all the same.
func TestAStateThatIsOutOfDate(t *testing.T) {
	t.Parallel()
	up := newUpstream(t)
	config := strings.Replace(simple(up.addr, "[reload]\nprobation = \"1ms\"\n"), "127.0.0.1:0", freeAddress(t), 1)
	i := serve(t, config)
	client, server := i.tunnel(up)
	path := filepath.Join(i.runtime(), "state")
	old := mustRead(t, path)
	i.reload(config + "# 2\n")
	i.wantStates("2 serving, 1 draining")
	before := i.crash()
	if err := os.WriteFile(path, old, 0o600); err != nil {
		t.Fatal(err)
	}
	i.succeed(before)
	another, anotherServer := i.tunnel(up)
	for _, w := range []*wire{client, server, another, anotherServer} {
		w.close()
	}
	i.wantStates("2 serving")
}

// The addresses of a serving generation that hangs are its: one that drains does not
// serve in its place without them, and once it is killed, somebody serves.
func TestTheServingGenerationHangsBesideOneThatDrains(t *testing.T) {
	t.Parallel()
	for _, end := range []syscall.Signal{syscall.SIGKILL, syscall.SIGCONT} {
		t.Run(end.String(), func(t *testing.T) {
			t.Parallel()
			up := newUpstream(t)
			config := strings.Replace(simple(up.addr, "[reload]\nprobation = \"1ms\"\n"), "127.0.0.1:0", freeAddress(t), 1)
			i := serve(t, config)
			client, server := i.tunnel(up)
			i.reload(config + "# 2\n")
			before := i.wantStates("2 serving, 1 draining")
			i.crash()
			syscall.Kill(before.Generations[0].PID, syscall.SIGSTOP)
			i.launch(nil)
			i.wait("generation 2 hangs", func(s *status) bool { return len(s.Generations) == 2 && s.Generations[0].NotAnswering })
			if s := i.status(); s.Ready || s.Generations[1].State != "draining" {
				t.Errorf("ready %t, %s", s.Ready, s.states())
			}
			syscall.Kill(before.Generations[0].PID, end)
			i.wait("a serving generation", func(s *status) bool { return s.Ready && len(s.Listeners) > 0 })
			another, anotherServer := i.tunnel(up)
			for _, w := range []*wire{client, server, another, anotherServer} {
				w.close()
			}
		})
	}
}
