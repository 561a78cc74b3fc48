package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"holdfast/bench/load"
	"holdfast/bench/peer"
	"holdfast/bench/proc"
	"holdfast/bench/report"
)

// direct is not a proxy: the client speaks to the upstream itself, which shows what the
// load costs and how much the tool could make.
const direct = "direct"

// A contestant is a proxy that is measured, or none (direct).
type contestant struct {
	name     string
	kind     *peer.Kind // nil: direct
	program  peer.Program
	upstream string         // its own address of the upstream
	instance *peer.Instance // that the round's modes share
}

// A bench is all that one run has started and found out.
type bench struct {
	options
	run         report.Run
	temp        string
	contestants []*contestant
	client      *load.Client
	parts       []*part // of the load
	sites       int
	cores       proc.Cores // at the beginning
	interrupted <-chan os.Signal
}

// busyMachine is from which share of the cores' time on others disturb.
const busyMachine = 0.05

var errInterrupted = errors.New("interrupted")

func newBench(o options) (*bench, error) {
	b := &bench{options: o}
	err := b.prepare()
	if err != nil {
		return nil, errors.Join(err, b.clear())
	}
	return b, nil
}

func (b *bench) prepare() error {
	// Go raises the soft limit of descriptors for itself. This is for what we start.
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return err
	}
	limit.Cur = limit.Max
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return err
	}
	var err error
	if b.run.Machine, err = machine(); err != nil {
		return err
	}
	b.run.Command, b.run.Sizes, b.run.Reference = b.command, b.sizes, b.table.reference
	if b.temp, err = os.MkdirTemp("/tmp", "hf-bench-"); err != nil { // short: paths of unix sockets are
		return err
	}
	if b.profiles != "" {
		if err := os.MkdirAll(b.profiles, 0o755); err != nil {
			return err
		}
	}
	if err := b.findProxies(); err != nil {
		return err
	}
	if err := b.startLoad(); err != nil {
		return err
	}
	return b.lookAround()
}

// lookAround sees what else goes on before anything is measured.
func (b *bench) lookAround() error {
	earlier, err := proc.ReadCores()
	if err != nil {
		return err
	}
	time.Sleep(min(2*time.Second, time.Duration(b.sizes.Settle)))
	if b.cores, err = proc.ReadCores(); err != nil {
		return err
	}
	b.run.Began = time.Now().Truncate(time.Second)
	b.run.Machine.Busy, _ = b.cores.Since(earlier)
	if b.run.Machine.Busy > busyMachine {
		b.say("the cores are %.0f %% busy with other things: compare what comes with care", 100*b.run.Machine.Busy)
	}
	return nil
}

func (b *bench) say(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }

func (b *bench) findProxies() error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	finder := peer.Finder{Root: b.root, Holdfast: b.holdfast, Self: self, Temp: b.temp, Say: b.say}
	for _, k := range b.table.kinds {
		if !slices.Contains(b.proxies, k.Name) {
			continue
		}
		program, err := k.Find(finder)
		if err != nil && k.Ours {
			return err
		}
		if err != nil {
			b.say("%s is left out: %v", k.Title, err)
			why, _, _ := strings.Cut(err.Error(), "\n")
			b.run.Missing = append(b.run.Missing, report.Missing{Title: k.Title, Why: why})
			continue
		}
		b.contestants = append(b.contestants, &contestant{name: k.Name, kind: k, program: program})
		b.run.Proxies = append(b.run.Proxies, report.Proxy{Name: k.Name, Title: k.Title, Version: program.Version, Note: program.Note})
	}
	if slices.Contains(b.proxies, direct) {
		b.contestants = append(b.contestants, &contestant{name: direct})
		b.run.Proxies = append(b.run.Proxies, report.Proxy{Name: direct, Title: "no proxy"})
	}
	return nil
}

// A part is one of the two processes that make the load.
type part struct {
	cmd *exec.Cmd
	in  io.Closer
	out io.Reader
}

// startPart starts this program in a role.
func (b *bench) startPart(args ...string) (io.Writer, io.Reader, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, nil, err
	}
	cmd := exec.Command(self, append([]string{"role"}, args...)...)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, nil, err
	}
	b.parts = append(b.parts, &part{cmd: cmd, in: in, out: out})
	return in, out, nil
}

func (b *bench) startLoad() error {
	_, addresses, err := b.startPart("upstream", fmt.Sprint(len(b.contestants)))
	if err != nil {
		return err
	}
	lines := bufio.NewScanner(addresses)
	for _, c := range b.contestants {
		if !lines.Scan() {
			return fmt.Errorf("the upstream has not said where it listens: %v", lines.Err())
		}
		c.upstream = lines.Text()
	}
	in, out, err := b.startPart("client")
	if err != nil {
		return err
	}
	b.client = load.NewClient(in, out)
	return nil
}

// clear ends what was started, those in front first, and removes the files.
func (b *bench) clear() error {
	var left []error
	for _, c := range b.contestants {
		left = append(left, c.stop())
	}
	for _, p := range slices.Backward(b.parts) {
		p.in.Close()
		p.cmd.Process.Kill()
		p.cmd.Wait()
	}
	if b.temp != "" {
		left = append(left, os.RemoveAll(b.temp))
	}
	return errors.Join(left...)
}

// startInstance starts a proxy anew.
func (b *bench) startInstance(c *contestant, tunnels int) (*peer.Instance, error) {
	b.sites++
	dir := filepath.Join(b.temp, fmt.Sprint(b.sites))
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	return peer.Start(c.kind, c.program, peer.Site{Dir: dir, Upstream: c.upstream, Tunnels: tunnels, Cores: runtime.NumCPU()})
}

func (c *contestant) stop() error {
	if c.instance == nil {
		return nil
	}
	i := c.instance
	c.instance = nil
	return i.Stop()
}

// address is where the client connects.
func (c *contestant) address() string {
	if c.instance == nil {
		return c.upstream
	}
	return c.instance.Address()
}

func (c *contestant) pids() []int {
	if c.instance == nil {
		return nil
	}
	return c.instance.All()
}

// all runs all rounds. In each, the modes that share an instance come first, one mode
// after the other for all proxies, and each round another proxy begins.
func (b *bench) all() error {
	for round := range max(b.sizes.Rounds, b.sizes.Slow) {
		order := slices.Concat(b.contestants[round%len(b.contestants):], b.contestants[:round%len(b.contestants)])
		if round < b.sizes.Rounds {
			if err := b.shared(round, order); err != nil {
				return err
			}
		}
		if round < b.sizes.Slow {
			if err := b.alone(round, order); err != nil {
				return err
			}
		}
	}
	b.run.Took = report.Duration(time.Since(b.run.Began).Round(time.Second))
	cores, err := proc.ReadCores()
	_, b.run.Machine.Stolen = cores.Since(b.cores)
	return err
}

// shared runs the modes in which all proxies run at the same time, each with nothing
// to do but in its turns.
func (b *bench) shared(round int, order []*contestant) error {
	if !slices.ContainsFunc(modes, func(m mode) bool { return !m.alone && slices.Contains(b.modes, m.name) }) {
		return nil
	}
	for _, c := range order {
		if c.kind == nil {
			continue
		}
		var err error
		if c.instance, err = b.startInstance(c, b.sizes.Many+b.sizes.Few); err != nil {
			return err
		}
	}
	for _, m := range modes {
		if m.alone || !slices.Contains(b.modes, m.name) {
			continue
		}
		for range max(1, m.times) {
			for _, c := range order {
				if err := b.step(round, m, c); err != nil {
					return err
				}
			}
		}
	}
	var left []error
	for _, c := range order {
		left = append(left, c.stop())
	}
	return errors.Join(left...)
}

// alone runs the modes for which each proxy is started anew.
func (b *bench) alone(round int, order []*contestant) error {
	for _, m := range modes {
		if !m.alone || !slices.Contains(b.modes, m.name) {
			continue
		}
		for _, c := range order {
			if c.kind == nil || m.possible != nil && !m.possible(c.kind) {
				continue
			}
			tunnels, err := m.tunnels(b, c)
			if err != nil {
				return err
			}
			if c.instance, err = b.startInstance(c, tunnels); err != nil {
				return err
			}
			err = b.step(round, m, c)
			if stopped := c.stop(); stopped != nil {
				b.say("%v", stopped)
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// step measures one mode of one proxy. What does not work is noted, and the run goes on.
func (b *bench) step(round int, m mode, c *contestant) error {
	select {
	case s := <-b.interrupted:
		return fmt.Errorf("%w: %v", errInterrupted, s)
	default:
	}
	b.say("%s  round %d  %-8s %s", time.Now().Format(time.TimeOnly), round+1, m.name, c.name)
	if err := m.measure(b, c); err != nil {
		failure := fmt.Sprintf("%s, %s, round %d: %v", c.name, m.name, round+1, err)
		b.say("%s", failure)
		b.run.Failures = append(b.run.Failures, failure)
	}
	_, err := b.client.Do(load.Command{Do: "close"})
	return err
}
