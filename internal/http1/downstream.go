package http1

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"time"

	"holdfast/internal/exchange"
	"holdfast/internal/poller"
	"holdfast/internal/stream"
	"holdfast/internal/task"
)

// interimTime is how long a client may take to make room for a 1xx head. The limits
// of handlers are on what comes behind it.
const interimTime = 10 * time.Second

var (
	errResponded    = errors.New("the response head was sent already")
	errNotResponded = errors.New("no response head was sent yet")
	errNotUpgrade   = errors.New("the request asked for no upgrade, or had a body")
	errStopped      = errors.New("the rest of the request body was given up")
)

// serverExchange implements [exchange.Exchange] on a serverConn, for one request after the
// other. It is there while the connection has a task.
type serverExchange struct {
	c        *serverConn
	down     exchange.Downstream
	head     requestHead
	memory   []byte // what the strings of head are parts of
	body     bodyReader
	out      bodyWriter
	patience poller.Deadline // until when the client must have taken something
	spoiled  bool            // it cannot be used for another connection

	progress
}

// progress is what is known of one request and its response.
type progress struct {
	began     time.Duration // when its first byte had come, since the server's epoch
	parsed    bool          // the head is valid
	handling  bool          // the handler has it
	ended     bool          // and meanwhile the connection was not the server's any more
	mustClose bool          // nothing may follow this exchange
	wantsGoOn bool          // the client waits for a 100 that was not sent
	over      error
	watcher   exchange.Watcher

	// What the request said, which the handler may have changed since.
	method  string
	minor   int
	upgrade bool

	bodyRead bool // to its end
	reading  bool // somebody waits for more of it, since pace.since
	stopped  bool // nobody wants the rest of it
	pace     pace

	state    responseState
	close    bool       // "Connection: close" was said
	refusing bool       // the codec answers by itself
	sending  bool       // a task does
	goingOn  bool       // it sends a 100
	waits    *task.Task // to send, until the other task has sent
}

// A responseState is how far the response is.
type responseState uint8

const (
	awaitingResponse responseState = iota
	sendingResponse                // the final head is written or held back
	endingResponse                 // the handler has given all of it
	responseFinished
	responseSwitched
)

// release gives up what the exchange holds.
func (e *serverExchange) release() {
	if e.spoiled {
		return
	}
	e.out.release()
	if e.memory != nil {
		e.loop().Release(e.memory)
		e.memory = nil
	}
}

func (e *serverExchange) loop() *stream.Loop { return e.c.on.loop }

// readHead reads a request head and what belongs to it, within the head timeout,
// which begins now: at the first byte.
func (e *serverExchange) readHead(t *task.Task) error {
	c := e.c
	var deadline time.Time
	if d := c.on.server.options.Limits.HeadTimeout; d > 0 {
		deadline = e.loop().Now().Add(d)
	}
	c.Limit(time.Time{})
	end, err := e.findHead(t, deadline)
	if err != nil {
		return err
	}
	if c.speaksHTTP2(c.Buffered()[:end]) {
		return errHTTP2
	}
	e.memory = e.loop().Buffer(end)
	if err := e.head.parse(viewOf(e.memory[:copy(e.memory, c.Buffered()[:end])]), c.on.server.options.Scheme); err != nil {
		return err
	}
	e.parsed = true
	e.head.Texts.Use(e.memory[end:])
	c.Consume(end)
	if e.head.hasTail {
		for len(c.Buffered()) < draft76Tail {
			if err := e.fillHead(t, deadline); err != nil {
				return err
			}
		}
		e.head.addTail(c.Buffered())
		c.Consume(draft76Tail)
	}
	return nil
}

// findHead reads until a whole head is buffered.
func (e *serverExchange) findHead(t *task.Task, deadline time.Time) (end int, err error) {
	scan := headScanner{limit: int(e.c.on.server.options.Limits.HeadSize), request: true}
	for {
		end, err := scan.scan(e.c.Buffered())
		switch {
		case err != nil:
			return 0, err
		case end > 2:
			return end, nil
		case end == 2: // the one that may be there was skipped
			return 0, malformed("empty lines before a request")
		}
		if err := e.fillHead(t, deadline); err != nil {
			return 0, err
		}
	}
}

// fillHead reads more of a head. Most heads come as a whole, and need no deadline.
func (e *serverExchange) fillHead(t *task.Task, deadline time.Time) error {
	e.c.Limit(deadline)
	err := e.c.Fill(t)
	e.c.Limit(time.Time{})
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return refusal(408, "a head that came too slowly")
	}
	return err
}

// begin prepares for the handler.
func (e *serverExchange) begin() {
	h, limits := &e.head, &e.c.on.server.options.Limits
	e.method, e.minor, e.upgrade = h.Method, h.Minor, h.Upgrade != "" && !h.UpgradeBody || h.Offer != "" && h.ContentLength == 0
	// Behind an upgrade request stand bytes of the new protocol or of the old one,
	// as the answer may be: after a refusal nobody can tell which.
	e.mustClose = h.close || h.Upgrade != ""
	e.wantsGoOn = h.expect
	e.body.begin(&e.c.Conn, decoderFor(h.ContentLength), limits.BodySize)
	e.bodyRead = e.body.dec.done()
	e.pace = pace{window: limits.BodyTimeout, rate: limits.BodyRate}
	e.out = bodyWriter{out: &e.c.Conn}
}

// serve runs the handler.
func (e *serverExchange) serve(t *task.Task) {
	sl := e.c.on
	sl.requests.Add(1)
	defer func() {
		e.handling = false
		sl.requests.Add(-1)
		if e.ended {
			sl.server.options.Ended()
		}
	}()
	defer e.c.contain("handler") // here already, so that the exchange is settled after it
	e.handling = true
	e.look()
	sl.server.options.Handler.Serve(t, e)
}

// look ends the exchange if its client has gone. Whoever ends its direction behind a whole
// request has, too: it would be told by nothing else.
func (e *serverExchange) look() {
	gone := e.c.Broken() || e.c.HungUp() && e.bodyRead && e.state < endingResponse
	if e.handling && gone {
		e.c.abort(errClientGone)
	}
}

// endWith notes that the connection was closed.
func (e *serverExchange) endWith(reason error) {
	e.over = reason
	if w := e.watcher; w != nil {
		e.watcher = nil
		e.tell(w)
	}
}

func (e *serverExchange) tell(w exchange.Watcher) {
	defer e.c.contain("handler")
	w.ExchangeOver(e.over)
}

// end settles the connection after the handler has returned and says whether it
// can carry another request.
func (e *serverExchange) end(t *task.Task) bool {
	c := e.c
	e.handling, e.watcher = false, nil
	switch {
	case !c.Open(): // or it was switched
		return false
	case e.state != responseFinished:
		e.cut()
		return false
	case e.close:
		if !e.head.close || !e.body.dec.done() || !c.Quiet() {
			c.linger(t)
		}
		return false
	case !e.skipBody(t):
		c.linger(t)
		return false
	}
	return true
}

// cut ends the connection within a response.
func (e *serverExchange) cut() {
	if e.out.failed {
		e.c.abort(errClientGone)
	}
	e.c.abort(errAborted)
}

// endsWithConnection says that the response is not complete, and would look so if the
// connection had a proper end.
func (e *serverExchange) endsWithConnection() bool {
	return e.out.kind == untilClose && (e.state == sendingResponse || e.state == endingResponse)
}

// leavesTooMuch says that more of the request body is to come than is read in vain, to keep
// the connection.
func (e *serverExchange) leavesTooMuch() bool {
	return e.body.dec.kind == byLength && e.body.dec.left > leftoverBytes
}

// skipBody reads what the handler left of the request body, within bounds.
func (e *serverExchange) skipBody(t *task.Task) bool {
	if e.body.dec.done() {
		return true
	}
	if e.mustClose || e.body.err != nil || e.leavesTooMuch() {
		return false
	}
	e.body.limit = e.body.total + leftoverBytes
	e.c.Limit(e.loop().Now().Add(leftoverTime)) // until the next one is set
	for {
		if _, err := e.body.read(t); err != nil {
			return err == io.EOF
		}
	}
}

func (e *serverExchange) Request() *exchange.Request       { return &e.head.Request }
func (e *serverExchange) Downstream() *exchange.Downstream { return &e.down }
func (e *serverExchange) Local() netip.AddrPort            { return stream.LocalAddr(e.c.FD()) }
func (e *serverExchange) Loop() *stream.Loop               { return e.loop() }
func (e *serverExchange) Trailers() exchange.Fields        { return e.body.dec.trailers }
func (e *serverExchange) Abort()                           { e.c.abort(errAborted) }
func (e *serverExchange) Over() error                      { return e.over }

// OnOver implements [exchange.Exchange].
func (e *serverExchange) OnOver(w exchange.Watcher) {
	if e.over != nil {
		w.ExchangeOver(e.over)
		return
	}
	e.watcher = w
}

// Read implements [exchange.Exchange]. Its errors are *exchange.StatusError (400,
// 408, 413) or mean that the client has gone.
func (e *serverExchange) Read(t *task.Task) ([]byte, error) {
	if err := e.mayRead(); err != nil {
		return nil, err
	}
	if err := e.goOn(t); err != nil {
		return nil, err
	}
	content, err := e.receive(t)
	if err = e.heard(err); err != nil {
		return nil, err
	}
	return content, nil
}

// heard draws the conclusions from what was read of the body, or could not be.
func (e *serverExchange) heard(err error) error {
	switch {
	case e.body.dec.done() && (err == nil || err == io.EOF):
		e.bodyRead = true
		e.look() // it may have gone before
		return cmp.Or(e.over, err)
	case err == nil:
	case e.over != nil:
		return e.over
	case e.stopped:
		return errStopped
	default:
		e.mustClose = true
		switch exchange.StatusOf(err, 0) {
		case 0:
			e.c.abort(errClientGone)
		case 400:
			e.c.on.server.options.Metrics.errors.Inc()
		}
	}
	return err
}

// mayRead returns why there is nothing to be read, or nil.
func (e *serverExchange) mayRead() error {
	switch {
	case e.over != nil:
		return e.over
	case e.bodyRead:
		return io.EOF
	case e.stopped:
		return errStopped
	}
	return e.body.err
}

// receive returns the next bytes of the body. Its client has BodyTimeout for each piece, and
// has to keep up the least rate in all the time that we wait for it.
func (e *serverExchange) receive(t *task.Task) ([]byte, error) {
	for !e.stopped && !e.body.ready() {
		e.Awaiting()
		e.body.err = e.body.more(t)
		e.awaited()
	}
	if e.stopped {
		return nil, errStopped
	}
	content, err := e.body.read(t)
	if err == nil {
		err = e.paced(len(content))
	}
	return content, err
}

// Awaiting implements [exchange.Source]: the client's time runs.
func (e *serverExchange) Awaiting() {
	if !e.reading {
		e.reading = true
		e.pace.since = e.loop().Now()
		e.c.Limit(e.pace.limit())
	}
}

// awaited says that nobody waits for the client any more.
func (e *serverExchange) awaited() {
	if e.reading {
		e.reading = false
		e.c.Limit(time.Time{})
		e.pace.waited += e.loop().Now().Sub(e.pace.since)
	}
}

// paced says of n bytes that have come whether that is fast enough.
func (e *serverExchange) paced(n int) error {
	if !e.pace.keeps(n) && !e.body.dec.done() {
		e.body.err = errSlowBody
	}
	return e.body.err
}

// Source implements [exchange.Source].
func (e *serverExchange) Source() (from *stream.Conn, left int64) {
	if e.wantsGoOn || e.mayRead() != nil {
		return nil, 0
	}
	return e.body.source()
}

// Took implements [exchange.Source].
func (e *serverExchange) Took(n int) error {
	e.awaited()
	e.body.took(n)
	err := e.paced(n)
	if e.stopped {
		err = errStopped
	}
	return e.heard(err)
}

// Ended implements [exchange.Source].
func (e *serverExchange) Ended(err error) {
	e.awaited()
	if err != nil && e.mayRead() == nil { // or Took has said so
		e.body.err = e.body.failure(err)
		e.heard(e.body.err)
	}
}

// pace is how fast a request's body comes, in windows of the time that we have waited for
// it. The zero value sets no bounds.
type pace struct {
	window time.Duration
	rate   int64 // least bytes per second; 0: none

	since  time.Time     // when the wait has begun, if there is one
	waited time.Duration // before that, in this window
	bytes  int64         // that came in it
}

// enough says that all bytes have come that are due in a window.
func (p *pace) enough() bool {
	return p.rate <= 0 || float64(p.bytes) >= float64(p.rate)*p.window.Seconds()
}

// limit is until when the next byte must come.
func (p *pace) limit() time.Time {
	switch {
	case p.window <= 0:
		return time.Time{}
	case p.enough():
		return p.since.Add(p.window)
	}
	return p.since.Add(p.window - p.waited)
}

// keeps notes that n bytes have come, and says whether that is fast enough.
func (p *pace) keeps(n int) bool {
	p.bytes += int64(n)
	if p.window <= 0 || p.waited < p.window {
		return true
	}
	enough := p.enough()
	p.waited, p.bytes = 0, 0
	return enough
}

// StopReading implements [exchange.Exchange]. Of a body that was read to its end
// nothing is given up, so that nothing changes then.
func (e *serverExchange) StopReading() {
	if e.bodyRead || e.stopped || !e.c.Open() {
		return
	}
	e.stopped = true
	e.mustClose = true
	switch {
	case e.reading || e.goingOn:
		e.c.Expire(nil) // as if the time were over
	case e.waits != nil:
		e.waits.Wake() // it may be to send a 100
	}
}

// goOn sends "100 Continue" if the client waits for it, unless it has begun to
// send the body anyway (RFC 9110 §10.1.1).
func (e *serverExchange) goOn(t *task.Task) error {
	if !e.wantsGoOn {
		return nil
	}
	for e.sending && !e.stopped {
		e.waits = t
		t.Wait()
	}
	if e.stopped {
		e.waits = nil
		return errStopped
	}
	e.sending = true
	defer e.endSend()
	wanted := e.wantsGoOn && len(e.c.Buffered()) == 0 // a response may have begun meanwhile
	e.wantsGoOn = false
	if !wanted {
		return nil
	}
	return e.sendGoOn(t)
}

var goOnHead = []byte("HTTP/1.1 100 Continue\r\n\r\n")

// sendGoOn is sendInterim for a 100, which nobody waits for once the body is given up: if a
// part of it has left, the rest leaves before whatever comes next.
func (e *serverExchange) sendGoOn(t *task.Task) error {
	if e.over != nil { // while the other task has sent
		return e.over
	}
	e.loop().SetDeadline(&e.patience, e, e.loop().Now().Add(interimTime))
	e.goingOn = true
	left := goOnHead
	var err error
	for len(left) > 0 && err == nil {
		var n int
		n, err = e.c.SendSome(t, left)
		left = left[n:]
	}
	e.goingOn = false
	e.loop().Forget(&e.patience)
	switch {
	case err == nil:
		return nil
	case !e.stopped || e.over != nil:
		e.c.abort(errClientGone)
		return e.over
	case len(left) < len(goOnHead):
		e.out.precede(left)
	}
	e.c.Limit(time.Time{}) // the connection goes on
	return errStopped
}

// beginSend waits until what the other task sends is out: one of them may be a 100, which
// must not stand within something else.
func (e *serverExchange) beginSend(t *task.Task) {
	for e.sending {
		e.waits = t
		t.Wait()
	}
	e.sending = true
}

func (e *serverExchange) endSend() {
	e.sending = false
	if w := e.waits; w != nil {
		e.waits = nil
		w.Wake()
	}
}

// sendInterim sends a 1xx head. A client that does not take it within interimTime is
// gone: it has filled its connection with answers that it does not read.
func (e *serverExchange) sendInterim(t *task.Task, head []byte) error {
	if e.over != nil { // while the other task has sent
		return e.over
	}
	err := e.sendWithin(t, head, interimTime)
	if err != nil {
		e.c.abort(errClientGone)
		err = e.over
	}
	return err
}

// sendWithin sends b, or fails when the client has not taken it after a time.
func (e *serverExchange) sendWithin(t *task.Task, b []byte, d time.Duration) error {
	e.loop().SetDeadline(&e.patience, e, e.loop().Now().Add(d))
	defer e.loop().Forget(&e.patience)
	return e.c.Send(t, b, nil, nil)
}

// Expire implements [poller.Expirer].
func (e *serverExchange) Expire(*poller.Deadline) {
	if e.refusing {
		e.c.Interrupt(os.ErrDeadlineExceeded)
	} else {
		e.c.abort(errClientGone)
	}
}

// Inform implements [exchange.Exchange]. HTTP/1.0 has no interim responses
// (RFC 9110 §15.2).
func (e *serverExchange) Inform(t *task.Task, r *exchange.Response) error {
	switch {
	case e.over != nil:
		return e.over
	case e.state != awaitingResponse:
		return errResponded
	case r.Status < 100 || r.Status > 199 || r.Status == 101:
		return fmt.Errorf("interim response with the status %d", r.Status)
	case e.minor == 0:
		return nil
	}
	if r.Status == 100 {
		e.wantsGoOn = false
	}
	b, err := appendResponse(e.loop().Buffer(1)[:0], r, framing{})
	if err == nil {
		e.beginSend(t)
		b = slices.Insert(b, 0, e.out.held...) // the rest of a 100
		e.out.release()
		err = e.sendInterim(t, b)
		e.endSend()
	}
	e.loop().Release(b)
	return err
}

// Respond implements [exchange.Exchange]. The head is held back until there is
// something to send with it, or Flush or Finish.
func (e *serverExchange) Respond(r *exchange.Response) error {
	switch {
	case e.over != nil:
		return e.over
	case e.state != awaitingResponse:
		return errResponded
	case r.Status < 200:
		return fmt.Errorf("final response with the status %d", r.Status)
	}
	f := e.frame(r)
	if err := e.out.appendHead(r, f); err != nil {
		return err
	}
	e.out.kind, e.out.left = f.body, r.ContentLength
	e.out.discard = e.method == "HEAD"
	e.close = f.close
	e.state = sendingResponse
	return nil
}

// frame decides how the response's body ends, and whether the connection does.
func (e *serverExchange) frame(r *exchange.Response) framing {
	sl := e.c.on
	// A client that waits for a 100 and gets this response instead may send its
	// body or not: what follows could be either (RFC 9110 §10.1.1).
	e.mustClose = e.mustClose || e.wantsGoOn || r.Close || e.leavesTooMuch()
	e.wantsGoOn = false
	draining := !sl.drain.IsZero() && !sl.silent
	if draining && !e.mustClose {
		sl.server.options.Metrics.drained.Inc()
		e.mustClose = true
	}
	f := framing{date: e.loop().Date(), close: e.mustClose}
	switch {
	case r.Status == 204:
	case r.Status == 304:
		f.length = r.ContentLength > 0
	case e.method == "HEAD":
		f.length = r.ContentLength >= 0
	case r.ContentLength >= 0:
		f.body, f.length = byLength, true
	case e.minor == 0:
		f.body = untilClose // implies close: HTTP/1.0 is always the last one
	default:
		f.body = byChunks
	}
	return f
}

// Write implements [exchange.Exchange].
func (e *serverExchange) Write(t *task.Task, p []byte) error {
	switch {
	case e.over != nil:
		return e.over
	case e.state != sendingResponse:
		return errNotResponded
	case e.sending: // p is not ours any more when we have waited
		p = append([]byte(nil), p...)
	}
	e.beginSend(t)
	defer e.endSend()
	return e.sent(e.out.write(t, p))
}

// Sink implements [exchange.Sink].
func (e *serverExchange) Sink() (to *stream.Conn, left int64) {
	if e.over != nil || e.state != sendingResponse || e.sending {
		return nil, 0
	}
	return e.out.sink()
}

// Gave implements [exchange.Sink].
func (e *serverExchange) Gave(n int) { e.out.left -= int64(n) }

// Failed implements [exchange.Sink].
func (e *serverExchange) Failed(error) { e.out.failed = true }

// sent returns why sending has failed.
func (e *serverExchange) sent(err error) error {
	if err != nil && e.over != nil {
		return e.over
	}
	return err
}

// Flush implements [exchange.Exchange].
func (e *serverExchange) Flush(t *task.Task) error {
	if e.over != nil {
		return e.over
	}
	e.beginSend(t)
	defer e.endSend()
	return e.sent(e.out.flush(t))
}

// Taken implements [exchange.Exchange].
func (e *serverExchange) Taken(least int) bool { return e.c.Taken(least) }

// Finish implements [exchange.Exchange]. It succeeds if everything was sent before
// the client left: many leave as soon as they have the last byte.
func (e *serverExchange) Finish(t *task.Task, trailers exchange.Fields) error {
	if e.state != sendingResponse {
		return cmp.Or(e.over, errNotResponded)
	}
	e.beginSend(t)
	defer e.endSend()
	if e.over != nil && !e.out.complete() {
		return e.over
	}
	e.state = endingResponse // whoever ends its direction now may still read
	if err := e.out.finish(t, trailers); err != nil {
		return e.sent(err)
	}
	e.state = responseFinished
	return nil
}

// Switch implements [exchange.Exchange]. It fails for a request that did not ask
// for an upgrade or has a body, and for a client that has gone.
func (e *serverExchange) Switch(r *exchange.Response) (c stream.Passed, head []byte, err error) {
	if head, err = e.switchHead(r); err != nil {
		e.Abort()
		return stream.Passed{FD: -1}, nil, err
	}
	c = e.c.PassOn()
	sl := e.c.on
	sl.remove(e.c, givenAway)
	sl.loop.Counts.Add(sl.server.options.Metrics.traffic.Sent, uint64(len(head))) // whoever has the connection sends it
	e.state = responseSwitched
	return c, head, nil
}

func (e *serverExchange) switchHead(r *exchange.Response) ([]byte, error) {
	switch {
	case e.over != nil:
		return nil, e.over
	case !e.upgrade:
		return nil, errNotUpgrade
	case e.state != awaitingResponse:
		return nil, errResponded
	case r.Status != 101:
		return nil, fmt.Errorf("switch with the status %d", r.Status)
	}
	return appendResponse(make([]byte, 0, roomFor(r)), r, framing{})
}

// roomFor is about how many bytes a head without a body has.
func roomFor(r *exchange.Response) int {
	n := 128 + len(r.Reason)
	for _, f := range r.Fields {
		n += len(f.Name) + len(f.Value) + len(": \r\n")
	}
	return n
}
