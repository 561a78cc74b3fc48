package http2

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/net/http2"

	"holdfast/internal/exchange"
	"holdfast/internal/http1"
	"holdfast/internal/stream"
	"holdfast/internal/task"
)

const (
	maxInterim = 32      // 1xx responses before a final one, as in HTTP/1
	maxTarget  = 8 << 10 // bytes
	maxAdded   = 64      // fields that we may add to those of a request

	// chunkSize is how much of a body is taken from the library at once. mostChunks wait for the
	// task.
	chunkSize  = 32 << 10
	mostChunks = 2

	// mostUnsent is how much of a request's body waits for the library before whoever writes
	// does.
	mostUnsent = 64 << 10
)

var (
	errSent          = errors.New("the request head was sent already")
	errNotSent       = errors.New("no request head was sent yet")
	errReceived      = errors.New("the final response head was received already")
	errNotFinal      = errors.New("no final response head was received yet")
	errOver          = errors.New("the exchange was closed")
	errBodyTooLong   = errors.New("more body bytes than announced")
	errTooFew        = errors.New("fewer body bytes than announced")
	errNeverSwitches = errors.New("HTTP/2 knows no upgrade")
	errEndless       = errors.New("interim responses without end")
	errUnasked       = errors.New("a 101, which HTTP/2 does not have")
	errBodiless      = errors.New("a body where none may be")
	errGoAway        = errors.New("the upstream has ended the connection before it has looked at the request (GOAWAY)")
	errRefused       = errors.New("the upstream has refused the stream (REFUSED_STREAM)")
	errNotTaken      = errors.New("the connection takes no further requests")
)

// chunks has memory for parts of bodies.
var chunks = sync.Pool{New: func() any { return new([chunkSize]byte) }}

// bodyPart is a part of a body.
type bodyPart struct {
	memory *[chunkSize]byte // nil: none
	n      int
}

// clientStream implements [exchange.Upstream] on a ClientConn. The library wants to be called by
// goroutines that it may block: run is one for all that comes, and the library has its own for
// what is sent. What they and the loop have in common is guarded by mu; whoever waits on the loop
// is woken by a post, of which there is one at a time.
type clientStream struct {
	c      *ClientConn
	loop   *stream.Loop
	reused bool
	woken  func() // what is posted

	// The loop's.
	cancel   context.CancelFunc // nil: nothing was sent
	out      *clientBody        // nil: no body is sent
	finished bool               // the request was sent to its end, as far as this is concerned
	over     bool
	complete bool       // the response has come to its end
	receiver *task.Task // who waits; nil: nobody
	writer   *task.Task
	final    bool
	head     *exchange.Response // the last one
	last     bodyPart           // of which somebody has a part
	readErr  error
	trailers exchange.Fields

	mu       sync.Mutex
	room     sync.Cond // for chunks; or it is closed
	posted   bool
	closed   bool
	interims []*exchange.Response // not received yet
	informed int                  // how many there were
	answer   *exchange.Response   // the final one
	err      error                // why there will be no more heads
	body     [mostChunks]bodyPart
	bodies   int
	bodyErr  error           // behind what is in body; io.EOF: its proper end
	behind   exchange.Fields // the trailers

	told    httptrace.ClientTrace // set once, by Send
	written atomic.Bool           // the head has left
}

func newClientStream(c *ClientConn, l *stream.Loop, reused bool) *clientStream {
	s := &clientStream{c: c, loop: l, reused: reused}
	s.room.L = &s.mu
	s.woken = func() {
		s.mu.Lock()
		s.posted = false
		s.mu.Unlock()
		if s.receiver != nil {
			s.receiver.Wake()
		}
		if s.writer != nil {
			s.writer.Wake()
		}
	}
	return s
}

// Reused implements [exchange.Upstream].
func (s *clientStream) Reused() bool { return s.reused }

// Trailers implements [exchange.Upstream].
func (s *clientStream) Trailers() exchange.Fields { return s.trailers }

// Switch implements [exchange.Upstream].
func (s *clientStream) Switch() (stream.Passed, error) {
	return stream.Passed{FD: -1}, errNeverSwitches
}

// tellLocked has the loop look.
func (s *clientStream) tellLocked() {
	if !s.posted {
		s.posted = s.loop.Post(s.woken)
	}
}

// Send implements [exchange.Upstream].
func (s *clientStream) Send(t *task.Task, r *exchange.Request) error {
	switch {
	case s.over:
		return errOver
	case s.cancel != nil:
		return errSent
	}
	req, err := s.request(r)
	if err != nil {
		return err
	}
	s.c.wire.earned.Add(creditOfStream)
	go s.run(req)
	return nil
}

// trace returns a context by which the library tells of the exchange, and which ends with cancel.
func (s *clientStream) trace() (ctx context.Context) {
	ctx, s.cancel = context.WithCancel(context.Background())
	s.told = httptrace.ClientTrace{Got1xxResponse: s.inform, WroteHeaders: func() { s.written.Store(true) }}
	return httptrace.WithClientTrace(ctx, &s.told)
}

// request makes the library's request. It fails rather than send what another codec would not
// read as the same one.
func (s *clientStream) request(r *exchange.Request) (*http.Request, error) {
	switch {
	case !isName(r.Method) || r.Method == "CONNECT":
		return nil, fmt.Errorf("request with the method %q", r.Method)
	case !isTarget(r.Target) && (r.Target != "*" || r.Method != "OPTIONS"):
		return nil, fmt.Errorf("request with the target %q", r.Target)
	case !http1.IsAuthority(r.Authority):
		return nil, fmt.Errorf("request with the authority %q", r.Authority)
	case r.ContentLength < -1:
		return nil, fmt.Errorf("request with the length %d", r.ContentLength)
	case len(r.Fields) > maxFields+maxAdded:
		return nil, fmt.Errorf("request with %d fields", len(r.Fields))
	case r.Upgrade != "" || r.UpgradeBody || len(r.HeadTail) > 0:
		return nil, errNeverSwitches
	}
	h := make(http.Header, len(r.Fields)+2)
	if err := addHeader(h, r.Fields); err != nil {
		return nil, err
	}
	if r.TakesTrailers {
		h["Te"] = []string{"trailers"}
	}
	if _, ok := h["User-Agent"]; !ok {
		h["User-Agent"] = nil // otherwise the library has one
	}
	scheme := "http"
	if s.c.secure {
		scheme = "https"
	}
	// These are kept as fields are: see add.
	method, target, authority := strings.Clone(r.Method), strings.Clone(r.Target), strings.Clone(r.Authority)
	blank := http.Request{Method: method, URL: &url.URL{Scheme: scheme, Opaque: target}, Host: authority, Header: h}
	req := blank.WithContext(s.trace()) // the one copy that is not on the stack
	if strings.HasPrefix(r.Target, "//") {
		// It would be taken for an authority; of this the library removes what is in front.
		req.URL.Opaque = scheme + "://" + authority + target
	}
	if r.ContentLength != 0 {
		s.out = &clientBody{s: s, left: r.ContentLength, ready: sync.Cond{L: &s.mu}}
		req.Body, req.ContentLength = s.out, r.ContentLength
		if r.ContentLength == -1 {
			s.out.trailer = make(http.Header)
			req.Trailer = s.out.trailer // which Read may fill in as long as it has not ended
		}
	}
	return req, nil
}

// isTarget says whether s is a path, with a query, as HTTP/1 takes it.
func isTarget(s string) bool {
	if s == "" || s[0] != '/' || len(s) > maxTarget {
		return false
	}
	for i := range len(s) {
		if c := s[i]; c <= ' ' || c > '~' || c == '#' {
			return false
		}
	}
	return true
}

// run is the goroutine of an exchange: it has the request sent, and takes what comes.
func (s *clientStream) run(req *http.Request) {
	defer s.c.ended()
	resp, err := s.c.conn.RoundTrip(req)
	if err != nil {
		s.c.notice()
		err = s.failure(err)
		s.mu.Lock()
		s.err, s.bodyErr = err, err
		s.tellLocked()
		s.mu.Unlock()
		return
	}
	defer resp.Body.Close()
	head, err := newResponse(resp, req.Method)
	s.mu.Lock()
	if s.answer, s.err = head, err; err != nil {
		s.err = badGateway(err)
		s.bodyErr = s.err
	}
	s.tellLocked()
	s.mu.Unlock()
	if err == nil {
		s.take(resp, !mayHaveBody(resp.StatusCode, req.Method))
	}
}

// mayHaveBody says whether a response may have a body (RFC 9110 §6.4.1).
func mayHaveBody(status int, method string) bool {
	return method != "HEAD" && status != 204 && status != 304
}

// take takes the body. With none it is only its end that may come.
func (s *clientStream) take(resp *http.Response, none bool) {
	for {
		// The library's Read waits for something to come also where it may return none of it: so
		// what waits for long needs no memory meanwhile.
		var memory *[chunkSize]byte
		n, err := resp.Body.Read(nil)
		if err == nil {
			memory = chunks.Get().(*[chunkSize]byte)
			n, err = resp.Body.Read(memory[:])
		}
		switch {
		case n > 0 && none:
			n, err = 0, badGateway(errBodiless)
		case err == io.ErrUnexpectedEOF && none:
			err = io.EOF // the library misses what was announced, as of a 304, for another request
		}
		if err != nil && err != io.EOF {
			s.c.notice()
			err = s.cut(err)
		}
		var trailers exchange.Fields
		if err == io.EOF && len(resp.Trailer) > 0 {
			var wrong error
			if trailers, wrong = appendTrailers(nil, resp.Trailer, isGRPC(resp.Header)); wrong != nil {
				err = cutShort{badGateway(wrong), wrong}
			}
		}
		if !s.put(bodyPart{memory, n}, err, trailers) || err != nil {
			return
		}
	}
}

// put hands a part of the body on, and waits until there is room for the next one. false: nobody
// wants it.
func (s *clientStream) put(c bodyPart, err error, trailers exchange.Fields) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case c.memory == nil:
	case c.n == 0 || s.closed:
		chunks.Put(c.memory)
	default:
		s.body[s.bodies] = c
		s.bodies++
	}
	s.bodyErr, s.behind = err, trailers
	s.tellLocked()
	for s.bodies == mostChunks && !s.closed && err == nil {
		s.room.Wait()
	}
	return !s.closed
}

// inform takes an interim response, on the goroutine of the library that reads. With an error the
// stream ends.
func (s *clientStream) inform(status int, h textproto.MIMEHeader) error {
	if status == 101 {
		return errUnasked
	}
	fields, err := appendFields(nil, http.Header(h))
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.informed++; s.informed > maxInterim {
		return errEndless
	}
	s.interims = append(s.interims, &exchange.Response{Status: status, Fields: fields})
	s.tellLocked()
	return nil
}

// newResponse makes one of the library's. An error says that it is none.
func newResponse(resp *http.Response, method string) (*exchange.Response, error) {
	status := resp.Status
	if resp.StatusCode < 200 || resp.StatusCode > 599 || len(status) < 4 || status[3] != ' ' || status[0] == '+' {
		return nil, errors.New("an invalid status") // of which the library takes more than three digits
	}
	fields, err := appendFields(make(exchange.Fields, 0, len(resp.Header)), resp.Header)
	if err != nil {
		return nil, err
	}
	r := &exchange.Response{Status: resp.StatusCode, Fields: fields, ContentLength: resp.ContentLength}
	_, stated := resp.Header["Content-Length"]
	switch {
	case resp.StatusCode == 204:
		if stated && resp.ContentLength > 0 {
			return nil, errBodiless
		}
		r.ContentLength = 0
	case !mayHaveBody(resp.StatusCode, method) && !stated:
		r.ContentLength = -1
	}
	return r, nil
}

// badGateway makes an error one of a response that is none.
func badGateway(err error) error {
	if exchange.StatusOf(err, 0) == 502 {
		return err
	}
	return &exchange.StatusError{Status: 502, Text: "upstream: " + err.Error()}
}

// cutShort is a response that did not end as it should. It is io.ErrUnexpectedEOF for
// [errors.Is].
type cutShort struct {
	error       // for the receiver
	cause error // of the end
}

func (e cutShort) Unwrap() []error    { return []error{e.error, e.cause} }
func (cutShort) Is(target error) bool { return target == io.ErrUnexpectedEOF }

// cut is what Read says of an error within a body.
func (s *clientStream) cut(err error) error {
	if exchange.StatusOf(err, 0) != 0 {
		return err
	}
	return cutShort{badGateway(err), err}
}

// What the library says in words only: of a stream of which the peer has seen nothing, and why
// others have ended.
const (
	saidGoAway = "http2: Transport received Server's graceful shutdown GOAWAY"
	saidAtOnce = "http2: Transport received GOAWAY from server" // to a connection's first request, with an error
	saidByPeer = "received from peer"
	saidLarge  = "request header list larger than peer's advertised limit"
)

// unprocessed is an error of an exchange of which the peer has said, or nobody can doubt, that
// nothing was done.
type unprocessed struct {
	error
	moves bool // another connection may take the request
}

func (e unprocessed) Unwrap() error { return e.error }
func (e unprocessed) Is(target error) bool {
	return target == exchange.ErrRefused || e.moves && target == exchange.ErrNoAnswer
}

// failure is what there being no head is for the exchange.
func (s *clientStream) failure(err error) error {
	s.mu.Lock()
	answered := s.informed > 0
	s.mu.Unlock()
	of, isStream := errors.AsType[http2.StreamError](err)
	_, isConn := errors.AsType[http2.ConnectionError](err)
	switch text := err.Error(); {
	case text == saidGoAway || strings.HasPrefix(text, saidAtOnce):
		return unprocessed{errGoAway, true}
	case isStream && of.Cause != nil && of.Cause.Error() == saidByPeer:
		if of.Code == http2.ErrCodeRefusedStream && !answered {
			return unprocessed{errRefused, false}
		}
		return fmt.Errorf("the upstream has reset the stream: %v", of.Code)
	case isStream, isConn, errors.Is(err, errFlood):
		if isStream && of.Cause != nil {
			err = of.Cause
		}
		return badGateway(err)
	case strings.HasSuffix(text, saidLarge):
		return &exchange.StatusError{Status: 431, Text: "the upstream takes no request head of that size"}
	case !s.written.Load(): // nothing was sent
		return unprocessed{fmt.Errorf("%w: %w", errNotTaken, err), true}
	case answered:
		return cutShort{badGateway(err), err}
	}
	return fmt.Errorf("%w: %w", exchange.ErrNoAnswer, err)
}

// Write implements [exchange.Upstream].
func (s *clientStream) Write(t *task.Task, p []byte) error {
	switch {
	case s.over:
		return errOver
	case s.cancel == nil:
		return errNotSent
	case s.out == nil:
		return errBodyTooLong
	}
	return s.out.write(t, p)
}

// Finish implements [exchange.Upstream].
func (s *clientStream) Finish(_ *task.Task, trailers exchange.Fields) error {
	switch {
	case s.over:
		return errOver
	case s.cancel == nil:
		return errNotSent
	}
	s.finished = true
	if s.out == nil {
		return nil
	}
	return s.out.finish(trailers)
}

// await waits for something to come.
func (s *clientStream) await(t *task.Task, who **task.Task) {
	*who = t
	t.Wait()
	*who = nil
}

// Receive implements [exchange.Upstream].
func (s *clientStream) Receive(t *task.Task) (*exchange.Response, error) {
	for {
		switch {
		case s.final:
			return nil, errReceived
		case s.over:
			return nil, net.ErrClosed
		case s.cancel == nil:
			return nil, errNotSent
		}
		s.mu.Lock()
		resp, err := s.nextHeadLocked()
		s.mu.Unlock()
		if resp != nil || err != nil {
			s.head = resp
			return resp, err
		}
		s.await(t, &s.receiver)
	}
}

func (s *clientStream) nextHeadLocked() (resp *exchange.Response, err error) {
	switch {
	case len(s.interims) > 0:
		resp = s.interims[0]
		s.interims = s.interims[1:]
	case s.err != nil:
		return nil, s.err
	case s.answer != nil:
		resp, s.final = s.answer, true
	}
	return resp, nil
}

// Read implements [exchange.Upstream].
func (s *clientStream) Read(t *task.Task) ([]byte, error) {
	s.giveBack()
	for {
		switch {
		case !s.final:
			return nil, errNotFinal
		case s.readErr != nil:
			return nil, s.readErr
		case s.over:
			return nil, net.ErrClosed
		}
		s.mu.Lock()
		if s.bodies > 0 {
			s.last = s.body[0]
			copy(s.body[:], s.body[1:])
			s.bodies--
			s.room.Signal()
		}
		if s.bodies == 0 {
			s.readErr, s.trailers = s.bodyErr, s.behind
		}
		s.mu.Unlock()
		s.complete = s.readErr == io.EOF
		if s.last.memory != nil || s.readErr != nil {
			return s.last.bytes(), s.readErr
		}
		s.await(t, &s.receiver)
	}
}

func (c bodyPart) bytes() []byte {
	if c.memory == nil {
		return nil
	}
	return c.memory[:c.n]
}

// giveBack gives up what the last Read has returned.
func (s *clientStream) giveBack() {
	if s.last.memory != nil {
		chunks.Put(s.last.memory)
		s.last = bodyPart{}
	}
}

// Ready implements [exchange.Upstream].
func (s *clientStream) Ready() bool {
	if !s.final || s.readErr != nil {
		return s.readErr != nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.bodies > 0 || s.bodyErr != nil
}

// Close implements [exchange.Upstream]. What is not complete is reset, and the connection goes on.
func (s *clientStream) Close() {
	if s.over {
		return
	}
	s.over = true
	if s.cancel == nil {
		s.c.ended()
		return
	}
	s.mu.Lock()
	s.closed = true
	for i := range s.bodies {
		chunks.Put(s.body[i].memory)
		s.body[i] = bodyPart{}
	}
	s.bodies = 0
	failed := s.err != nil || s.bodyErr != nil && s.bodyErr != io.EOF
	s.room.Signal()
	if s.out != nil {
		s.out.endLocked(errOver)
	}
	s.mu.Unlock()
	if memory := s.last.memory; memory != nil {
		s.last = bodyPart{}
		s.loop.Post(func() { chunks.Put(memory) }) // it is good until whoever has read it waits
	}
	if !failed && !(s.finished && s.complete) {
		s.c.client.options.Counts.ResetsByUs.Inc()
	}
	s.cancel()
	if s.receiver != nil {
		s.receiver.Wake()
	}
	if s.writer != nil {
		s.writer.Wake()
	}
}

// clientBody is a request's body on its way from a task to the library. All but what is set once
// is guarded by the stream's lock.
type clientBody struct {
	s       *clientStream
	trailer http.Header // the library's, which looks at it while it sends the head, and behind the end of Read; nil: there can be none
	ready   sync.Cond   // for whoever reads

	left   int64 // bytes that may still be written; -1: nobody knows
	kept   []byte
	read   int         // of kept
	err    error       // what comes behind kept; nil: more
	behind http.Header // the trailers
}

// write has the library send p, and waits while much of what came before was not sent.
func (b *clientBody) write(t *task.Task, p []byte) error {
	s := b.s
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case b.err != nil:
		return b.err
	case b.left >= 0 && int64(len(p)) > b.left:
		b.endLocked(errBodyTooLong)
		return errBodyTooLong
	}
	if b.left > 0 {
		b.left -= int64(len(p))
	}
	if b.read >= mostUnsent {
		b.kept, b.read = b.kept[:copy(b.kept, b.kept[b.read:])], 0
	}
	b.kept = append(b.kept, p...)
	if b.left == 0 {
		b.err = io.EOF // so that the end leaves together with the last bytes
	}
	b.ready.Signal()
	for len(b.kept)-b.read > mostUnsent && (b.err == nil || b.err == io.EOF) && !s.over {
		s.mu.Unlock()
		s.await(t, &s.writer)
		s.mu.Lock()
	}
	if b.err == io.EOF {
		return nil
	}
	return b.err
}

// finish ends the body.
func (b *clientBody) finish(trailers exchange.Fields) error {
	b.s.mu.Lock()
	defer b.s.mu.Unlock()
	switch {
	case b.left > 0:
		b.endLocked(errTooFew)
		return errTooFew
	case b.err == nil:
		if b.trailer != nil && len(trailers) > 0 {
			b.behind = make(http.Header, len(trailers))
			addTrailers(b.behind, trailers, false)
		}
		b.endLocked(io.EOF)
	case b.err != io.EOF:
		return b.err
	}
	return nil
}

// endLocked has nothing more be written.
func (b *clientBody) endLocked(err error) {
	if b.err == nil || b.err == io.EOF && err == errOver {
		b.err = err
	}
	b.ready.Signal()
}

// Read implements [io.Reader], for the library.
func (b *clientBody) Read(p []byte) (int, error) {
	s := b.s
	s.mu.Lock()
	defer s.mu.Unlock()
	for b.read == len(b.kept) && b.err == nil {
		b.ready.Wait()
	}
	if b.err != nil && b.err != io.EOF {
		return 0, b.err
	}
	n := copy(p, b.kept[b.read:])
	had := len(b.kept) - b.read
	b.read += n
	if had > mostUnsent && had-n <= mostUnsent {
		s.tellLocked()
	}
	if b.read == len(b.kept) {
		b.kept, b.read = b.kept[:0], 0
		if cap(b.kept) > 2*mostUnsent {
			b.kept = nil
		}
		if b.err == io.EOF {
			maps.Copy(b.trailer, b.behind)
		}
		return n, b.err
	}
	return n, nil
}

// Close implements [io.Closer], for the library: the peer takes no more.
func (b *clientBody) Close() error {
	s := b.s
	s.mu.Lock()
	defer s.mu.Unlock()
	if b.err == nil || b.err == io.EOF && b.read < len(b.kept) {
		b.err = errOver
		b.ready.Signal()
		s.tellLocked()
	}
	return nil
}

var _ io.ReadCloser = (*clientBody)(nil)
