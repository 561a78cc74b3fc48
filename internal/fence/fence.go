// Package fence decides whom a generation obeys: which of its channels commands, which
// one may come to command, and with what epoch. It does nothing itself. A generation
// tells it what has happened and does as it says:
//
//	f := fence.New(epoch)         // the channel that the generation was started with commands
//	f.Message(from, type, epoch)  // a message has come: Do, Refuse, Ignore, Admit or Commit
//	f.Ended(channel)              // a channel is closed: Ignore, Wait or Seek
//	f.Found()                     // another supervisor was found at the rendezvous
//
// and closes every channel that is then neither [Fence.Commander] nor [Fence.Candidate].
//
// What it guarantees: at most one channel commands, at most one other may come to, the
// epoch only grows, and nothing that a channel has said counts once another one has
// been told [control.TypeObey].
package fence

import (
	"fmt"

	"holdfast/internal/control"
)

// Channel names a channel of one generation. A number is never given again.
type Channel uint64

// None is no channel; First is the one that the generation was started with.
const (
	None Channel = iota
	First
)

// Verdict is what to do about what has happened.
type Verdict int

const (
	Ignore Verdict = iota // nothing: it is of no importance any more
	Refuse                // answer with the error, change nothing
	Do                    // what the message says
	Admit                 // the channel in the message is the new [Fence.Candidate]
	Commit                // the channel commands now, with the message's epoch
	Wait                  // nobody commands, but the candidate may come to
	Seek                  // nobody is left: look for a supervisor at the rendezvous
	numVerdicts
)

var verdictNames = [numVerdicts]string{
	Ignore: "ignore", Refuse: "refuse", Do: "do", Admit: "admit", Commit: "commit", Wait: "wait", Seek: "seek",
}

func (v Verdict) String() string {
	if v >= 0 && v < numVerdicts {
		return verdictNames[v]
	}
	return fmt.Sprintf("verdict(%d)", int(v))
}

// role is what a channel is to the generation.
type role int

const (
	stranger  role = iota // was closed: what it still says came too late
	candidate             // may ask, and come to command
	commander             // commands
	numRoles
)

// kind is what a message wants, as far as it matters here.
type kind int

const (
	question kind = iota // to know something: changes nothing
	order                // everything else
	prepare              // to bring a candidate
	obey                 // to command
	numKinds
)

// kinds are the messages that are not orders.
var kinds = map[control.Type]kind{
	control.TypeStatus: question, control.TypeAdopt: question,
	control.TypePrepare: prepare, control.TypeObey: obey,
}

func kindOf(t control.Type) kind {
	if k, ok := kinds[t]; ok {
		return k
	}
	return order
}

// verdicts is the whole fence. Where it says Admit or Commit the epoch must be above the
// one that commands; otherwise it is a refusal.
var verdicts = [numRoles][numKinds]Verdict{
	stranger:  {question: Ignore, order: Ignore, prepare: Ignore, obey: Ignore},
	candidate: {question: Do, order: Refuse, prepare: Refuse, obey: Commit},
	commander: {question: Do, order: Do, prepare: Admit, obey: Commit},
}

// Fence is the state of one generation. Its methods are called by one goroutine at a
// time.
type Fence struct {
	epoch                uint64
	commander, candidate Channel
	last                 Channel
}

// New returns the fence of a generation that was started by the supervisor of epoch,
// who commands at the channel [First].
func New(epoch uint64) *Fence { return &Fence{epoch: epoch, commander: First, last: First} }

// Epoch is the number of the supervisor that commands, or commanded last.
func (f *Fence) Epoch() uint64 { return f.epoch }

// Commander is the channel that commands, or [None].
func (f *Fence) Commander() Channel { return f.commander }

// Candidate is the channel that may come to command, or [None].
func (f *Fence) Candidate() Channel { return f.candidate }

// Message judges a message with its epoch, 0 where it has none. The error goes with
// [Refuse] and says why.
func (f *Fence) Message(from Channel, t control.Type, epoch uint64) (Verdict, error) {
	v := verdicts[f.role(from)][kindOf(t)]
	switch {
	case v == Refuse:
		return v, fmt.Errorf("%q is for the supervisor that commands, and this one does not", t)
	case (v == Admit || v == Commit) && epoch <= f.epoch:
		return Refuse, fmt.Errorf("%q with epoch %d, which is not above %d", t, epoch, f.epoch)
	case v == Admit:
		f.admit()
	case v == Commit:
		f.epoch, f.commander, f.candidate = epoch, from, None
	}
	return v, nil
}

// Ended says that a channel is closed, whoever has closed it.
func (f *Fence) Ended(c Channel) Verdict {
	switch f.role(c) {
	case stranger:
		return Ignore
	case candidate:
		f.candidate = None
	case commander:
		f.commander = None
	}
	switch {
	case f.commander != None:
		return Ignore
	case f.candidate != None:
		return Wait
	}
	return Seek
}

// Found says that a supervisor was found at the rendezvous and returns its channel, the
// candidate. ok is false if none is sought any more.
func (f *Fence) Found() (_ Channel, ok bool) {
	if f.commander != None || f.candidate != None {
		return None, false
	}
	return f.admit(), true
}

// admit makes a new channel the candidate.
func (f *Fence) admit() Channel {
	f.last++
	f.candidate = f.last
	return f.candidate
}

func (f *Fence) role(c Channel) role {
	switch {
	case c == None:
		return stranger
	case c == f.commander:
		return commander
	case c == f.candidate:
		return candidate
	}
	return stranger
}
