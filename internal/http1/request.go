package http1

import (
	"strings"

	"holdfast/internal/exchange"
)

// draft76Tail is how many bytes follow the head of a draft-76 WebSocket handshake
// (draft-ietf-hybi-thewebsocketprotocol-00 §1.3).
const draft76Tail = 8

// requestHead is a request with what concerns its connection only. Its memory is used
// for one request after the other.
type requestHead struct {
	exchange.Request
	close   bool // the client's last request here
	expect  bool // the client waits for a 100 before it sends the body
	hasTail bool // draft76Tail bytes follow the head and belong to it

	ctl  control
	tail [draft76Tail]byte
}

// reset forgets a request, and keeps the memory.
func (h *requestHead) reset(scheme string) {
	h.Request = exchange.Request{Scheme: scheme, Major: 1, Fields: h.Fields[:0]}
	h.close, h.expect, h.hasTail = false, false, false
	h.ctl.reset()
}

// parse reads a head that a headScanner has found, from the request line to the empty
// line; its strings are parts of head. Errors are *exchange.StatusError, and leave nothing
// that is of use.
func (h *requestHead) parse(head, scheme string) error {
	h.reset(scheme)
	r, ctl := &h.Request, &h.ctl
	line, lines := cutLine(head)
	authority, err := parseRequestLine(r, line)
	if err != nil {
		return err
	}
	if r.Fields, err = ctl.readFields(lines[:len(lines)-len("\r\n")], r.Fields); err != nil {
		return err
	}
	if r.Authority, err = ctl.authority(authority); err != nil {
		return err
	}
	if r.ContentLength, _, err = ctl.bodyLength(r.Minor); err != nil {
		return err
	}
	if h.expect, err = ctl.expectation(r); err != nil {
		return err
	}
	r.Trailers = ctl.trailer
	h.close = ctl.close || r.Minor == 0
	h.readUpgrade()
	r.TakesTrailers = ctl.trailers && ctl.teHere && r.Minor == 1 && r.Upgrade == ""
	return nil
}

// readable fills in what can be read of a head that is not valid, or not whole: the
// request line, if that is there and is valid itself.
func (h *requestHead) readable(head, scheme string) {
	h.reset(scheme)
	if line, _, ok := strings.Cut(head, "\r\n"); ok {
		if _, err := parseRequestLine(&h.Request, line); err == nil {
			return
		}
	}
	h.Request = exchange.Request{Scheme: scheme, Fields: h.Fields}
}

// addTail takes a copy of the draft76Tail bytes behind the head.
func (h *requestHead) addTail(p []byte) { h.HeadTail = h.tail[:copy(h.tail[:], p)] }

// parseRequestLine fills in method, target and version. authority is that of an
// absolute-form target, or "".
func parseRequestLine(r *exchange.Request, line string) (authority string, err error) {
	method, rest, ok1 := strings.Cut(line, " ")
	target, version, ok2 := strings.Cut(rest, " ")
	if !ok1 || !ok2 || !isToken(method) || target == "" {
		return "", malformed("a malformed request line")
	}
	if r.Minor, err = parseMinor(version); err != nil {
		return "", err
	}
	r.Method = method
	switch {
	case len(target) > maxTarget:
		return "", refusal(414, "a target that is too long")
	case method == "CONNECT":
		return "", refusal(501, "CONNECT")
	case !consistsOf(target, targetChar):
		return "", malformed("a target with a forbidden character")
	}
	r.Target, authority, err = splitTarget(method, target)
	return authority, err
}

// splitTarget reduces a target to origin-form or "*" (RFC 9112 §3.2).
func splitTarget(method, target string) (path, authority string, err error) {
	switch {
	case target[0] == '/':
		return target, "", nil
	case target == "*" && method == "OPTIONS":
		return target, "", nil
	}
	scheme, rest, ok := strings.Cut(target, "://")
	if !ok || !strings.EqualFold(scheme, "http") && !strings.EqualFold(scheme, "https") {
		return "", "", malformed("a target in no known form")
	}
	end := strings.IndexAny(rest, "/?")
	if end < 0 {
		end = len(rest)
	}
	authority, path = rest[:end], rest[end:]
	switch {
	case !isAuthority(authority):
		return "", "", malformed("a target with an invalid host")
	case path == "" && method == "OPTIONS":
		path = "*" // RFC 9112 §3.2.4
	case path == "" || path[0] == '?':
		path = "/" + path
	}
	return path, authority, nil
}

// authority checks Host against the target's authority, which may be "".
func (ctl *control) authority(target string) (string, error) {
	switch {
	case ctl.host.count == 0:
		return "", malformed("no Host")
	case ctl.host.count > 1:
		return "", malformed("more than one Host")
	case !isAuthority(ctl.host.value):
		return "", malformed("an invalid Host")
	case target != "" && !strings.EqualFold(target, ctl.host.value):
		return "", malformed("Host and target disagree")
	}
	return ctl.host.value, nil
}

// expectation says whether the client waits for a 100 (RFC 9110 §10.1.1).
func (ctl *control) expectation(r *exchange.Request) (bool, error) {
	switch {
	case ctl.expect.count == 0:
		return false, nil
	case ctl.expect.count > 1 || !isWord(ctl.expect.value, "100-continue"):
		return false, refusal(417, "an unknown expectation")
	}
	return r.Minor == 1 && r.ContentLength != 0, nil
}

// readUpgrade applies the rule of [exchange.Request.Upgrade].
func (h *requestHead) readUpgrade() {
	r, ctl := &h.Request, &h.ctl
	if r.Method != "GET" || r.Minor != 1 || !ctl.upgradeHere || ctl.upgrade.count != 1 {
		return
	}
	if !isWord(ctl.upgrade.value, "websocket") {
		if isProtocol(ctl.upgrade.value) {
			r.Offer = strings.ToLower(ctl.upgrade.value)
		}
		return
	}
	r.Upgrade = "websocket"
	r.UpgradeBody = r.ContentLength != 0
	if takesTail(r) {
		// Who reads the keys takes the bytes behind the head for the handshake's, who
		// reads the framing does not.
		h.hasTail = ctl.length.count == 0 && ctl.coding.count == 0
		r.UpgradeBody = !h.hasTail
	}
}

// takesTail says whether draft76Tail bytes belong to the head of a request.
func takesTail(r *exchange.Request) bool {
	return r.Upgrade == "websocket" && r.Fields.Has("Sec-WebSocket-Key1") && r.Fields.Has("Sec-WebSocket-Key2") && !r.Fields.Has("Sec-WebSocket-Key")
}
