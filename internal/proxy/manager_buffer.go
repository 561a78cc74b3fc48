package proxy

import (
	"errors"
	"io"
	"log/slog"
	"runtime/debug"

	"holdfast/internal/exchange"
	"holdfast/internal/task"
)

// A request's body goes to the endpoint as it comes. Where another try may need it, or a
// mirror, what has come is kept on a tape as well, up to a limit: from then on the body goes
// on as all others, and there is neither. A route with a request_buffer has the whole body on
// the tape before an endpoint is chosen.
//
// The upload's task reads the client and keeps what comes. Whoever has something to deliver
// does so: the upload's task what it has just read, the tape's own task, with each try but
// the first one, what is there already. One of them delivers at a time, until all is
// delivered.

// tape is what is kept of a request's body, from its beginning. The zero value keeps nothing.
type tape struct {
	r        *request
	kept     []byte // in a buffer of the loop
	limit    int64
	keeping  bool
	gathered bool // the request_buffer has all of it
	ended    bool // it is all of the body

	// Of the try that is under way.
	given    int  // bytes that the endpoint has
	failed   bool // it takes no more
	finished bool

	replaying  bool       // there is a task of its own
	delivering bool       // a task does
	waits      *task.Task // the upload's, for everything to be delivered
}

var (
	errBufferFull = &exchange.StatusError{Status: 413, Text: "a body longer than the route's request_buffer"}
	errCrowded    = errors.New("too many bytes of request bodies are kept already")
)

// leastKept is the first buffer of a tape, which grows as the body comes: what a client has
// announced costs nothing.
const leastKept = 4 << 10

// mostBodies is how many bytes of request bodies are kept at once, where nobody says otherwise.
const mostBodies = 1 << 30

// keep appends to the tape.
func (p *tape) keep(b []byte) {
	if need := len(p.kept) + len(b); need > cap(p.kept) {
		grown := p.r.loop.Buffer(max(need, 2*cap(p.kept), leastKept))[:len(p.kept)]
		copy(grown, p.kept)
		p.release()
		p.kept = grown
		p.r.local.kept += int64(cap(grown))
	}
	p.kept = append(p.kept, b...)
}

func (p *tape) release() {
	if p.kept != nil {
		p.r.local.kept -= int64(cap(p.kept))
		p.r.loop.Release(p.kept)
		p.kept = nil
	}
}

// crowded says that all tapes of the loop together have more than they may: clients that send
// bodies slowly take no more memory than that, however many there are. One tape alone has what
// its route grants.
func (p *tape) crowded() bool {
	kept := p.r.local.kept
	return kept > p.r.m.mostKept && kept > int64(cap(p.kept))
}

// erase ends the tape: nobody plays it any more.
func (p *tape) erase() {
	p.keeping = false
	p.release()
}

// wake has whoever waits for the tape look again.
func (p *tape) wake() {
	if p.waits != nil {
		p.waits.Wake()
	}
}

// replayable says whether all that an endpoint may have of the body can be sent again.
func (r *request) replayable() bool {
	return r.head.ContentLength == 0 || r.tape.keeping || !r.upload.begun
}

// prepareTries finds out what the route wants beside the one exchange.
func (r *request) prepareTries() {
	if r.route.Retry != nil {
		r.tries.policy = r.m.retries[r.route]
		r.hangBells()
		r.tape.limit = r.route.Retry.Buffer
	}
	if r.route.Mirror != nil {
		r.chooseCopies()
	}
	n := r.head.ContentLength
	r.tape.keeping = n != 0 && r.tape.limit > 0 && n <= r.tape.limit
	if r.copies != nil && n != 0 && !r.tape.keeping && r.route.RequestBuffer == 0 {
		r.dropCopies(r.copies.tooLong)
	}
}

// gather reads the whole body, where the route has a request_buffer. false: that was not
// possible, and is answered.
func (r *request) gather() bool {
	if r.route.RequestBuffer == 0 || r.head.ContentLength == 0 {
		return true
	}
	if err := r.readWhole(r.route.RequestBuffer); err != nil {
		r.clientDue = false
		if over := r.x.Over(); over != nil {
			r.ExchangeOver(over)
		}
		r.failed(bodyError{err})
		return false
	}
	r.upload.begun, r.upload.complete = true, true
	r.tape.keeping, r.tape.gathered, r.tape.ended = true, true, true
	if len(r.x.Trailers()) == 0 { // they need a body of unknown length
		r.head.ContentLength = int64(len(r.tape.kept))
	}
	return true
}

// readWhole reads the body to its end.
func (r *request) readWhole(most int64) error {
	if r.head.ContentLength > most {
		return errBufferFull
	}
	r.clientDue = true
	for {
		b, err := r.x.Read(r.task)
		r.upload.took(len(b))
		if r.isLarge() {
			return errLargeBody
		}
		if len(b) > 0 {
			r.touch()
			if int64(len(r.tape.kept)+len(b)) > most {
				return errBufferFull
			}
			if r.tape.keep(b); r.tape.crowded() {
				return errCrowded
			}
		}
		switch {
		case err == io.EOF:
			r.clientDue = false
			return nil
		case err != nil:
			return err
		}
	}
}

// record is copy with a tape.
func (u *upload) record(t *task.Task) {
	r, p := u.r, &u.r.tape
	for !p.ended {
		r.clientDue = true
		b, err := r.x.Read(t)
		r.clientDue = false
		u.took(len(b))
		u.complete = u.complete || err == io.EOF
		if r.isLarge() {
			r.bodyFailed(errLargeBody)
			return
		}
		if len(b) > 0 {
			r.touch()
			p.keep(b)
		}
		p.ended = err == io.EOF
		if err != nil && !p.ended {
			r.bodyFailed(err)
			return
		}
		if p.ended && r.copies != nil {
			r.mirror()
		}
		p.deliver(t)
		if (int64(len(p.kept)) > p.limit || p.crowded()) && !p.ended {
			u.goOnWithout(t)
			return
		}
	}
}

// goOnWithout has the rest of a body that is too long for the tape, or for all of them, copied, when an endpoint
// has what is kept: that may be another one than is just tried.
func (u *upload) goOnWithout(t *task.Task) {
	r, p := u.r, &u.r.tape
	for !p.delivered() {
		if r.cause != nil || r.givenUp {
			return
		}
		p.waits = t
		t.Wait()
		p.waits = nil
		p.deliver(t)
	}
	p.erase()
	if r.copies != nil {
		r.dropCopies(r.copies.tooLong)
	}
	u.copy(t)
}

// delivered says that the endpoint of the present try has all that is kept.
func (p *tape) delivered() bool {
	return p.r.up != nil && !p.failed && !p.delivering && p.given == len(p.kept)
}

// deliver gives the endpoint what is kept and it does not have yet, unless somebody does so
// already. An endpoint that takes no more may have answered: see [upload.copy].
func (p *tape) deliver(t *task.Task) {
	if p.delivering {
		return
	}
	r := p.r
	p.delivering = true
	defer func() {
		p.delivering = false
		p.wake()
		if r.up == nil {
			r.task.Wake() // see detachUpload
		}
	}()
	for r.up != nil && !p.failed && p.given < len(p.kept) {
		part := p.kept[p.given:]
		p.failed = r.up.Write(t, part) != nil
		p.given += len(part)
		r.touch()
	}
	if r.up != nil && !p.failed && p.ended && !p.finished {
		p.finished = true
		_ = r.up.Finish(t, r.x.Trailers())
	}
}

// replay begins to give another endpoint what is kept, in a task of its own.
func (p *tape) replay() {
	p.given, p.failed, p.finished = 0, false, false
	p.replaying = true
	p.r.loop.Tasks.Go(p)
}

// Run implements [task.Runner].
func (p *tape) Run(t *task.Task) {
	r := p.r
	defer func() {
		if v := recover(); v != nil { // costs this exchange, not the process
			r.log(slog.LevelError, "panic in a replay", slog.Any("panic", v), slog.String("stack", string(debug.Stack())))
			r.fail(errFault)
		}
		p.replaying = false
		r.task.Wake()
	}()
	p.deliver(t)
}

// detachUpload closes the exchange with the upstream, and returns when nobody delivers to it
// any more; the client's body may be read on meanwhile.
func (r *request) detachUpload() {
	r.closeUpstream()
	for r.tape.replaying || r.tape.delivering {
		r.task.Wait()
	}
}
