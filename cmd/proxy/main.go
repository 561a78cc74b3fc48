// Command holdfast-proxy is the data plane of Holdfast: one process of it is one
// generation. The supervisor starts it; there is no use in starting it by hand,
// except for
//
//	holdfast-proxy version
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"os"
	"os/signal"
	"runtime"
	"syscall"
	"time"

	"holdfast/internal/clienttls"
	"holdfast/internal/config"
	"holdfast/internal/control"
	"holdfast/internal/logs"
	"holdfast/internal/proxy"
	"holdfast/internal/routecheck"
	"holdfast/internal/servertls"
	"holdfast/internal/version"
)

// Exit codes.
const (
	exitDone   = 0
	exitFailed = 1
	exitConfig = 2 // what check refuses, and bad usage
)

// Descriptors that the supervisor passes besides the standard ones.
const (
	binaryFD  = 3 // what was executed; of no use to us
	controlFD = 4
)

// What libraries say by themselves nobody asked for, and HTTP/2 peers decide how much that is.
func silence() { log.SetOutput(io.Discard) }

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

func run(args []string, stdout, stderr io.Writer) int {
	if len(args) != 1 {
		args = []string{""}
	}
	switch args[0] {
	case "version":
		fmt.Fprintln(stdout, "holdfast-proxy", version.String())
		return exitDone
	case "check":
		return check(stdout, stderr)
	case "config":
		return consult(stdout, stderr, func(b *control.Bundle) ([]byte, error) { return config.Effective(b.Path, b.Config) })
	case "route":
		return answer(stdout, stderr)
	case "run":
		silence()
		return serve(stderr)
	}
	fmt.Fprintln(stderr, "holdfast-proxy is started by the supervisor: see `holdfast run`")
	return exitConfig
}

// check validates the bundle.
func check(stdout, stderr io.Writer) int {
	return consult(stdout, stderr, func(b *control.Bundle) ([]byte, error) {
		cfg, err := config.Parse(b.Path, b.Config)
		if err == nil {
			err = errors.Join(cfg.ReadBodies(), clienttls.Check(cfg), servertls.Check(cfg))
		}
		return nil, err
	})
}

// answer answers the bundle's question about its routes.
func answer(stdout, stderr io.Writer) int {
	return consult(stdout, stderr, func(b *control.Bundle) ([]byte, error) {
		cfg, err := config.Parse(b.Path, b.Config)
		if err != nil {
			return nil, err
		}
		if b.Question == nil {
			return nil, errors.New("the bundle has no question")
		}
		return json.Marshal(routecheck.Answer(cfg, b.Question))
	})
}

// consult prints what of says of the bundle on the standard input, a sealed memory
// file; or the mistakes in it, one a line.
func consult(stdout, stderr io.Writer, of func(*control.Bundle) ([]byte, error)) int {
	bundle := new(control.Bundle)
	if err := control.ReadPayload(0, bundle); err != nil {
		fmt.Fprintln(stderr, err)
		return exitFailed
	}
	text, err := of(bundle)
	if err != nil {
		fmt.Fprintln(stdout, err)
		return exitConfig
	}
	if _, err := stdout.Write(text); err != nil {
		fmt.Fprintln(stderr, err)
		return exitFailed
	}
	return exitDone
}

// serve is the life of a generation. Everything but the end comes over a control
// channel: of all signals only SIGTERM means anything. SIGPIPE is ignored so that a
// log reader that goes away takes nothing with it.
func serve(stderr io.Writer) int {
	control.CloseAll([]int{binaryFD})
	// The kernel names a process after the path that was executed, /proc/self/fd/3
	// (proc(5), comm). ps, pgrep and ss -p show that name: "3" tells nobody anything.
	_ = os.WriteFile("/proc/self/comm", []byte("holdfast-proxy"), 0)
	signal.Ignore(syscall.SIGINT, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGPIPE)
	terminate := make(chan os.Signal, 1)
	signal.Notify(terminate, syscall.SIGTERM)

	// The runtime knows the machine's processors and what the cgroup may use of them
	// (cpu.max). A loop that waits may keep one of its Ps; two more are for all else.
	loops := runtime.GOMAXPROCS(0)
	runtime.GOMAXPROCS(loops + 2)

	var writer *logs.Writer
	level := new(slog.LevelVar)
	log := slog.New(slog.NewTextHandler(stderr, nil)).With("pid", os.Getpid()) // until the configuration is known
	err := proxy.Run(context.Background(), proxy.Options{
		Control: controlFD, Terminate: terminate, Stdout: os.Stdout, Loops: loops, Reunite: control.Reunite,
		Logger: func(cfg config.Log, generation int) proxy.Logger {
			level.Set(cfg.Level)
			log, writer = logs.New(stderr, level, cfg.Format, slog.Int("generation", generation), slog.Int("pid", os.Getpid()))
			return proxy.Logger{Log: log, Level: level, Dropped: writer.Dropped}
		},
	})
	if err != nil {
		log.Error("the generation ends", "err", err)
	}
	if writer != nil {
		_ = writer.Close(100 * time.Millisecond) // a reader that never reads must not keep us
	}
	if err != nil {
		return exitFailed
	}
	return exitDone
}
