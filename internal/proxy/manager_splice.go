package proxy

import (
	"errors"

	"holdfast/internal/exchange"
	"holdfast/internal/stream"
	"holdfast/internal/task"
)

// leastSplice is how much of a body must be left for it to go from one socket to the other
// within the kernel: twice as many system calls cost more than to copy some.
const leastSplice = 32 << 10

// splicing is a body that moves within the kernel: that of the response, or of the request,
// which may move at the same time.
type splicing struct {
	r      *request // nil: nothing moves
	source exchange.Source
	sink   exchange.Sink
	held   int // bytes that were taken and not given on
}

// run moves the rest of a large body from one side to the other without copying it, where
// both codecs let it; a side may be nil. It returns why the sink took no more; what the
// source has to say its next Read tells.
func (s *splicing) run(t *task.Task, r *request, from, to any) error {
	source, ok := from.(exchange.Source)
	sink, both := to.(exchange.Sink)
	if !ok || !both {
		return nil
	}
	in, left := source.Source()
	out, room := sink.Sink()
	if left < leastSplice || room != left {
		return nil
	}
	*s = splicing{r: r, source: source, sink: sink}
	_, err := stream.Splice(t, in, out, left, s)
	if s.uploads() {
		r.clientDue = false
	}
	*s = splicing{}
	if failed, ok := errors.AsType[*stream.WriteError](err); ok {
		source.Ended(nil)
		sink.Failed(failed.Err)
		return failed.Err
	}
	if failed, ok := errors.AsType[*stream.ReadError](err); ok {
		err = failed.Err
	}
	source.Ended(err)
	return nil
}

func (s *splicing) uploads() bool { return s == &s.r.upload.spliced }

// Awaiting implements [stream.Progress].
func (s *splicing) Awaiting() {
	if s.uploads() {
		s.r.clientDue = true
	}
	s.source.Awaiting()
}

// Took implements [stream.Progress].
func (s *splicing) Took(n int) error {
	s.held += n
	if s.uploads() {
		s.r.clientDue = false
		s.r.upload.took(n)
	} else {
		s.r.clientSlow = true
	}
	s.r.touch()
	return s.source.Took(n)
}

// Gave implements [stream.Progress].
func (s *splicing) Gave(n int) {
	s.held -= n
	if !s.uploads() {
		s.r.clientSlow = s.held > 0
		s.r.sent += uint64(n)
	}
	s.r.touch()
	s.sink.Gave(n)
}
