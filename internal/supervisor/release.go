package supervisor

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/control"
)

// A release is all that a generation is started from: the bytes of the
// configuration and the opened proxy binary. What happens to the files afterwards
// changes nothing, so a generation can be started again from its release.
type release struct {
	config *config.Supervisor
	bytes  []byte
	path   string // of the configuration
	hash   string // of bytes
	binary *os.File
	logs   accessLogs
	closed atomic.Bool

	// learnt is what the first generation of the release has found out: nil before
	// it is ready.
	learnt atomic.Pointer[control.Learnt]
}

// hashOf names a configuration in status and logs.
func hashOf(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:6])
}

// loadRelease reads the file and opens the binary. The error is a *Refusal.
func loadRelease(ctx context.Context, path, defaultProxy string) (*release, error) {
	data, err := config.ReadFile(path)
	if err != nil {
		return nil, refuse("configuration", err)
	}
	cfg, err := config.ParseSupervisor(path, data)
	if err != nil {
		return nil, fullCheck(ctx, path, data, defaultProxy, refuse("configuration", err))
	}
	proxy := cfg.Process.Proxy
	if proxy == "" {
		proxy = defaultProxy
	}
	binary, err := os.Open(proxy)
	if err != nil {
		return nil, fullCheck(ctx, path, data, defaultProxy, refuse("proxy binary", err))
	}
	return &release{config: cfg, bytes: data, path: path, hash: hashOf(data), binary: binary}, nil
}

// close closes what the release holds open, once. No generation can be started from it
// any more.
func (r *release) close() error {
	if r.closed.Swap(true) {
		return nil
	}
	if r.binary == nil {
		return r.logs.close()
	}
	return errors.Join(r.binary.Close(), r.logs.close())
}

// bundle is what a generation gets to read: b, filled in with what the release is.
func (r *release) bundle(b control.Bundle) (*os.File, error) {
	b.Path, b.Config, b.Learnt = r.path, r.bytes, r.learnt.Load()
	return control.Payload(b)
}

// command runs the very binary that is open, not what its path names by now. It
// becomes descriptor 3 of the child: one chosen here could be overwritten by the
// descriptors that os/exec arranges between fork and exec.
func (r *release) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "/proc/self/fd/3", args...)
	cmd.Args[0] = r.binary.Name()
	cmd.ExtraFiles = []*os.File{r.binary}
	cmd.Env = environment(os.Environ())
	return cmd
}

// check has the proxy binary validate the bundle. The error is a *Refusal.
func (r *release) check(ctx context.Context) error {
	_, err := r.consult(ctx, "check", control.Bundle{})
	return err
}

// effective has the proxy binary say what the configuration is with every default:
// it knows keys that a supervisor of another version does not. The error is a
// *Refusal.
func (r *release) effective(ctx context.Context) (string, error) {
	return r.consult(ctx, "config", control.Bundle{})
}

// consult runs a command of the proxy binary on the bundle, b filled in, and returns what
// it prints. The error is a *Refusal.
func (r *release) consult(ctx context.Context, command string, b control.Bundle) (string, error) {
	bundle, err := r.bundle(b)
	if err != nil {
		return "", refuse("configuration", err)
	}
	defer bundle.Close()
	ctx, cancel := context.WithTimeout(ctx, r.config.Reload.ReadyTimeout)
	defer cancel()
	cmd := r.command(ctx, command)
	cmd.Stdin = bundle
	// Mistakes of the file come on the standard output with exit code 2, which is
	// also that of a Go program that panics: its words come on the other one.
	words, noise := &bounded{left: maxConsulted}, &bounded{left: 4 << 10}
	cmd.Stdout, cmd.Stderr = words, noise
	cmd.WaitDelay = time.Second // a child of the binary may hold the pipe
	if err = startUnprivileged(cmd); err == nil {
		err = cmd.Wait()
	}
	if err == nil && words.left == 0 {
		err = fmt.Errorf("it says more than %d bytes", maxConsulted)
	}
	exit, exited := errors.AsType[*exec.ExitError](err)
	switch {
	case err == nil:
		return words.String(), nil
	case ctx.Err() != nil:
		return "", refuse("proxy binary", fmt.Errorf("%s %s: no answer within %s", r.binary.Name(), command, r.config.Reload.ReadyTimeout))
	case exited && exit.ExitCode() == 2 && strings.TrimSpace(words.String()) != "":
		return "", &Refusal{Step: "configuration", Problems: strings.Split(strings.TrimSpace(words.String()), "\n")}
	}
	if path, ok := errors.AsType[*os.PathError](err); ok { // its path is that of our descriptor
		err = fmt.Errorf("cannot be executed: %w", path.Err)
	}
	if last := strings.TrimSpace(noise.String()); last != "" {
		err = fmt.Errorf("%w: %q", err, last)
	}
	return "", refuse("proxy binary", fmt.Errorf("%s %s: %w", r.binary.Name(), command, err))
}

// maxConsulted bounds what a proxy binary may say when it is asked. An effective
// configuration is some times as long as its file, of which 16 MiB are read.
const maxConsulted = 64 << 20

// Check does what a start does before it touches anything: it reads the file,
// validates it and has the proxy binary validate it, and sees whether access logs
// could be opened. The error is a *Refusal.
func Check(ctx context.Context, path, defaultProxy string) error {
	r, err := loadRelease(ctx, path, defaultProxy)
	if err != nil {
		return err
	}
	defer r.close()
	if err := r.check(ctx); err != nil {
		return err
	}
	return probeAccessLogs(r.config.AccessLogs)
}

// Route has the proxy binary answer a question about the routes of a configuration file. The
// error is a *Refusal.
func Route(ctx context.Context, path, defaultProxy string, q *control.RouteQuestion) (*control.RouteAnswer, error) {
	r, err := loadRelease(ctx, path, defaultProxy)
	if err != nil {
		return nil, err
	}
	defer r.close()
	text, err := r.consult(ctx, "route", control.Bundle{Question: q})
	if err != nil {
		return nil, err
	}
	answer := new(control.RouteAnswer)
	if err := json.Unmarshal([]byte(text), answer); err != nil {
		return nil, refuse("proxy binary", fmt.Errorf("%s route: %w", r.binary.Name(), err))
	}
	return answer, nil
}

// fullCheck answers for a file whose supervisor's sections are wrong already: the
// proxy knows every mistake, the supervisor only its own. Where the proxy cannot
// be asked, those have to do.
func fullCheck(ctx context.Context, path string, data []byte, defaultProxy string, own *Refusal) error {
	binary, err := os.Open(defaultProxy)
	if err != nil {
		return own
	}
	defer binary.Close()
	r := &release{config: &config.Supervisor{Reload: config.Reload{ReadyTimeout: 30 * time.Second}}, bytes: data, path: path, binary: binary}
	if all, ok := errors.AsType[*Refusal](r.check(ctx)); ok && all.Step == "configuration" {
		return all
	}
	return own
}

// environment is what a generation gets of ours: nothing that systemd or an
// upgrade gave to us (NOTIFY_SOCKET, LISTEN_FDS, WATCHDOG_USEC, …), which it would
// take for its own.
func environment(ours []string) []string {
	allowed := []string{
		"PATH", "HOME", "USER", "LANG", "LC_ALL", "TZ", "TMPDIR",
		"GODEBUG", "GOGC", "GOMEMLIMIT", "GOMAXPROCS", "GOTRACEBACK", "GORACE", "GOCOVERDIR",
		"SSL_CERT_FILE", "SSL_CERT_DIR",
		"JOURNAL_STREAM", // says that the log, which they inherit too, is the journal
	}
	env := []string{}
	for _, name := range allowed {
		for _, kv := range ours {
			if strings.HasPrefix(kv, name+"=") {
				env = append(env, kv)
			}
		}
	}
	return env
}

// bounded keeps the beginning of what a program says and swallows the rest.
type bounded struct {
	bytes.Buffer
	left int
}

func (b *bounded) Write(p []byte) (int, error) {
	n := min(len(p), b.left)
	b.left -= n
	b.Buffer.Write(p[:n])
	return len(p), nil
}

var _ io.Writer = (*bounded)(nil)
