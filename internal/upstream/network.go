package upstream

import (
	"context"
	"net"
	"net/netip"
	"time"

	"holdfast/internal/http1"
	"holdfast/internal/stream"
	"holdfast/internal/task"
)

// KeepAlive is what all TCP connections have. It finds out about a host that vanished
// without a word in two minutes.
var KeepAlive = stream.KeepAlive{Idle: 60 * time.Second, Interval: 15 * time.Second, Count: 4}

// New builds the clusters of a configuration with HTTP/1.1 connections, on the host's network
// unless there is another one in o. It resolves the names among the endpoints that are not
// known, and blocks until all are answered or ctx is done; every address of a name becomes an
// endpoint. The error names each cluster and endpoint that could not be resolved. Nothing is
// connected to.
func New(ctx context.Context, o Options) (*Clusters, error) {
	if o.Network.Lookup == nil {
		o.Network.Lookup = func(ctx context.Context, name string) ([]netip.Addr, error) {
			return net.DefaultResolver.LookupNetIP(ctx, "ip", name)
		}
	}
	if o.Network.Connect == nil {
		o.Network.Connect = connector(&o)
	}
	return newOn(ctx, o)
}

// connector makes HTTP/1.1 connections.
func connector(o *Options) func(*task.Task, *stream.Loop, string, string, time.Time, *Attempt, Owner) (Conn, error) {
	spare := make(spares, len(o.Loops))
	return func(t *task.Task, l *stream.Loop, network, address string, until time.Time, a *Attempt, owner Owner) (Conn, error) {
		conn := spare.take(l.Index, owner)
		a.Wait(conn)
		err := dialOn(t, l, conn, network, address, &stream.DialOptions{
			Until: until, MayHave: o.MayHave, KeepAlive: KeepAlive, Source: a.Source(), First: a.Header(), TLS: a.TLS(),
		})
		if err != nil {
			return nil, err
		}
		if s := conn.Secure(); s != nil && s.State().DidResume {
			a.Resumed()
		}
		return conn, nil
	}
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

// dialOn connects conn. Its errors say what net's do.
func dialOn(t *task.Task, l *stream.Loop, conn *http1.Conn, network, address string, o *stream.DialOptions) error {
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
