package systemd

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// The Debian package, as `make deb` builds it.

const (
	oldVersion = "1.0.0"
	newVersion = "1.1.0"

	welcome = "http://127.0.0.1:8080" // the listener of the configuration of the package
)

// Packages between the two, made from the newer one, each with its mistake or peculiarity.
const (
	deadSupervisor = "1.0.1"
	deadProxy      = "1.0.2"
	otherUnit      = "1.2.0"
)

// packages are built once, into the folder that the programs under test are in.
var packages = sync.OnceValue(func() error {
	for _, version := range []string{oldVersion, newVersion} {
		if err := build(version, bin); err != nil {
			return err
		}
	}
	// What runs a program is dead, commands are not.
	const dead = "mv %[1]s %[1]s.real; printf '#!/bin/sh\\n[ \"$1\" != run ] || { echo dead on arrival >&2; exit 1; }\\nexec /%[1]s.real \"$@\"\\n' >%[1]s; chmod 755 %[1]s"
	for version, change := range map[string]string{
		deadSupervisor: fmt.Sprintf(dead, "usr/bin/holdfast"),
		deadProxy:      fmt.Sprintf(dead, "usr/bin/holdfast-proxy"),
		otherUnit:      "echo '# another' >>usr/lib/systemd/system/holdfast.service",
	} {
		script := fmt.Sprintf("set -e; d=$(mktemp -d); trap 'rm -rf $d' EXIT; dpkg-deb -R %s $d; cd $d; %s; sed -i 's/^Version: .*/Version: %s/' DEBIAN/control; dpkg-deb -Znone -b $d %s",
			debOf(newVersion), change, version, debOf(version))
		if out, err := exec.Command("sh", "-c", script).CombinedOutput(); err != nil {
			return fmt.Errorf("package %s: %w\n%s", version, err, out)
		}
	}
	return nil
})

// build makes the package of a version, as a release of that version would be tagged.
func build(version, dir string) error {
	if out, err := exec.Command("../../deploy/deb/build", "v"+version, dir).CombinedOutput(); err != nil {
		return fmt.Errorf("deploy/deb/build %s: %w\n%s", version, err, out)
	}
	return nil
}

func debOf(version string) string {
	arch, _ := exec.Command("dpkg", "--print-architecture").Output()
	return filepath.Join(bin, fmt.Sprintf("holdfast_%s_%s.deb", version, bytes.TrimSpace(arch)))
}

// bootForPackages boots a system that Holdfast is not installed in, and has the packages.
func bootForPackages(t *testing.T) *box {
	t.Helper()
	t.Parallel()
	if err := packages(); err != nil {
		t.Fatal(err)
	}
	var files []string
	for _, version := range []string{oldVersion, newVersion, deadSupervisor, deadProxy, otherUnit} {
		files = append(files, debOf(version)+":"+inBox(version))
	}
	return bootWith(t, files...)
}

func inBox(version string) string { return "/srv/holdfast_" + version + ".deb" }

// install has dpkg install a version, manual pages and documentation too, and returns what
// is said. Nothing that is wrong with the service makes it fail.
func (b *box) install(version string) string {
	b.t.Helper()
	return b.run("dpkg", "--path-include=/usr/share/man/*", "--path-include=/usr/share/doc/*", "--install", inBox(version))
}

func TestThePackage(t *testing.T) {
	b := bootForPackages(t)
	b.step("serves a page when it is installed", func() {
		b.install(oldVersion)
		if page, err := b.get(welcome); err != nil || !strings.Contains(page, "<h1>Holdfast works</h1>") {
			b.t.Errorf("the page (%v): %s", err, page)
		}
		b.is("ActiveState", "active")
		b.is("UnitFileState", "enabled")
		if status := b.run("holdfast", "status"); !strings.Contains(status, "welcome on 127.0.0.1:8080") {
			b.t.Errorf("the status:\n%s", status)
		}
		b.await("the request in the journal", limit, func() bool {
			return strings.Contains(b.journal("info"), `"target":"/"`)
		})
		if journal := b.journal("warning"); journal != "-- No entries --" && journal != "" {
			b.t.Errorf("it complains:\n%s", journal)
		}
		b.run("holdfast", "check", "-c", configPath)
		var sample strings.Builder // what the file has to begin with, commented out
		for line := range strings.Lines(b.configuration()) {
			if text, ok := strings.CutPrefix(line, "#"); ok && !strings.HasPrefix(text, " ") && !strings.HasPrefix(text, "\t") {
				sample.WriteString(text)
			}
		}
		b.write("/srv/sample.toml", sample.String(), 0o644)
		if route := b.run("holdfast", "route", "-c", "/srv/sample.toml", "GET", "http://example.com/socket/1"); !strings.Contains(route, "cluster: app") {
			b.t.Errorf("the sample in the configuration:\n%s", route)
		}
		for _, file := range packagedFiles(b.t) {
			b.run("test", "-s", file)
		}
	})

	example, err := os.ReadFile("../../deploy/systemd/holdfast.toml")
	if err != nil {
		t.Fatal(err)
	}
	b.configure("[stop]\ntimeout = \"1s\"\n" + string(example))
	b.run("systemctl", "reload", unit)
	b.await("the end of the page", limit, func() bool { return b.refuses("127.0.0.1:8080") })
	b.upstream("127.0.0.1:8080", "hello")
	open := b.openTunnel()
	main := b.mainPID()

	b.step("whose supervisor does not start changes nothing", func() {
		said := b.install(deadSupervisor)
		b.says(said, "the upgrade was refused and nothing has changed", "serves on", "holdfast upgrade && systemctl reload holdfast")
		b.is("MainPID", main)
		b.runs("v"+oldVersion, "v"+oldVersion)
	})
	b.step("whose proxy does not start leaves the old generation", func() {
		said := b.install(deadProxy)
		b.says(said, "in the place of v"+oldVersion, "the proxy ended while it was starting", "serves on", "systemctl reload holdfast")
		b.runs("v"+newVersion, "v"+oldVersion)
	})
	b.step("that works takes over", func() {
		if said := b.install(newVersion); strings.Contains(said, "restart") {
			b.t.Errorf("nothing needs a restart:\n%s", said)
		}
		b.runs("v"+newVersion, "v"+newVersion)
		b.is("NRestarts", "0")
		if version := b.run("holdfast", "version"); !strings.Contains(version, "v"+newVersion) {
			b.t.Errorf("holdfast version: %s", version)
		}
		if b.configuration() != "[stop]\ntimeout = \"1s\"\n"+string(example) {
			b.t.Error("the configuration is another one")
		}
	})
	for _, s := range []string{"during a broken upgrade and the good one after it", "in all generations"} {
		b.step("no tunnel ends "+s, func() {
			open.isOpen()
			b.serves("hello")
		})
	}
	b.step("says that another unit wants a restart", func() {
		b.says(b.install(otherUnit), "systemctl restart holdfast")
		open.isOpen()
	})
	b.step("goes back to an older one in the same way", func() {
		b.says(b.install(oldVersion), "in the place of v"+newVersion)
		b.runs("v"+oldVersion, "v"+oldVersion)
		open.isOpen()
	})
	b.step("leaves alone what somebody has stopped and disabled", func() {
		open.conn.CloseNow()
		b.run("systemctl", "disable", "--now", unit)
		b.install(newVersion)
		b.is("ActiveState", "inactive")
		b.is("UnitFileState", "disabled")
		b.run("systemctl", "enable", unit)
		b.install(newVersion)
		b.is("ActiveState", "inactive")
		b.is("UnitFileState", "enabled")
		b.run("systemctl", "start", unit)
		b.serves("hello")
	})
	b.step("ends when it is removed, orphans too", func() {
		open := b.openTunnel()
		b.dropIn("RestartSec=1h\nRestartMaxDelaySec=1h")
		b.killSupervisor()
		open.isOpen()
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			open.awaitEnd()
		}()
		b.run("dpkg", "--remove", "holdfast")
		<-ended
		b.noneIsLeft()
		b.run("test", "-e", configPath)
		b.gone("/usr/bin/holdfast", "/usr/bin/holdfast-proxy", "/usr/lib/systemd/system/holdfast.service", "/usr/share/doc/holdfast", "/usr/share/holdfast")
		b.is("LoadState", "not-found")
	})
	b.step("is back with its configuration when it is installed again", func() {
		b.install(newVersion)
		b.serves("hello")
		b.is("UnitFileState", "enabled")
	})
	b.step("leaves nothing when it is purged", func() {
		b.run("dpkg", "--purge", "holdfast")
		b.noneIsLeft()
		b.gone("/etc/holdfast", "/var/log/holdfast", "/run/holdfast", "/run/holdfast-package",
			"/etc/systemd/system/multi-user.target.wants/holdfast.service")
		if left := b.run("sh", "-c", "find /usr /etc /var -name '*holdfast*' -not -path '/etc/systemd/system/holdfast.service.d*'"); left != "" {
			b.t.Errorf("it leaves\n%s", left)
		}
	})
	// Its port is the upstream's now.
	b.step("that cannot serve is installed all the same, and says why", func() {
		b.run("rm", "-r", "/etc/systemd/system/holdfast.service.d")
		b.says(b.install(newVersion), "The reason:", "cannot start", "127.0.0.1:8080", "address already in use")
		b.configure(string(example))
		b.await("a start with the mended file", limit, func() bool { return b.property("ActiveState") == "active" })
		b.serves("hello")
		b.run("dpkg", "--purge", "holdfast")
	})
	b.step("does what the machine's policy says", func() {
		b.write("/usr/sbin/policy-rc.d", "#!/bin/sh\nexit 101\n", 0o755)
		b.install(oldVersion)
		b.is("ActiveState", "inactive")
		b.configure(string(example))
		b.run("systemctl", "start", unit)
		b.says(b.install(newVersion), "policy-rc.d forbids")
		b.runs("v"+oldVersion, "v"+oldVersion)
	})
}

// says wants a text to have some parts.
func (b *box) says(text string, parts ...string) {
	b.t.Helper()
	for _, part := range parts {
		if !strings.Contains(text, part) {
			b.t.Errorf("%q is not said:\n%s", part, text)
		}
	}
}

// runs wants a version of the supervisor, and one of the generation that serves.
func (b *box) runs(supervisor, proxy string) {
	b.t.Helper()
	status := b.run("holdfast", "status")
	if !strings.HasPrefix(status, "holdfast "+supervisor+",") {
		b.t.Errorf("the supervisor is not %s:\n%s", supervisor, status)
	}
	for line := range strings.Lines(status) {
		if f := strings.Fields(line); len(f) > 2 && f[1] == "serving" {
			if f[2] != proxy {
				b.t.Errorf("the generation that serves is not of %s:\n%s", proxy, status)
			}
			return
		}
	}
	b.t.Errorf("no generation serves:\n%s", status)
}

func (b *box) gone(files ...string) {
	b.t.Helper()
	for _, file := range files {
		if _, code := b.try("test", "-e", file, "-o", "-L", file); code == 0 {
			b.t.Errorf("%s is left", file)
		}
	}
}

// packagedFiles are where the documentation is in the package. Manual pages and completions
// are those that the tree has.
func packagedFiles(t *testing.T) []string {
	t.Helper()
	files := []string{"/usr/share/doc/holdfast/copyright", "/usr/share/doc/holdfast/third-party.gz", "/usr/share/doc/holdfast/changelog.gz", "/usr/share/doc/holdfast/CHANGELOG.md.gz"}
	for pattern, where := range map[string]func(string) string{
		"docs/*.md":         func(name string) string { return "/usr/share/doc/holdfast/" + name },
		"deploy/man/*.[18]": func(name string) string { return "/usr/share/man/man" + filepath.Ext(name)[1:] + "/" + name + ".gz" },
		"deploy/man/*.5":    func(name string) string { return "/usr/share/man/man5/" + name + ".gz" },
		"deploy/completions/*": func(name string) string {
			return map[string]string{
				"holdfast.bash": "/usr/share/bash-completion/completions/holdfast",
				"_holdfast":     "/usr/share/zsh/vendor-completions/_holdfast",
				"holdfast.fish": "/usr/share/fish/vendor_completions.d/holdfast.fish",
			}[name]
		},
	} {
		found, err := filepath.Glob("../../" + pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range found {
			files = append(files, where(filepath.Base(file)))
		}
	}
	return files
}

// The same sources make the same package, and nothing of this machine or of the moment is in it.
func TestThePackageIsReproducible(t *testing.T) {
	t.Parallel()
	if err := packages(); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := build(newVersion, dir); err != nil {
		t.Fatal(err)
	}
	first, err := os.ReadFile(debOf(newVersion))
	if err != nil {
		t.Fatal(err)
	}
	second, err := os.ReadFile(filepath.Join(dir, filepath.Base(debOf(newVersion))))
	if err != nil || !bytes.Equal(first, second) {
		t.Errorf("two builds of the same sources differ (%v)", err)
	}
}

func TestVersionsOfThePackage(t *testing.T) {
	t.Parallel()
	previous := "0"
	for _, c := range []struct{ described, want string }{ // each is newer than the one before
		{"devel", "0~devel"},
		{"0a1b2c3", "0+0.g0a1b2c3"}, // which no repository has
		{"0a1b2c3-dirty", "0+0.g0a1b2c3.dirty"},
		{"v1.2.3-rc1", "1.2.3~rc1"},
		{"v1.2.3-rc1-4-g0a1b2c3", "1.2.3~rc1+4.g0a1b2c3"},
		{"v1.2.3", "1.2.3"},
		{"v1.2.3-4-g0a1b2c3", "1.2.3+4.g0a1b2c3"},
		{"v1.2.3-4-g0a1b2c3-dirty", "1.2.3+4.g0a1b2c3.dirty"},
		{"v1.2.3-dirty", "1.2.3+dirty"},
		{"1.2.4", "1.2.4"},
	} {
		out, err := exec.Command("../../deploy/deb/version", c.described).CombinedOutput()
		if got := strings.TrimSpace(string(out)); err != nil || got != c.want {
			t.Errorf("%s becomes %q (%v), want %q", c.described, got, err, c.want)
		}
		if c.described != "devel" && exec.Command("dpkg", "--compare-versions", c.want, "gt", previous).Run() != nil {
			t.Errorf("%s is not newer than %s", c.want, previous)
		}
		previous = c.want
	}
}
