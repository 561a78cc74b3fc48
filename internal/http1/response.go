package http1

import (
	"strconv"
	"strings"

	"holdfast/internal/exchange"
)

// responseHead is a response with what concerns its connection only. Its memory is used
// for one response after the other.
type responseHead struct {
	exchange.Response
	body  bodyDecoder
	close bool // the upstream keeps the connection no longer than this response

	ctl control
}

// parse reads a head that a headScanner has found, in answer to a request of the given
// method; its strings are parts of head. Errors are those of a request; the caller makes
// them a bad gateway's.
func (h *responseHead) parse(head, method string) error {
	r, ctl := &h.Response, &h.ctl
	*r = exchange.Response{Fields: r.Fields[:0]}
	ctl.reset()
	line, lines := cutLine(head)
	minor, err := parseStatusLine(r, line)
	if err != nil {
		return err
	}
	if r.Fields, err = ctl.readFields(lines[:len(lines)-len("\r\n")], r.Fields); err != nil {
		return err
	}
	if h.body, err = ctl.responseBody(r, minor, method); err != nil {
		return err
	}
	h.close = ctl.close || minor == 0 || h.body.kind == untilClose
	if r.Status == 101 && ctl.upgradeHere && ctl.upgrade.count == 1 && (isToken(ctl.upgrade.value) || isProtocol(ctl.upgrade.value)) {
		r.Upgrade = lowerToken(ctl.upgrade.value)
	}
	return nil
}

// lowerToken is strings.ToLower, and allocates nothing for the one that is meant.
func lowerToken(s string) string {
	if isWord(s, "websocket") {
		return "websocket"
	}
	return strings.ToLower(s)
}

var errStatusLine = malformed("a malformed status line")

// parseStatusLine reads the status line. The space before an absent reason phrase
// may be missing, as it is in much that is deployed.
func parseStatusLine(r *exchange.Response, line string) (minor int, err error) {
	version, rest, ok := strings.Cut(line, " ")
	code, reason, _ := strings.Cut(rest, " ")
	if minor, err = parseMinor(version); err != nil {
		return 0, err
	}
	if !ok || len(code) != 3 || !consistsOf(code, digitChar) || code[0] < '1' || code[0] > '5' || !consistsOf(reason, valueChar) {
		return 0, errStatusLine
	}
	r.Reason = reason
	r.Status, err = strconv.Atoi(code)
	return minor, err
}

// responseBody applies RFC 9112 §6.3.
func (ctl *control) responseBody(r *exchange.Response, minor int, method string) (bodyDecoder, error) {
	n, stated, err := ctl.bodyLength(minor)
	if err != nil {
		return bodyDecoder{}, err
	}
	switch {
	case r.Status < 200 && minor == 0:
		return bodyDecoder{}, malformed("a 1xx in HTTP/1.0") // which has none (RFC 9110 §15.2)
	case r.Status < 200 || r.Status == 204:
		if n != 0 {
			return bodyDecoder{}, malformed("a " + strconv.Itoa(r.Status) + " with a body")
		}
		return bodyDecoder{}, nil
	case method == "HEAD" || r.Status == 304:
		r.ContentLength = n
		if !stated {
			r.ContentLength = -1
		}
		return bodyDecoder{}, nil
	case !stated:
		r.ContentLength = -1
		return bodyDecoder{kind: untilClose}, nil
	}
	r.ContentLength = n
	return decoderFor(n), nil
}
