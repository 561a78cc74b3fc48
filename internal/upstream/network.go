package upstream

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/http1"
	"holdfast/internal/metrics"
)

// keepAlive finds out about a host that vanished without a word in two minutes.
var keepAlive = net.KeepAliveConfig{Enable: true, Idle: 60 * time.Second, Interval: 15 * time.Second, Count: 4}

// New builds the clusters of cfg with the host's resolver and HTTP/1.1 connections.
// It resolves the names among the endpoints that are not known, and blocks until all
// are answered or ctx is done; every address of a name becomes an endpoint. The error names
// each cluster and endpoint that could not be resolved. Nothing is connected to.
// r counts; it may be nil. mayHave says of a descriptor whether a connection may have it,
// and connecting fails as if there were none (EMFILE) where it may not; nil: always.
func New(ctx context.Context, cfg *config.Config, known map[string][]netip.Addr, r *metrics.Registry, mayHave func(fd int) bool) (*Clusters, error) {
	buffers := new(http1.Buffers)
	return NewOn(ctx, cfg, known, r, Network{
		Lookup: func(ctx context.Context, name string) ([]netip.Addr, error) {
			return net.DefaultResolver.LookupNetIP(ctx, "ip", name)
		},
		Connect: func(ctx context.Context, network, address string, owner Owner) (Conn, error) {
			return connect(ctx, network, address, mayHave, http1.ClientOptions{
				Buffers:  buffers,
				Traffic:  http1.Traffic{Received: owner.Received, Sent: owner.Sent},
				OnIdle:   func(c *http1.Conn) { owner.Idle(c) },
				OnEnd:    owner.Ended,
				OnSwitch: owner.Taken,
			})
		},
	})
}

func connect(ctx context.Context, network, address string, mayHave func(fd int) bool, options http1.ClientOptions) (Conn, error) {
	dialer := net.Dialer{KeepAliveConfig: keepAlive}
	if mayHave != nil {
		dialer.Control = func(_, _ string, c syscall.RawConn) (err error) {
			outer := c.Control(func(fd uintptr) {
				if !mayHave(int(fd)) {
					err = os.NewSyscallError("socket", syscall.EMFILE)
				}
			})
			return errors.Join(outer, err)
		}
	}
	// The engine reads TCP_INFO of these sockets, which MPTCP does not fill.
	dialer.SetMultipathTCP(false)
	conn, err := dialer.DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	return http1.NewClient(conn, options), nil
}
