package systemd

import (
	"encoding/json"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"testing"
)

// image is what the last stage of the Containerfile says.
type image struct {
	copies  [][2]string // FROM, TO; what the build stage makes begins with /out/
	env     []string
	user    string
	command []string
	health  []string
}

// readImage understands as much of the format as the file uses, and no more.
func readImage(t *testing.T) image {
	t.Helper()
	text, err := os.ReadFile("../../deploy/container/Containerfile")
	if err != nil {
		t.Fatal(err)
	}
	words := func(list string) (all []string) {
		if err := json.Unmarshal([]byte(list), &all); err != nil {
			t.Fatalf("%s: %v", list, err)
		}
		return all
	}
	var i image
	var command []string
	for line := range strings.Lines(strings.ReplaceAll(string(text), "\\\n", " ")) {
		instruction, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
		switch instruction {
		case "FROM":
			i = image{} // a stage of its own
			if !strings.Contains(rest, " AS ") && rest != "scratch" {
				t.Fatalf("the image is made from %s", rest)
			}
		case "COPY":
			f := strings.Fields(rest)
			from := strings.HasPrefix(f[0], "--from")
			for strings.HasPrefix(f[0], "--") {
				f = f[1:]
			}
			for _, source := range f[:len(f)-1] {
				if _, err := os.Stat("../../" + source); !from && err != nil {
					t.Errorf("what is copied: %v", err)
				}
				i.copies = append(i.copies, [2]string{source, f[len(f)-1]})
			}
		case "ENV":
			i.env = append(i.env, rest)
		case "USER":
			i.user = rest
		case "ENTRYPOINT":
			i.command = words(rest)
		case "CMD":
			command = words(rest)
		case "HEALTHCHECK":
			_, list, _ := strings.Cut(rest, "CMD ")
			i.health = words(list)
		case "", "#", "ARG", "WORKDIR", "RUN", "EXPOSE", "STOPSIGNAL":
		default:
			if !strings.HasPrefix(line, "#") {
				t.Fatalf("what is %s?", line)
			}
		}
	}
	i.command = append(i.command, command...)
	return i
}

// What the Containerfile puts into its image is enough: run as process 1, as its user, on a
// root that is read-only.
func TestTheImage(t *testing.T) {
	t.Parallel()
	i := readImage(t)
	if err := packages(); err != nil {
		t.Fatal(err)
	}
	b := bootWith(t)
	const root = "/srv/image"
	programs := t.TempDir() // as the build stage builds them
	if out, err := exec.Command("dpkg-deb", "-x", debOf(newVersion), programs).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, c := range i.copies {
		source, built := strings.CutPrefix(c[0], "/out/")
		switch source {
		case "empty":
			b.run("mkdir", "-p", root+c[1])
			b.run("chown", i.user, root+c[1])
			continue
		case "supervisor", "proxy":
			source = filepath.Join(programs, "usr/bin", path.Base(c[1]))
		case "ca-certificates.crt":
			source = os.DevNull // nobody is asked for a certificate
		default:
			if built {
				t.Fatalf("the build stage makes no %s", c[0])
			}
			source = "../../" + source
		}
		text, err := os.ReadFile(source)
		if err != nil {
			t.Fatal(err)
		}
		b.write(root+c[1], string(text), 0o755)
	}

	uid, gid, _ := strings.Cut(i.user, ":")
	// A process and mount namespace of its own, a root that is read-only but for what the image
	// makes a folder for, no privilege: what an engine does with the strictest options.
	engine := "cd " + root + "; mkdir proc dev; : >dev/null; mount --bind . .; cd " + root + `
		mount -t proc proc proc; mount --bind /dev/null dev/null; mount --bind run/holdfast run/holdfast; mount -o remount,bind,ro .
		exec env -i ` + strings.Join(i.env, " ") + " /usr/sbin/chroot --userspec=" + i.user + ` . "$@"`
	run := []string{"systemd-run", "--quiet", "--unit=" + unit, "-p", "KillMode=process", "unshare", "--pid", "--mount", "--fork", "sh", "-ec", engine, "-"}
	b.run(append(run, i.command...)...)
	b.await("the page", limit, func() bool {
		page, err := b.get(welcome)
		return err == nil && strings.Contains(page, "<h1>Holdfast works</h1>")
	})
	if ready, err := b.get("http://127.0.0.1:9901/readyz"); err != nil {
		t.Errorf("/readyz: %s (%v)", ready, err)
	}

	main := b.supervisors()[0]
	if pids := strings.Fields(b.processStatus(main)["NSpid"]); pids[len(pids)-1] != "1" {
		t.Fatalf("it is process %q", pids)
	}
	within := func(args ...string) (string, int) {
		// The image has no program but its own: nsenter comes from outside.
		enter := []string{"nsenter", "-t", main, "-m", "-r", "-p", "-S", uid, "-G", gid}
		return b.try(append(append([]string{"env", "-i", "PATH=/usr/sbin:/usr/bin"}, i.env...), append(enter, args...)...)...)
	}
	if out, code := within(i.health...); code != 0 {
		t.Errorf("the health check: exit code %d\n%s", code, out)
	}
	if out, code := within("/usr/bin/holdfast", "reload"); code != 0 {
		t.Errorf("a reload: exit code %d\n%s", code, out)
	}
	if out, code := within("/usr/bin/holdfast", "upgrade"); code != 1 {
		t.Errorf("an upgrade of process 1: exit code %d\n%s", code, out)
	}
	b.run("kill", "-TERM", main)
	b.await("the end of the container", limit, func() bool { return b.property("ActiveState") == "inactive" })
	b.is("Result", "success")
	b.noneIsLeft()
}
