package config

import (
	"time"
)

// Edits are the header fields that a virtual host, a route or a cluster changes.
type Edits struct {
	RequestHeaders  *Headers // on the way to the upstream; nil: none
	ResponseHeaders *Headers // on the way to the client; nil: none
}

// Headers are changes to the fields of a head: first what is removed, then what is set, then
// what is added. The values may have variables, which package headers knows.
type Headers struct {
	Remove []string
	Set    []Header // sorted by name
	Add    []Header // sorted by name
}

// Header is a field to be made.
type Header struct{ Name, Value string }

// Actions are what a route does to requests and responses besides sending them somewhere.
// The zero value does nothing.
type Actions struct {
	Edits

	ClusterHeader string // the field that names the cluster; "" means none
	SplitByHash   bool   // equal hashes get the same one of several clusters

	Direct *DirectResponse // the answer; nil means none

	Upgrades            []string // tokens besides "websocket", in lower case
	Origins             []string // of those who may upgrade; nil means everybody
	RefuseWithoutOrigin bool     // beside Origins: whether an upgrade without Origin is refused

	RegexRewrite      *RegexRewrite // of the path
	HostRewriteHeader string        // the field that names the host; "" means none

	MaxBodySize int64 // bytes of a request's body: 413 beyond; 0: unlimited
	MaxHeadSize int64 // bytes of a request's head: 431 beyond; 0: unlimited

	CORS       *CORS
	HashPolicy []HashPolicy // in order
}

// DirectResponse is an answer of our own.
type DirectResponse struct {
	Status      int
	Body        string // of the file, once [Config.ReadBodies] has read it
	File        string // absolute; "" means that Body is in the configuration
	ContentType string // of the body
}

// RegexRewrite replaces every match of an RE2 expression in a path.
type RegexRewrite struct {
	Pattern      string
	Substitution string // as in the file: \1 is the first group
}

// CORS is which pages of other origins may read the answers (the Fetch standard).
type CORS struct {
	AllowOrigins     []string // as [Actions.Origins], or "*"
	AllowMethods     []string
	AllowHeaders     []string
	ExposeHeaders    []string
	MaxAge           time.Duration // that the answer to a preflight holds; 0: nothing is said of it
	AllowCredentials bool
}

// HashPolicy is what a request's hash is made of: exactly one of Header, Cookie and
// SourceAddress.
type HashPolicy struct {
	Header        string
	Cookie        *HashCookie
	SourceAddress bool
	Terminal      bool // the rest is left out if the hash is made of something already
}

// HashCookie is a cookie that a hash is made of.
type HashCookie struct {
	Name string
	Make bool          // one is made where the client has none
	TTL  time.Duration // of one that is made; 0: until the browser ends
	Path string        // of one that is made; "" means none is said
}

// readUpgrades reads which upgrades become tunnels.
func readUpgrades(t *table, r *Route) {
	t.boolean("websocket", &r.WebSocket)
	readTokens(t, r)
	readOrigins(t, r)
}

// readLimits reads how much of a request the route takes.
func readLimits(t *table, r *Route) {
	read(t, "max_body_size", &r.MaxBodySize, sizeOrUnlimited)
	read(t, "max_head_size", &r.MaxHeadSize, sizeOrUnlimited)
}

// answersItself says whether the route sends no request anywhere, and by which key.
func (r *Route) answersItself() (key string, does bool) {
	switch {
	case r.Redirect != nil:
		return "redirect", true
	case r.Direct != nil:
		return "direct_response", true
	}
	return "", false
}

// MakesTunnels says whether upgrades may become tunnels here.
func (r *Route) MakesTunnels() bool { return r.WebSocket || len(r.Upgrades) > 0 }
