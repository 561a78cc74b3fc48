package stream

import "sync/atomic"

// Resets are what the two ends of a pair of unix sockets that both are in this process tell each
// other by this, as sockets of TCP by a reset. It is set before the end is closed.
type Resets struct {
	ByPeer   atomic.Bool // the one that the tunnel has not got was given up
	ByTunnel atomic.Bool // the tunnel's was
}
