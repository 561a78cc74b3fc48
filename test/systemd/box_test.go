package systemd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/coder/websocket"
	"golang.org/x/sys/unix"
)

const (
	// limit bounds every wait for something that happens soon.
	limit = 20 * time.Second
	// bootLimit is for a machine that is busy with other tests.
	bootLimit = 60 * time.Second

	unit       = "holdfast.service"
	configPath = "/etc/holdfast/holdfast.toml"
	where      = "http://127.0.0.1" // the listener of the configuration that is shipped
)

// box is a booted systemd with Holdfast installed: its programs, its units, and the
// configuration that is shipped, in front of an upstream that answers.
type box struct {
	t   *testing.T
	dir string
	pid int      // of its systemd
	net *os.File // its network namespace
}

func boot(t *testing.T) *box {
	t.Helper()
	t.Parallel()
	deploy, err := filepath.Abs("../../deploy/systemd")
	if err != nil {
		t.Fatal(err)
	}
	b := bootWith(t, bin+"/holdfast:/usr/bin/holdfast", bin+"/holdfast-proxy:/usr/bin/holdfast-proxy",
		deploy+"/holdfast.service:/usr/lib/systemd/system/holdfast.service",
		deploy+"/holdfast.socket:/usr/lib/systemd/system/holdfast.socket",
		deploy+"/holdfast.sysusers:/usr/lib/sysusers.d/holdfast.conf")
	b.run("systemd-sysusers")
	config, err := os.ReadFile(filepath.Join(deploy, "holdfast.toml"))
	if err != nil {
		t.Fatal(err)
	}
	b.configure(string(config))
	b.upstream("127.0.0.1:8080", "hello")
	return b
}

// bootWith boots a systemd with some files of ours, SOURCE:DESTINATION, and nothing else.
func bootWith(t *testing.T, files ...string) *box {
	t.Helper()
	b := &box{t: t, dir: t.TempDir()}
	b.launch(exec.Command("./box", append([]string{"boot", b.dir}, files...)...))
	b.await("the box's systemd", bootLimit, func() bool {
		text, err := os.ReadFile(filepath.Join(b.dir, "pid"))
		if err == nil {
			b.pid, err = strconv.Atoi(strings.TrimSpace(string(text)))
		}
		return err == nil
	})
	var err error
	if b.net, err = os.Open(fmt.Sprintf("/proc/%d/ns/net", b.pid)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.net.Close() })
	b.await("the end of the boot", bootLimit, func() bool {
		state, _ := b.try("systemctl", "is-system-running", "--wait")
		return state == "running" || state == "degraded"
	})
	return b
}

// step is a part of the test with a name of its own. Steps share the box, which takes
// longer to boot than most of them take.
func (b *box) step(name string, f func()) {
	b.t.Helper()
	whole := b.t
	defer func() { b.t = whole }()
	whole.Run(name, func(t *testing.T) {
		b.t = t
		f()
	})
}

// launch runs cmd until the end of the test, and never longer than this process: the
// kernel kills it when the thread ends that has started it.
func (b *box) launch(cmd *exec.Cmd) {
	b.t.Helper()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started, ended := make(chan error), make(chan struct{})
	go func() {
		defer close(ended)
		runtime.LockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // it was killed
		}
	}()
	if err := <-started; err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() {
		if b.t.Failed() {
			b.show()
		}
		_ = cmd.Process.Kill() // and with it its systemd, and all that is in its PID namespace
		<-ended
		b.removeCgroups()
	})
}

// show says what a failed test is looked into with.
func (b *box) show() {
	console, _ := os.ReadFile(filepath.Join(b.dir, "console"))
	b.t.Logf("console:\n%s", console)
	if b.pid != 0 {
		journal, _ := b.try("journalctl", "--no-pager", "-o", "short-monotonic", "-u", "holdfast*")
		status, _ := b.try("systemctl", "status", "--no-pager", unit)
		b.t.Logf("journal:\n%s\nstatus:\n%s", journal, status)
	}
}

// removeCgroups waits for the kernel to have buried the box's processes.
func (b *box) removeCgroups() {
	text, err := os.ReadFile(filepath.Join(b.dir, "cgroup"))
	if err != nil {
		return // it did not get that far
	}
	top := strings.TrimSpace(string(text))
	for deadline := time.Now().Add(limit); ; time.Sleep(10 * time.Millisecond) {
		var below []string
		_ = filepath.WalkDir(top, func(path string, d os.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				below = append(below, path)
			}
			return nil
		})
		for i := len(below) - 1; i >= 0; i-- {
			err = os.Remove(below[i])
		}
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			b.t.Errorf("the box's processes live on: %v", err)
			return
		}
	}
}

// --- files and commands -------------------------------------------------------

// path is where a file of the box is for us.
func (b *box) path(p string) string { return fmt.Sprintf("/proc/%d/root%s", b.pid, p) }

func (b *box) write(p, text string, mode os.FileMode) {
	b.t.Helper()
	p = b.path(p)
	if err := errors.Join(os.MkdirAll(filepath.Dir(p), 0o755), os.WriteFile(p, []byte(text), mode), os.Chmod(p, mode)); err != nil {
		b.t.Fatal(err)
	}
}

// configure writes the configuration.
func (b *box) configure(text string) { b.t.Helper(); b.write(configPath, text, 0o644) }

// settings adds to the configuration.
func (b *box) settings(text string) {
	b.t.Helper()
	old, err := os.ReadFile(b.path(configPath))
	if err != nil {
		b.t.Fatal(err)
	}
	b.configure(text + "\n" + string(old))
}

// dropIn changes settings of the service's unit, as `systemctl edit` does. An empty text
// takes that back.
func (b *box) dropIn(text string) {
	b.t.Helper()
	b.write("/etc/systemd/system/holdfast.service.d/test.conf", "[Service]\n"+text+"\n", 0o644)
	b.run("systemctl", "daemon-reload")
}

// try runs a command in the box and returns what it says and its exit code.
func (b *box) try(args ...string) (string, int) {
	b.t.Helper()
	enter := []string{"-t", strconv.Itoa(b.pid), "-m", "-u", "-i", "-p", "-C", "-n", "--",
		"env", "-i", "PATH=/usr/sbin:/usr/bin", "LANG=C.UTF-8"}
	ctx, cancel := context.WithTimeout(context.Background(), bootLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, "nsenter", append(enter, args...)...)
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	if exit, ok := errors.AsType[*exec.ExitError](err); err != nil && (!ok || exit.ExitCode() < 0) {
		b.t.Errorf("%q in the box: %v\n%s", args, err, out)
	}
	return strings.TrimSpace(string(out)), cmd.ProcessState.ExitCode()
}

// run runs a command in the box that must succeed.
func (b *box) run(args ...string) string {
	b.t.Helper()
	out, code := b.try(args...)
	if code != 0 {
		b.t.Fatalf("%q: exit code %d\n%s", args, code, out)
	}
	return out
}

// is wants a property of the service's unit to have a value.
func (b *box) is(property, want string) {
	b.t.Helper()
	if got := b.property(property); got != want {
		b.t.Errorf("%s of the service is %q, want %q", property, got, want)
	}
}

func (b *box) property(name string) string {
	b.t.Helper()
	return b.run("systemctl", "show", "-P", name, unit)
}

// mainPID is the supervisor's, in the box's numbers.
func (b *box) mainPID() string { b.t.Helper(); return b.property("MainPID") }

// proxies are the pids of all generations, oldest first, in the box's numbers.
func (b *box) proxies() []string {
	b.t.Helper()
	out, _ := b.try("pgrep", "-x", "holdfast-proxy")
	return strings.Fields(out)
}

// journal is what the service has logged. A priority leaves out what matters less.
func (b *box) journal(priority string) string {
	b.t.Helper()
	b.run("journalctl", "--sync")
	return b.run("journalctl", "--no-pager", "-o", "cat", "-u", unit, "-p", priority)
}

func (b *box) await(what string, within time.Duration, done func() bool) {
	b.t.Helper()
	for deadline := time.Now().Add(within); !done(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			b.t.Fatalf("%s: not within %s", what, within)
		}
	}
}

// --- clients and servers in the box's network -----------------------------------

// inside runs f in a thread that is in the box's network. A socket stays in the
// network that it was made in, whoever uses it.
func (b *box) inside(f func() error) error {
	result := make(chan error)
	go func() {
		runtime.LockOSThread() // for good: nobody else may get the thread
		err := unix.Setns(int(b.net.Fd()), unix.CLONE_NEWNET)
		if err == nil {
			err = f()
		}
		result <- err
	}()
	return <-result
}

func (b *box) dial(ctx context.Context, network, addr string) (conn net.Conn, err error) {
	err = b.inside(func() error {
		conn, err = new(net.Dialer).DialContext(ctx, network, addr)
		return err
	})
	return conn, err
}

// upstream answers requests with text, and echoes WebSocket messages.
func (b *box) upstream(addr, text string) {
	b.t.Helper()
	var l net.Listener
	if err := b.inside(func() (err error) { l, err = net.Listen("tcp", addr); return err }); err != nil {
		b.t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") == "" {
			fmt.Fprint(w, text)
			return
		}
		conn, err := websocket.Accept(w, r, nil)
		if err != nil {
			return
		}
		defer conn.CloseNow()
		for {
			kind, message, err := conn.Read(r.Context())
			if err != nil || conn.Write(r.Context(), kind, message) != nil {
				return
			}
		}
	})}
	go server.Serve(l)
	b.t.Cleanup(func() { server.Close() })
}

// client opens a connection for each request.
func (b *box) client() *http.Client {
	return &http.Client{Transport: &http.Transport{DialContext: b.dial, DisableKeepAlives: true}, Timeout: limit}
}

// get returns the body of a response, or why there is none.
func (b *box) get(url string) (string, error) { return body(b.client(), url) }

// getAt does it over a unix socket.
func (b *box) getAt(path string) (string, error) {
	c := b.client()
	c.Transport.(*http.Transport).DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", b.path(path))
	}
	return body(c, "http://local")
}

func body(c *http.Client, url string) (string, error) {
	response, err := c.Get(url)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	return string(bytes.TrimSpace(text)), err
}

// serves wants the service to answer with text.
func (b *box) serves(text string) {
	b.t.Helper()
	if got, err := b.get(where); err != nil || got != text {
		b.t.Errorf("the service answers %q (%v), want %q", got, err, text)
	}
}

// tunnel is an open WebSocket.
type tunnel struct {
	b    *box
	conn *websocket.Conn
}

func (b *box) openTunnel() *tunnel {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b.t.Context(), limit)
	defer cancel()
	conn, _, err := websocket.Dial(ctx, "ws"+strings.TrimPrefix(where, "http")+"/socket", &websocket.DialOptions{HTTPClient: b.client()})
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { conn.CloseNow() })
	return &tunnel{b, conn}
}

// echo sends a message and waits for its return.
func (t *tunnel) echo() error {
	ctx, cancel := context.WithTimeout(t.b.t.Context(), limit)
	defer cancel()
	if err := t.conn.Write(ctx, websocket.MessageText, []byte("still there?")); err != nil {
		return err
	}
	_, _, err := t.conn.Read(ctx)
	return err
}

func (t *tunnel) isOpen() {
	t.b.t.Helper()
	if err := t.echo(); err != nil {
		t.b.t.Errorf("the tunnel has ended: %v", err)
	}
}

// awaitEnd waits until the service closes the tunnel, and closes it too.
func (t *tunnel) awaitEnd() {
	t.b.t.Helper()
	ctx, cancel := context.WithTimeout(t.b.t.Context(), limit)
	defer cancel()
	if _, _, err := t.conn.Read(ctx); err == nil || ctx.Err() != nil {
		t.b.t.Errorf("the tunnel has not ended: %v", err)
	}
	t.conn.CloseNow()
}
