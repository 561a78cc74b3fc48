package tunnel

import "holdfast/internal/tunnel/inflight"

// mostSpliced is what a pipe holds at most.
const mostSpliced = 1 << 20

// splice passes on bytes through a pipe, in which the kernel moves pages instead of
// bytes. What the receiver does not take stays in the pipe, and the pipe with the flow.
//
// The pipe is empty before, so that EAGAIN is the sender's. What was moved may be less
// than what there is: a pipe is also full when it has so and so many pieces.
func (e *engine) splice(n uint32, t *slot, from int) {
	f, d := &t.flows[from], key(n, from)
	p := e.store.Pipe(d)
	if p == nil {
		f.bulk = false
		return
	}
	got, errno := splice(t.sockets[from].fd, int32(p.W), min(int(f.left), e.origins.used[t.origin].splice))
	if got == 0 {
		e.store.FreePipe(p)
		if errno == 0 || t.sockets[from].broken {
			f.bulk = false // the end, or an urgent mark before it: a read tells
			return
		}
		e.nothing(n, t, from, errno)
		return
	}
	f.heard = true
	if moved := e.pour(n, t, from, p, got); moved < got {
		e.hold(f, d, held{pipe: p, left: got - moved})
	} else {
		e.store.FreePipe(p)
	}
}

// pour gives the receiver of a flow what is in a pipe. Less than all: it is slow, or
// was lost.
func (e *engine) pour(n uint32, t *slot, from int, p *inflight.LoopPipe, all int) (moved int) {
	for moved < all {
		taken, errno := splice(int32(p.R), t.sockets[1-from].fd, all-moved)
		if taken == 0 {
			e.gave(n, t, from, 0, all, errno)
			break
		}
		t.flows[from].left -= int32(taken)
		e.gave(n, t, from, taken, taken, 0)
		e.store.Complete(key(n, from), taken)
		moved += taken
	}
	return moved
}
