package main

import (
	"cmp"
	"errors"
	"fmt"
	"time"

	"holdfast/bench/load"
	"holdfast/bench/peer"
	"holdfast/bench/proc"
)

// A mode measures something about a proxy.
type mode struct {
	name    string
	measure func(*bench, *contestant) error
	times   int // a round; 0: once

	// alone says that it needs an instance of its own, for so many tunnels.
	alone    bool
	tunnels  func(*bench, *contestant) (int, error)
	possible func(*peer.Kind) bool // nil: with any
}

var modes = []mode{
	{name: "idle", measure: (*bench).idle, alone: true, tunnels: (*bench).idleTunnels},
	{name: "echo", measure: (*bench).echo},
	{name: "paced", measure: (*bench).paced, times: pacedTimes},
	{name: "bulk", measure: (*bench).bulk},
	{name: "small", measure: asking("small", smallBody)},
	{name: "16k", measure: asking("16k", 16<<10)},
	{name: "1m", measure: asking("1m", 1<<20)},
	{name: "httppaced", measure: (*bench).httpPaced, times: pacedTimes},
	{name: "httpconns", measure: (*bench).httpConns},
	{name: "handshake", measure: (*bench).handshakes},
	{name: "tlsconnect", measure: (*bench).secureConnect},
	{name: "tlsecho", measure: (*bench).secureEcho},
	{name: "tlsidle", measure: (*bench).secureIdle, alone: true, tunnels: (*bench).idleTunnels},
	{name: "connect", measure: (*bench).connect},
	{name: "reload", measure: (*bench).reload, alone: true, tunnels: (*bench).heldTunnels, possible: (*peer.Kind).Reloads},
	{name: "crash", measure: (*bench).crash, alone: true, tunnels: (*bench).heldTunnels},
	{name: "resume", measure: (*bench).resume, alone: true, tunnels: (*bench).idleTunnels, possible: (*peer.Kind).KeepsTunnels},
	{name: "move", measure: (*bench).move, alone: true, tunnels: (*bench).idleTunnels, possible: (*peer.Kind).KeepsTunnels},
	{name: "httpidle", measure: (*bench).httpIdle, alone: true, tunnels: (*bench).idleTunnels},
}

const (
	// warm is how long load is made before it is measured, in parts of the time
	// that is measured.
	warm = 4

	// pacedTimes is how often a pace is kept in a round, and pacedShare for how long,
	// in parts of the usual time. A moment in which the machine did something else
	// spoils the high percentiles of the time in which it falls: many short ones are
	// better than a long one.
	pacedTimes = 3
	pacedShare = 2

	// A reload is followed by so many tunnels that are opened to stay.
	openedBetween = 10

	// watchRate is how many requests a second look whether a proxy serves.
	watchRate = 100

	// beforeReload is how long a configuration serves before the next one. Traefik
	// holds back a change that follows soon upon another, HAProxy loses one.
	beforeReload = 2500 * time.Millisecond

	// afterReloads is how long replaced workers and generations may take to go: a
	// little longer than the longest probation.
	afterReloads = 12 * time.Second
)

// open opens tunnels, all of them.
func (b *bench) open(c *contestant, path string, tunnels int) error {
	a, err := b.client.Do(load.Command{Do: "open", Address: c.address(), Path: path, Tunnels: tunnels})
	if err == nil && a.Failed > 0 {
		err = fmt.Errorf("%d of %d tunnels could not be opened", a.Failed, tunnels)
	}
	return err
}

// timed has load made, for the usual time unless cmd says how long, and looks that no
// connection is lost by it. What is measured is called key.
func (b *bench) timed(c *contestant, key string, cmd load.Command) (load.Answer, error) {
	cmd.For = cmp.Or(cmd.For, time.Duration(b.sizes.Measured))
	cmd.Warm = cmd.For / warm
	cmd.PIDs = c.pids()
	a, err := b.watched(c, key, cmd)
	if err == nil && a.Failed > 0 {
		err = lost("lost", a.Failed, a)
	}
	return a, err
}

// lost is the error of so many connections.
func lost(what string, n int, a load.Answer) error {
	if a.Reason != "" {
		return fmt.Errorf("%d connections were %s, the last one: %s", n, what, a.Reason)
	}
	return fmt.Errorf("%d connections were %s", n, what)
}

// addCPU notes the CPU time for a unit of work.
func (b *bench) addCPU(measure string, c *contestant, cpu time.Duration, unit time.Duration, count float64) {
	if c.kind != nil && count > 0 {
		b.run.Add(measure, c.name, float64(cpu)/float64(unit)/count)
	}
}

func (b *bench) idleTunnels(c *contestant) (int, error) {
	most, err := c.kind.MaxTunnels()
	return min(b.sizes.Idle, most), err
}

func (b *bench) heldTunnels(*contestant) (int, error) {
	return b.sizes.Held + b.sizes.Reloads*openedBetween + watchRate, nil
}

// idle opens a few tunnels first: what a program sets up for the first one is no
// tunnel's.
func (b *bench) idle(c *contestant) error {
	tunnels, err := b.idleTunnels(c)
	if err != nil {
		return err
	}
	if err := b.open(c, load.EchoPath, b.sizes.Few); err != nil {
		return err
	}
	if _, err := b.client.Do(load.Command{Do: "close"}); err != nil {
		return err
	}
	start, err := b.settled(c)
	if err != nil {
		return err
	}
	if err := b.open(c, load.EchoPath, tunnels); err != nil {
		return err
	}
	full, err := b.settled(c)
	if err != nil {
		return err
	}
	if _, err := b.client.Do(load.Command{Do: "close"}); err != nil {
		return err
	}
	after, err := b.settled(c)
	if err != nil {
		return err
	}
	const mb = 1e6
	b.run.Add("idle.tunnels", c.name, float64(tunnels))
	b.run.Add("idle.private", c.name, float64(full.relays.private-start.relays.private)/float64(tunnels))
	b.run.Add("idle.descriptors", c.name, float64(full.relays.descriptors-start.relays.descriptors)/float64(tunnels))
	if start.above.descriptors > 0 {
		b.run.Add("idle.above.private", c.name, float64(full.above.private-start.above.private)/float64(tunnels))
		b.run.Add("idle.above.descriptors", c.name, float64(full.above.descriptors-start.above.descriptors)/float64(tunnels))
		b.run.Add("idle.above.left", c.name, float64(after.above.private-start.above.private)/mb)
	}
	b.run.Add("idle.start", c.name, float64(start.relays.private)/mb)
	b.run.Add("idle.left", c.name, float64(after.relays.private-start.relays.private)/mb)
	return nil
}

// holding is what processes hold.
type holding struct {
	private     int64
	descriptors int
}

// A look is what a proxy holds: in the processes that relay, and in the one above them,
// if there is one.
type look struct{ relays, above holding }

// settled waits for what a proxy does behind the scenes, and then looks at it.
func (b *bench) settled(c *contestant) (look, error) {
	time.Sleep(time.Duration(b.sizes.Settle))
	above, relays := c.instance.Parts()
	var l look
	var errs [2]error
	l.relays, errs[0] = held(relays)
	l.above, errs[1] = held(above)
	return l, errors.Join(errs[:]...)
}

func held(pids []int) (holding, error) {
	m, err := proc.MemoryOf(pids)
	if err != nil {
		return holding{}, err
	}
	descriptors, err := proc.Descriptors(pids)
	return holding{m.Private, descriptors}, err
}

// A group is of so many connections, by whose key measures begin.
type group struct {
	key         string
	connections int
}

func (b *bench) fewAndMany(key string) []group {
	return []group{{key + ".few", b.sizes.Few}, {key + ".many", b.sizes.Many}}
}

func (b *bench) echo(c *contestant) error {
	for _, n := range b.fewAndMany("echo") {
		if err := b.open(c, load.EchoPath, n.connections); err != nil {
			return err
		}
		a, err := b.timed(c, n.key, load.Command{Do: "echo", Size: b.sizes.Message})
		if err != nil {
			return err
		}
		b.addCPU(n.key+".cpu", c, a.CPU, time.Microsecond, float64(a.Count))
		b.run.Add(n.key+".rate", c.name, float64(a.Count)/a.Measured.Seconds())
		if _, err := b.client.Do(load.Command{Do: "close"}); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) paced(c *contestant) error {
	if err := b.open(c, load.EchoPath, b.sizes.Many); err != nil {
		return err
	}
	a, err := b.timed(c, "paced", load.Command{Do: "paced", Size: b.sizes.Message, Rate: b.sizes.Rate, For: time.Duration(b.sizes.Measured) / pacedShare})
	if err != nil {
		return err
	}
	b.addPaced("paced", c, a)
	return nil
}

func (b *bench) addPaced(key string, c *contestant, a load.Answer) {
	b.addCPU(key+".cpu", c, a.CPU, time.Microsecond, float64(a.Count))
	for percentile, d := range map[string]time.Duration{".p50": a.Latencies.P50, ".p99": a.Latencies.P99, ".p999": a.Latencies.P999} {
		b.run.Add(key+percentile, c.name, float64(d)/float64(time.Microsecond))
	}
}

func (b *bench) bulk(c *contestant) error {
	for _, n := range []group{{"bulk.one", 1}, {"bulk.few", b.sizes.Few}} {
		if err := b.open(c, load.BulkPath, n.connections); err != nil {
			return err
		}
		a, err := b.timed(c, n.key, load.Command{Do: "bulk"})
		if err != nil {
			return err
		}
		const gb = 1e9
		b.addCPU(n.key+".cpu", c, a.CPU, time.Second, float64(a.Bytes)/gb)
		b.run.Add(n.key+".rate", c.name, float64(a.Bytes)/gb/a.Measured.Seconds())
		if _, err := b.client.Do(load.Command{Do: "close"}); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) connect(c *contestant) error {
	return b.turnover(c, "connect", load.Command{Do: "connect", Path: load.EchoPath})
}

// turnover measures connections that are used once.
func (b *bench) turnover(c *contestant, key string, cmd load.Command) error {
	// Each takes a source port for a while, on both sides of the proxy.
	const atOnce, atMost = 32, 20_000
	cmd.Address, cmd.Tunnels, cmd.Limit = c.address(), atOnce, atMost
	a, err := b.timed(c, key, cmd)
	if err != nil {
		return err
	}
	b.addCPU(key+".cpu", c, a.CPU, time.Microsecond, float64(a.Count))
	b.run.Add(key+".rate", c.name, float64(a.Count)/a.Measured.Seconds())
	return nil
}

func (b *bench) reload(c *contestant) error {
	if err := b.open(c, load.EchoPath, b.sizes.Held); err != nil {
		return err
	}
	processes := c.instance.All()
	before, err := proc.MemoryOf(processes)
	if err != nil {
		return err
	}
	if _, err := b.client.Do(load.Command{Do: "watch", Address: c.address(), Rate: watchRate}); err != nil {
		return err
	}
	live, err := b.reloads(c)
	watched, unwatched := b.client.Do(load.Command{Do: "unwatch"})
	if err != nil {
		return err
	}
	if unwatched != nil {
		return unwatched
	}
	time.Sleep(min(afterReloads, 2*time.Duration(b.sizes.Settle)))
	left := c.instance.All()
	after, err := proc.MemoryOf(left)
	if err != nil {
		return err
	}
	checked, err := b.client.Do(load.Command{Do: "check", Size: b.sizes.Message})
	if err != nil {
		return err
	}
	b.noteWatch("reload", c, watched)
	b.run.Add("reload.dropped", c.name, float64(checked.Failed))
	b.run.Add("reload.live", c.name, float64(live)/float64(time.Millisecond)/float64(b.sizes.Reloads))
	b.run.Add("reload.processes", c.name, float64(len(left)-len(processes)))
	b.run.Add("reload.memory", c.name, float64(after.Pss-before.Pss)/1e6)
	return nil
}

// reloads reloads, and opens tunnels that stay in between. It returns how long all
// reloads took together until they were in service.
func (b *bench) reloads(c *contestant) (time.Duration, error) {
	var sum time.Duration
	for range b.sizes.Reloads {
		time.Sleep(min(beforeReload, 10*time.Duration(b.sizes.Settle)))
		live, err := c.instance.Reload()
		if err != nil {
			return 0, err
		}
		sum += live
		if err := b.open(c, load.EchoPath, openedBetween); err != nil {
			return 0, err
		}
	}
	return sum, nil
}

// noteWatch notes what has failed meanwhile.
func (b *bench) noteWatch(mode string, c *contestant, a load.Answer) {
	b.run.Add(mode+".failed", c.name, float64(a.Failed))
	if a.Failed > 0 {
		b.say("    %s: %d of %d requests failed, the last one with: %s", c.name, a.Failed, a.Count, a.Reason)
	}
}

func (b *bench) crash(c *contestant) error {
	if err := b.open(c, load.EchoPath, b.sizes.Held); err != nil {
		return err
	}
	if _, err := b.client.Do(load.Command{Do: "watch", Address: c.address(), Rate: watchRate}); err != nil {
		return err
	}
	killed := time.Now()
	err := c.instance.Crash()
	if err == nil {
		err = c.instance.WaitReady()
	}
	time.Sleep(min(time.Second, time.Duration(b.sizes.Settle))) // some failures show late
	watched, unwatched := b.client.Do(load.Command{Do: "unwatch"})
	if err != nil {
		return err
	}
	if unwatched != nil {
		return unwatched
	}
	checked, err := b.client.Do(load.Command{Do: "check", Size: b.sizes.Message})
	if err != nil {
		return err
	}
	b.noteWatch("crash", c, watched)
	b.run.Add("crash.dropped", c.name, float64(checked.Failed))
	last := 0.0
	if watched.Failed > 0 {
		last = float64(watched.LastFailure.Sub(killed)) / float64(time.Millisecond)
	}
	b.run.Add("crash.last", c.name, last)
	return nil
}

// allBack is how long every tunnel may take to echo again.
const allBack = 30 * time.Second

// resume measures from the death of the process that relays until every tunnel has
// answered. All are asked at once: what that takes by itself is measured beforehand.
func (b *bench) resume(c *contestant) error {
	tunnels, err := b.idleTunnels(c)
	if err != nil {
		return err
	}
	if err := b.open(c, load.EchoPath, tunnels); err != nil {
		return err
	}
	steady, err := b.echoAll()
	if err != nil {
		return err
	}
	killed := time.Now()
	if err := c.instance.Crash(); err != nil {
		return err
	}
	if _, err := b.echoAll(); err != nil {
		return err
	}
	b.run.Add("resume.last", c.name, float64(time.Since(killed))/float64(time.Millisecond))
	b.run.Add("resume.steady", c.name, float64(steady)/float64(time.Millisecond))
	return nil
}

// echoAll has every tunnel echo once, and returns how long that took.
func (b *bench) echoAll() (time.Duration, error) {
	began := time.Now()
	a, err := b.client.Do(load.Command{Do: "check", Size: b.sizes.Message, For: allBack})
	if err == nil && a.Failed > 0 {
		err = fmt.Errorf("%d of %d tunnels have not come back", a.Failed, a.Count+a.Failed)
	}
	return time.Since(began), err
}

// A pace in which tunnels move lasts so many times as long as others: as long again before
// the move, and for what follows it.
const movingTimes = 3

// move measures how fast tunnels go to the next generation, and how long messages take
// that are due meanwhile, beside those of the same pace that were due before.
func (b *bench) move(c *contestant) error {
	tunnels, err := b.idleTunnels(c)
	if err != nil {
		return err
	}
	if err := b.open(c, load.EchoPath, tunnels); err != nil {
		return err
	}
	if err := c.instance.Relieve(); err != nil {
		return err
	}
	paced := make(chan error, 1)
	measured := time.Duration(b.sizes.Measured)
	start := time.Now()
	go func() {
		a, err := b.client.Do(load.Command{Do: "paced", Size: b.sizes.Message, Rate: b.sizes.Rate, Warm: measured, For: movingTimes * measured})
		if err == nil && a.Failed > 0 {
			err = fmt.Errorf("%d tunnels were lost", a.Failed)
		}
		paced <- err
	}()
	time.Sleep(2 * measured)
	moved, err := c.instance.Move()
	if err := errors.Join(err, <-paced); err != nil {
		return err
	}
	before, err := b.between(start, moved.Began)
	if err != nil {
		return err
	}
	meanwhile, err := b.between(moved.Began, moved.Most)
	if err != nil {
		return err
	}
	const us = float64(time.Microsecond)
	b.run.Add("move.rate", c.name, 0.99*float64(moved.Tunnels)/moved.Most.Sub(moved.Began).Seconds())
	b.run.Add("move.over", c.name, float64(moved.Over.Sub(moved.Began))/float64(time.Millisecond))
	b.run.Add("move.steady", c.name, float64(before.P99)/us)
	b.run.Add("move.p99", c.name, float64(meanwhile.P99)/us)
	b.run.Add("move.max", c.name, float64(meanwhile.Max)/us)
	return nil
}

// between returns how long messages of the last pace took.
func (b *bench) between(from, to time.Time) (load.Latencies, error) {
	a, err := b.client.Do(load.Command{Do: "between", From: from, To: to})
	if err == nil && a.Count == 0 {
		err = fmt.Errorf("no message was due in %s", to.Sub(from))
	}
	return a.Latencies, err
}
