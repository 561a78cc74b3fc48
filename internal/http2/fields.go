package http2

import (
	"errors"
	"fmt"
	"net/http"
	"net/textproto"
	"slices"
	"strings"

	"golang.org/x/net/http/httpguts"

	"holdfast/internal/exchange"
	"holdfast/internal/http1"
)

// maxFields is how many fields a head or trailers may have, as in HTTP/1.
const maxFields = 200

// maxHeaderList is the most of a head or of trailers, as HTTP/2 counts it (RFC 9113 §6.5.2): what
// HTTP/1 takes.
const maxHeaderList = 64 << 10

// errManyFields says that a head has more fields than are taken.
var errManyFields = fmt.Errorf("more than %d fields", maxFields)

// isConnectionField says of a field that it is about the connection: a message of HTTP/2 that has
// one is malformed (RFC 9113 §8.2.2). TE is not among them, which may say "trailers".
func isConnectionField(name string) bool {
	switch len(name) {
	case 7:
		return strings.EqualFold(name, "upgrade")
	case 10:
		return strings.EqualFold(name, "connection") || strings.EqualFold(name, "keep-alive")
	case 16:
		return strings.EqualFold(name, "proxy-connection")
	case 17:
		return strings.EqualFold(name, "transfer-encoding")
	}
	return false
}

// isName says whether a field can have this name: a token (RFC 9110 §5.1). That it came in lower
// case the library has seen to.
func isName(name string) bool { return httpguts.ValidHeaderFieldName(name) }

// isValue says whether a field can have this value: no CR, LF, NUL or other control character
// than HTAB, as in HTTP/1 (RFC 9113 §8.2.1 forbids the first three).
func isValue(value string) bool { return httpguts.ValidHeaderFieldValue(value) }

// appendFields adds to fields those of a message that has come, by name, since the library does
// not know in which order they came. It fails where HTTP/1 would take the message for something
// else, or HTTP/2 forbids it. Content-Length and what is meant for one hop is left out: who wants
// that looks for it before.
func appendFields(fields exchange.Fields, h http.Header) (exchange.Fields, error) {
	had := len(fields)
	names := make([]string, 0, len(h)) // on the stack it would have that of the goroutine grow
	for name := range h {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		switch {
		case !isName(name):
			return fields, errors.New("a field without a valid name")
		case isConnectionField(name):
			return fields, fmt.Errorf("the field %s, which is about a connection", name)
		case http1.IsLookalike(name):
			return fields, fmt.Errorf("the field %s", name)
		}
		plain := http1.IsPlain(name)
		for _, value := range h[name] {
			switch {
			case !isValue(value):
				return fields, errors.New("a control character in the field " + name)
			case len(fields)-had == maxFields:
				return fields, errManyFields
			case plain:
				fields = append(fields, exchange.Field{Name: name, Value: strings.Trim(value, " \t")})
			}
		}
	}
	return fields, nil
}

// isGRPC says whether a response is one of gRPC, whose trailers are no fields of the head that came
// late, but metadata of its own: how the call ended, and whatever the program has to say about it
// ("Trailers" in gRPC's PROTOCOL-HTTP2). gRPC-Web, which has them in the body, is another protocol.
func isGRPC(h http.Header) bool {
	types := h["Content-Type"]
	if len(types) != 1 {
		return false
	}
	const name = "application/grpc"
	t := types[0]
	return len(t) >= len(name) && strings.EqualFold(t[:len(name)], name) && (len(t) == len(name) || strings.IndexByte("+; \t", t[len(name)]) >= 0)
}

// notMetadata are fields that mean something of which RFC 9110 §6.5.1 forbids that it is said in
// trailers, and that some recipients heed there: they do not pass as metadata.
var notMetadata = map[string]bool{
	"Age": true, "Cache-Control": true, "Clear-Site-Data": true, "Date": true, "Expires": true, "Location": true, "Pragma": true, "Refresh": true,
	"Retry-After": true, "Set-Cookie": true, "Set-Cookie2": true, "Strict-Transport-Security": true, "Vary": true, "Warning": true,
	"Authorization": true, "Cookie": true, "Proxy-Authenticate": true, "Proxy-Authentication-Info": true, "Proxy-Authorization": true, "Www-Authenticate": true,
	"Content-Disposition": true, "Content-Encoding": true, "Content-Language": true, "Content-Location": true, "Content-Range": true, "Content-Type": true,
}

// mayTrail says whether a field may stand in trailers of a response, or with grpc in those of one
// of gRPC. What looks like framing may not.
func mayTrail(name string, grpc bool) bool {
	return http1.MayTrail(name) || grpc && http1.IsPlain(name) && !notMetadata[textproto.CanonicalMIMEHeaderKey(name)]
}

// appendTrailers is appendFields for trailers, of which those are left out that may not be there.
func appendTrailers(fields exchange.Fields, h http.Header, grpc bool) (exchange.Fields, error) {
	for name := range h {
		if isName(name) && !mayTrail(name, grpc) && !isConnectionField(name) {
			delete(h, name)
		}
	}
	return appendFields(fields, h)
}

// addHeader adds fields to h, which is to be sent. It fails rather than send what the peer, or
// who reads it behind that, would take for something else. What is about a connection cannot be
// there, since who made the fields has removed it.
func addHeader(h http.Header, fields exchange.Fields) error {
	for _, f := range fields {
		if !isName(f.Name) || !isValue(f.Value) || !http1.IsPlain(f.Name) {
			return fmt.Errorf("field %q cannot be sent", f.Name)
		}
		add(h, f)
	}
	return nil
}

// add adds a copy of a field: the library keeps what it sends in a table that is the connection's
// (RFC 7541), long after the memory of the exchange is another one's. It makes the name lower
// case.
func add(h http.Header, f exchange.Field) {
	name := strings.Clone(textproto.CanonicalMIMEHeaderKey(f.Name))
	h[name] = append(h[name], strings.Clone(f.Value))
}

// addTrailers is addHeader for trailers. Those that may not be sent as such are left out.
func addTrailers(h http.Header, fields exchange.Fields, grpc bool) {
	for _, f := range fields {
		if isName(f.Name) && isValue(f.Value) && mayTrail(f.Name, grpc) {
			add(h, f)
		}
	}
}
