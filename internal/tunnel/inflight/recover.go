package inflight

import (
	"errors"
	"fmt"
)

// ErrContradiction says that what is left of a direction cannot be. Nobody knows what its
// receiver is to get.
var ErrContradiction = errors.New("what is left of a tunnel contradicts itself")

// Hold is what a predecessor has claimed for a direction.
type Hold uint8

const (
	HoldNothing Hold = iota
	HoldBuffer       // into which Bytes were read; 0: none, or nobody knows
	HoldPipe         // in which Bytes are
	HoldBroken       // what cannot be: two claims, too many bytes, a pipe that is not there
)

// Trace is what a predecessor has left of a direction.
type Trace struct {
	Hold      Hold
	Bytes     uint64
	Completed uint64

	Source, Receiver Counters // what was taken and given since the direction began
	Reset            bool     // a source that is Gone is known to be so without both FINs
}

// Finding is what is in flight of a direction. At most one of the first three is there.
type Finding struct {
	From, To int // bytes of the buffer that are to be sent; From == To: none
	Piped    int // bytes of the pipe that are to be moved to the receiver
	Discard  int // bytes in the source's queue that were sent already

	Reset bool // the source is Gone, and not by both FINs
	Lost  bool // so nobody knows what is in the buffer; the receiver is to be reset, too

	Completed uint64 // what the count is from now on
	Given     uint64 // bytes that the receiver was given; if it is Gone, those of which it is certain
}

// Recover finds out what is in flight of a direction, from nothing but its arguments. It
// fails with [ErrContradiction].
func Recover(t Trace) (Finding, error) {
	f := Finding{Completed: t.Completed, Given: t.Completed, Reset: t.Reset}
	switch {
	case t.Hold == HoldBroken:
		return f, t.contradiction()
	case t.Receiver.Gone: // nobody will get what is in flight
		return f, nil
	}
	f.Given = t.Receiver.Given
	given := f.Given - t.Completed // of which the count says nothing so far
	sound := f.Given >= t.Completed && (given <= BufferSize || t.Hold == HoldPipe)
	switch {
	case t.Hold == HoldPipe:
		f.Piped = int(t.Bytes)
		sound = sound && f.taken(t, f.Given+t.Bytes)
	case t.Hold == HoldBuffer && t.Bytes > 0:
		f.From, f.To = int(given), int(t.Bytes)
		sound = sound && given <= t.Bytes && f.taken(t, t.Completed+t.Bytes)
	case t.Hold == HoldBuffer:
		sound = sound && f.unfilled(t, given)
	case !t.Receiver.FinSent: // after our FIN, bytes are thrown away
		sound = sound && f.taken(t, f.Given)
	}
	left := f.To - f.From + f.Piped + f.Discard
	if !sound || left > 0 && t.Receiver.FinSent {
		return f, t.contradiction()
	}
	if f.From == f.To && !f.Lost {
		f.From, f.To, f.Completed = 0, 0, f.Given
	}
	return f, nil
}

// taken says whether c bytes may have been taken from the source.
func (f *Finding) taken(t Trace, c uint64) bool {
	switch {
	case !t.Source.Gone:
		return t.Source.Taken == c
	case t.Reset: // nobody knows whether a FIN is counted; if we have reset it, nothing is
		return true
	case t.Source.Taken == c: // there was no FIN
		f.Reset = true
		return true
	}
	return t.Source.Taken == c+1
}

// unfilled is what follows from a buffer of which nobody knows how much was read into it:
// either all of it is still to be sent, or it was only peeked at.
func (f *Finding) unfilled(t Trace, given uint64) (sound bool) {
	taken := t.Source.Taken - t.Completed
	switch {
	case !t.Source.Gone:
	case taken == 0:
		f.Reset = true
	case t.Reset:
		f.Lost = true
		return true
	default:
		taken-- // the FIN
	}
	switch {
	case taken < given:
		f.Discard = int(given - taken)
		return f.Discard <= t.Source.Unread
	case taken > given:
		f.To = int(taken)
		return given == 0 && taken <= BufferSize
	}
	return true
}

func (t Trace) contradiction() error {
	return fmt.Errorf("inflight: %w: %+v", ErrContradiction, t)
}
