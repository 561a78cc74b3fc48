package proxy

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"math"
	"runtime/debug"
	"sync/atomic"
	"time"

	"holdfast/internal/exchange"
	"holdfast/internal/upstream"
)

// uploadGrace is how long a request's last bytes may take to reach an upstream that
// has answered completely. It keeps both connections usable in the usual case,
// where the upload ends a moment after the response.
const uploadGrace = time.Second

// forward sends an ordinary request to an endpoint and its response back.
func (r *request) forward() {
	r.watchIdle()
	if r.head.ContentLength == 0 {
		r.awaitAnswer(r.route.Timeout, errResponseTimeout)
	}
	open := opener((*upstream.Endpoint).Get)
	for {
		up, err := r.connect(open)
		if err == nil {
			err = r.exchange(up)
		}
		if err == nil {
			return
		}
		if up == nil || !r.mayRepeat(up, err) {
			r.failed(err)
			return
		}
		r.log(slog.LevelDebug, "a kept connection was closed, trying a fresh one", slog.Any("err", err))
		r.endpoint.Retried()
		open = (*upstream.Endpoint).Fresh
	}
}

// watchIdle ends the request when nothing moves for too long. It is called once.
func (r *request) watchIdle() {
	r.idle.start(r.route.StreamIdleTimeout, func() {
		switch {
		case r.clientDue.Load():
			r.fail(errIdleClient)
		case r.clientSlow.Load():
			r.fail(errIdleReader)
		default:
			r.fail(errIdleUpstream)
		}
	})
}

// mayRepeat says whether a failed request is sent again: only if an idle connection
// seems to have been closed under it, nothing of a response came, and it is
// idempotent and has no body that is gone by now (RFC 9110 §9.2.2).
func (r *request) mayRepeat(up exchange.Upstream, err error) bool {
	if !up.Reused() || !errors.Is(err, exchange.ErrNoAnswer) || r.head.ContentLength != 0 || r.ctx.Err() != nil {
		return false
	}
	switch r.head.Method {
	case "GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE":
		return true
	}
	return false
}

// exchange sends the request and relays what comes back, both at the same time.
// When it returns, up is closed and nobody reads the request's body any more.
func (r *request) exchange(up exchange.Upstream) (err error) {
	r.call = r.endpoint.Call()
	defer func() { r.call.End(r.outcome(err)) }()
	defer closeWith(r.ctx, up)()

	r.rewrite()
	if err := up.Send(r.head); err != nil {
		return err
	}
	body := upload{r: r, up: up, done: make(chan struct{})}
	if r.head.ContentLength == 0 {
		close(body.done)
		if err := up.Finish(nil); err != nil {
			return err
		}
	} else {
		go body.run()
		defer body.abandon()
	}
	resp, err := r.receive(up)
	if err != nil {
		return err
	}
	if resp.Status == 101 {
		return errUnasked101
	}
	if !r.beginAnswer() {
		return context.Cause(r.ctx)
	}
	if r.head.ContentLength != 0 && !body.complete.Load() {
		r.metrics.early.Inc()
	}
	if err := r.relay(up, resp); err != nil {
		return err
	}
	body.settle()
	if err := r.x.Finish(up.Trailers()); err != nil {
		return goneError{err}
	}
	r.complete = true
	return nil
}

// upload copies the request's body in a goroutine of its own, which ends before
// the exchange does.
type upload struct {
	r    *request
	up   exchange.Upstream
	done chan struct{} // closed when the goroutine has ended

	complete atomic.Bool // all of the body was read from the client
}

// run copies. An upstream that takes no more may have answered already: what it
// says is for the receiving side to find out. A fault of the client ends it all.
func (u *upload) run() {
	defer close(u.done)
	defer func() {
		if p := recover(); p != nil { // costs this exchange, not the process
			u.r.log(slog.LevelError, "panic in an upload", slog.Any("panic", p), slog.String("stack", string(debug.Stack())))
			u.r.fail(errFault)
		}
	}()
	defer func() { u.r.awaitAnswer(u.r.route.Timeout, errResponseTimeout) }()
	buf := u.r.m.buffers.Get().(*copyBuffer)
	defer u.r.m.buffers.Put(buf)
	left := u.r.head.ContentLength // negative, and never 0, for a body of unknown length
	for {
		u.r.clientDue.Store(true)
		n, err := u.r.x.Read(buf[:])
		u.r.clientDue.Store(false)
		left -= int64(n)
		u.r.received += uint64(n)
		if left == 0 || err == io.EOF {
			// Said before the last bytes leave: the answer to them may be faster
			// than this goroutine.
			u.complete.Store(true)
		}
		if n > 0 {
			u.r.idle.touch()
			if _, err := u.up.Write(buf[:n]); err != nil {
				return
			}
			u.r.idle.touch()
		}
		if err == io.EOF {
			u.up.Finish(u.r.x.Trailers())
			return
		}
		if err != nil {
			u.r.bodyFailed(err)
			return
		}
	}
}

// settle ends the upload after the response: at once if the client has not sent
// everything, which costs both connections; nobody waits for the rest.
func (u *upload) settle() {
	if u.complete.Load() {
		grace := time.NewTimer(uploadGrace)
		defer grace.Stop()
		select {
		case <-u.done:
		case <-grace.C:
		case <-u.r.ctx.Done():
		}
	}
	u.abandon()
}

// abandon makes the goroutine end, if it has not, and waits for it.
func (u *upload) abandon() {
	select {
	case <-u.done:
		return
	default:
	}
	u.r.giveUpBody()
	u.up.Close()
	<-u.done
}

// watchdog calls a function once if nothing has moved for a while. Its zero value
// never does. What moves only stores a time; one timer looks at it now and then.
type watchdog struct {
	limit  time.Duration
	expire func()
	began  time.Time
	moved  atomic.Int64 // time since began, in nanoseconds
	timer  *time.Timer
}

// start begins to watch; 0 is no limit. It is called at most once.
func (w *watchdog) start(limit time.Duration, expire func()) {
	if limit <= 0 {
		return
	}
	w.limit, w.expire, w.began = limit, expire, time.Now()
	// The timer is stored before it can run out.
	w.timer = time.AfterFunc(math.MaxInt64, w.look)
	w.timer.Reset(limit)
}

// touch says that something has moved.
func (w *watchdog) touch() {
	if w.limit > 0 {
		w.moved.Store(int64(time.Since(w.began)))
	}
}

func (w *watchdog) look() {
	still := time.Since(w.began) - time.Duration(w.moved.Load())
	if still >= w.limit {
		w.expire()
		return
	}
	w.timer.Reset(w.limit - still)
}

// stop ends the watch. expire may be running.
func (w *watchdog) stop() {
	if w.timer != nil {
		w.timer.Stop()
	}
}
