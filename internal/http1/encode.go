package http1

import (
	"errors"
	"fmt"
	"strconv"

	"holdfast/internal/exchange"
)

var (
	errTooMuch   = errors.New("more body bytes than announced")
	errTooLittle = errors.New("fewer body bytes than announced")
	errNoBody    = errors.New("a body where none may be")
)

// appendRequest writes a request head. It fails rather than write what our own
// parser would not read as the same request.
func appendRequest(b []byte, r *exchange.Request) ([]byte, error) {
	asterisk := r.Target == "*" && r.Method == "OPTIONS"
	switch {
	case !isToken(r.Method) || r.Method == "CONNECT":
		return b, fmt.Errorf("request with the method %q", r.Method)
	case !asterisk && (r.Target == "" || r.Target[0] != '/' || len(r.Target) > maxTarget || !consistsOf(r.Target, targetChar)):
		return b, fmt.Errorf("request with the target %q", r.Target)
	case !isAuthority(r.Authority):
		return b, fmt.Errorf("request with the authority %q", r.Authority)
	case r.ContentLength < -1 || r.ContentLength > maxLength:
		return b, fmt.Errorf("request with the length %d", r.ContentLength)
	case len(r.HeadTail) > 0 != takesTail(r) || len(r.HeadTail) > draft76Tail:
		return b, errors.New("request with a tail that its head does not announce, or without one that it does")
	case len(r.Fields) > maxFields+maxAdded:
		return b, fmt.Errorf("request with %d fields", len(r.Fields))
	case r.UpgradeBody || r.Upgrade != "" && (!isProtocol(r.Upgrade) || r.ContentLength != 0 || r.Method != "GET"):
		return b, errors.New("upgrade request with a body, or to no protocol")
	}
	b = append(append(b, r.Method...), ' ')
	b = append(append(b, r.Target...), " HTTP/1.1\r\nHost: "...)
	b = append(append(b, r.Authority...), "\r\n"...)
	if r.TakesTrailers && r.Upgrade == "" {
		b = append(b, "Connection: TE\r\nTE: trailers\r\n"...) // RFC 9110 §10.1.4 wants both
	}
	switch {
	case r.Upgrade != "":
		b = append(b, "Connection: Upgrade\r\nUpgrade: "...)
		b = append(append(b, r.Upgrade...), "\r\n"...)
	case r.ContentLength == -1:
		b = append(b, "Transfer-Encoding: chunked\r\n"...)
	case r.ContentLength > 0 || takesContent(r.Method):
		b = appendLength(b, r.ContentLength)
	}
	b, err := appendFields(b, r.Fields)
	return append(append(b, "\r\n"...), r.HeadTail...), err
}

// takesContent names the methods of which an upstream may miss a Content-Length
// even if there is no content (RFC 9110 §8.6).
func takesContent(method string) bool {
	return method == "POST" || method == "PUT" || method == "PATCH"
}

// framing is what a response head says besides its fields.
type framing struct {
	body   bodyKind
	length bool // Content-Length is stated
	close  bool
	date   string // for a head that has no Date; "": none
}

// appendResponse writes a response head. It fails rather than write what another
// reader could take for two.
func appendResponse(b []byte, r *exchange.Response, f framing) ([]byte, error) {
	if r.Status < 100 || r.Status > 599 || !isValue(r.Reason) {
		return b, fmt.Errorf("response with the status %d %q", r.Status, r.Reason)
	}
	b = append(b, "HTTP/1.1 "...)
	b = append(strconv.AppendInt(b, int64(r.Status), 10), ' ')
	b = append(append(b, r.Reason...), "\r\n"...)
	switch {
	case r.Status == 101:
		if !isToken(r.Upgrade) && !isProtocol(r.Upgrade) {
			return b, fmt.Errorf("101 that changes to %q", r.Upgrade)
		}
		b = append(b, "Connection: Upgrade\r\nUpgrade: "...)
		b = append(append(b, r.Upgrade...), "\r\n"...)
	case f.close:
		b = append(b, "Connection: close\r\n"...)
	}
	switch {
	case f.body == byChunks:
		b = append(b, "Transfer-Encoding: chunked\r\n"...)
	case f.length:
		b = appendLength(b, r.ContentLength)
	}
	if f.date != "" && !r.Fields.Has("Date") {
		b = append(append(b, "Date: "...), f.date...)
		b = append(b, "\r\n"...)
	}
	b, err := appendFields(b, r.Fields)
	return append(b, "\r\n"...), err
}

func appendLength(b []byte, n int64) []byte {
	b = append(b, "Content-Length: "...)
	return append(strconv.AppendInt(b, n, 10), "\r\n"...)
}

// appendFields writes field lines. Framing among them would contradict what the
// codec writes itself, so it is an error, and so is a value that ends its line.
func appendFields(b []byte, fields exchange.Fields) ([]byte, error) {
	for _, f := range fields {
		if !isToken(f.Name) || kindOf(f.Name) != plainField || !isValue(f.Value) {
			return b, fmt.Errorf("field %q cannot be sent", f.Name)
		}
		b = append(append(b, f.Name...), ": "...)
		b = append(append(b, f.Value...), "\r\n"...)
	}
	return b, nil
}

// appendLastChunk writes the end of a chunked body. Trailers that may not be sent
// as such are left out.
func appendLastChunk(b []byte, trailers exchange.Fields) []byte {
	b = append(b, "0\r\n"...)
	for _, f := range trailers {
		if isToken(f.Name) && mayTrail(f.Name) && isValue(f.Value) {
			b = append(append(b, f.Name...), ": "...)
			b = append(append(b, f.Value...), "\r\n"...)
		}
	}
	return append(b, "\r\n"...)
}
