// Package config turns a Holdfast configuration file into a validated value that
// nobody changes afterwards.
//
// Two processes read one file. [Parse] is the proxy's and knows every key; [ParseSupervisor]
// is the supervisor's, strict about the sections that are its own and blind to
// the rest, so that a newer proxy may bring keys that an older supervisor has
// never heard of.
//
// Both report every mistake at once, as an error that holds one [Problem] each.
package config

import (
	"log/slog"
	"net/netip"
	"time"
)

// Config is everything that a proxy generation needs to know.
//
// A duration of 0 is "off" and a number or size of 0 is "unlimited" or "off", in
// all types of this package; files say it in those words.
type Config struct {
	Supervisor    // what the supervisor reads
	Drain         Drain
	Tunnels       Tunnels
	Recordings    []Recording   // aligned with Supervisor.AccessLogs
	HTTPListeners []Listener    // of either protocol, in the order of the file, aligned with Supervisor.Listeners
	VirtualHosts  []VirtualHost // in the order of the file
	Clusters      []Cluster     // in the order of the file
}

// Supervisor holds the sections that the supervisor reads.
type Supervisor struct {
	Process   Process
	Admin     Admin
	Log       Log
	Runtime   Runtime
	Reload    Reload
	Stop      Stop
	Tickets   Tickets
	Listeners []Socket

	AccessLogs []AccessLog // in the order of the file; no two of one path
}

// Stdout is the path of an access log that goes to the standard output.
const Stdout = "stdout"

// AccessLog is a file, or the standard output, that requests and tunnels are
// recorded in. What is recorded is in a [Recording].
type AccessLog struct {
	Path string // absolute, or Stdout
}

// Process is read at start only; a reload that changes it is refused.
type Process struct {
	Proxy string // absolute path of the proxy binary; "" means beside the supervisor's
}

// Admin is about the admin surface beside the unix socket in the runtime
// directory, which is always there.
type Admin struct {
	HTTP         netip.AddrPort // the zero value means off
	AllowActions bool           // whether HTTP may change anything
	Hosts        []string       // names, beside addresses and localhost, that a Host header may have; lower case
}

// Log is what both programs write about themselves.
type Log struct {
	Level  slog.Level
	Format string // "text" or "json"
}

// Runtime is about numbers that are overridden while generations run.
type Runtime struct {
	File string // absolute path of the file with overrides; "" means there is none
}

// Reload bounds what a reload may take.
type Reload struct {
	ReadyTimeout   time.Duration
	Probation      time.Duration
	MaxGenerations int // 0 means unlimited
}

// Stop is how the service ends.
type Stop struct {
	Delay   time.Duration // ready is negative, still accepting
	Timeout time.Duration // what is left after it is cut
}

// Socket is a listening socket as the supervisor sees it.
type Socket struct {
	Name     string
	Address  Address
	Mode     uint32 // permission bits of a unix socket
	IPv6Only bool   // of "[::]:port": whether IPv4 stays out
}

// Key is the identity of the socket over reloads: its address, and where the kernel
// chooses the port also its name, since such an address says nothing about where
// it is.
func (s Socket) Key() string {
	if s.Address.Network == "tcp" && s.Address.IP.Port() == 0 {
		return s.Name + "@" + s.Address.Key()
	}
	return s.Address.Key()
}

// Drain is how an old generation lets go of requests.
type Drain struct {
	IdleGrace     time.Duration // how long an idle keep-alive connection stays open
	StreamTimeout time.Duration // when a response still running is cut; 0: never
	CloseSpread   time.Duration // over which time tunnels are closed where they must be
}

// Tunnels are limits on tunnels, and what becomes of them; a route may override them.
type Tunnels struct {
	DrainTimeout     time.Duration // after which a draining generation closes its tunnels; 0: never
	IdleTimeout      time.Duration // no byte in either direction; 0: never
	MaxAge           time.Duration // 0: never
	HandshakeTimeout time.Duration // until the upstream's final answer to an upgrade; 0: never
	Buffer           int64         // most bytes held per direction while a receiver is slow
	KeepAlive        KeepAlive

	SurviveCrash        bool // they outlive the process that relays them
	MoveOnReload        bool // to the new generation; false: they stay with the old one
	CloseOnRouteRemoved bool // when they have moved, and their route or its cluster is gone

	CloseOnEndpointRemoved   bool // when their cluster does not have the endpoint any more
	CloseOnEndpointUnhealthy bool // while the endpoint is not fit for new work
}

// KeepAlive is how a peer of a tunnel that has vanished is found out (tcp(7)).
type KeepAlive struct {
	Idle     time.Duration // without a byte until the first probe; whole seconds
	Interval time.Duration // between two probes; whole seconds
	Count    int           // of probes without an answer
}

// Listener is what the proxy does on a listening socket of the same name.
type Listener struct {
	Name           string
	Limits         ListenerLimits
	TrustedProxies []netip.Prefix // whose forwarding fields are believed
	ReceivedProxy  ReceivedProxy
	TLS            *ListenerTLS // nil: none
	HTTP2          ListenerHTTP2
	Edge
	HealthCheck *HealthCheck // nil: none
	Filters     *Filters     // of all of its requests
	TCP         *TCP         // nil: it speaks HTTP; otherwise of the rest it has Limits.Connections, Limits.HeadTimeout for all that is read before it is relayed, and Allow and Deny of its Filters
}

// ListenerLimits bound what a client can take.
type ListenerLimits struct {
	Connections int           // at once, in one generation; 0: unlimited
	HeadSize    int64         // bytes of a request head: 431 beyond
	HeadTimeout time.Duration // from the first byte of a head to its last: 408 beyond
	BodySize    int64         // bytes of a request body: 413 beyond; 0: unlimited
	BodyTimeout time.Duration // between two bytes of a request body: 408 beyond
	BodyRate    int64         // bytes of a request body per second, over BodyTimeout: 408 below; 0: none
	IdleTimeout time.Duration // of a kept-alive connection between two requests

	HTTP2Streams int // requests at once on a connection of HTTP/2: others are refused, and may be sent again
}

// VirtualHost is a set of domains and their routes.
type VirtualHost struct {
	Name      string
	Listeners []string // names; never empty: a file that names none means all
	Domains   []string // lower case: exact, "*.suffix", or "*"
	Filters   *Filters // of all of its requests
	Routes    []Route  // the first that matches wins
	Edits
}

// Route says what happens to the requests that it matches. Exactly one of
// Clusters, ClusterHeader, Redirect and Direct is set.
type Route struct {
	Name              string // unique in its virtual host; "" means none
	Match             Match
	WebSocket         bool
	Clusters          []WeightedCluster // weights are positive in sum; routes may share them
	Redirect          *Redirect
	PrefixRewrite     string // "" means none
	HostRewrite       string // "" means none
	AutoHostRewrite   bool
	Timeout           time.Duration // from the request's end to the response's head; 0: never
	StreamIdleTimeout time.Duration // no byte of request or response moved; 0: never
	RequestBuffer     int64         // bytes of a body that is read whole before an endpoint is chosen; 0: off
	Retry             *Retry        // nil: none
	Mirror            *Mirror       // nil: none
	Priority          Priority      // which limits of the clusters hold
	Tunnels           Tunnels       // the defaults with the route's own keys laid over
	Filters           *Filters
	Actions
}

// WeightedCluster is a share of a route's requests.
type WeightedCluster struct {
	Cluster string
	Weight  Dynamic // from 0 to MaxWeight
}

// Redirect answers with a Location; empty parts stay as the request had them.
type Redirect struct {
	Scheme string // "http" or "https"
	Host   string // with or without a port
	Port   int    // 0 means as requested
	Path   string // replaces path and query
	Status int    // 301, 302, 303, 307 or 308

	PrefixRewrite string        // replaces the matched prefix
	RegexRewrite  *RegexRewrite // replaces matches in the path
	StripQuery    bool
}

// Cluster is a named group of endpoints.
type Cluster struct {
	Name           string
	Endpoints      []Endpoint
	Discovery      Discovery
	Balancing      Balancing
	HealthCheck    *EndpointCheck // nil: none
	Outliers       *Outliers      // nil: none is looked for
	Breakers       Breakers
	Connecting     Connecting
	TLS            *ClusterTLS // nil: none
	Protocol       Protocol
	HTTP2          ClusterHTTP2
	WarmingTimeout time.Duration // how long a generation waits until it is warm before it says ready
	ConnectTimeout time.Duration
	IdleTimeout    time.Duration // of a pooled connection
	RetryBudget    RetryBudget
	Edits
}

// Endpoint is an address as configured: "host:port" with an IP address or a name
// that is resolved, or "unix:/path".
type Endpoint struct {
	Address string
	SRV     bool // Address is the name of a service, without a port: its SRV records have the rest
	EndpointOptions
}

// EndpointOptions are what an endpoint may have besides its address.
type EndpointOptions struct {
	Weight   int64             // at least 1; 0 is 1
	Priority int               // 0 comes first
	Metadata map[string]string // for those who look
}
