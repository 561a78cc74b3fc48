// Package service is what `holdfast run` is: the supervisor with its runtime
// directory, lock, log, admin surface and signals, and what systemd hears of it.
//
// It stays alive for as long as connections do, so it is kept small: it knows
// nothing of the commands in package cli and of the tools beside them, and a test
// says so.
package service

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"holdfast/internal/admin"
	"holdfast/internal/config"
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
// and has ended. The error is a *supervisor.Refusal if the first generation could
// not be put into service. It takes over the signals of the process and must run
// once only.
func Run(o Options) error {
	// A log reader that has gone away must not end the service.
	signal.Ignore(syscall.SIGPIPE)
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGUSR1)
	defer signal.Stop(signals)
	inherited, err := socket.Inherit(systemd.Files())
	if err != nil {
		return err
	}
	return run(o, signals, inherited, func(options supervisor.Options) service { return supervisor.New(options) })
}

// Check does what Run does with the file before it touches anything.
func Check(ctx context.Context, configPath string) error {
	proxy, err := defaultProxy()
	if err != nil {
		return err
	}
	return supervisor.Check(ctx, configPath, proxy)
}

// service is what Run needs of a supervisor.
type service interface {
	supervisor.Commands
	Run(context.Context) error
}

func run(o Options, signals <-chan os.Signal, inherited *socket.Inherited, start func(supervisor.Options) service) (err error) {
	proxy, err := defaultProxy()
	if err != nil {
		return err
	}
	if err := prepare(o.RuntimeDir); err != nil {
		return err
	}
	lock, err := acquire(o.RuntimeDir)
	if err != nil {
		return err
	}
	defer lock.Close()

	settings := logSettings(o.ConfigPath)
	level := new(slog.LevelVar)
	level.Set(settings.Level)
	log, writer := logs.New(o.Log, level, settings.Format, slog.Int("pid", os.Getpid()))
	defer writer.Close(flushTimeout) // an error is that nobody reads
	log.Info("supervisor starts", "version", version.String(), "config", o.ConfigPath, "runtime_dir", o.RuntimeDir)

	if names := inherited.Names(); len(names) > 0 {
		log.Info("systemd has passed listening sockets", "names", names)
	}

	surface := admin.New(log)
	h := newHerald(systemd.NewNotifier(log))
	defer func() { h.end(err) }()
	options := supervisor.Options{
		ConfigPath:   o.ConfigPath,
		DefaultProxy: proxy,
		Log:          log,
		ApplyLog: func(now config.Log) {
			level.Set(now.Level)
			if now.Format != settings.Format {
				log.Warn("log.format is read at the start of the service", "now", settings.Format, "file", now.Format)
			}
		},
		LogsDropped: writer.Dropped,
		Admin:       surface,
		Inherited:   inherited,
	}
	h.instruct(&options, systemd.WatchdogInterval())
	sup := start(options)
	if err := surface.Start(o.RuntimeDir, sup); err != nil {
		return err
	}
	// The order of the end. The supervisor first: while it ends, the surface shows
	// how far it is. Then the socket's path, and only then the lock, so that a
	// successor never meets a path that is about to be removed. Whoever waits for the
	// end hears of it after that, and can start a successor at once. The log is last,
	// because all of them write to it.
	defer func() {
		surface.CloseListeners()
		lock.Close()
		surface.Close()
		log.Info("supervisor ended")
	}()

	ctx, cancel := context.WithCancel(context.Background())
	var beside sync.WaitGroup
	beside.Go(func() { obey(ctx, sup, signals, log) })
	beside.Go(func() { h.report(ctx, sup) })
	err = sup.Run(context.Background())
	cancel()
	beside.Wait()
	return err
}

// obey does what signals ask for until ctx ends. A stop never waits for anything else
// that was asked for.
func obey(ctx context.Context, sup supervisor.Commands, signals <-chan os.Signal, log *slog.Logger) {
	// The supervisor logs how both went.
	reload, reloaded := errand(func() { sup.Reload(ctx, false) })
	defer reloaded()
	reopen, reopened := errand(func() { sup.ReopenLogs(ctx) })
	defer reopened()
	for {
		select {
		case s := <-signals:
			log.Info("signal received", "signal", s.String())
			switch s {
			case syscall.SIGHUP:
				reload()
			case syscall.SIGUSR1:
				reopen()
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
