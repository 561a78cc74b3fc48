package proxy

import (
	"errors"
	"io"
	"log/slog"
	"runtime/debug"
	"strings"
	"time"

	"holdfast/internal/exchange"
	"holdfast/internal/task"
	"holdfast/internal/upstream"
)

// uploadGrace is how long a request's last bytes may take to reach an upstream that
// has answered completely. It keeps both connections usable in the usual case,
// where the upload ends a moment after the response.
const uploadGrace = time.Second

// forward sends an ordinary request to an endpoint and its response back.
func (r *request) forward() {
	if err := r.takeAim(); err != nil {
		r.failed(err)
		return
	}
	r.watchIdle()
	if r.prepareTries(); !r.gather() {
		return
	}
	if r.head.ContentLength == 0 || r.upload.complete {
		r.awaitAnswer(r.route.Timeout, errResponseTimeout)
	}
	open := opener((*upstream.Endpoint).Get)
	for {
		up, err := r.connect(open)
		if err == nil {
			err = r.exchange(up)
		} else {
			r.tries.next = r.ended(err, false)
		}
		switch {
		case err == nil:
			return
		case r.tries.next == repeat:
			if r.logs(slog.LevelDebug) {
				r.log(slog.LevelDebug, "a kept connection was closed, trying a fresh one", slog.Any("err", err))
			}
			r.endpoint.Retried()
			open = (*upstream.Endpoint).Fresh
			continue
		case r.tries.next == retry && r.pause():
			if r.logs(slog.LevelDebug) {
				r.log(slog.LevelDebug, "trying again", slog.Int("retry", r.tries.made), slog.Any("err", err))
			}
			open = (*upstream.Endpoint).Get
			continue
		}
		r.abandonUpload()
		r.failed(err)
		return
	}
}

// mayRepeat says whether a request that failed on a kept connection is sent again: only
// if that seems to have been closed under it, nothing of a response came, and the request
// is idempotent and has no body that is gone by now (RFC 9110 §9.2.2).
func (r *request) mayRepeat(err error) bool {
	if !errors.Is(err, exchange.ErrNoAnswer) || !r.replayable() || r.cause != nil {
		return false
	}
	switch r.head.Method {
	case "GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE":
		return true
	}
	return false
}

// exchange sends the request and relays what comes back, both at the same time.
// When it returns, up is closed and nobody reads the request's body any more, unless it is
// kept for another try.
func (r *request) exchange(up exchange.Upstream) (err error) {
	r.use(up)
	reused := up.Reused()
	defer func() {
		r.tries.next = giveUp
		if err != nil {
			if r.tries.timedOut {
				r.tries.timedOut, err = false, errTryTimeout
			}
			r.tries.next = r.ended(err, reused)
		}
		r.leave(err)
	}()

	if err := r.sendRequest(up); err != nil {
		return err
	}
	if r.head.ContentLength == 0 || r.upload.complete {
		r.limitTry()
	}
	resp, err := r.receive(up)
	if err != nil {
		return err
	}
	switch {
	case r.tries.timedOut:
		return errTryTimeout
	case resp.Status == 101:
		return errUnasked101
	case r.discards(up, resp):
		return errDiscarded
	case !r.beginAnswer():
		return r.cause
	}
	if r.head.ContentLength != 0 && !r.upload.complete {
		r.metrics.early.Inc()
	}
	if err := r.relay(up, resp); err != nil {
		return err
	}
	trailers := r.settleUpload(up.Trailers())
	r.clientSlow = true
	if err := r.x.Finish(r.task, trailers); err != nil {
		return goneError{err}
	}
	r.complete = true
	return nil
}

// sendRequest sends the request, without waiting for its body.
func (r *request) sendRequest(up exchange.Upstream) error {
	r.rewrite()
	if r.copies != nil && (r.head.ContentLength == 0 || r.tape.ended) {
		r.mirror()
	}
	if err := up.Send(r.task, r.head); err != nil {
		return err
	}
	if r.head.ContentLength == 0 {
		return up.Finish(r.task, nil)
	}
	if r.upload.begun {
		r.tape.replay()
	} else {
		r.upload.begun, r.upload.running = true, true
		r.loop.Tasks.Go(&r.upload)
	}
	r.task.Pause() // what has come of the body leaves together with the head
	return nil
}

// upload copies the request's body in a task of its own, which ends before the
// exchange does.
type upload struct {
	r        *request
	begun    bool // it, or to gather the body
	running  bool
	complete bool // all of the body was read from the client
	spliced  splicing
}

// Run implements [task.Runner].
func (u *upload) Run(t *task.Task) {
	defer u.end()
	if u.r.tape.keeping {
		u.record(t)
	} else {
		u.copy(t)
	}
}

// end is the last that the task does.
func (u *upload) end() {
	r := u.r
	if p := recover(); p != nil { // costs this exchange, not the process
		r.log(slog.LevelError, "panic in an upload", slog.Any("panic", p), slog.String("stack", string(debug.Stack())))
		r.fail(errFault)
	}
	r.awaitAnswer(r.route.Timeout, errResponseTimeout)
	r.limitTry()
	u.running = false
	r.task.Wake()
}

// copy copies. An upstream that takes no more may have answered already: what it
// says is for the receiving side to find out. A fault of the client ends it all.
func (u *upload) copy(t *task.Task) {
	r := u.r
	for {
		r.clientDue = true
		p, err := r.x.Read(t)
		r.clientDue = false
		u.took(len(p))
		u.complete = u.complete || err == io.EOF
		if r.isLarge() {
			r.bodyFailed(errLargeBody)
			return
		}
		if len(p) > 0 {
			r.touch()
			if r.up == nil || r.up.Write(t, p) != nil {
				return
			}
			r.touch()
			if u.spliced.run(t, r, r.x, r.up) != nil {
				return
			}
		}
		if err == io.EOF {
			if r.up != nil {
				_ = r.up.Finish(t, r.x.Trailers())
			}
			return
		}
		if err != nil {
			r.bodyFailed(err)
			return
		}
	}
}

// took counts what was read of the body. It is complete before its last bytes leave: the
// answer to them may be there before the task goes on.
func (u *upload) took(n int) {
	u.r.received += uint64(n)
	u.complete = u.r.received == uint64(u.r.head.ContentLength) // of unknown length it never is
}

// isLarge says whether more of the body has come than its route takes. Whoever reads the body
// asks, before anybody gets what it has read.
func (r *request) isLarge() bool {
	most := r.route.MaxBodySize
	return most > 0 && r.received > uint64(most)
}

// broken says that a part of the body was read and not all: nobody reads the rest when
// the upload has ended.
func (u *upload) broken() bool { return u.r.received > 0 && !u.complete }

// settleUpload ends the upload after the response: at once if the client has not sent
// everything, which costs both connections; nobody waits for the rest. It returns the
// response's trailers, which are the upstream's until that is closed.
func (r *request) settleUpload(trailers exchange.Fields) exchange.Fields {
	if !r.uploading() {
		return trailers
	}
	trailers = cloneFields(trailers)
	if r.upload.complete {
		r.loop.SetDeadline(&r.grace.Deadline, &r.grace, r.loop.Now().Add(uploadGrace))
		for r.uploading() && !r.grace.over && r.cause == nil {
			r.task.Wait()
		}
	}
	r.abandonUpload()
	return trailers
}

// cloneFields returns fields with texts of their own.
func cloneFields(fields exchange.Fields) exchange.Fields {
	own := make(exchange.Fields, len(fields))
	for i, f := range fields {
		own[i] = exchange.Field{Name: strings.Clone(f.Name), Value: strings.Clone(f.Value)}
	}
	return own
}

// abandonUpload makes the upload end, if it has not, and waits for it.
func (r *request) abandonUpload() {
	if !r.uploading() {
		return
	}
	r.giveUpBody()
	r.closeUpstream()
	for r.uploading() {
		r.task.Wait()
	}
}

// uploading says that a task has to do with the request's body.
func (r *request) uploading() bool { return r.upload.running || r.tape.replaying }
