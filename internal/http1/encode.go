package http1

import (
	"errors"
	"fmt"
	"net"
	"strconv"
	"time"

	"holdfast/internal/exchange"
	"holdfast/internal/metrics"
)

// dateFormat is IMF-fixdate (RFC 9110 §5.6.7).
const dateFormat = "Mon, 02 Jan 2006 15:04:05 GMT"

// coalesce is the largest piece of a body that is copied behind what is sent with
// it; above, a vectored write is cheaper than the copy.
const coalesce = 4 << 10

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
	case r.UpgradeBody || r.Upgrade != "" && (r.Upgrade != "websocket" || r.ContentLength != 0 || r.Method != "GET"):
		return b, errors.New("upgrade request with a body, or to something else than WebSocket")
	}
	b = append(append(b, r.Method...), ' ')
	b = append(append(b, r.Target...), " HTTP/1.1\r\nHost: "...)
	b = append(append(b, r.Authority...), "\r\n"...)
	switch {
	case r.Upgrade != "":
		b = append(b, "Connection: Upgrade\r\nUpgrade: websocket\r\n"...)
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

// responseFraming is what a response head says besides its fields.
type responseFraming struct {
	body   bodyKind
	length bool // Content-Length is stated
	close  bool
	date   time.Time // for a head that has no Date; zero for none
}

// appendResponse writes a response head. It fails rather than write what another
// reader could take for two.
func appendResponse(b []byte, r *exchange.Response, f responseFraming) ([]byte, error) {
	if r.Status < 100 || r.Status > 599 || !consistsOf(r.Reason, valueChar) {
		return b, fmt.Errorf("response with the status %d %q", r.Status, r.Reason)
	}
	b = append(b, "HTTP/1.1 "...)
	b = append(strconv.AppendInt(b, int64(r.Status), 10), ' ')
	b = append(append(b, r.Reason...), "\r\n"...)
	switch {
	case r.Status == 101:
		if !isToken(r.Upgrade) {
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
	if !f.date.IsZero() && !r.Fields.Has("Date") {
		b = append(b, "Date: "...)
		b = append(f.date.UTC().AppendFormat(b, dateFormat), "\r\n"...)
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
		if !isToken(f.Name) || kindOf(f.Name) != plainField || !consistsOf(f.Value, valueChar) {
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
		if isToken(f.Name) && mayTrail(f.Name) && consistsOf(f.Value, valueChar) {
			b = append(append(b, f.Name...), ": "...)
			b = append(append(b, f.Value...), "\r\n"...)
		}
	}
	return append(b, "\r\n"...)
}

// bodyWriter sends a head and the body behind it. One goroutine at a time uses it.
type bodyWriter struct {
	conn    net.Conn
	buffers *Buffers
	counted *metrics.Counter // of the bytes sent
	held    []byte           // what is not sent yet: a head, or nothing
	kind    bodyKind
	left    int64 // of byLength
	discard bool  // bytes are counted but belong to nobody: the body of an answer to HEAD
	failed  bool  // the connection took no more
}

// write sends p as a part of the body, with what was held back before it.
func (w *bodyWriter) write(p []byte) (int, error) {
	switch {
	case len(p) == 0:
		return 0, w.flush()
	case w.discard:
		return len(p), w.flush()
	case w.kind == noBody:
		return 0, errNoBody
	case w.kind == byLength && int64(len(p)) > w.left:
		return 0, errTooMuch
	}
	b := w.take()
	var tail string
	if w.kind == byChunks {
		b = append(strconv.AppendInt(b, int64(len(p)), 16), "\r\n"...)
		tail = "\r\n"
	}
	if err := w.sendAll(b, p, tail); err != nil {
		return 0, err
	}
	w.left -= int64(len(p))
	return len(p), nil
}

// sendAll sends b, p and tail as one, and gives b back.
func (w *bodyWriter) sendAll(b, p []byte, tail string) error {
	var err error
	switch {
	case len(b) == 0 && tail == "":
		err = w.send(p)
	case len(p) <= coalesce:
		b = append(append(b, p...), tail...)
		err = w.send(b)
	default:
		pieces := net.Buffers{b, p}
		if tail != "" {
			pieces = append(pieces, []byte(tail))
		}
		var n int64
		n, err = pieces.WriteTo(w.conn)
		w.sent(n, err)
	}
	w.buffers.put(b)
	return err
}

// send writes to the connection, whatever is held back.
func (w *bodyWriter) send(p []byte) error {
	n, err := w.conn.Write(p)
	w.sent(int64(n), err)
	return err
}

// sent notes what became of a write.
func (w *bodyWriter) sent(n int64, err error) {
	w.counted.Add(uint64(n))
	w.failed = w.failed || err != nil
}

// flush sends what is held back.
func (w *bodyWriter) flush() error {
	if len(w.held) == 0 {
		return nil
	}
	b := w.held
	w.held = nil
	err := w.send(b)
	w.buffers.put(b)
	return err
}

// complete says that the message was sent to its last byte, so that finish has
// nothing to add.
func (w *bodyWriter) complete() bool {
	return len(w.held) == 0 && (w.discard || w.kind == noBody || w.kind == byLength && w.left == 0)
}

// finish ends the body.
func (w *bodyWriter) finish(trailers exchange.Fields) error {
	switch {
	case w.discard:
	case w.kind == byLength && w.left > 0:
		return errTooLittle
	case w.kind == byChunks:
		w.held = appendLastChunk(w.take(), trailers)
	}
	return w.flush()
}

// take returns the held bytes to append to.
func (w *bodyWriter) take() []byte {
	b := w.held
	w.held = nil
	if b == nil {
		b = w.buffers.get(smallBuffer)[:0]
	}
	return b
}
