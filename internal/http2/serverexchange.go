package http2

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"runtime/debug"
	"strconv"
	"sync"
	"time"

	"holdfast/internal/exchange"
	"holdfast/internal/http1"
	"holdfast/internal/poller"
	"holdfast/internal/stream"
	"holdfast/internal/task"
)

const (
	// backlog is how much of a response may wait for the goroutine that sends it.
	backlog = 16 << 10

	// piece is how much of that it sends at once: so it is known what the client takes.
	piece = 16 << 10

	// What is read of a request's body at once: more, where more comes.
	leastRead, mostRead = 4 << 10, 32 << 10

	// mostInterim is how many heads of 1xx may wait.
	mostInterim = 8

	// finishTime is how long a client may take for the last of a response, which the library sends,
	// for one that no handler makes, and for each piece of what a tunnel has left behind.
	finishTime = time.Minute
)

// serverExchange implements [exchange.Exchange] on a stream. Two goroutines serve it besides its
// loop: the library's for its handler, which sends, and one that reads the body if somebody wants
// that.
type serverExchange struct {
	c    *serverConn
	id   uint32
	head *serverHead
	down exchange.Downstream
	w    http.ResponseWriter // the handler's goroutine; see help
	r    *http.Request

	// The loop's.
	over     error
	watcher  exchange.Watcher
	state    responseState
	held     *responseHead // the final one, until there is something to send with it
	discard  bool          // bytes are counted but belong to nobody
	nothing  bool          // there is no body
	grpc     bool          // the response is one of gRPC
	left     int64         // of the body; -1: nobody knows
	sends    *task.Task
	reads    *task.Task
	pumping  bool
	chunks   []chunk
	handed   []byte // a chunk that was returned by Read
	bodyErr  error
	bodySize int64
	stopped  bool
	pace     http1.Pace
	slow     poller.Deadline
	expired  bool
	taken    uint64 // what the client had taken when Taken was called
	asked    bool

	buffers chan []byte // for the goroutine that reads; closed: it is to end
	wake    chan struct{}
	helpers sync.WaitGroup

	mu       sync.Mutex
	interim  []responseHead
	final    *responseHead
	out      []byte
	flush    bool
	finish   bool
	pair     *pair // what the stream is to be relayed with from now on
	trailers http.Header
	abort    bool
	busy     bool   // the handler's goroutine does what it was told
	returned bool   // it is done
	failed   error  // sending is not possible any more
	waits    bool   // a task waits for it
	passed   uint64 // bytes that the library has taken
}

// A responseState is how far the response is.
type responseState uint8

const (
	awaitingResponse responseState = iota
	sendingResponse
	responseFinished
)

type responseHead struct {
	status int
	header http.Header
}

// chunk is a part of the request's body, and what comes behind it.
type chunk struct {
	buffer []byte
	err    error
}

func newServerExchange(c *serverConn, id uint32, h *serverHead, w http.ResponseWriter, r *http.Request) *serverExchange {
	l := &c.on.server.options.Limits
	e := &serverExchange{
		c: c, id: id, head: h, down: c.downstream(), w: w, r: r,
		wake: make(chan struct{}, 1), pace: http1.NewPace(l.BodyTimeout, l.BodyRate),
	}
	if h.ContentLength == 0 {
		e.bodyErr = io.EOF
	}
	return e
}

// answer is the handler's goroutine: it has the loop do what there is to do, and sends what comes
// of that.
func (e *serverExchange) answer() {
	s := e.c.on.server
	s.requests.Add(1)
	s.options.Metrics.streams.Inc()
	s.options.Metrics.streaming.Add(1)
	defer func() {
		s.requests.Add(-1)
		s.options.Metrics.streaming.Add(-1)
	}()
	if !e.c.on.loop.Post(e.begin) {
		panic(http.ErrAbortHandler)
	}
	stop := context.AfterFunc(e.r.Context(), e.gone)
	whole := e.send()
	stop()
	e.mu.Lock()
	e.returned = true
	e.mu.Unlock()
	e.helpers.Wait()
	if !whole {
		panic(http.ErrAbortHandler) // the stream is reset
	}
}

// gone is called when the stream is not there any more.
func (e *serverExchange) gone() {
	if !e.c.on.loop.Post(func() { e.endWith(errClientGone) }) {
		e.order(func() { e.abort = true })
	}
}

// order has the handler's goroutine do something.
func (e *serverExchange) order(what func()) {
	e.mu.Lock()
	what()
	e.mu.Unlock()
	select {
	case e.wake <- struct{}{}:
	default:
	}
}

// orders is what it is to do, all at once.
type orders struct {
	interim  []responseHead
	final    *responseHead
	out      []byte
	flush    bool
	finish   bool
	trailers http.Header
	pair     *pair
}

// next waits for orders; false: the exchange is to be aborted.
func (e *serverExchange) next(memory []byte) (o orders, ok bool) {
	for {
		e.mu.Lock()
		if e.abort {
			e.mu.Unlock()
			return o, false
		}
		if len(e.interim) > 0 || e.final != nil || len(e.out) > 0 || e.flush || e.finish {
			o = orders{e.interim, e.final, e.out, e.flush, e.finish, e.trailers, e.pair}
			e.interim, e.final, e.out, e.flush, e.finish = nil, nil, memory[:0], false, false
			e.busy = true
			e.mu.Unlock()
			return o, true
		}
		e.mu.Unlock()
		<-e.wake
	}
}

// send sends what it is told to, and returns whether that was a whole response.
func (e *serverExchange) send() (whole bool) {
	var memory []byte
	for {
		o, ok := e.next(memory)
		if !ok {
			e.dropPair()
			return false
		}
		err := e.obey(&o)
		if o.pair != nil {
			return e.relay(o.pair)
		}
		if memory = o.out; cap(memory) > 4*backlog {
			memory = nil
		}
		e.mu.Lock()
		e.busy = false
		e.failed = cmp.Or(e.failed, err)
		waits := e.waits
		e.waits = false
		e.mu.Unlock()
		over := o.finish && err == nil
		if waits || over {
			e.c.on.loop.Post(func() { e.wrote(over) })
		}
		if over {
			return true
		}
	}
}

func (e *serverExchange) obey(o *orders) error {
	header := e.w.Header()
	for _, h := range o.interim {
		for name, values := range h.header {
			header[name] = values
		}
		// If the stream ends meanwhile the library returns, and still writes what it was given.
		// Where it has a length to leave out it takes a copy.
		header["Content-Length"] = nil
		e.w.WriteHeader(h.status)
		clear(header)
	}
	if o.final != nil {
		for name, values := range o.final.header {
			header[name] = values
		}
		e.w.WriteHeader(o.final.status)
	}
	for p := o.out; len(p) > 0; {
		n, err := e.w.Write(p[:min(len(p), piece)])
		p = p[n:]
		e.mu.Lock()
		e.passed += uint64(n)
		e.mu.Unlock()
		if err != nil {
			return err
		}
	}
	control := http.NewResponseController(e.w)
	if !o.finish {
		if o.flush || len(o.out) > 0 {
			return control.Flush()
		}
		return nil
	}
	for name, values := range o.trailers {
		header[http.TrailerPrefix+name] = values
	}
	// The rest, of 4 KiB at the most, is sent by the library when we have returned.
	return control.SetWriteDeadline(time.Now().Add(e.c.on.server.finish))
}

// begin has a task serve the exchange, on the loop.
func (e *serverExchange) begin() {
	e.c.exchanges[e] = struct{}{}
	switch _, lives := e.c.on.conns[e.c]; {
	case e.c.wasCut.Load():
		e.endWith(net.ErrClosed)
	case !lives: // and nobody tells it so any more
		e.endWith(errClientGone)
	}
	e.c.on.loop.Tasks.Go(e)
}

// Run implements [task.Runner].
func (e *serverExchange) Run(t *task.Task) {
	defer e.end()
	defer e.contain("handler")
	e.c.on.server.options.Handler.Serve(t, e)
}

// end settles the exchange after the handler has returned.
func (e *serverExchange) end() {
	delete(e.c.exchanges, e)
	e.watcher = nil
	e.c.on.loop.Forget(&e.slow)
	if e.state != responseFinished {
		e.endWith(errAborted)
	}
	if e.pumping {
		e.pumping = false
		close(e.buffers)
		e.help(func() { e.r.Body.Close() })
	}
}

// contain keeps a panic from the others.
func (e *serverExchange) contain(who string) {
	if p := recover(); p != nil {
		e.c.on.server.options.Log.Error(who+" panicked", "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
		e.endWith(errAborted)
	}
}

// endWith ends the exchange for a reason; further ones do nothing.
func (e *serverExchange) endWith(reason error) {
	if e.over != nil {
		return
	}
	e.over = reason
	e.order(func() {
		e.abort = true
		e.failed = cmp.Or(e.failed, reason)
		if e.busy && reason != errClientGone { // then it has failed already
			e.helpLocked(func() { _ = http.NewResponseController(e.w).SetWriteDeadline(time.Unix(1, 0)) }) // what it waits for fails
		}
	})
	e.wakeAll()
	if w := e.watcher; w != nil {
		e.watcher = nil
		defer e.contain("handler")
		w.ExchangeOver(reason)
	}
}

func (e *serverExchange) wakeAll() {
	if e.sends != nil {
		e.sends.Wake()
	}
	if e.reads != nil {
		e.reads.Wake()
	}
}

// help does what may wait on a goroutine, before the handler's returns, unless it has.
func (e *serverExchange) help(fn func()) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.helpLocked(fn)
}

func (e *serverExchange) helpLocked(fn func()) {
	if !e.returned {
		e.helpers.Go(fn)
	}
}

// wrote is told, on the loop, that the handler's goroutine has done what it was told.
func (e *serverExchange) wrote(whole bool) {
	if whole {
		e.state = responseFinished
	}
	if e.sends != nil {
		e.sends.Wake()
	}
}

func (e *serverExchange) Request() *exchange.Request       { return &e.head.Request }
func (e *serverExchange) Downstream() *exchange.Downstream { return &e.down }
func (e *serverExchange) Local() netip.AddrPort            { return e.c.local }
func (e *serverExchange) Loop() *stream.Loop               { return e.c.on.loop }
func (e *serverExchange) Trailers() exchange.Fields        { return e.head.trailers }
func (e *serverExchange) Abort()                           { e.endWith(errAborted) }
func (e *serverExchange) Over() error                      { return e.over }

// OnOver implements [exchange.Exchange].
func (e *serverExchange) OnOver(w exchange.Watcher) {
	if e.over != nil {
		w.ExchangeOver(e.over)
		return
	}
	e.watcher = w
}

// Read implements [exchange.Exchange].
func (e *serverExchange) Read(t *task.Task) ([]byte, error) {
	e.giveBack()
	if err := e.mayRead(); err != nil {
		return nil, err
	}
	if !e.pumping {
		e.pumping = true
		e.buffers = make(chan []byte, 2)
		e.buffers <- make([]byte, leastRead)
		e.buffers <- nil
		go e.pump()
	}
	for len(e.chunks) == 0 {
		if err := e.awaitBody(t); err != nil {
			return nil, err
		}
	}
	chunk := e.chunks[0]
	e.chunks = e.chunks[1:]
	if len(chunk.buffer) > 0 {
		e.handed = chunk.buffer
		e.bodySize += int64(len(chunk.buffer))
		if most := e.c.on.server.options.Limits.BodySize; most > 0 && e.bodySize > most {
			e.bodyErr = http1.Refuse(413, "a body that is too large")
			return nil, e.bodyErr
		}
		e.bodyErr = e.meaning(chunk.err)
		if !e.pace.Keeps(len(chunk.buffer)) && e.bodyErr == nil {
			e.bodyErr = http1.ErrSlowBody
			return nil, e.bodyErr
		}
		return chunk.buffer, nil
	}
	e.bodyErr = e.meaning(chunk.err)
	return nil, e.bodyErr
}

// awaitBody waits for a part of the body.
func (e *serverExchange) awaitBody(t *task.Task) error {
	l := e.Loop()
	e.expired = false
	l.SetDeadline(&e.slow, e, e.pace.Await(l.Now()))
	e.reads = t
	t.Wait()
	e.reads = nil
	l.Forget(&e.slow)
	if len(e.chunks) > 0 {
		e.pace.Awaited(l.Now())
	}
	switch err := e.mayRead(); {
	case err != nil:
		return err
	case len(e.chunks) == 0 && e.expired:
		e.bodyErr = http1.ErrSlowBody
		return e.bodyErr
	}
	return nil
}

// Expire implements [poller.Expirer]: the client's time is over.
func (e *serverExchange) Expire(*poller.Deadline) {
	e.expired = true
	if e.reads != nil {
		e.reads.Wake()
	}
}

func (e *serverExchange) mayRead() error {
	switch {
	case e.over != nil:
		return e.over
	case e.bodyErr != nil:
		return e.bodyErr
	case e.stopped:
		return errStopped
	}
	return nil
}

// meaning is what the library's error says.
func (e *serverExchange) meaning(err error) error {
	if err == nil || err == io.EOF {
		return err
	}
	return cmp.Or(e.over, errClientGone)
}

// giveBack has the memory of what Read has returned be used again.
func (e *serverExchange) giveBack() {
	if e.handed == nil {
		return
	}
	b := e.handed[:cap(e.handed)]
	if len(e.handed) == len(b) && len(b) < mostRead {
		b = make([]byte, 2*len(b))
	}
	e.handed = nil
	if e.pumping {
		e.buffers <- b // there are two, and room for both
	}
}

// pump is the goroutine that reads the body. It is one part ahead.
func (e *serverExchange) pump() {
	for b := range e.buffers {
		if b == nil {
			b = make([]byte, leastRead)
		}
		n, err := e.r.Body.Read(b)
		if !e.Loop().Post(func() { e.arrived(chunk{b[:n], err}) }) || err != nil {
			return
		}
	}
}

func (e *serverExchange) arrived(c chunk) {
	e.chunks = append(e.chunks, c)
	if e.reads != nil {
		e.reads.Wake()
	}
}

// StopReading implements [exchange.Exchange].
func (e *serverExchange) StopReading() {
	if e.stopped || e.bodyErr == io.EOF {
		return
	}
	e.stopped = true
	if e.pumping {
		e.help(func() { e.r.Body.Close() })
	}
	if e.reads != nil {
		e.reads.Wake()
	}
}

// Inform implements [exchange.Exchange].
func (e *serverExchange) Inform(t *task.Task, r *exchange.Response) error {
	switch {
	case e.over != nil:
		return e.over
	case e.state != awaitingResponse:
		return errResponded
	case r.Status < 100 || r.Status > 199 || r.Status == 101:
		return fmt.Errorf("interim response with the status %d", r.Status)
	}
	header, err := headerOf(r.Fields)
	if err != nil {
		return err
	}
	e.order(func() { e.interim = append(e.interim, responseHead{r.Status, header}) })
	return e.await(t, func() bool { return len(e.interim) >= mostInterim })
}

// Respond implements [exchange.Exchange].
func (e *serverExchange) Respond(r *exchange.Response) error {
	switch {
	case e.over != nil:
		return e.over
	case e.state != awaitingResponse:
		return errResponded
	case r.Status < 200 || r.Status > 599:
		return fmt.Errorf("final response with the status %d", r.Status)
	}
	header, err := headerOf(r.Fields)
	if err != nil {
		return err
	}
	e.left, e.discard, e.grpc = r.ContentLength, e.head.Method == "HEAD", isGRPC(header)
	e.nothing = r.Status == 204 || r.Status == 304
	length := r.ContentLength >= 0
	switch r.Status {
	case 204:
		length = false
	case 304:
		length = r.ContentLength > 0
	}
	if length {
		header["Content-Length"] = []string{strconv.FormatInt(r.ContentLength, 10)}
	}
	if _, ok := header["Content-Type"]; !ok {
		header["Content-Type"] = nil // the library would guess
	}
	if _, ok := header["Date"]; !ok {
		header["Date"] = []string{e.Loop().Date()}
	}
	e.state = sendingResponse
	// It leaves with what comes next: nobody is woken for it.
	e.held = &responseHead{r.Status, header}
	return nil
}

// Write implements [exchange.Exchange].
func (e *serverExchange) Write(t *task.Task, p []byte) error {
	switch {
	case e.over != nil:
		return e.over
	case e.state != sendingResponse:
		return errNotResponded
	case len(p) == 0:
		return e.Flush(t)
	case e.discard:
		return nil
	case e.nothing:
		return errNoBody
	case e.left >= 0 && int64(len(p)) > e.left:
		return errTooMuch
	}
	if e.left >= 0 {
		e.left -= int64(len(p))
	}
	e.order(func() {
		e.unhold()
		e.out = append(e.out, p...)
	})
	return e.await(t, func() bool { return len(e.out) > backlog })
}

// unhold has the head leave. mu is held.
func (e *serverExchange) unhold() {
	if e.held != nil {
		e.final, e.held = e.held, nil
	}
}

// await waits while something is so, that is guarded by mu, and returns why nothing can be sent.
func (e *serverExchange) await(t *task.Task, so func() bool) error {
	for {
		if e.over != nil {
			return e.over
		}
		e.mu.Lock()
		err, wait := e.failed, so()
		e.waits = wait && err == nil
		e.mu.Unlock()
		switch {
		case err != nil:
			return cmp.Or(e.over, errClientGone)
		case !wait:
			return nil
		}
		e.sends = t
		t.Wait()
		e.sends = nil
	}
}

// Flush implements [exchange.Exchange].
func (e *serverExchange) Flush(*task.Task) error {
	if e.over != nil {
		return e.over
	}
	if e.state == sendingResponse {
		e.order(func() {
			e.unhold()
			e.flush = true
		})
	}
	return nil
}

// Taken implements [exchange.Exchange].
func (e *serverExchange) Taken(least int) bool {
	if e.sends == nil {
		return false
	}
	e.mu.Lock()
	now := e.passed
	e.mu.Unlock()
	if e.asked && now < e.taken+uint64(max(least, 1)) {
		return false
	}
	e.asked, e.taken = true, now
	return true
}

// Finish implements [exchange.Exchange].
func (e *serverExchange) Finish(t *task.Task, trailers exchange.Fields) error {
	switch {
	case e.over != nil:
		return e.over
	case e.state != sendingResponse:
		return errNotResponded
	case e.left > 0 && !e.discard && !e.nothing:
		return errTooLittle
	}
	header := make(http.Header)
	if !e.discard && !e.nothing {
		addTrailers(header, cloned(trailers), e.grpc)
	}
	e.order(func() {
		e.unhold()
		e.finish, e.trailers = true, header
	})
	err := e.await(t, func() bool { return e.state != responseFinished })
	if e.state == responseFinished {
		return nil
	}
	return err
}

// headerOf returns fields as the library wants them, in memory of their own.
func headerOf(fields exchange.Fields) (http.Header, error) {
	h := make(http.Header, len(fields)+3)
	return h, addHeader(h, cloned(fields))
}

// cloned is a copy of fields, and of their strings.
func cloned(fields exchange.Fields) exchange.Fields {
	n := 0
	for _, f := range fields {
		n += len(f.Name) + len(f.Value)
	}
	var texts exchange.Texts
	texts.Use(make([]byte, 0, n))
	c := make(exchange.Fields, len(fields))
	for i, f := range fields {
		c[i] = exchange.Field{Name: texts.Join(f.Name), Value: texts.Join(f.Value)}
	}
	return c
}
