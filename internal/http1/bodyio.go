package http1

import (
	"errors"
	"io"
	"os"
	"slices"
	"strconv"

	"holdfast/internal/exchange"
	"holdfast/internal/stream"
	"holdfast/internal/task"
)

// bodyReader reads a body from a connection.
type bodyReader struct {
	in    *stream.Conn
	dec   bodyDecoder
	limit int64 // most bytes of content; 0: no limit
	total int64 // bytes of content so far
	err   error // what ended the body; io.EOF at its proper end
	next  error // what comes behind the content that was read last
}

// begin has the reader read another body, with the memory of the one before.
func (b *bodyReader) begin(in *stream.Conn, dec bodyDecoder, limit int64) {
	dec.reuse(&b.dec)
	*b = bodyReader{in: in, dec: dec, limit: limit}
}

// read returns content, which is good until the task waits. Errors of framing are those of
// a request.
func (b *bodyReader) read(t *task.Task) ([]byte, error) {
	for b.err == nil {
		content := b.gather()
		b.total += int64(len(content))
		switch {
		case b.limit > 0 && b.total > b.limit:
			b.err = refusal(413, "a body that is too large")
		case len(content) > 0:
			return content, nil
		case b.next != nil:
			b.err = b.next
		case b.dec.done():
			b.err = io.EOF
		default:
			b.err = b.more(t)
		}
	}
	return nil, b.err
}

// gather returns what is buffered, of as many chunks as there are, moved together over
// their framing: each piece that is read costs a write on the other side, and a peer may
// send chunks of one byte.
func (b *bodyReader) gather() (content []byte) {
	for b.next == nil {
		buffered := b.in.Buffered()
		piece, consumed, err := b.dec.next(buffered, len(buffered))
		b.next = err
		if content == nil {
			content = piece
		} else {
			content = append(content, piece...) // in front of piece, in the same buffer
		}
		b.in.Consume(consumed)
		if consumed == 0 {
			break
		}
	}
	return content
}

// more waits for bytes.
func (b *bodyReader) more(t *task.Task) error { return b.failure(b.in.Fill(t)) }

// failure returns what it means for the body that no more can be read.
func (b *bodyReader) failure(err error) error {
	switch {
	case err == io.EOF && b.dec.kind == untilClose && !b.truncated():
		b.dec.finished = true
	case err == io.EOF:
		err = io.ErrUnexpectedEOF
	case errors.Is(err, os.ErrDeadlineExceeded):
		err = errSlowBody
	}
	return err
}

// truncated says that TLS does not know of the end that was read: it could be anybody's, so a
// body is not complete that nothing else ends (RFC 9112 §9.8).
func (b *bodyReader) truncated() bool {
	s := b.in.Secure()
	return s != nil && s.Truncated()
}

// source is that of [exchange.Source].
func (b *bodyReader) source() (from *stream.Conn, left int64) {
	if b.err != nil || b.next != nil || b.dec.kind != byLength || b.in.Secure() != nil {
		return nil, 0
	}
	return b.in, b.dec.left
}

// readOn reads what else is there, unless more than most bytes are known to be missing.
func (b *bodyReader) readOn(most int64) {
	missing := b.dec.left - int64(len(b.in.Buffered()))
	if b.dec.done() || b.dec.kind == byLength && (missing <= 0 || missing > most) {
		return
	}
	b.in.More()
}

// took says that n bytes of the body were read by somebody else.
func (b *bodyReader) took(n int) {
	b.dec.took(n)
	b.total += int64(n)
}

// ready says that the next read will not wait.
func (b *bodyReader) ready() bool {
	if b.next == nil && b.err == nil && len(b.in.Buffered()) > 0 {
		// What is there may be framing alone.
		_, consumed, err := b.dec.next(b.in.Buffered(), 0)
		b.in.Consume(consumed)
		b.next = err
	}
	return b.err != nil || b.next != nil || b.dec.done() || len(b.in.Buffered()) > 0
}

var errSlowBody = refusal(408, "a body that came too slowly")

var crlf = []byte("\r\n")

// bodyWriter sends a head and the body behind it. One task at a time uses it.
type bodyWriter struct {
	out     *stream.Conn
	held    []byte // what is not sent yet: heads, or nothing; in a buffer of the loop
	kind    bodyKind
	left    int64 // of byLength
	discard bool  // bytes are counted but belong to nobody: the body of an answer to HEAD
	failed  bool  // the connection took no more
}

// sink is that of [exchange.Sink].
func (w *bodyWriter) sink() (to *stream.Conn, left int64) {
	if w.kind != byLength || w.discard || w.failed || len(w.held) > 0 || w.out.Secure() != nil {
		return nil, 0
	}
	return w.out, w.left
}

// write sends p as a part of the body, with what was held back before it.
func (w *bodyWriter) write(t *task.Task, p []byte) error {
	if len(p) == 0 || w.discard {
		return w.flush(t)
	}
	err := w.takes(p)
	if err == nil {
		err = w.sendPart(t, p)
	}
	if err == nil {
		w.left -= int64(len(p))
	}
	return err
}

// takes says whether p may be a part of the body.
func (w *bodyWriter) takes(p []byte) error {
	switch {
	case w.kind == noBody:
		return errNoBody
	case w.kind == byLength && int64(len(p)) > w.left:
		return errTooMuch
	}
	return nil
}

// hold is a write that leaves with the next one, with flush or with finish, of which the
// caller knows that it comes at once. False: p has no room, or is for write to judge.
func (w *bodyWriter) hold(p []byte) bool {
	if len(p) == 0 || w.discard || w.takes(p) != nil {
		return false
	}
	w.held = w.take()
	if !hasRoom(w.held, p) {
		return false
	}
	w.held = w.appendPart(w.held, p)
	w.left -= int64(len(p))
	return true
}

// mostFraming is what a chunk is longer than its content, at most: a size of 16 digits and
// two line ends.
const mostFraming = 20

// hasRoom says whether p fits behind b, with its framing.
func hasRoom(b, p []byte) bool { return len(p)+mostFraming <= cap(b)-len(b) }

// appendPart appends p in its framing.
func (w *bodyWriter) appendPart(b, p []byte) []byte {
	if w.kind != byChunks {
		return append(b, p...)
	}
	return append(append(appendSize(b, p), p...), crlf...)
}

// appendSize appends what stands in front of a chunk.
func appendSize(b, p []byte) []byte { return append(strconv.AppendInt(b, int64(len(p)), 16), crlf...) }

// sendPart sends what is held, p and its framing as one. What has room in the buffer is
// copied into it: that is cheaper than a vectored write.
func (w *bodyWriter) sendPart(t *task.Task, p []byte) error {
	if len(w.held) == 0 && w.kind != byChunks {
		return w.send(t, nil, p, nil)
	}
	b := w.take()
	var err error
	switch {
	case hasRoom(b, p):
		b = w.appendPart(b, p)
		err = w.send(t, b, nil, nil)
	case w.kind == byChunks:
		b = appendSize(b, p)
		err = w.send(t, b, p, crlf)
	default:
		err = w.send(t, b, p, nil)
	}
	w.out.Loop().Release(b)
	return err
}

func (w *bodyWriter) send(t *task.Task, a, b, c []byte) error {
	err := w.out.Send(t, a, b, c)
	w.failed = w.failed || err != nil
	return err
}

// flush sends what is held back.
func (w *bodyWriter) flush(t *task.Task) error {
	if len(w.held) == 0 {
		return nil
	}
	b := w.take()
	err := w.send(t, b, nil, nil)
	w.out.Loop().Release(b)
	return err
}

// complete says that the message was sent to its last byte, so that finish has
// nothing to add.
func (w *bodyWriter) complete() bool {
	return len(w.held) == 0 && (w.discard || w.kind == noBody || w.kind == byLength && w.left == 0)
}

// finish ends the body.
func (w *bodyWriter) finish(t *task.Task, trailers exchange.Fields) error {
	switch {
	case w.discard:
	case w.kind == byLength && w.left > 0:
		return errTooLittle
	case w.kind == byChunks:
		w.held = appendLastChunk(w.take(), trailers)
	}
	return w.flush(t)
}

// precede has b leave before all that was not sent yet.
func (w *bodyWriter) precede(b []byte) { w.held = slices.Insert(w.take(), 0, b...) }

// appendHead has a head leave with the next thing that is sent.
func (w *bodyWriter) appendHead(r *exchange.Response, f framing) error {
	b := w.take()
	before := len(b)
	b, err := appendResponse(b, r, f)
	if err != nil {
		b = b[:before]
	}
	w.held = b
	return err
}

// take returns the held bytes to append to; whoever does gives them back, or has them held.
func (w *bodyWriter) take() []byte {
	b := w.held
	w.held = nil
	if b == nil {
		b = w.out.Loop().Buffer(1)[:0]
	}
	return b
}

// release gives back what is held and was not sent.
func (w *bodyWriter) release() {
	if w.held != nil {
		w.out.Loop().Release(w.held)
		w.held = nil
	}
}
