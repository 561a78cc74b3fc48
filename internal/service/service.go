// Package service is what `holdfast run` is: the supervisor with its runtime
// directory, lock, log, admin surface and signals, and what systemd hears of it.
//
// It stays alive for as long as connections do, so it is kept small: it knows
// nothing of the commands in package cli and of the tools beside them, and a test
// says so.
package service

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/control"
	"holdfast/internal/logs"
	"holdfast/internal/socket"
	"holdfast/internal/supervisor"
	"holdfast/internal/systemd"
	"holdfast/internal/version"
)

// flushTimeout bounds how long the end waits for somebody to read the log.
const flushTimeout = 2 * time.Second

// Options are what `run` was told; all are set by the caller.
type Options struct {
	ConfigPath string
	RuntimeDir string // made if it is not there
	Log        io.Writer
}

// Run serves until the service is told to stop, by SIGTERM, SIGINT or a command,
// and has ended, or until another process has taken its place in an upgrade. The error
// is a *supervisor.Refusal if the first generation could not be put into service. It
// takes over the signals of the process and must run once only.
func Run(o Options) error {
	// A log reader that has gone away must not end the service.
	signal.Ignore(syscall.SIGPIPE)
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGUSR1, syscall.SIGUSR2)
	defer signal.Stop(signals)
	sockets, stored := systemd.Files() // before anything else is opened
	inherited, err := socket.Inherit(sockets)
	if err != nil {
		return err
	}
	up, err := newFlip()
	if err != nil {
		return err
	}
	defer up.Stop()
	p, err := meet(up)
	if err != nil {
		return err
	}
	if p != nil {
		inherited = takeSystemd(p)
	}
	from := origin{signals: signals, inherited: inherited, stored: stored, flip: up, predecessor: p}
	return run(o, from, func(options supervisor.Options) service { return supervisor.New(options) })
}

// origin is what a process of the service has from the one that has started it.
type origin struct {
	signals     <-chan os.Signal
	inherited   *socket.Inherited
	stored      map[string]int // by systemd, in an earlier life
	flip        flip
	predecessor *predecessor // nil: nobody else runs the service
}

// Check does what Run does with the file before it touches anything.
func Check(ctx context.Context, configPath string) error {
	proxy, err := defaultProxy()
	if err != nil {
		return err
	}
	return supervisor.Check(ctx, configPath, proxy)
}

// Route answers a question about the routes of a configuration file. The error is a
// *supervisor.Refusal.
func Route(ctx context.Context, configPath string, q *control.RouteQuestion) (*control.RouteAnswer, error) {
	proxy, err := defaultProxy()
	if err != nil {
		return nil, err
	}
	return supervisor.Route(ctx, configPath, proxy, q)
}

// service is what Run needs of a supervisor.
type service interface {
	supervisor.Commands
	Run(context.Context) error
}

func run(o Options, from origin, start func(supervisor.Options) service) (err error) {
	if from.predecessor != nil {
		defer func() { from.predecessor.end(err) }()
	}
	proxy, err := defaultProxy()
	if err != nil {
		return err
	}
	h, err := occupy(o.RuntimeDir, from)
	if err != nil {
		return err
	}
	options := supervisor.Options{
		ConfigPath: o.ConfigPath, DefaultProxy: proxy,
		Inherited: from.inherited, Stored: from.stored,
		Directory: h.dir, Secret: h.secret, Fresh: h.fresh, Rendezvous: h.rendezvous,
	}
	log, writer := openLog(o, &options)
	defer writer.Close(flushTimeout) // an error is that nobody reads
	log.Info("supervisor starts", "version", version.String(), "config", o.ConfigPath, "runtime_dir", o.RuntimeDir)
	if names := from.inherited.Names(); len(names) > 0 {
		log.Info("systemd has passed listening sockets", "names", names)
	}

	h.settle(log, &options)
	tell := newHerald(h.notifier)
	defer func() { tell.end(err) }()
	tell.instruct(&options, systemd.WatchdogInterval())
	sup := start(options)
	if err := h.surface.Start(o.RuntimeDir, sup); err != nil {
		return errors.Join(err, h.rendezvous.Close(h.ours(err)), h.lock.Close())
	}

	ctx, cancel := context.WithCancel(context.Background())
	var beside sync.WaitGroup
	beside.Go(func() { obey(ctx, sup, from.signals, log) })
	beside.Go(func() { tell.report(ctx, sup) })
	// The supervisor ends first, since while it does the surface shows how far it is;
	// the log is last, since all of them write to it.
	err = sup.Run(context.Background())
	cancel()
	beside.Wait()
	if err := h.close(h.ours(err)); err != nil {
		log.Error("not everything could be given up in order", "err", err)
	}
	log.Info("supervisor ended")
	if errors.Is(err, supervisor.ErrSucceeded) {
		return h.parting()
	}
	return err
}

// openLog opens the log as the configuration wants it, and completes options by it.
func openLog(o Options, options *supervisor.Options) (*slog.Logger, *logs.Writer) {
	settings := logSettings(o.ConfigPath)
	level := new(slog.LevelVar)
	level.Set(settings.Level)
	log, writer := logs.New(o.Log, level, settings.Format, slog.Int("pid", os.Getpid()))
	options.Log, options.LogsDropped = log, writer.Dropped
	options.ApplyLog = func(now config.Log) {
		level.Set(now.Level)
		if now.Format != settings.Format {
			log.Warn("log.format is read at the start of the service", "now", settings.Format, "file", now.Format)
		}
	}
	return log, writer
}

// obey does what signals ask for until ctx ends. A stop never waits for anything else
// that was asked for.
func obey(ctx context.Context, sup supervisor.Commands, signals <-chan os.Signal, log *slog.Logger) {
	// The supervisor logs how they went.
	reload, reloaded := errand(func() { sup.Reload(ctx, false) })
	defer reloaded()
	reopen, reopened := errand(func() { sup.ReopenLogs(ctx) })
	defer reopened()
	upgrade, upgraded := errand(func() { sup.Upgrade(ctx) })
	defer upgraded()
	for {
		select {
		case s := <-signals:
			log.Info("signal received", "signal", s.String())
			switch s {
			case syscall.SIGHUP:
				reload()
			case syscall.SIGUSR1:
				reopen()
			case syscall.SIGUSR2:
				upgrade()
			default:
				sup.Stop()
			}
		case <-ctx.Done():
			return
		}
	}
}

// errand returns begin, which has f run beside its caller, and end, which waits for
// that and is called last. All begins during an f are one more f, which is the answer
// to every one of them: it starts after they came.
func errand(f func()) (begin, end func()) {
	asked, done := make(chan struct{}, 1), make(chan struct{})
	go func() {
		defer close(done)
		for range asked {
			f()
		}
	}()
	begin = func() {
		select {
		case asked <- struct{}{}:
		default:
		}
	}
	end = func() {
		close(asked)
		<-done
	}
	return begin, end
}

// logSettings reads [log] for the time until the first configuration serves. A
// file that cannot be read is refused a moment later, with every mistake in it.
func logSettings(path string) config.Log {
	data, err := config.ReadFile(path)
	if err == nil {
		if c, err := config.ParseSupervisor(path, data); err == nil {
			return c.Log
		}
	}
	return config.Log{Level: slog.LevelInfo, Format: "text"}
}

// defaultProxy is the proxy beside this program.
func defaultProxy() (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("path of this program: %w", err)
	}
	return filepath.Join(filepath.Dir(self), "holdfast-proxy"), nil
}
