package config

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"holdfast/internal/headers"
	"holdfast/internal/urlpath"
)

// Edge is what a listener believes of those who connect, how it reads their paths, and what
// it tells them about itself.
type Edge struct {
	TrustedHops         int      // proxies in front, each of which is believed; 0: see TrustedProxies
	InternalHeaders     []string // names, or beginnings of names with a "*" behind, that nobody else may send
	Forwarded           bool     // whether a Forwarded field is written
	RequestIDInResponse bool
	Server              ServerHeader
	Path                urlpath.Policy
}

// ServerHeader says what becomes of the Server field of responses. The zero value leaves it
// alone.
type ServerHeader struct {
	Action ServerAction
	Name   string // of those actions that set one
}

// A ServerAction is what is done to the Server field of a response.
type ServerAction uint8

const (
	PassServer ServerAction = iota
	DropServer
	OverwriteServer
	AppendServer // where there is none
)

// MaxHops is how many proxies in front can be counted.
const MaxHops = 32

// maxInternalHeaders bounds what is compared with each field of a request.
const maxInternalHeaders = 64

func readEdge(t *table, l *Listener) {
	t.hops("trusted_hops", &l.TrustedHops)
	if l.TrustedHops > 0 && len(l.TrustedProxies) > 0 {
		t.at("trusted_hops").fail("excludes trusted_proxies: the one counts the proxies in front, the other names them; drop one of the two")
	}
	internal := list(t, "internal_headers", headerPattern)
	for i, e := range internal {
		same := func(other entry[string]) bool { return strings.EqualFold(other.value, e.value) }
		if j := slices.IndexFunc(internal, same); j < i {
			e.fail("%s is listed twice (%s)", quote(e.value), internal[j].node)
			continue
		}
		l.InternalHeaders = append(l.InternalHeaders, e.value)
	}
	if len(internal) > maxInternalHeaders {
		t.at("internal_headers").fail("has %d names; at most %d are compared with each field", len(internal), maxInternalHeaders)
	}
	read(t, "forwarded", &l.Forwarded, either("off", "append"))
	t.boolean("request_id_in_response", &l.RequestIDInResponse)
	read(t, "server", &l.Server, serverHeader)
	l.Path = readPathPolicy(t.table("path"))
}

func readPathPolicy(t *table) urlpath.Policy {
	var p urlpath.Policy
	normalize, merge := true, true
	t.boolean("normalize", &normalize)
	t.boolean("merge_slashes", &merge)
	read(t, "encoded_slashes", &p.Encoded, encodedSlashes)
	read(t, "parameters", &p.RefuseParams, either("keep", "reject"))
	p.Off, p.KeepSlashes = !normalize, !merge
	if p.Off {
		for _, key := range []string{"merge_slashes", "encoded_slashes", "parameters"} {
			t.inapplicable(key, "has no meaning beside normalize = false, which leaves every path as it came; drop one of the two")
		}
		p = urlpath.Policy{Off: true}
	}
	t.strict()
	return p
}

// hops reads a number of proxies, or the word for none.
func (t *table) hops(key string, dst *int) {
	if n, ok := t.get(key); ok {
		v, ok := n.raw.(int64)
		if s, word := n.raw.(string); word && s == "off" {
			v = 0
		} else if !ok || v < 1 || v > MaxHops {
			n.fail(`must be an integer from 1 to %d, or "off", found %s`, MaxHops, describe(n.raw))
			return
		}
		*dst = int(v)
	}
	if *dst == 0 {
		t.set(key, `"off"`)
	} else {
		t.set(key, strconv.Itoa(*dst))
	}
}

var encodedWords = []string{urlpath.Reject: "reject", urlpath.Keep: "keep", urlpath.Decode: "decode"}

var encodedSlashes = form[urlpath.Encoded]{alternatives(encodedWords), func(s string) (urlpath.Encoded, error) {
	word, err := oneOf(encodedWords...).parse(s)
	return urlpath.Encoded(max(0, slices.Index(encodedWords, word))), err
}, func(e urlpath.Encoded) string { return encodedWords[e] }}

// headerPattern is the name of a field, or the beginning of some.
var headerPattern = form[string]{`the name of a header like "X-Internal-User", or the beginning of some like "X-Internal-*"`, func(s string) (string, error) {
	name := strings.TrimSuffix(s, "*")
	switch {
	case s == "*":
		return "", errors.New("it would be every header")
	case name == "" || len(name) > 128 || !isToken(name) || strings.Contains(name, "*"):
		return "", errForm
	case headers.OfCodec(s):
		return "", errors.New("it is about the connection and never goes further")
	}
	return s, nil
}, asIs}

const (
	overwriteServer = "overwrite:"
	appendServer    = "append-if-absent:"
)

var serverHeader = form[ServerHeader]{`"pass", "off", "overwrite:NAME" or "append-if-absent:NAME"`, func(s string) (ServerHeader, error) {
	switch s {
	case "pass":
		return ServerHeader{}, nil
	case "off":
		return ServerHeader{Action: DropServer}, nil
	}
	h := ServerHeader{Action: OverwriteServer}
	name, ok := strings.CutPrefix(s, overwriteServer)
	if !ok {
		h.Action = AppendServer
		name, ok = strings.CutPrefix(s, appendServer)
	}
	const most = 128
	switch {
	case !ok:
		return ServerHeader{}, errForm
	case name == "" || len(name) > most || name != strings.TrimSpace(name) || strings.ContainsFunc(name, func(r rune) bool { return r < ' ' || r >= 0x7f }):
		return ServerHeader{}, fmt.Errorf("the name is 1 to %d ASCII characters, without spaces around it", most)
	}
	h.Name = name
	return h, nil
}, func(h ServerHeader) string {
	switch h.Action {
	case DropServer:
		return "off"
	case OverwriteServer:
		return overwriteServer + h.Name
	case AppendServer:
		return appendServer + h.Name
	}
	return "pass"
}}

// checkSpelling refuses routes that match no path as it is once the listeners of their
// virtual host have normalised it.
func checkSpelling(host *table, routes []Route, policies []urlpath.Policy) {
	if !slices.ContainsFunc(routes, func(r Route) bool {
		return !reachable(r.Match.Prefix, policies) || !reachable(r.Match.Path, policies) || !urlpath.Resolved(r.PrefixRewrite)
	}) {
		return // as almost always; there may be a hundred thousand routes
	}
	for _, e := range host.array("routes") {
		route := newTable(e)
		match := newTable(route.at("match"))
		checkMatched(match, "prefix", "x", policies) // more may follow
		checkMatched(match, "path", "", policies)
		s, ok := route.keys["prefix_rewrite"].(string)
		if _, err := matchPath.parse(s); ok && err == nil && !urlpath.Resolved(s+"x") && allNormalise(policies) {
			route.at("prefix_rewrite").fail("has a dot segment; write the path that is meant")
		}
	}
}

// checkMatched refuses what matches nothing, whatever follows it in a path.
func checkMatched(match *table, key, tail string, policies []urlpath.Policy) {
	s, ok := match.keys[key].(string)
	if _, err := matchPath.parse(s); !ok || err != nil || reachable(s+tail, policies) {
		return
	}
	if normal, err := policies[0].Normalise(s); err != nil {
		match.at(key).fail("matches nothing: %v is refused, see listeners.path", err)
	} else {
		match.at(key).fail("matches nothing: paths are normalised before, see listeners.path; write %s", quote(normal))
	}
}

// reachable says whether one of these leaves a path as it is, if there is one.
func reachable(path string, policies []urlpath.Policy) bool {
	return path == "" || len(policies) == 0 || slices.ContainsFunc(policies, func(p urlpath.Policy) bool {
		normal, err := p.IsNormal(path)
		return normal && err == nil
	})
}

func allNormalise(policies []urlpath.Policy) bool {
	return !slices.ContainsFunc(policies, func(p urlpath.Policy) bool { return p.Off })
}
