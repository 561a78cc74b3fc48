package upstream

import (
	"context"
	"net"
	"net/netip"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/http1"
	"holdfast/internal/metrics"
	"holdfast/internal/stream"
	"holdfast/internal/task"
)

// KeepAlive is what all TCP connections have. It finds out about a host that vanished
// without a word in two minutes.
var KeepAlive = stream.KeepAlive{Idle: 60 * time.Second, Interval: 15 * time.Second, Count: 4}

// New builds the clusters of cfg with the host's resolver and HTTP/1.1 connections.
// It resolves the names among the endpoints that are not known, and blocks until all
// are answered or ctx is done; every address of a name becomes an endpoint. The error names
// each cluster and endpoint that could not be resolved. Nothing is connected to.
// r counts; it may be nil. loops are all on which there will be requests: the number of each
// is its place. mayHave says of a descriptor whether a connection may have it,
// and connecting fails as if there were none (EMFILE) where it may not; nil: always.
func New(ctx context.Context, cfg *config.Config, known map[string][]netip.Addr, r *metrics.Registry, loops []*stream.Loop, mayHave func(fd int) bool) (*Clusters, error) {
	spare := make(spares, len(loops))
	return NewOn(ctx, cfg, known, r, loops, Network{
		Lookup: func(ctx context.Context, name string) ([]netip.Addr, error) {
			return net.DefaultResolver.LookupNetIP(ctx, "ip", name)
		},
		Connect: func(t *task.Task, l *stream.Loop, network, address string, until time.Time, a *Attempt, owner Owner) (Conn, error) {
			conn := spare.take(l.Index, owner)
			a.Wait(conn)
			err := dial(t, l, conn, network, address, &stream.DialOptions{Until: until, MayHave: mayHave, KeepAlive: KeepAlive})
			if err != nil {
				return nil, err
			}
			return conn, nil
		},
	})
}

// client is a connection, and the memory of those that became tunnels before it.
type client struct {
	*http1.Conn
	owner Owner
}

// spares are clients by the loop, on whose goroutine they are used, that have no connection any
// more.
type spares [][]*client

// mostSpare is how many a loop keeps: more than that are hardly ever about to become tunnels.
const mostSpare = 32

// take returns a Conn for a connection of owner's, which takes part again if it becomes a
// tunnel.
func (s spares) take(loop int, owner Owner) *http1.Conn {
	if last := len(s[loop]) - 1; last >= 0 {
		c := s[loop][last]
		s[loop] = s[loop][:last]
		c.owner = owner
		c.Renew(owner.Traffic)
		return c.Conn
	}
	c := &client{owner: owner}
	c.Conn = http1.NewClient(http1.ClientOptions{
		Traffic:  owner.Traffic,
		OnIdle:   func(conn *http1.Conn) { c.owner.Idle(conn) },
		OnEnd:    func(byPeer bool) { c.owner.Ended(byPeer) },
		OnSwitch: func() { c.owner.Taken() },
		OnOver: func() {
			c.owner = Owner{}
			if len(s[loop]) < mostSpare {
				s[loop] = append(s[loop], c)
			}
		},
	})
	return c.Conn
}

// dial connects conn. Its errors say what net's do.
func dial(t *task.Task, l *stream.Loop, conn *http1.Conn, network, address string, o *stream.DialOptions) error {
	if network == "unix" {
		if err := conn.DialUnix(t, l, address, o); err != nil {
			return &net.OpError{Op: "dial", Net: network, Addr: &net.UnixAddr{Name: address, Net: network}, Err: err}
		}
		return nil
	}
	to, err := netip.ParseAddrPort(address)
	if err != nil {
		return err
	}
	if err := conn.Dial(t, l, to, o); err != nil {
		return &net.OpError{Op: "dial", Net: network, Addr: net.TCPAddrFromAddrPort(to), Err: err}
	}
	return nil
}
