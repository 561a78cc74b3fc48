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
const patience = 10 * time.Second

// How much it does.
const (
	keptConnections = 4
	requestPause    = 20 * time.Millisecond // between two requests of one
	connectEvery    = 10 * time.Millisecond
	slowAnswers     = 2 // at a time

	// The first tunnel of each kind is kept for ever. The others live for a time
	// between these.
	shortLife = 500 * time.Millisecond
	longLife  = 5 * time.Second
	forEver   = 10_000 * time.Hour
)

// Kinds is how many kinds of tunnels there are.
const Kinds = len(kinds)

// A Command is what the canary is to do.
type Command struct {
	// Do is one of:
	//
	//	start   use the proxy at Address, with Tunnels tunnels of each kind
	//	report  say what you have seen
	//	killed  the process that has the Sockets is killed as soon as this is answered
	//	spoil   have a tunnel be spoiled on its way to the proxy, as How says
	//	end     close everything in order, and report
	Do string

	Address string
	Tunnels int
	Sockets []string // each as "ADDRESS ADDRESS": its own and the other end's
	How     string   // byte: one is changed; tunnel: it is cut
}

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
}

func newCanary() *canary {
	c := &canary{conns: newConns()}
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
		a.Report = c.tally.take()
		if err := answers.Encode(a); err != nil {
			return err
		}
	}
}

func (c *canary) do(cmd Command) error {
	switch cmd.Do {
	case "start":
		c.address = cmd.Address
		c.start(cmd.Tunnels)
	case "report":
	case "killed":
		c.conns.kill(cmd.Sockets)
	case "spoil":
		return c.spoil(cmd.How)
	case "end":
		c.end()
		c.work.Wait()
	default:
		return fmt.Errorf("there is no command %q", cmd.Do)
	}
	return nil
}

func (c *canary) start(tunnels int) {
	for range keptConnections {
		c.work.Go(c.keepAlive)
	}
	for range slowAnswers {
		c.work.Go(c.slowRequests)
	}
	c.work.Go(c.connect)
	for kind := range kinds {
		c.work.Go(func() { c.keepTunnel(kind, func() time.Duration { return forEver }) })
		for range tunnels - 1 {
			c.work.Go(func() {
				c.keepTunnel(kind, func() time.Duration { return shortLife + rand.N(longLife-shortLife) })
			})
		}
	}
}

// connect opens connections at its pace, however long they take.
func (c *canary) connect() {
	tick := time.NewTicker(connectEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			c.work.Go(c.oneRequest)
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
		c.tally.fail(nil, nil, &c.tally.Refused, "connect: %v", err)
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
