// Package canary is what looks, from outside, whether a proxy keeps its promise: a
// process with clients and upstreams of its own that opens connections, sends requests
// and keeps tunnels through the proxy, and knows of every byte where it belongs. It is
// a process by itself so that nothing that befalls the proxy's disturbs it.
package canary

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"
)

// patience is how long anything may take before it counts as failed.
const patience = 30 * time.Second

// How much it does.
const (
	keptConnections = 4
	requestPause    = 20 * time.Millisecond // between two requests of one
	connectEvery    = 10 * time.Millisecond
	slowAnswers     = 2 // at a time

	// The first half of the tunnels of each kind is kept for ever. The others live for
	// a time between these.
	shortLife = 500 * time.Millisecond
	longLife  = 5 * time.Second
	forEver   = 10_000 * time.Hour

	opensAtOnce = 64 // tunnels
)

// Kinds is how many kinds of tunnels there are.
const Kinds = len(kinds)

// A Command is what the canary is to do.
type Command struct {
	// Do is one of:
	//
	//	start   use the proxy at Address, with Tunnels tunnels of each kind, and besides
	//	        with Quiet ones that carry little and are kept for ever
	//	report  say what you have seen
	//	killed  the process that has the Sockets is killed as soon as this is answered
	//	storm   any process may be killed from now on: have tunnels, and nothing else,
	//	        under way
	//	calm    that is over
	//	spoil   have a tunnel be spoiled on its way to the proxy, as How says
	//	end     close everything in order, and report
	Do string

	Address string
	Tunnels int
	Quiet   int
	Sockets []string // each as "ADDRESS ADDRESS": its own and the other end's
	How     string   // byte: one is changed; tunnel: it is cut
}

// reports says whether the answer has a report.
func (cmd *Command) reports() bool { return cmd.Do == "report" || cmd.Do == "end" }

// An Answer is the answer to a command.
type Answer struct {
	Error  string `json:",omitempty"`
	Report Report

	// The first answer is to no command. It says where the upstream is.
	Upstream string `json:",omitempty"`
}

// canary is all that is under way.
type canary struct {
	address string
	tally   tally
	conns   *conns

	live context.Context // until everything is to end
	end  context.CancelFunc
	work sync.WaitGroup

	tunnels atomic.Uint64 // so many were begun
	opening sync.Map      // by their numbers: those that no upstream has accepted yet
	opens   chan struct{} // has room for one more that opens

	// requests is held for reading during each, and for writing during a storm. Who
	// keeps a connection gives it up after one.
	requests sync.RWMutex
	storms   atomic.Int64
}

func newCanary() *canary {
	c := &canary{conns: newConns(), opens: make(chan struct{}, opensAtOnce)}
	c.tally.began = make(map[*tunnel]time.Time)
	c.live, c.end = context.WithCancel(context.Background())
	return c
}

// Serve does what the commands say that come from in, until it ends.
func Serve(in io.Reader, out io.Writer) error {
	c := newCanary()
	defer c.end()
	upstream, closeUpstream, err := c.serveUpstream()
	if err != nil {
		return err
	}
	defer closeUpstream()
	answers := json.NewEncoder(out)
	if err := answers.Encode(Answer{Upstream: upstream}); err != nil {
		return err
	}
	for commands := json.NewDecoder(in); ; {
		var cmd Command
		if err := commands.Decode(&cmd); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		var a Answer
		if err := c.do(cmd); err != nil {
			a.Error = err.Error()
		}
		if cmd.reports() {
			a.Report = c.tally.take()
		}
		if err := answers.Encode(a); err != nil {
			return err
		}
	}
}

func (c *canary) do(cmd Command) error {
	switch cmd.Do {
	case "start":
		c.address = cmd.Address
		c.request()
		c.start(cmd.Tunnels, cmd.Quiet)
	case "report":
	case "killed":
		c.conns.kill(cmd.Sockets)
	case "storm":
		c.storm(true)
	case "calm":
		c.storm(false)
	case "spoil":
		return c.spoil(cmd.How)
	case "end":
		c.storm(false)
		c.end()
		c.work.Wait()
	default:
		return fmt.Errorf("there is no command %q", cmd.Do)
	}
	return nil
}

// request begins to send requests.
func (c *canary) request() {
	for range keptConnections {
		c.work.Go(c.keepAlive)
	}
	for range slowAnswers {
		c.work.Go(c.slowRequests)
	}
	c.work.Go(c.connect)
}

// start begins to use tunnels.
func (c *canary) start(ofEach, quietOnes int) {
	always := func() time.Duration { return forEver }
	aWhile := func() time.Duration { return shortLife + rand.N(longLife-shortLife) }
	for i := range kinds {
		for n := range ofEach {
			life := always
			if n >= (ofEach+1)/2 {
				life = aWhile
			}
			c.work.Go(func() { c.keepTunnel(&kinds[i], life) })
		}
	}
	for range quietOnes {
		c.work.Go(func() { c.keepTunnel(&quietKind, always) })
	}
}

// storm has requests pause, and counts apart what cannot be opened, while generations
// are killed that nobody can know the sockets of.
func (c *canary) storm(rages bool) {
	if rages == c.tally.stormy() {
		return
	}
	if rages {
		c.storms.Add(1)
		c.requests.Lock()
		c.tally.storm(true)
	} else {
		c.conns.killAll() // what became of them may be noticed later
		c.tally.storm(false)
		c.requests.Unlock()
	}
}

// connect opens connections at its pace, however long they take.
func (c *canary) connect() {
	tick := time.NewTicker(connectEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			if c.requests.TryRLock() {
				c.work.Go(func() {
					defer c.requests.RUnlock()
					c.oneRequest()
				})
			}
		case <-c.live.Done():
			return
		}
	}
}

// dial opens a connection.
func (c *canary) dial(address string) (*conn, bool) {
	c.tally.count(func(r *Report) { r.Connections++ })
	conn, err := c.conns.dial(address)
	if err != nil {
		c.tally.fail(&c.tally.Refused, "connect: %v", err)
	}
	return conn, err == nil
}

// pause waits, until the end at most.
func (c *canary) pause(d time.Duration) { wait(c.live, d) }

func wait(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}
