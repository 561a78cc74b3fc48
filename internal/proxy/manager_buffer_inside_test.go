package proxy

import (
	"io"
	"testing"

	"holdfast/internal/config"
	"holdfast/internal/exchange"
	"holdfast/internal/route"
	"holdfast/internal/stream/streamtest"
	"holdfast/internal/task"
)

// endless is a client that sends a long body, and the endpoint that gets it.
type endless struct {
	exchange.Exchange
	r     *request
	piece []byte
	left  int
	most  int // of the tape, while something is sent
	got   int
}

func (e *endless) Trailers() exchange.Fields { return nil }

func (e *endless) Read(*task.Task) ([]byte, error) {
	if e.left == 0 {
		return nil, io.EOF
	}
	e.left--
	return e.piece, nil
}

// ends is the endpoint's side.
type ends struct {
	exchange.Upstream
	e *endless
}

func (u ends) Write(_ *task.Task, p []byte) error {
	u.e.got += len(p)
	u.e.most = max(u.e.most, cap(u.e.r.tape.kept))
	return nil
}

func (u ends) Finish(*task.Task, exchange.Fields) error { return nil }

// However long a body is, what is kept of it is bounded, and so is what is kept of all bodies.
func TestATapeHasALimit(t *testing.T) {
	t.Parallel()
	t.Run("of its own", func(t *testing.T) { t.Parallel(); testLimit(t, 20_000, 0) })
	t.Run("with others", func(t *testing.T) { t.Parallel(); testLimit(t, 2<<20, 1<<20-10_000) })
}

// testLimit records a body while other tapes have so many bytes.
func testLimit(t *testing.T, limit, other int64) {
	const pieces = 1000
	l := streamtest.NewVirtual(t)
	streamtest.Go(l, func(task *task.Task) {
		r := new(request)
		e := &endless{r: r, piece: make([]byte, 4096), left: pieces}
		r.x, r.up, r.loop, r.task = e, ends{e: e}, l, task
		r.head, r.route = &exchange.Request{ContentLength: -1}, &route.Route{Route: new(config.Route)}
		r.upload.r, r.tape.r = r, r
		r.m, r.local = &Manager{mostKept: 1 << 20}, &perLoop{kept: other}
		r.tape.limit, r.tape.keeping = limit, true
		r.upload.record(task)
		if e.got != pieces*len(e.piece) {
			t.Errorf("the endpoint got %d bytes", e.got)
		}
		if e.most > 64<<10 || r.tape.kept != nil || r.tape.keeping {
			t.Errorf("%d bytes were kept, and %d still are", e.most, cap(r.tape.kept))
		}
		if r.local.kept != other {
			t.Errorf("%d bytes are counted, %d of them as other ones", r.local.kept, other)
		}
	})
}
