package headers

import (
	"fmt"
	"slices"
	"strings"
)

// MostLines is how many fields one set of edits may set and add, and remove: codecs bound
// how many fields there are.
const MostLines = 16

// Edits are changes to the fields of a head, in this order: fields are removed, set, which
// leaves one of the name, and added to what is there.
type Edits struct {
	Remove []string
	Set    []Line
	Add    []Line
}

// Line is a field to be made.
type Line struct {
	Name  string
	Value Value
}

// ofCodec are the fields that say how a message is carried: codecs write them, and each
// reader goes by them.
var ofCodec = []string{
	"Host", "Content-Length", "Transfer-Encoding", "Connection", "Upgrade", "Trailer", "TE", "Expect",
	"Keep-Alive", "Proxy-Connection", "HTTP2-Settings",
}

// OfCodec says whether a field is one of those that say how a message is carried, and so of no
// request and no response that a codec hands on.
func OfCodec(name string) bool {
	return slices.ContainsFunc(ofCodec, func(n string) bool { return strings.EqualFold(n, name) })
}

// ofForwarding are the fields of a request that say whose it is: upstreams believe them.
var ofForwarding = []string{"Forwarded", "X-Request-Id"}

// Check says why a field cannot be edited in a request, or in a response: "" if it can.
// Names are compared as careless readers do, who take "_" for "-".
func Check(name string, request, remove bool) (why string) {
	folded := strings.ReplaceAll(name, "_", "-")
	for _, n := range ofCodec {
		if strings.EqualFold(folded, n) {
			return codecsOwn(n, name)
		}
	}
	switch {
	case hasPrefix(folded, "Sec-WebSocket-"):
		return "belongs to the handshake of WebSocket, which the two ends settle between themselves"
	case !request || remove:
		return ""
	case hasPrefix(folded, "X-Forwarded-"):
		return "says who the client is, and is made of the connection; see trusted_proxies"
	}
	for _, n := range ofForwarding {
		if strings.EqualFold(folded, n) {
			return "says who the client is, and is made of the connection; see trusted_proxies"
		}
	}
	return ""
}

// codecsOwn says what a field of the codec's is, by the name under which it was meant.
func codecsOwn(name, written string) string {
	switch {
	case name == "Host":
		return "is set by host_rewrite, auto_host_rewrite and host_rewrite_header"
	case strings.EqualFold(name, written):
		return "says how a message is carried over one connection, which the proxy writes itself"
	}
	return fmt.Sprintf("is taken for %s, which says how a message is carried over one connection: the proxy writes it itself", name)
}

func hasPrefix(s, prefix string) bool {
	return len(s) >= len(prefix) && strings.EqualFold(s[:len(prefix)], prefix)
}
