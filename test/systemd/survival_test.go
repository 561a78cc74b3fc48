package systemd

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// What clients notice when processes of the service die, or are replaced.

const metricsAt = "http://127.0.0.1:9901/metrics"

func TestASupervisorThatWasKilledHasASuccessorThatAdopts(t *testing.T) {
	b := boot(t)
	b.settings("[stop]\ntimeout = \"1s\"")
	good := b.configuration()
	b.run("systemctl", "start", unit)
	oldest := b.openTunnel()
	b.run("systemctl", "reload", unit)
	open := b.openTunnel()
	b.serves("hello")
	before, counted := b.proxies(), b.counters()

	b.step("nobody notices", func() {
		b.awaitSuccessor(b.killSupervisor())
		if now := b.proxies(); !slices.Equal(now, before) {
			b.t.Errorf("the generations are %q, were %q", now, before)
		}
		oldest.isOpen()
		open.isOpen()
		b.awaitStatus("generation 2 serving 1 tunnel; 1 draining with 1 tunnel")
		counted = b.noLessThan(counted)
	})
	b.step("with a broken file neither", func() {
		b.configure("[broken]")
		b.awaitSuccessor(b.killSupervisor())
		oldest.isOpen()
		open.isOpen()
		b.await("the complaint", limit, func() bool { return strings.Contains(b.journal("err"), "would be refused") })
		if now := b.proxies(); !slices.Equal(now, before) {
			b.t.Errorf("the generations are %q, were %q", now, before)
		}
		if out, code := b.try("systemctl", "reload", unit); code == 0 {
			b.t.Errorf("systemctl says that it has reloaded: %s", out)
		}
		b.configure(good)
		counted = b.noLessThan(counted)
	})
	b.step("the successor reloads", func() {
		b.run("systemctl", "reload", unit)
		open.isOpen()
		b.openTunnel().isOpen()
		b.awaitStatus("generation 3 serving 1 tunnel; 2 draining with 2 tunnels")
		counted = b.noLessThan(counted)
	})
	b.step("if memory runs out the oldest goes first", func() {
		all := b.proxies()
		if len(all) != 3 {
			b.t.Fatalf("there are %d generations", len(all))
		}
		oldest, older, serving := b.oomScore(all[0]), b.oomScore(all[1]), b.oomScore(all[2])
		if own := b.oomScore(b.mainPID()); oldest <= older || older <= serving || serving != own {
			b.t.Errorf("the scores are %d, %d and %d, that of the supervisor %d", oldest, older, serving, own)
		}
	})
	b.step("a generation that was adopted and dies has a successor", func() {
		b.awaitSuccessor(b.killSupervisor())
		serving := b.proxies()
		b.run("kill", "-KILL", serving[len(serving)-1])
		b.serves("hello")
		oldest.isOpen()
		open.isOpen()
		b.awaitStatus("generation 4 serving 0 tunnels; 2 draining with 2 tunnels")
		b.noLessThan(counted)
	})
	b.step("the successor stops", func() {
		oldest.conn.CloseNow()
		open.conn.CloseNow()
		b.run("systemctl", "stop", unit)
		b.is("ActiveState", "inactive")
		b.is("Result", "success")
		b.noneIsLeft()
	})
}

func TestASupervisorThatHangsIsReplaced(t *testing.T) {
	b := boot(t)
	b.dropIn("WatchdogSec=1s")
	b.run("systemctl", "start", unit)
	open := b.openTunnel()
	first := b.mainPID()
	b.isFed()
	b.is("MainPID", first)
	b.run("kill", "-STOP", first)
	b.awaitSuccessor(first)
	open.isOpen()
	journal := b.journal("info")
	if !strings.Contains(journal, "Watchdog timeout") || !strings.Contains(journal, "SIGABRT: abort") {
		t.Errorf("it was not the watchdog, or nothing says where it hung:\n%s", journal)
	}
}

// systemd has what nobody else has any more.
func TestConnectionsWaitWhileNoProcessLives(t *testing.T) {
	const local = "/run/holdfast/local.sock"
	const estate = 5 // descriptors that are left beside listening sockets, where one generation lives
	for _, c := range []struct {
		name, address string
		kept          int
	}{
		{"with sockets of the service", `"[::]:80"`, estate + 2},
		{"with sockets of systemd", `"systemd:web"`, estate + 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := boot(t)
			b.dropIn("RestartSec=2s\nRestartMaxDelaySec=2s") // long enough to see that nobody lives
			b.configure(strings.Replace(b.configuration(), `"[::]:80"`, c.address, 1))
			b.settings("[[listeners]]\nname = \"local\"\naddress = \"unix:" + local + "\"\nmode = \"0600\"")
			if strings.Contains(c.address, "systemd") {
				b.run("systemctl", "start", "holdfast.socket")
			}
			b.run("systemctl", "start", unit)
			b.run("systemctl", "reload", unit)
			b.serves("hello")
			open := b.openTunnel()
			counted := b.counters()

			for range 2 { // what was stored is stored again
				b.run("systemctl", "daemon-reexec") // systemd, too, is replaced in place
				first := b.mainPID()
				b.run("systemctl", "kill", "-s", "KILL", "--kill-whom=all", unit)
				b.await("the end of all", limit, func() bool { _, code := b.try("pgrep", "holdfast"); return code != 0 })
				const many = 10
				served := make(chan error)
				for i := range many {
					go func() {
						text, err := "", error(nil)
						if i%2 == 0 {
							text, err = b.get(where)
						} else {
							text, err = b.getAt(local)
						}
						if err == nil && text != "hello" {
							err = fmt.Errorf("the service answers %q", text)
						}
						served <- err
					}()
				}
				for range many {
					if err := <-served; err != nil {
						t.Errorf("a connection that was made while no process lived: %v", err)
					}
				}
				b.awaitSuccessor(first)
				counted = b.noLessThan(counted)
			}
			open.conn.CloseNow()
			if n := len(b.proxies()); n != 1 {
				t.Errorf("there are %d generations", n)
			}
			for range 3 {
				b.run("systemctl", "reload", unit)
			}
			b.await("nothing of what has ended in the store", limit, func() bool {
				return b.property("NFileDescriptorStore") == fmt.Sprint(c.kept)
			})
			b.noLessThan(counted)
			b.run("systemctl", "stop", unit)
			b.is("NFileDescriptorStore", "0")
			if _, code := b.try("test", "-e", local); code == 0 {
				t.Errorf("%s outlives the service", local)
			}
		})
	}
}

// What a configuration has dropped must not come back from systemd, and nobody must be
// let wait for it.
func TestAListenerThatWasRemovedIsNotKept(t *testing.T) {
	b := boot(t)
	good := b.configuration()
	b.settings("[[listeners]]\nname = \"second\"\naddress = \"127.0.0.1:8000\"")
	b.run("systemctl", "start", unit)
	if got, err := b.get("http://127.0.0.1:8000"); err != nil || got != "hello" {
		t.Fatalf("the second listener answers %q (%v)", got, err)
	}
	refused := func() bool { return b.refuses("127.0.0.1:8000") }
	b.configure(good)
	b.run("systemctl", "reload", unit)
	b.await("the end of the second listener", limit, refused)
	first := b.mainPID()
	b.run("systemctl", "kill", "-s", "KILL", "--kill-whom=all", unit)
	b.awaitSuccessor(first)
	if !refused() {
		t.Error("the second listener is back")
	}
}

func TestAfterAnUpgrade(t *testing.T) {
	b := boot(t)
	b.dropIn("WatchdogSec=1s\nRestartSec=100ms")
	b.settings("[stop]\ntimeout = \"2s\"")
	b.run("systemctl", "start", unit)
	oldest := b.openTunnel()
	b.run("systemctl", "reload", unit)
	open := b.openTunnel()
	counted := b.counters()
	generations := b.proxies()
	var main string

	b.step("systemd knows the new supervisor", func() {
		main = b.upgrade()
		b.is("NRestarts", "0")
		b.awaitStatus("generation 2 serving 1 tunnel; 1 draining with 1 tunnel")
		if now := b.proxies(); !slices.Equal(now, generations) {
			b.t.Errorf("the generations are %q, were %q", now, generations)
		}
		oldest.isOpen()
		open.isOpen()
		b.serves("hello")
		counted = b.noLessThan(counted)
		if set := b.processStatus(main)["CapEff"]; set != "0000000000000400" {
			b.t.Errorf("capabilities of the new supervisor: %s", set)
		}
	})
	b.step("it feeds the watchdog", func() {
		b.isFed()
		b.is("MainPID", main)
	})
	b.step("reloads", func() {
		b.settings("[[listeners]]\nname = \"second\"\naddress = \"[::]:81\"") // for which it needs its capability
		b.run("systemctl", "reload", unit)
		b.is("ActiveState", "active")
		if got, err := b.get(where + ":81"); err != nil || got != "hello" {
			b.t.Errorf("the new listener answers %q (%v)", got, err)
		}
		b.awaitStatus("generation 3 serving 0 tunnels; 2 draining with 2 tunnels")
		good := b.configuration()
		b.configure("[broken]")
		if out, code := b.try("systemctl", "reload", unit); code == 0 {
			b.t.Errorf("systemctl says that it has reloaded: %s", out)
		}
		b.configure(good)
		b.is("MainPID", main)
	})
	b.step("upgrades again, by signal", func() {
		b.run("kill", "-USR2", main)
		b.await("the next supervisor", limit, func() bool { return b.mainPID() != main })
		b.await("the end of the old one", limit, func() bool { _, code := b.try("kill", "-0", main); return code != 0 })
		main = b.mainPID()
		b.is("NRestarts", "0")
		b.isFed()
		oldest.isOpen()
		open.isOpen()
	})
	b.step("a killed one is noticed, and its successor adopts", func() {
		b.run("kill", "-KILL", main)
		b.awaitSuccessor(main)
		b.is("NRestarts", "1")
		oldest.isOpen()
		open.isOpen()
		counted = b.noLessThan(counted)
	})
	b.step("a stuck one too", func() {
		main = b.upgrade()
		b.run("kill", "-STOP", main)
		b.awaitSuccessor(main)
		b.is("NRestarts", "2")
		oldest.isOpen()
		open.isOpen()
	})
	b.step("connections wait while no process lives", func() {
		main = b.upgrade()
		counted = b.noLessThan(counted) // what the new supervisor itself has counted, too
		b.run("systemctl", "kill", "-s", "KILL", "--kill-whom=all", unit)
		b.serves("hello")
		b.awaitSuccessor(main)
		b.noLessThan(counted)
		if got, err := b.get(where + ":81"); err != nil || got != "hello" {
			b.t.Errorf("the listener that it has opened answers %q (%v)", got, err)
		}
	})
	b.step("stops", func() {
		main = b.upgrade()
		open := b.openTunnel()
		stopping := time.Now()
		b.run("systemctl", "stop", "--no-block", unit)
		b.awaitStatus("stopping; 1 generation left with 1 tunnel")
		open.isOpen()
		b.run("systemctl", "stop", unit)
		open.awaitEnd()
		if took := time.Since(stopping); took < 2*time.Second {
			b.t.Errorf("the tunnel was not waited for: %s", took)
		}
		b.is("ActiveState", "inactive")
		b.is("Result", "success")
		b.noneIsLeft()
		if journal := b.journal("info"); !strings.HasSuffix(strings.TrimSpace(journal), "Stopped "+b.property("Description")+".") &&
			!strings.Contains(journal, "supervisor ended") {
			b.t.Errorf("the end of the journal:\n%s", journal)
		}
	})
}

// An upgrade to nothing, or to what does not work, changes nothing.
func TestAnUpgradeThatIsRefused(t *testing.T) {
	b := boot(t)
	b.dropIn("WatchdogSec=1s")
	b.run("systemctl", "start", unit)
	open := b.openTunnel()
	main := b.mainPID()
	b.configure("[broken]")
	if out, code := b.try("holdfast", "upgrade"); code != 1 || !strings.Contains(out, "broken") {
		t.Errorf("exit code %d: %s", code, out)
	}
	b.isFed()
	b.is("MainPID", main)
	b.is("ActiveState", "active")
	b.is("NRestarts", "0")
	b.serves("hello")
	open.isOpen()
}

// Whoever dies, and whenever: systemd has a supervisor that commands, or starts one.
func TestAnUpgradeThatIsCutShort(t *testing.T) {
	const pause, reached = "/run/holdfast/pause", "/run/holdfast/pause.reached"
	b := boot(t)
	// Who dies as a child of the old one, which waits for it, leaves no trace for systemd
	// but its silence: that is the last case.
	b.dropIn("WatchdogSec=3s\nEnvironment=" + pauseVariable + "=" + pause + "\nRestartSec=100ms\nRestartMaxDelaySec=200ms")
	b.run("systemctl", "start", unit)
	open := b.openTunnel()
	counted := b.counters()
	generations := b.proxies()
	for _, c := range []struct {
		what, point string
		old         bool // dies; or else the new one does
		want        string
	}{
		{"the new one before it may command", "prepared", false, "the old one"},
		{"the old one before the new one may command", "agreed", true, "another"},
		{"the new one when it commands", "commands", false, "the old one"},
		{"the old one when the new one commands", "commands", true, "another"},
		{"the old one before systemd knows the new one", "relieved", true, "another"},
		{"the new one before systemd knows it", "relieved", false, "another"},
		{"the old one when systemd knows the new one", "dismissed", true, "the new one"},
		{"the new one when systemd knows it", "dismissed", false, "another"},
	} {
		b.step(c.what, func() {
			old := b.mainPID()
			b.run("rm", "-f", reached)
			b.write(pause, c.point, 0o644)
			upgraded := make(chan struct{})
			go func() {
				defer close(upgraded)
				b.try("holdfast", "upgrade")
			}()
			b.await("the point "+c.point, limit, func() bool { _, code := b.try("test", "-s", reached); return code == 0 })
			candidate := ""
			for _, pid := range b.supervisors() {
				if pid != old {
					candidate = pid
				}
			}
			killed := candidate
			if c.old {
				killed = old
			}
			b.run("kill", "-KILL", killed)
			b.run("rm", pause)
			<-upgraded
			b.await("one supervisor that lives, which systemd knows", limit, func() bool {
				all := b.supervisors() // where the dead one may still be, as systemd may not know yet
				return len(all) == 1 && all[0] != killed && all[0] == b.mainPID() && b.property("ActiveState") == "active"
			})
			got := "another"
			switch b.mainPID() {
			case old:
				got = "the old one"
			case candidate:
				got = "the new one"
			}
			if got != c.want {
				b.t.Errorf("%s commands, want %s", got, c.want)
			}
			if now := b.proxies(); !slices.Equal(now, generations) {
				b.t.Errorf("the generations are %q, were %q", now, generations)
			}
			open.isOpen()
			b.serves("hello")
			counted = b.noLessThan(counted)
			b.run("holdfast", "upgrade")
			b.await("the successor", limit, func() bool { all := b.supervisors(); return len(all) == 1 && all[0] == b.mainPID() })
		})
	}
}

// It ends every tunnel, and nothing that was counted is lost.
func TestARestart(t *testing.T) {
	b := boot(t)
	b.settings("[stop]\ntimeout = \"3s\"")
	b.run("systemctl", "start", unit)
	b.serves("hello")
	open := b.openTunnel()
	counted := b.counters()
	first := b.mainPID()
	b.run("systemctl", "restart", "--no-block", unit)
	// Who comes while the rest drains is told so, and does not wait for nobody.
	b.await("the end of the listener", limit, func() bool { return b.refuses("127.0.0.1:80") })
	b.is("MainPID", first)
	open.awaitEnd()
	b.awaitSuccessor(first)
	b.noLessThan(counted)

	b.run("systemctl", "stop", unit)
	b.is("NFileDescriptorStore", "0")
	b.run("systemctl", "start", unit)
	if now := b.counters()["holdfast_downstream_requests_total"]; now != 0 {
		t.Errorf("after a stop and a start counters begin at %v", now)
	}
}

// What a supervisor may do to its generations, it may do in the sandbox.
func TestOrphansAreStopped(t *testing.T) {
	b := boot(t)
	b.dropIn("RestartSec=1h\nRestartMaxDelaySec=1h")
	b.settings("[stop]\ntimeout = \"1s\"")
	b.run("systemctl", "start", unit)
	open := b.openTunnel()
	b.killSupervisor()
	b.await("systemd's notice of it", limit, func() bool { return b.property("SubState") == "auto-restart" })
	open.isOpen()
	b.run("systemctl", "stop", unit)
	open.isOpen() // nobody was there who could have been asked
	b.run("holdfast", "stop", "--orphans")
	open.awaitEnd()
	b.noneIsLeft()
	b.run("systemctl", "start", unit) // root has left nothing behind that hinders it
	b.serves("hello")
}

// refuses says whether nobody listens at addr.
func (b *box) refuses(addr string) bool {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b.t.Context(), limit)
	defer cancel()
	conn, err := b.dial(ctx, "tcp", addr)
	if err == nil {
		conn.Close()
	}
	return errors.Is(err, unix.ECONNREFUSED)
}

// oomScore is what the kernel adds when it looks for whom to kill (proc_pid_oom_score_adj(5)).
func (b *box) oomScore(pid string) int {
	b.t.Helper()
	score, err := strconv.Atoi(b.run("cat", "/proc/"+pid+"/oom_score_adj"))
	if err != nil {
		b.t.Fatal(err)
	}
	return score
}

// upgrade returns the pid of the new supervisor, which is the service's for systemd.
func (b *box) upgrade() string {
	b.t.Helper()
	old := b.mainPID()
	b.run("holdfast", "upgrade")
	b.await("the end of the old supervisor", limit, func() bool { _, code := b.try("kill", "-0", old); return code != 0 })
	b.is("ActiveState", "active")
	now := b.mainPID()
	if now == old || now == "0" {
		b.t.Fatalf("systemd takes process %s for the service, which was %s", now, old)
	}
	return now
}

// isFed wants several signs of life of a service whose watchdog waits 1 s for one.
func (b *box) isFed() {
	b.t.Helper()
	fed := map[string]bool{}
	b.await("several signs of life", limit, func() bool { fed[b.property("WatchdogTimestampMonotonic")] = true; return len(fed) > 9 })
}

// supervisors are the pids of all processes of `holdfast run`, in the box's numbers.
func (b *box) supervisors() []string {
	b.t.Helper()
	out, _ := b.try("pgrep", "-r", "R,S,D", "-f", "^[^ ]*holdfast run ")
	return strings.Fields(out)
}

// noneIsLeft wants the service to have no process.
func (b *box) noneIsLeft() {
	b.t.Helper()
	b.await("the end of all processes", limit, func() bool { _, code := b.try("pgrep", "holdfast"); return code != 0 })
}

// configuration is what the file says.
func (b *box) configuration() string {
	b.t.Helper()
	text, err := os.ReadFile(b.path(configPath))
	if err != nil {
		b.t.Fatal(err)
	}
	return string(text)
}

// counters are all series that never decrease, and the sums of all series of each.
func (b *box) counters() map[string]float64 {
	b.t.Helper()
	text, err := b.get(metricsAt)
	if err != nil {
		b.t.Fatal(err)
	}
	all := make(map[string]float64)
	counter := false
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "# TYPE ") {
			fields := strings.Fields(line)
			kind := fields[len(fields)-1]
			// The supervisor's own process is another one each time.
			counter = (kind == "counter" || kind == "histogram") && strings.HasPrefix(fields[2], "holdfast_")
		}
		series, value, found := strings.Cut(strings.TrimSpace(line), "} ")
		if !found {
			series, value, _ = strings.Cut(strings.TrimSpace(line), " ")
		}
		number, err := strconv.ParseFloat(value, 64)
		if !counter || strings.HasPrefix(line, "#") || err != nil {
			continue
		}
		all[series] = number
		if name, _, ok := strings.Cut(series, "{"); ok {
			all[name] += number
		}
	}
	if len(all) == 0 {
		b.t.Fatalf("no counters:\n%s", text)
	}
	return all
}

// noLessThan wants no counter to be smaller than it was, and returns what they are.
func (b *box) noLessThan(was map[string]float64) map[string]float64 {
	b.t.Helper()
	now := b.counters()
	for _, series := range slices.Sorted(maps.Keys(was)) {
		if value, there := now[series]; !there || value < was[series] {
			b.t.Errorf("%s is %v, was %v", series, value, was[series])
		}
	}
	return now
}
