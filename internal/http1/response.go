package http1

import (
	"strconv"
	"strings"

	"holdfast/internal/exchange"
)

// responseHead is a response with what concerns its connection only.
type responseHead struct {
	*exchange.Response
	body  bodyDecoder
	close bool // the upstream keeps the connection no longer than this response
}

// parseResponse reads a head that a headScanner has found, of about n field lines,
// in answer to a request of the given method. Errors are those of a request; the
// caller makes them a bad gateway's.
func parseResponse(head string, n int, method string) (responseHead, error) {
	line, rest, _ := strings.Cut(strings.TrimSuffix(head, "\r\n"), "\r\n")
	r := &exchange.Response{}
	minor, err := parseStatusLine(r, line)
	if err != nil {
		return responseHead{}, err
	}
	fields, ctl, err := parseFields(rest, n)
	if err != nil {
		return responseHead{}, err
	}
	r.Fields = fields
	h := responseHead{Response: r, close: ctl.close || minor == 0}
	if h.body, err = ctl.responseBody(r, minor, method); err != nil {
		return responseHead{}, err
	}
	if h.body.kind == untilClose {
		h.close = true
	}
	if r.Status == 101 && ctl.upgradeHere && ctl.upgrade.count == 1 && isToken(ctl.upgrade.value) {
		r.Upgrade = strings.ToLower(ctl.upgrade.value)
	}
	return h, nil
}

// parseStatusLine reads the status line. The space before an absent reason phrase
// may be missing, as it is in much that is deployed.
func parseStatusLine(r *exchange.Response, line string) (minor int, err error) {
	version, rest, ok := strings.Cut(line, " ")
	code, reason, _ := strings.Cut(rest, " ")
	if minor, err = parseMinor(version); err != nil {
		return 0, err
	}
	if !ok || len(code) != 3 || !consistsOf(code, digitChar) || code[0] < '1' || code[0] > '5' || !consistsOf(reason, valueChar) {
		return 0, malformed("a malformed status line")
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
