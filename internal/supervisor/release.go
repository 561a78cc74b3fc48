package supervisor

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
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

// bundle is what a generation gets to read.
func (r *release) bundle(generation int) (*os.File, error) {
	return control.Payload(control.Bundle{Path: r.path, Config: r.bytes, Generation: generation, Learnt: r.learnt.Load()})
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
	bundle, err := r.bundle(0)
	if err != nil {
		return refuse("configuration", err)
	}
	defer bundle.Close()
	ctx, cancel := context.WithTimeout(ctx, r.config.Reload.ReadyTimeout)
	defer cancel()
	cmd := r.command(ctx, "check")
	cmd.Stdin = bundle
	// Mistakes of the file come on the standard output with exit code 2, which is
	// also that of a Go program that panics: its words come on the other one.
	mistakes, noise := &bounded{left: 1 << 20}, &bounded{left: 4 << 10}
	cmd.Stdout, cmd.Stderr = mistakes, noise
	cmd.WaitDelay = time.Second // a child of the binary may hold the pipe
	err = cmd.Run()
	said := strings.TrimSpace(mistakes.String())
	exit, exited := errors.AsType[*exec.ExitError](err)
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return refuse("proxy binary", fmt.Errorf("%s check: no answer within %s", r.binary.Name(), r.config.Reload.ReadyTimeout))
	case exited && exit.ExitCode() == 2 && said != "":
		return &Refusal{Step: "configuration", Problems: strings.Split(said, "\n")}
	}
	if path, ok := errors.AsType[*os.PathError](err); ok { // its path is that of our descriptor
		err = fmt.Errorf("cannot be executed: %w", path.Err)
	}
	if words := strings.TrimSpace(noise.String()); words != "" {
		err = fmt.Errorf("%w: %q", err, words)
	}
	return refuse("proxy binary", fmt.Errorf("%s check: %w", r.binary.Name(), err))
}

// Check does what a start does before it touches anything: it reads the file,
// validates it and has the proxy binary validate it. The error is a *Refusal.
func Check(ctx context.Context, path, defaultProxy string) error {
	r, err := loadRelease(ctx, path, defaultProxy)
	if err != nil {
		return err
	}
	defer r.binary.Close()
	return r.check(ctx)
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
