// Package flags has the response flags: short words for what went wrong with a request or a
// tunnel, and whose doing it was, as Envoy has them. A record of the access log carries a set
// of them; status and reason say the rest.
package flags

// Set is any number of flags. The zero value is none.
type Set uint32

// The flags, in the order in which a set's are written.
const (
	NoHealthyUpstream          Set = 1 << iota // UH
	UpstreamFailure                            // UF
	UpstreamOverflow                           // UO
	NoRoute                                    // NR
	NoCluster                                  // NC
	UpstreamTimeout                            // UT
	UpstreamTermination                        // UC
	UpstreamReset                              // UR
	UpstreamProtocol                           // UPE
	RetryLimit                                 // URX
	LocalReset                                 // LR
	LocalHealthCheck                           // LH
	DownstreamTermination                      // DC
	DownstreamProtocol                         // DPE
	StreamIdle                                 // SI
	Duration                                   // DT
	RateLimited                                // RL
	DelayInjected                              // DI
	FaultInjected                              // FI
	Unauthorized                               // UAEX
	InvalidHeader                              // IH
	MaxUpstreamDurationReached                 // UMSDR
	end
)

// Known are all flags.
const Known = end - 1

// A Flag is one of them in words.
type Flag struct {
	Flag    Set
	Name    string // as it is written
	Meaning string // for the documentation
}

// All are the flags in their order.
var All = [...]Flag{
	{NoHealthyUpstream, "UH", "No endpoint of the cluster can be used"},
	{UpstreamFailure, "UF", "No endpoint could be connected to"},
	{UpstreamOverflow, "UO", "A limit of the cluster, or of what is kept of bodies, was reached"},
	{NoRoute, "NR", "No virtual host or no route matches"},
	{NoCluster, "NC", "There is no such cluster"},
	{UpstreamTimeout, "UT", "The upstream's answer did not come within the route's `timeout`, or that to an upgrade within `tunnels.handshake_timeout`"},
	{UpstreamTermination, "UC", "The upstream closed its connection before its answer was complete. A tunnel of which one peer was dead has UC and DC: nobody tells which"},
	{UpstreamReset, "UR", "The upstream reset its connection"},
	{UpstreamProtocol, "UPE", "What the upstream sent is no valid answer"},
	{RetryLimit, "URX", "The request failed after as many retries as are allowed"},
	{LocalReset, "LR", "Holdfast cut it: the time of a drain or a stop was over, an operator closed it, or a fault of its own"},
	{LocalHealthCheck, "LH", "Holdfast itself reported to be unhealthy"},
	{DownstreamTermination, "DC", "The client has gone before the end"},
	{DownstreamProtocol, "DPE", "What the client sent is no valid request, or larger than it may be"},
	{StreamIdle, "SI", "No byte moved for too long, or too few: within `stream_idle_timeout`, a tunnel's `idle_timeout`, or the limits of a request's head and body"},
	{Duration, "DT", "A tunnel was as old as its `max_age` allows"},
	{RateLimited, "RL", "A rate limit refused it"},
	{DelayInjected, "DI", "A delay was injected"},
	{FaultInjected, "FI", "A fault was injected"},
	{Unauthorized, "UAEX", "The external authorisation refused it"},
	{InvalidHeader, "IH", "A field that must be valid is not"},
	{MaxUpstreamDurationReached, "UMSDR", "The upstream's answer took longer in all than it may. Nothing of this version says so"},
}

// Parse returns the flag of a name.
func Parse(name string) (Set, bool) {
	for _, f := range All {
		if f.Name == name {
			return f.Flag, true
		}
	}
	return 0, false
}

// Append appends the names of the set's flags with a comma between two; nothing for none.
func (s Set) Append(b []byte) []byte {
	first := true
	for i := 0; s != 0 && i < len(All); i++ {
		if s&All[i].Flag == 0 {
			continue
		}
		s &^= All[i].Flag
		if !first {
			b = append(b, ',')
		}
		first = false
		b = append(b, All[i].Name...)
	}
	return b
}

// String returns the names of the set's flags with a comma between two.
func (s Set) String() string { return string(s.Append(nil)) }
