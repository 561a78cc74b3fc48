package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"holdfast/internal/pidfd"
)

// pauseEnv names the file that says where in an upgrade the program plain/pausing pauses
// for as long as the file is there.
const pauseEnv = "HOLDFAST_TEST_PAUSE"

// follow makes the supervisor that answers the one of the instance.
func (i *instance) follow() *status {
	i.t.Helper()
	s := i.status()
	id, err := pidfd.Of(s.PID)
	if err != nil {
		i.t.Fatal(err)
	}
	p, err := pidfd.Open(id)
	if err != nil {
		i.t.Fatal(err)
	}
	i.pid, i.ended = s.PID, make(chan struct{})
	go func(ended chan struct{}) {
		p.Wait()
		p.Close()
		close(ended)
	}(i.ended)
	return s
}

// upgrade expects that another supervisor commands then.
func (i *instance) upgrade() *status {
	i.t.Helper()
	old := i.pid
	if code, out, errs := i.holdfast("upgrade"); code != 0 || !strings.Contains(out, "commands after") {
		i.t.Fatalf("upgrade: exit code %d\n%s%s", code, out, errs)
	}
	i.awaitEnd() // of the old one
	if s := i.follow(); s.PID != old {
		return s
	}
	i.t.Fatalf("process %d still commands", old)
	return nil
}

// replaceable has the service started from a path of its own, which replace makes to be
// another program.
func (i *instance) replaceable(name string) {
	i.t.Helper()
	i.program = filepath.Join(i.dir, "holdfast")
	install(i.t, program(name), i.program)
}

func (i *instance) replace(by string) { install(i.t, by, i.program) }

// install puts a program where another one may be, as packages do.
func install(t *testing.T, program, at string) {
	t.Helper()
	if err := os.Symlink(program, at+".new"); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(at+".new", at); err != nil {
		t.Fatal(err)
	}
}

// quick is a configuration in which nothing is waited for.
func quick(backend string, n int) string {
	return simple(backend, fmt.Sprintf("# %d\n[reload]\nprobation = \"1ms\"\n[admin]\nhttp = \"127.0.0.1:0\"\n", n))
}

// Nobody notices that the supervisor is another one: not who has a tunnel, whether the
// generation serves or drains, and not who asks something just then.
func TestNothingIsLostOverManyUpgrades(t *testing.T) {
	t.Parallel()
	up, backend := newUpstream(t), newBackend(t)
	draining := simple(up.addr, "[reload]\nprobation = \"1ms\"\n")
	i := serve(t, draining)
	var held [][2]*wire
	for n := range 3 {
		client, server := i.tunnel(up)
		held = append(held, [2]*wire{client, server})
		if n < 2 {
			i.reload(draining + fmt.Sprintf("# %d\n", n))
		}
	}
	i.reload(quick(backend, 0))
	before := i.wantStates("4 serving, 3 draining, 2 draining, 1 draining")
	load := startLoad(t, i.address("public"), 20)
	first := i.pid
	for range 10 {
		i.upgrade()
		load.awaitProgress()
	}
	s := i.status()
	if s.PID == first || s.states() != before.states() || s.Generations[0].PID != before.Generations[0].PID || s.Generations[0].Tunnels < 20 {
		t.Errorf("before: pid %d, %s; now: pid %d, %s, %+v", first, before.states(), s.PID, s.states(), s.Generations[0])
	}
	most := 64
	for _, g := range s.Generations { // what is kept of its loops (a file and up to 32 pipes each) and tunnels
		most += runtime.NumCPU()*(1+2*32) + 2*(g.Deposits+10)
	}
	if n := descriptors(t, i.pid); n > most {
		t.Errorf("after ten upgrades the supervisor has %d descriptors open, want at most %d", n, most)
	}
	for _, h := range held {
		wantTunnel(h[0], h[1])
		h[0].close()
		h[1].close()
	}
	i.wantStates("4 serving")
	i.reload(quick(backend, 1))
	load.awaitProgress()
	load.stop()
	load.report()
	i.wantStates("5 serving")
	if code, _, errs := i.holdfast("stop"); code != 0 {
		t.Errorf("stop: exit code %d\n%s", code, errs)
	}
	i.awaitEnd()
	left, _ := filepath.Glob(filepath.Join(i.runtime(), "*.sock"))
	if len(left) > 0 {
		t.Errorf("after the end there is %q", left)
	}
}

// Of upgrades and reloads that are asked for at once each happens, one after the other.
func TestUpgradesAndReloadsQueue(t *testing.T) {
	t.Parallel()
	const each = 6
	backend := newBackend(t)
	i := serve(t, quick(backend, 0))
	load := startLoad(t, i.address("public"), 10)
	var both sync.WaitGroup
	for _, command := range []string{"reload", "upgrade"} {
		both.Go(func() {
			for range each {
				if code, out, errs := i.holdfast(command); code != 0 {
					t.Errorf("%s: exit code %d\n%s%s", command, code, out, errs)
				}
			}
		})
	}
	both.Wait()
	i.awaitEnd()
	i.follow()
	load.awaitProgress()
	load.stop()
	load.report()
	i.wantStates(fmt.Sprintf("%d serving", each+1))
}

func TestSIGUSR2Upgrades(t *testing.T) {
	t.Parallel()
	i := serve(t, quick(newBackend(t), 0))
	old := i.pid
	i.signal(syscall.SIGUSR2)
	i.awaitEnd()
	if s := i.follow(); s.PID == old || s.states() != "1 serving" {
		t.Errorf("pid %d was %d, %s", s.PID, old, s.states())
	}
	i.signal(syscall.SIGHUP)
	i.wantStates("2 serving")
}

// From any build to any other, forwards and back, with the generations of all of them.
func TestUpgradesBetweenBuilds(t *testing.T) {
	t.Parallel()
	up := newUpstream(t)
	proxy := filepath.Join(t.TempDir(), "proxy")
	install(t, program("1.1/holdfast-proxy"), proxy)
	i := newInstance(t, simple(up.addr, fmt.Sprintf("[reload]\nprobation = \"1ms\"\n[process]\nproxy = %q\n", proxy)))
	i.replaceable("1.1/holdfast")
	i.start(nil)
	held := [][2]*wire{}
	for _, build := range []string{"1.3", "plain", "1.1", "plain"} {
		client, server := i.tunnel(up)
		held = append(held, [2]*wire{client, server})
		i.replace(program(build + "/holdfast"))
		install(t, program(build+"/holdfast-proxy"), proxy)
		i.upgrade()
		if code, _, errs := i.holdfast("reload"); code != 0 {
			t.Fatal(errs)
		}
		if s := i.status(); build != "plain" && (s.Version != build+".0" || s.Generations[0].Version != s.Version) {
			t.Errorf("version %s commands and %s serves, want %s", s.Version, s.Generations[0].Version, build)
		}
		for _, h := range held {
			wantTunnel(h[0], h[1])
		}
	}
	i.wantStates("5 serving, 4 draining, 3 draining, 2 draining, 1 draining")
	for _, h := range held {
		h[0].close()
		h[1].close()
	}
	i.wantStates("5 serving")
}

// Whatever is wrong with the new program, the answer says it, and nothing has changed.
func TestAnUpgradeThatIsRefused(t *testing.T) {
	t.Parallel()
	script := func(lines string) func(*instance) {
		return func(i *instance) {
			path := filepath.Join(i.dir, "script")
			if err := os.WriteFile(path, []byte("#!/bin/sh\n"+lines+"\n"), 0o700); err != nil {
				i.t.Fatal(err)
			}
			i.replace(path)
		}
	}
	for name, test := range map[string]struct {
		spoil func(*instance)
		want  string
	}{
		"missing":               {func(i *instance) { os.Remove(i.program) }, "no such file"},
		"ends at once":          {script("exit 7"), "exit status 7"},
		"kills itself":          {script("kill -9 $$"), "signal: killed"},
		"hangs":                 {script("exec sleep 300"), "has not said what it is within 10s"},
		"speaks another core":   {func(i *instance) { i.replace(program("strange/holdfast")) }, "speaks control protocol 8 to 9, this supervisor 1 to 1"},
		"refuses configuration": {func(i *instance) { i.write("nonsense") }, "holdfast.toml:1"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			up := newUpstream(t)
			config := simple(up.addr, "[reload]\nprobation = \"1ms\"\n")
			i := newInstance(t, config)
			i.replaceable("holdfast")
			i.start(nil)
			client, server := i.tunnel(up)
			i.reload(config + "#\n")
			i.wantStates("2 serving, 1 draining")
			before := i.status()
			test.spoil(i)
			code, out, errs := i.holdfast("upgrade")
			if code != 1 || !strings.Contains(errs, "nothing has changed") || !strings.Contains(errs, test.want) {
				t.Errorf("exit code %d, want 1; the answer, in which %q must be:\n%s%s", code, test.want, out, errs)
			}
			if after := i.wantSame(before); after.PID != before.PID {
				t.Errorf("process %d commands, before it was %d", after.PID, before.PID)
			}
			eventually(t, func() bool { return len(i.supervisors()) == 1 }, func() string { return "the end of the candidate" })
			i.wantExclusive()

			// Mended, it works.
			i.write(config)
			i.replace(program("holdfast"))
			i.upgrade()
			wantTunnel(client, server)
			client.close()
			server.close()
			i.wantStates("2 serving")
		})
	}
}

// wantExclusive expects that a second supervisor is refused and told of the first.
func (i *instance) wantExclusive() {
	i.t.Helper()
	want := fmt.Sprintf("another supervisor (pid %d)", i.pid)
	if code, _, errs := i.holdfast("run", "-c", i.config()); code != 1 || !strings.Contains(errs, want) {
		i.t.Errorf("a second supervisor: exit code %d, want 1 with %q\n%s", code, want, errs)
	}
}

// supervisors are the living processes in the group of the first one, where those that
// succeed it are, too.
func (i *instance) supervisors() (pids []int) {
	all, err := os.ReadDir("/proc")
	if err != nil {
		i.t.Fatal(err)
	}
	for _, entry := range all {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil {
			continue
		}
		if state, group := processState(pid); group == i.cmd.Process.Pid && state != "Z" {
			pids = append(pids, pid)
		}
	}
	return pids
}

// The predecessor and the candidate are killed at each step of an upgrade. At each there
// is one supervisor afterwards, or none, and another one adopts. Nobody else notices.
func TestAKillAtEachStepOfAnUpgrade(t *testing.T) {
	t.Parallel()
	const (
		refused = "the old one commands"
		done    = "the new one commands"
		nobody  = "nobody commands"
	)
	// Where one of the two pauses, and who commands when the old one is killed then, or
	// the new one.
	for _, test := range []struct{ point, oldKilled, newKilled string }{
		{"starts", nobody, ""}, // there is no new one
		{"born", nobody, refused},
		{"introduced", nobody, refused},
		{"greeted", nobody, refused},
		{"offered", nobody, refused},
		{"endowed", nobody, refused},
		{"prepared", nobody, refused},
		{"agreed", nobody, refused},
		{"committed", done, ""}, // the new one may have said that it commands before it was killed, or not
		{"told", done, refused},
		{"commands", done, refused},
		{"ready", done, nobody},
		{"relieved", done, nobody},
		{"dismissed", done, nobody},
	} {
		for _, victim := range []struct{ name, want string }{{"old", test.oldKilled}, {"new", test.newKilled}} {
			if victim.want == "" {
				continue
			}
			t.Run(test.point+", the "+victim.name+" one", func(t *testing.T) {
				t.Parallel()
				up := newUpstream(t)
				config := simple(up.addr, "[reload]\nprobation = \"1ms\"\n[drain]\nidle_grace = \"10ms\"\n")
				i := newInstance(t, config)
				pause := filepath.Join(i.dir, "pause")
				if err := os.WriteFile(pause, []byte(test.point), 0o600); err != nil {
					t.Fatal(err)
				}
				i.program, i.command, i.env = program("plain/pausing"), program("plain/holdfast"), []string{pauseEnv + "=" + pause}
				i.start(nil)
				client, server := i.tunnel(up)
				i.reload(config + "#\n")
				before := i.wantStates("2 serving, 1 draining")
				old := i.pid

				answered := make(chan int, 1)
				go func() {
					code, _, _ := i.holdfast("upgrade")
					answered <- code
				}()
				eventually(t, func() bool {
					reached, err := os.ReadFile(pause + ".reached")
					return err == nil && strings.HasSuffix(string(reached), "\n")
				}, func() string { return "one of the two to pause" })
				for _, pid := range i.supervisors() {
					if (pid == old) == (victim.name == "old") {
						syscall.Kill(pid, syscall.SIGKILL)
					}
				}
				if err := os.Remove(pause); err != nil {
					t.Fatal(err)
				}
				code := <-answered
				switch victim.want {
				case refused:
					if code != 1 {
						t.Errorf("upgrade: exit code %d, want 1", code)
					}
					if s := i.wantSame(before); s.PID != old {
						t.Errorf("process %d commands, want %d", s.PID, old)
					}
				case done:
					if code != 3 && code != 0 { // it may have been answered
						t.Errorf("upgrade: exit code %d, want 3", code)
					}
					i.awaitEnd()
					i.follow()
				case nobody:
					eventually(t, func() bool { return len(i.supervisors()) == 0 }, func() string { return "the end of both" })
					i.awaitEnd()
					i.launch(nil)
				}
				i.wantSame(before)
				i.wantExclusive()
				wantTunnel(client, server)
				i.reload(config + "# 2\n")
				i.wantStates("3 serving, 1 draining")
				i.upgrade()
				wantTunnel(client, server)
				client.close()
				server.close()
				i.wantStates("3 serving")
			})
		}
	}
}
