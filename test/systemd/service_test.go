package systemd

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// slowProxy begins to build only when told to.
const slowProxy = `#!/bin/sh
while [ "$1" = run ] && [ ! -e /run/holdfast/go ]; do sleep 0.05; done
exec /usr/bin/holdfast-proxy "$@"
`

func TestAStartIsOverWhenAGenerationServes(t *testing.T) {
	b := boot(t)
	b.write("/usr/lib/holdfast/slow", slowProxy, 0o755)
	b.settings("[process]\nproxy = \"/usr/lib/holdfast/slow\"")
	b.run("systemctl", "start", "--no-block", unit)
	b.awaitStatus("starting")
	b.is("ActiveState", "activating")
	b.write("/run/holdfast/go", "", 0o644)
	b.run("systemctl", "start", unit) // waits for the start that is under way
	b.serves("hello")
	b.is("ActiveState", "active")
	b.awaitStatus("generation 1 serving 0 tunnels")
}

func TestAStartWithABrokenConfigurationFailsAndSaysWhy(t *testing.T) {
	b := boot(t)
	b.dropIn("RestartSec=200ms\nRestartMaxDelaySec=300ms")
	b.settings("[reload]\nprobatoin = \"1s\"")
	for range 6 { // by default systemd allows five in 10 s
		if out, code := b.try("systemctl", "start", unit); code == 0 || strings.Contains(out, "too quickly") {
			t.Errorf("a start with a broken configuration: exit code %d, %s", code, out)
		}
	}
	b.await("the reason in the journal, among the errors", limit, func() bool {
		return strings.Contains(b.journal("err"), "reload.probatoin: unknown key")
	})
	b.awaitStatus("cannot start: configuration: " + configPath + ":")
	// Mended, it starts by itself.
	good, err := os.ReadFile("../../deploy/systemd/holdfast.toml")
	if err != nil {
		t.Fatal(err)
	}
	b.configure(string(good))
	b.await("a start with the mended file", limit, func() bool { return b.property("ActiveState") == "active" })
	b.serves("hello")
}

func TestReloads(t *testing.T) {
	b := boot(t)
	b.upstream("127.0.0.1:8081", "new")
	b.run("systemctl", "start", unit)
	open := b.openTunnel()
	open.isOpen()

	b.settings("[log]\nlevel = \"info\"")
	text, err := os.ReadFile(b.path(configPath))
	if err != nil {
		t.Fatal(err)
	}
	b.configure(strings.ReplaceAll(string(text), "127.0.0.1:8080", "127.0.0.1:8081"))
	b.run("systemctl", "reload", unit)
	b.serves("new")
	b.is("ActiveState", "active")
	open.isOpen()
	const status = "generation 2 serving 0 tunnels; 1 draining with 1 tunnel"
	b.awaitStatus(status)

	// A broken file.
	b.settings("[reload]\nprobation = 5")
	supervisor := b.mainPID()
	if out, code := b.try("systemctl", "reload", unit); code == 0 {
		t.Errorf("systemctl says that it has reloaded: %s", out)
	}
	b.serves("new")
	b.is("ActiveState", "active")
	b.is("MainPID", supervisor)
	open.isOpen()
	b.awaitStatus(status + "; last reload refused: configuration: " + configPath + ":")
	b.await("the reason in the journal, among the errors", limit, func() bool {
		return strings.Contains(b.journal("err"), "reload refused; nothing has changed")
	})

	// A reload that systemd did not ask for, and has a limit for all the same.
	b.configure(string(text))
	b.run("kill", "-HUP", supervisor)
	b.await("the reload by signal", limit, func() bool { text, _ := b.get(where); return text == "hello" })
	b.await("the end of the reload", limit, func() bool { return b.property("ActiveState") == "active" })
	open.isOpen()
	b.is("NRestarts", "0")
}

// What systemd-oomd leaves in a control group when it kills for memory is what
// systemd looks at; the kernel's own counter it reads in the same way, but not
// every machine has the memory controller in the hierarchy that boxes use.
func TestAGenerationThatIsKilledForMemoryTakesNothingWithIt(t *testing.T) {
	for _, c := range []struct{ name, settings, want string }{
		{"as the unit is", "", "active"},
		{"which OOMPolicy= is for", "OOMPolicy=stop", "failed"},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := boot(t)
			b.dropIn(c.settings + "\nRestart=no")
			b.settings("[stop]\ntimeout = \"1s\"")
			b.run("systemctl", "start", unit)
			resumed := b.openTunnel()
			b.run("systemctl", "reload", unit)
			kept := b.openTunnel()
			group := b.path("/sys/fs/cgroup" + b.property("ControlGroup"))
			for _, a := range []string{"user.oomd_ooms", "user.oomd_kill"} {
				if err := unix.Setxattr(group, a, []byte("1"), 0); err != nil {
					t.Fatal(err)
				}
			}
			b.run("kill", "-KILL", b.proxies()[0])
			// systemd looks when a child of its own ends: here one that loses its parent.
			b.run("sh", "-c", "echo $$ >/sys/fs/cgroup"+b.property("ControlGroup")+"/cgroup.procs; (sleep 0.1 &)")
			b.await("systemd's notice of it", limit, func() bool {
				return strings.Contains(b.journal("info"), "oomd killed 1 process(es)")
			})
			b.await("the state "+c.want, limit, func() bool { return b.property("ActiveState") == c.want })
			if c.want == "active" {
				resumed.isOpen()
				kept.isOpen()
				b.serves("hello")
			}
		})
	}
}

func TestStops(t *testing.T) {
	b := boot(t)
	b.step("one by hand is final", func() {
		b.run("systemctl", "start", unit)
		b.run("holdfast", "stop")
		b.await("the end of the service", limit, func() bool { return b.property("ActiveState") == "inactive" })
		b.is("Result", "success")
		b.is("NRestarts", "0")
	})
	b.step("a supervisor that cannot be asked is stopped all the same", func() {
		b.run("systemctl", "start", unit)
		b.run("rm", "/run/holdfast/admin.sock")
		b.run("systemctl", "stop", unit)
		b.is("ActiveState", "inactive")
		b.is("Result", "success")
		if left := b.proxies(); len(left) > 0 {
			b.t.Errorf("generations are left: %q", left)
		}
	})
	b.step("the runtime directory stays", func() {
		b.run("systemctl", "start", unit)
		b.run("touch", "/run/holdfast/mark")
		b.run("systemctl", "restart", unit)
		b.run("test", "-e", "/run/holdfast/mark")
		b.run("systemctl", "stop", unit)
		b.run("test", "-e", "/run/holdfast/mark")
		if owner := b.run("stat", "-c", "%U %a", "/run/holdfast"); owner != "holdfast 700" {
			b.t.Errorf("the runtime directory is %s", owner)
		}
	})
}

// The stop takes as long as the configuration says, here 4 s, although systemd's own
// limit is shorter.
func TestAStopTakesItsTime(t *testing.T) {
	const delay, timeout = 2 * time.Second, 2 * time.Second
	b := boot(t)
	b.dropIn("TimeoutStopSec=1s")
	b.settings(fmt.Sprintf("[stop]\ndelay = %q\ntimeout = %q", delay, timeout))
	b.run("systemctl", "start", unit)
	open := b.openTunnel()
	stopping := time.Now()
	b.run("systemctl", "stop", "--no-block", unit)
	b.awaitStatus("stopping; 1 generation left with 1 tunnel")
	b.serves("hello") // in the delay
	open.isOpen()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		open.awaitEnd()
	}()
	b.run("systemctl", "stop", unit) // waits for the stop that is under way
	if took := time.Since(stopping); took < delay+timeout {
		t.Errorf("the stop took %s", took)
	}
	<-ended
	b.is("ActiveState", "inactive")
	b.is("Result", "success")
	journal := b.journal("info")
	if !strings.Contains(journal, "supervisor ended") || strings.Contains(journal, "signal received") {
		t.Errorf("the supervisor was not stopped by ExecStop=:\n%s", journal)
	}
	if left := b.proxies(); len(left) > 0 {
		t.Errorf("generations are left: %q", left)
	}
}

func TestAConnectionMadeBeforeTheStartIsServed(t *testing.T) {
	b := boot(t)
	text, err := os.ReadFile(b.path(configPath))
	if err != nil {
		t.Fatal(err)
	}
	b.configure(strings.Replace(string(text), `"[::]:80"`, `"systemd:web"`, 1))
	b.run("systemctl", "start", "holdfast.socket")
	b.is("ActiveState", "inactive")
	b.serves("hello") // which starts the service
	b.is("ActiveState", "active")
	if status := b.run("holdfast", "status"); !strings.Contains(status, "public on [::]:80") {
		t.Errorf("the status does not say where the socket of systemd is:\n%s", status)
	}

	// A name that systemd has not passed.
	b.configure(strings.Replace(string(text), `"[::]:80"`, `"systemd:wbe"`, 1))
	if out, code := b.try("systemctl", "reload", unit); code == 0 {
		t.Errorf("systemctl says that it has reloaded: %s", out)
	}
	b.await("the refusal with the names that there are", limit, func() bool {
		return strings.Contains(b.journal("err"), `systemd has passed no socket of this name, only \"web\"`)
	})
	b.serves("hello")

	// A successor has it too, and can name it again.
	b.upgrade()
	b.serves("hello")
	b.configure(strings.Replace(string(text), `"[::]:80"`, `"127.0.0.1:8000"`, 1))
	b.run("systemctl", "reload", unit)
	b.configure(strings.Replace(string(text), `"[::]:80"`, `"systemd:web"`, 1))
	b.run("systemctl", "reload", unit)
	b.serves("hello")

	// While the service restarts, connections wait.
	restarted := make(chan struct{})
	go func() {
		defer close(restarted)
		b.try("systemctl", "restart", unit)
	}()
	for restarting := true; restarting; {
		select {
		case <-restarted:
			restarting = false
		default:
		}
		b.serves("hello")
	}
}

// killSupervisor returns the pid that it had.
func (b *box) killSupervisor() string {
	b.t.Helper()
	pid := b.mainPID()
	if pid == "0" {
		b.t.Fatal("no supervisor runs")
	}
	b.run("kill", "-KILL", pid)
	return pid
}

// awaitStatus waits until the status that systemd shows begins with text.
func (b *box) awaitStatus(text string) {
	b.t.Helper()
	b.await("the status "+text, limit, func() bool { return strings.HasPrefix(b.property("StatusText"), text) })
}

// awaitSuccessor waits until the service runs again and serves.
func (b *box) awaitSuccessor(of string) {
	b.t.Helper()
	b.await("the successor of the supervisor", limit, func() bool {
		now := b.mainPID()
		return now != of && now != "0" && b.property("ActiveState") == "active"
	})
	b.serves("hello")
}

// The other tests change some of these, and their effect shows only where something
// goes wrong for long.
func TestTheSettingsAsShipped(t *testing.T) {
	b := boot(t)
	// Not the values that the unit asks for: a setting that it lacks would not show.
	b.write("/etc/systemd/system.conf.d/defaults.conf", "[Manager]\nDefaultTimeoutStartSec=10min\nDefaultTimeoutStopSec=10min\n", 0o644)
	b.run("systemctl", "daemon-reload")
	b.run("systemctl", "start", unit) // the watchdog's is shown of a running service only
	for _, s := range []struct{ property, want, why string }{
		{"StartLimitIntervalUSec", "0", "systemd never gives up"},
		{"Type", "notify", "a start is over when a generation serves, and a reload can fail"},
		{"NotifyAccess", "main", "no proxy process speaks for the service"},
		{"KillMode", "process", "tunnels outlive the supervisor"},
		{"OOMPolicy", "continue", "one generation that is killed takes no other with it"},
		{"Restart", "on-failure", "a supervisor that dies has a successor, one that was stopped has none"},
		{"RestartUSec", "500ms", "the first successor comes soon"},
		{"RestartSteps", "5", "the pauses grow"},
		{"RestartMaxDelayUSec", "10s", "a mended file is served soon, however often a start has failed"},
		{"WatchdogUSec", "30s", "a supervisor that hangs is noticed"},
		{"TimeoutStartUSec", "1min 30s", "a start that hangs ends"},
		{"TimeoutStopUSec", "1min 30s", "a stop that hangs ends"},
		{"LimitNOFILE", "1048576", "two descriptors for each tunnel"},
		{"TasksMax", "16384", "threads of many old generations, whatever the size of the machine"},
		{"FileDescriptorStoreMax", "16384", "room for listening sockets and tunnels"},
		{"FileDescriptorStorePreserve", "restart", "what is left with systemd outlives processes, not the service"},
		{"RuntimeDirectory", "holdfast", "for the command socket and the lock"},
		{"RuntimeDirectoryMode", "0700", "nobody else commands the supervisor"},
		{"RuntimeDirectoryPreserve", "yes", "it outlives the supervisor"},
		{"LogsDirectory", "holdfast", "the sandbox leaves it writable"},
		{"LogsDirectoryMode", "0750", "records name clients"},
		{"ConfigurationDirectory", "holdfast", "it exists, and belongs to the service"},
		{"UMask", "0027", "what the service makes is not for everybody"},
		{"User", "holdfast", "not root"},
		{"Group", "holdfast", "not root's"},
		// Of the sandbox, what the figure of systemd-analyze does not show.
		{"PrivateIPC", "yes", "nothing is shared with others"},
		{"RemoveIPC", "yes", "nothing is left behind"},
		{"NoExecPaths", "/", "nothing that was written is executed"},
		{"ExecPaths", "/usr", "nothing that was written is executed"},
		{"ProcSubset", "pid", "of the kernel nothing is to be seen"},
		{"ProtectHostname", "yes", "the machine keeps its name"},
		{"LockPersonality", "yes", "system calls mean what the filter takes them for"},
		{"MemoryDenyWriteExecute", "yes", "nothing that was written is executed"},
		{"SystemCallErrorNumber", strconv.Itoa(int(unix.EPERM)), "a call that is not allowed is an error, not the end of the process"},
	} {
		if got := b.property(s.property); got != s.want {
			t.Errorf("%s is %q, want %q: %s", s.property, got, s.want, s.why)
		}
	}
}

func TestTheSandbox(t *testing.T) {
	b := boot(t)
	// In tenths. What is left of it docs/systemd.md explains.
	if out, code := b.try("systemd-analyze", "security", "--no-pager", "--threshold=15", unit); code != 0 {
		t.Errorf("systemd-analyze security:\n%s", out)
	}
	if out := b.run("systemd-analyze", "verify", "--man=no", unit, "holdfast.socket"); out != "" {
		t.Errorf("systemd-analyze verify:\n%s", out)
	}
	b.run("systemctl", "start", unit)
	b.run("systemctl", "reload", unit) // all of it works in the sandbox
	b.serves("hello")                  // on a port below 1024
	b.await("a record in the access log", limit, func() bool {
		_, code := b.try("test", "-s", "/var/log/holdfast/access.log")
		return code == 0
	})

	supervisor := b.processStatus(b.mainPID())
	const bindService = "0000000000000400" // CAP_NET_BIND_SERVICE is bit 10
	for field, want := range map[string]string{
		"CapEff": bindService, "CapPrm": bindService, "CapBnd": bindService, "NoNewPrivs": "1", "Seccomp": "2",
	} {
		if got := supervisor[field]; got != want {
			t.Errorf("%s of the supervisor is %s, want %s", field, got, want)
		}
	}
	for _, pid := range b.proxies() {
		proxy := b.processStatus(pid)
		const none = "0000000000000000"
		for field, want := range map[string]string{
			"CapEff": none, "CapPrm": none, "CapInh": none, "CapAmb": none, "NoNewPrivs": "1", "Seccomp": "2",
		} {
			if got := proxy[field]; got != want {
				t.Errorf("%s of a proxy is %s, want %s", field, got, want)
			}
		}
		if strings.HasPrefix(proxy["Uid"], "0\t") || proxy["Uid"] != supervisor["Uid"] {
			t.Errorf("the proxy runs as %s, the supervisor as %s", proxy["Uid"], supervisor["Uid"])
		}
	}
	// Whoever has taken over a proxy process tells systemd nothing.
	b.run("sh", "-c", "echo $$ >/sys/fs/cgroup"+b.property("ControlGroup")+"/cgroup.procs;"+
		"NOTIFY_SOCKET=/run/systemd/notify setpriv --reuid=holdfast --regid=holdfast --clear-groups systemd-notify --status=taken")
	if b.property("StatusText") == "taken" {
		t.Error("systemd believes every process of the service")
	}

	var most unix.Rlimit // this machine may have a lower limit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &most); err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprint(min(most.Max, 1048576))
	limits, err := os.ReadFile(filepath.Join(b.path("/proc"), b.proxies()[0], "limits"))
	if got := regexp.MustCompile(`open files +(\d+)`).FindSubmatch(limits); err != nil || got == nil || string(got[1]) != want {
		t.Errorf("limits of a proxy (%v), want %s:\n%s", err, want, limits)
	}
}

// Where nothing needs a low port, the service can be without any capability.
func TestWithSocketsOfSystemdNoCapabilityIsNeeded(t *testing.T) {
	b := boot(t)
	text, err := os.ReadFile(b.path(configPath))
	if err != nil {
		t.Fatal(err)
	}
	b.configure(strings.Replace(string(text), `"[::]:80"`, `"systemd:web"`, 1))
	b.dropIn("AmbientCapabilities=\nCapabilityBoundingSet=\nPrivateUsers=yes")
	b.run("systemctl", "start", "holdfast.socket", unit)
	b.run("systemctl", "reload", unit)
	b.serves("hello")
	if set := b.processStatus(b.mainPID())["CapPrm"]; set != "0000000000000000" {
		t.Errorf("capabilities of the supervisor: %s", set)
	}
}

func TestAccessLogsAreOpenedAgainBySignal(t *testing.T) {
	b := boot(t)
	b.run("systemctl", "start", unit)
	b.serves("hello")
	b.run("mv", "/var/log/holdfast/access.log", "/var/log/holdfast/access.log.1")
	b.run("systemctl", "kill", "--kill-whom=main", "-s", "USR1", unit)
	b.await("a new file", limit, func() bool { _, code := b.try("test", "-e", "/var/log/holdfast/access.log"); return code == 0 })
	b.await("a record in it", limit, func() bool {
		b.serves("hello")
		_, code := b.try("test", "-s", "/var/log/holdfast/access.log")
		return code == 0
	})
	if owner := b.run("stat", "-c", "%U %G %a", "/var/log/holdfast/access.log"); owner != "holdfast holdfast 640" {
		t.Errorf("the file is %s", owner)
	}
}

// processStatus reads proc_pid_status(5).
func (b *box) processStatus(pid string) map[string]string {
	b.t.Helper()
	text, err := os.ReadFile(filepath.Join(b.path("/proc"), pid, "status"))
	if err != nil {
		b.t.Fatal(err)
	}
	fields := make(map[string]string)
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(line, ":")
		fields[name] = strings.TrimSpace(value)
	}
	return fields
}
