// Package discovery finds out what clusters consist of, while they are in use: by asking for
// names ([New] with DNS) and by following a file. It tells of it, and changes nothing itself.
//
//	source := discovery.New(discovery.Options{Config: cfg, Endpoints: endpoints, Deliver: set, ...})
//	set(source.Begin())
//	source.Run(ctx)
//
// A failure changes nothing: what was found last stands until something else is found. All that
// comes from outside is bounded, and none of it gets into logs or the names of figures.
package discovery

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"sync/atomic"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/metrics"
)

// Endpoint is one that was found.
type Endpoint struct {
	Address string         // as configured or listed; of a service's host its name and port
	At      netip.AddrPort // where it is; zero for a unix socket, and where there are Addresses
	Path    string         // of a unix socket

	// Addresses are those of one that is a name, whatever addresses that has.
	Addresses []netip.AddrPort

	config.EndpointOptions
}

// Options say what is to be found, and who is told.
type Options struct {
	Config    *config.Discovery
	Endpoints []config.Endpoint // as configured
	Last      []Endpoint        // what somebody else has found last; what that has of Endpoints holds until there is an answer

	// Deliver is told of all endpoints whenever they have changed, Moved of the addresses of
	// one that is a name, where nothing else has. Settled is called once, when all is known
	// for the first time, or stays as it was last because it cannot be found out. All are
	// called by the goroutine of Run, one at a time.
	Deliver func([]Endpoint)
	Moved   func(address string, addresses []netip.AddrPort)
	Settled func()

	World  *World // nil: the host's
	Counts Counts
	Log    *slog.Logger
}

// Counts is what is counted of one cluster.
type Counts struct {
	Attempts, Successes, Failures, Empty, LeftOut *metrics.Counter
}

// Source is what finds the endpoints of one cluster.
type Source struct {
	o      Options
	paused atomic.Bool

	follow interface {
		begin() []Endpoint
		run(ctx context.Context)
		resume() // that it is not paused any more; anybody may call it
	}
}

// New returns a source that has not begun yet.
func New(o Options) *Source {
	if o.World == nil {
		o.World = new(World)
	}
	s := &Source{o: o}
	if o.Config.By == config.ByFile {
		s.follow = newFile(s)
	} else {
		s.follow = newNames(s)
	}
	return s
}

// Begin returns what is known before anything is asked.
func (s *Source) Begin() []Endpoint { return s.follow.begin() }

// Run finds out what there is, until ctx is done. It returns when all that it has begun has
// ended.
func (s *Source) Run(ctx context.Context) { s.follow.run(ctx) }

// Pause says whether nothing is to be found out for now. Any goroutine may call it.
func (s *Source) Pause(on bool) {
	s.paused.Store(on)
	if !on {
		s.follow.resume()
	}
}

// later adds up to a tenth, so that what was learnt at the same time is not asked for at the
// same time for ever.
func later(d time.Duration) time.Duration { return d + rand.N(d/10+1) }

// about is a time that is up to a quarter more or less.
func about(d time.Duration) time.Duration { return d - d/4 + rand.N(d/2+1) }
