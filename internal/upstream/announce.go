package upstream

import (
	"cmp"

	"holdfast/internal/proxyheader"
)

// Announcement is what the PROXY header of a new connection says, where the cluster is
// configured to begin with one: the client whose connection it is to be, and where that
// was taken. The zero value is a connection of our own, as for a health check.
type Announcement = proxyheader.Announcement

// Announces says whether connections to the cluster's endpoints begin with a PROXY header.
// If so, who connects sets [Attempt.Announcement] before. A connection that announces a client
// is never kept for another request.
func (c *Cluster) Announces() bool { return c.cfg.Connecting.ProxyProtocol != 0 }

// ConnectAttempts is how many of the cluster's endpoints are tried until one is connected to.
func (c *Cluster) ConnectAttempts() int { return cmp.Or(c.cfg.Connecting.Attempts, connectAttempts) }

// connectAttempts is that where the configuration was not read from a file.
const connectAttempts = 3

// Announces is that of its cluster.
func (e *Endpoint) Announces() bool { return e.cluster.Announces() }

// Header returns what a new connection to the endpoint begins with; nil: nothing.
func (e *Endpoint) Header(a Announcement) []byte {
	version := e.cluster.cfg.Connecting.ProxyProtocol
	if version == 0 {
		return nil
	}
	return proxyheader.Append(nil, version, a)
}
