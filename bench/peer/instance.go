package peer

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
	"strings"
	"syscall"
	"time"

	"holdfast/bench/load"
	"holdfast/bench/proc"
	"holdfast/internal/child"
)

const (
	startTimeout  = 30 * time.Second
	reloadTimeout = 30 * time.Second
	stopTimeout   = 10 * time.Second

	// restartDelay is what a service manager waits before it starts again what has
	// died: systemd's default.
	restartDelay = 100 * time.Millisecond
)

// An Instance is a proxy that runs.
type Instance struct {
	Kind    *Kind
	program Program
	site    Site
	main    *child.Child
}

// Start starts a proxy in front of an upstream and waits until it serves.
func Start(k *Kind, p Program, s Site) (*Instance, error) {
	var err error
	if s.Listen, err = freeAddress(); err != nil {
		return nil, err
	}
	if s.Secure, err = freeAddress(); err != nil {
		return nil, err
	}
	if err := writeCertificate(s.Dir); err != nil {
		return nil, err
	}
	i := &Instance{Kind: k, program: p, site: s}
	if err := k.write(s); err != nil {
		return nil, err
	}
	if err := i.run(); err != nil {
		return nil, err
	}
	if err := i.WaitReady(); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w\n%s", k.Name, err, i.Log()), i.Stop())
	}
	return i, nil
}

// Address is where the instance listens.
func (i *Instance) Address() string { return i.site.Listen }

// SecureAddress is where it listens for TLS, if its kind does.
func (i *Instance) SecureAddress() string { return i.site.Secure }

// freeAddress returns an address that was free a moment ago. Not every proxy can choose
// one for itself.
func freeAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	return l.Addr().String(), nil
}

func (i *Instance) logName() string { return filepath.Join(i.site.Dir, "log") }

// Log is the end of what the instance has written.
func (i *Instance) Log() string {
	text, _ := os.ReadFile(i.logName())
	return string(bytes.TrimSpace(last(text, 2000)))
}

func (i *Instance) run() error {
	log, err := os.OpenFile(i.logName(), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	args := i.Kind.arguments(i.program, i.site)
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Dir = i.site.Dir
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Env = append(os.Environ(), "HOME="+i.site.Dir, "XDG_CONFIG_HOME="+i.site.Dir, "XDG_DATA_HOME="+i.site.Dir)
	i.main, err = child.Start(cmd)
	return err
}

// WaitReady waits until the instance serves: it asks for a page until it comes.
func (i *Instance) WaitReady() error {
	client := fresh()
	return poll(startTimeout, func() error {
		select {
		case <-i.main.Ended():
			return fmt.Errorf("%w: it has ended", errStop)
		default:
		}
		r, err := client.Get("http://" + i.site.Listen + load.PagePath)
		if err != nil {
			return err
		}
		defer r.Body.Close()
		if r.StatusCode != http.StatusOK {
			return errors.New(r.Status)
		}
		_, err = io.Copy(io.Discard, r.Body)
		return err
	})
}

// Reload puts the next revision of the configuration into service, and returns how long
// it took until the first request met it.
func (i *Instance) Reload() (time.Duration, error) {
	i.site.Revision++
	begun := time.Now()
	if err := i.Kind.write(i.site); err != nil {
		return 0, err
	}
	if err := i.Kind.reload(i); err != nil {
		return 0, fmt.Errorf("reload: %w", err)
	}
	client, want := fresh(), i.site.RevisionTarget()
	err := poll(reloadTimeout, func() error {
		r, err := client.Get("http://" + i.site.Listen + RevisionPath)
		if err != nil {
			return err
		}
		r.Body.Close()
		if got := r.Header.Get("Location"); !strings.HasSuffix(got, want) {
			return fmt.Errorf("%s redirects to %q, not to %s", RevisionPath, got, want)
		}
		return nil
	})
	return time.Since(begun), err
}

// All returns the pids of all the instance's processes.
func (i *Instance) All() []int { return proc.PIDs(proc.Family(i.main.PID())) }

// Relays returns the pids of the processes that carry traffic: those below the first
// one, or that one where it is alone.
func (i *Instance) Relays() []int {
	_, relays := i.Parts()
	return relays
}

// Parts returns the pid of the process above those that carry traffic, if there is one,
// and theirs.
func (i *Instance) Parts() (above, relays []int) {
	all := i.All()
	if len(all) > 1 {
		return all[:1], all[1:]
	}
	return nil, all
}

// Crash kills one of the processes that carry traffic, and does what a service manager
// would do if that ends the instance.
func (i *Instance) Crash() error {
	relays := i.Relays()
	if len(relays) == 0 {
		return errors.New("it does not run")
	}
	if err := syscall.Kill(relays[0], syscall.SIGKILL); err != nil {
		return err
	}
	if !i.Kind.restarted {
		return nil
	}
	select {
	case <-i.main.Ended():
	case <-time.After(stopTimeout):
		return errors.New("it has not ended with its worker")
	}
	time.Sleep(restartDelay)
	return i.run()
}

// Stop ends the instance, and every process that it has left behind.
func (i *Instance) Stop() error {
	family := proc.Family(i.main.PID())
	err := i.main.Stop()
	for _, p := range family {
		if now, ok := proc.Find(p.PID); ok && now.Started == p.Started && !now.Ended {
			syscall.Kill(p.PID, syscall.SIGKILL)
		}
	}
	return err
}

func (i *Instance) signal(s syscall.Signal) error { return syscall.Kill(i.main.PID(), s) }

// command runs a program that speaks to the instance.
func command(name string, args ...string) error {
	ctx, cancel := context.WithTimeout(context.Background(), reloadTimeout)
	defer cancel()
	if out, err := exec.CommandContext(ctx, name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", filepath.Base(name), err, last(out, 1000))
	}
	return nil
}

// fresh is a client whose every request is on a connection of its own.
func fresh() *http.Client {
	return &http.Client{
		Timeout:       2 * time.Second,
		Transport:     &http.Transport{DisableKeepAlives: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// errStop is wrapped by an error after which poll does not try again.
var errStop = errors.New("given up")

// poll tries until try succeeds.
func poll(patience time.Duration, try func() error) error {
	for end := time.Now().Add(patience); ; time.Sleep(2 * time.Millisecond) {
		err := try()
		if err == nil || errors.Is(err, errStop) || time.Now().After(end) {
			return err
		}
	}
}
