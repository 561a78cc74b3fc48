package tunnel

import (
	"errors"
	"time"

	"holdfast/internal/tunnel/inflight"
)

// A Vault is where somebody outside of this process keeps what the tunnels on loops need
// to outlive it. Loops call its methods, also several at once: they never wait. An error
// says that nothing was done; one that is [ErrVaultBusy] may pass in a moment, any other
// means that nobody is there until [Set.Deposit] says that somebody is. They keep none of
// the slices that they are given.
type Vault interface {
	// Deposit hands over tunnels with duplicates of their sockets; one that is there
	// already is replaced. At most VaultBatch at once.
	Deposit(tunnels []Deposit) error

	// Withdraw gives back tunnels that have ended. At most 1,024 at once.
	Withdraw(numbers []uint64) error

	// Complete says that all were deposited that [Set.Deposit] has asked for with this
	// ticket. It may be said more than once.
	Complete(Ticket) error

	// Release offers tunnels, which stand still from now on, to go on elsewhere.
	// [Set.Gone] or [Set.Returned] answers. At most VaultBatch at once.
	Release(tunnels []Standing) error

	// Taken and Declined answer [Set.Take]. Taken deposits as well, without sockets: the
	// vault has them.
	Taken(ticket Ticket, d Deposit) error
	Declined(ticket Ticket) error
}

// ErrVaultBusy is what a [Vault] returns that has no room at present.
var ErrVaultBusy = errors.New("the vault is busy")

// VaultBatch is how many tunnels a Vault is given at once, and VaultHeld how many bytes
// all those that it is to release have in Held.
const (
	VaultBatch = 16
	VaultHeld  = 2 * inflight.BufferSize
)

// Deposit is a living tunnel as a [Vault] keeps it.
type Deposit struct {
	Record
	FDs   [2]int // the client's and the server's; the Set's
	Place Place
	Stand uint64 // of one that was released, and nobody has said what became of that; as in [Standing]
}

// Place is where a successor finds what is in flight, and what it needs to know of the
// time before the deposit. It never changes while a tunnel is on its loop.
type Place struct {
	Loop int    // its number in [Options]
	Slot uint32 // the two flows are the directions 2×Slot and 2×Slot + 1 of the loop's store

	// By the flow: from the client, from the server.
	Taken, Given [2]uint64 // what the kernel's counters are counted from; see package inflight
	Moved        [2]uint64 // bytes that were passed on before that
}

// Standing is what becomes of a tunnel on its way to another loop, beside its identity.
type Standing struct {
	Number uint64
	Stand  uint64        // which time it is that a tunnel of the Set stands still, from 1
	Idle   time.Duration // since a byte was last passed on

	// By the flow.
	Moved [2]uint64
	Held  [2][]byte // taken from the sender, and still to be passed on before all else
	Pipe  [2]int    // the same in a pipe of which this is the read end, and stays so; 0: none
	Piped [2]int    // how much is in it

	// By the socket.
	FinSent, Ended [2]bool // our FIN was sent; the peer's was read
	ClosedFirst    Reason  // of the two FINs; Open where none was read
}

// Ticket is whatever a caller knows by what it is answered: that of [Set.Take] a tunnel,
// that of [Set.Deposit] who asked.
type Ticket any

// Arriving is a tunnel of another Set that is to go on in this one. Its Origin is the
// one that it gets here. A Set that takes it owns FDs, and closes Standing.Pipe in any
// case.
type Arriving struct {
	Record // without Number
	FDs    [2]int
	Standing
	Ticket Ticket
	Sentence
}

// Resumed is a tunnel of a process that is dead, which is to go on at its old place.
type Resumed struct {
	Record // as deposited
	FDs    [2]int
	Place  Place
	Sentence
}

// Sentence is what a Set is told about the end of a tunnel that it takes over.
type Sentence struct {
	Ends   Reason        // Open: it lives on
	Within time.Duration // it is closed at a random moment of that time
}
