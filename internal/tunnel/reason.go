package tunnel

// Reason says why a tunnel ended. Each one has exactly one: the first cause.
type Reason uint8

// The reasons. Access log, metrics and lists use their String.
const (
	Open              Reason = iota // it has not ended
	DownstreamClosed                // both directions ended by a FIN, the client's first
	UpstreamClosed                  // both directions ended by a FIN, the server's first
	DownstreamReset                 // the client's connection was cut
	UpstreamReset                   // the server's connection was cut
	IdleTimeout                     // no byte for as long as the limit says
	MaxAge                          // it was as old as the limit says
	DeadPeer                        // a peer answered neither keepalive probes nor retransmissions
	DrainLimit                      // the generation drained for as long as the limit says
	Operator                        // the operator closed it
	Stopped                         // the process was told to stop
	Failed                          // a fault of ours, which is in the log
	LostInCrash                     // its process died, and what it left of the tunnel contradicts itself
	Quarantined                     // two processes died in a row while they worked on it
	RouteRemoved                    // the configuration has no place for it any more
	EndpointRemoved                 // its cluster does not have the endpoint any more
	EndpointUnhealthy               // the endpoint is not fit for new work
	numReasons
)

var reasons = [numReasons]string{
	Open:             "open",
	DownstreamClosed: "downstream closed",
	UpstreamClosed:   "upstream closed",
	DownstreamReset:  "downstream reset",
	UpstreamReset:    "upstream reset",
	IdleTimeout:      "idle timeout",
	MaxAge:           "max age",
	DeadPeer:         "dead peer",
	DrainLimit:       "drain limit",
	Operator:         "operator",
	Stopped:          "stopped",
	Failed:           "failed",
	LostInCrash:      "lost in crash",
	Quarantined:      "quarantined",
	RouteRemoved:     "route removed",

	EndpointRemoved:   "endpoint removed",
	EndpointUnhealthy: "endpoint unhealthy",
}

func (r Reason) String() string {
	if r < numReasons {
		return reasons[r]
	}
	return "unknown"
}

// isLoss says whether a connection was lost.
func (r Reason) isLoss() bool { return r == DownstreamReset || r == UpstreamReset || r == DeadPeer }
