// Package tunnel relays the bytes of two connections to each other until both
// directions have ended, and keeps account of every such pair.
//
// A [Set] holds the tunnels of one generation. Start gives it a pair of
// connections; it owns them from then on:
//
//	set := tunnel.NewSet(tunnel.Options{Log: log, OnEnd: func(r tunnel.Record) { … }})
//	set.Start(tunnel.Spec{Down: client, Up: server, UpEarly: early})
//	…
//	set.Drain(5 * time.Minute)
//	<-set.Empty()
//
// No byte is interpreted. What is sent on is in order and complete:
//
//   - a FIN is passed on as a FIN, behind all bytes before it; the other
//     direction goes on (RFC 9293 §3.6, half-close)
//   - a reset is passed on as a reset, after what the peer had sent before it was
//     delivered, for as long as the receiver makes progress and at most 30
//     seconds: a reset discards what the kernel still holds
//   - a tunnel that we close ends with a FIN to both sides behind the bytes that
//     were already taken in, and a bounded wait for their FINs
//   - a peer that answers nothing any more is found out, whether the tunnel is idle or
//     something is on its way to it; one that is alive and merely does not read is left
//     alone
//
// While a receiver is slow at most one buffer or pipe per direction is held, and the
// sender is not read: its window closes.
//
// # Loops
//
// The tunnels of which both connections are plain TCP live on loops, as far as the Set was
// given some ([Options]). Their descriptors are not in Go's poller any more, and a loop's
// engine owns everything about them: a slot of at most 256 bytes in a table without
// pointers, and, only while something waits for a slow receiver, a buffer or a pipe of the
// loop's [inflight.Store]. Bytes are copied through one buffer that all tunnels of a loop
// share; larger amounts are spliced through a pipe. What is counted is added up within the
// loop and made known once in each of its turns. Nothing wakes a loop up in which nothing
// moves and nothing is due.
//
// Tunnels of which a side has TLS or is a unix socket are foreign: loops relay them as well, by
// the same rules, but what they hold is private memory of exact size, no pipe is used for them,
// and no successor process knows of them. An idle one has no buffer beside what crypto/tls keeps
// of its keys.
//
// What is left, as pairs of Go's own connections and those for which no loop has room, has a pair
// of goroutines, which hold a buffer only while bytes move. They keep the same rules and the same
// account. TLS is not for them: a tunnel for which no loop has room is cut ([Failed]).
//
// # TLS
//
// The ends of TLS are passed on as far as its peer can be told of them (RFC 8446 §6.1):
//
//	close_notify            a FIN; the other direction goes on
//	a FIN without it        a FIN, too, and counted: somebody may have cut what was sent
//	a FIN within a record,  a reset
//	an alert, bad bytes
//	a reset                 a reset
//
// A peer that has TLS is sent close_notify and then a FIN for a FIN, and a reset for a reset.
// A peer of TLS 1.2 may end the whole connection for a close_notify.
//
// # What a successor process relies on
//
// A tunnel on a loop does not depend on the process that relays it: somebody else may hold
// duplicates of both sockets, of the memory file and of the pipes, and go on after this
// process died, at whatever instruction. Package [inflight] says how the bytes are found
// that were on their way. For that,
//
//   - nothing is taken from a socket, or put into one, without a claim in the store; the
//     two flows of the tunnel in slot n are the directions 2n (from the client) and 2n+1
//   - early bytes are in a buffer of the store where they fit. Others are private: counting
//     begins after them, and until they are sent, nothing of their direction is taken in
//   - what a flow holds is given up only after its receiver was reset
//   - a socket that has sent our FIN gets no more bytes. What its sender still sends is
//     thrown away without a claim
//   - that a FIN is about to be sent, that a socket is lost, why the tunnel ends and who
//     closed first is marked in the store before anything is done about it
//   - a slot whose tunnel has ended is not another one's until nobody looks for it there
//   - a socket does not block, which all duplicates have in common: whoever clears
//     O_NONBLOCK on one (as os.File.Fd does) stops the loop
//   - urgent bytes are in the stream, like all others (SO_OOBINLINE)
//   - connections are ended by shutdown and connect(AF_UNSPEC), which act at once however
//     many duplicates there are. close alone would end nothing, and a descriptor leaves
//     its epoll set before it is closed, or else the duplicates would keep it in there
//
// # The vault
//
// Who holds all that is behind a [Vault], which a Set is given. A tunnel is deposited there
// before its first byte is moved, together with others that were started in the same turn.
// Nothing waits for a vault for long: while it is busy a new tunnel waits for at most a
// quarter of a second, and is deposited later; while nobody is there it does not wait.
// When somebody is there all are deposited ([Set.Deposit]). A tunnel that has ended is
// withdrawn before its end is reported, so that each end is reported once, whoever relays
// the tunnel then.
//
// After a death another Set resumes all tunnels in place, with the same stores, slots and
// numbers ([Set.Resume]), as often as processes die.
//
// A tunnel moves from one living Set to another one, with a store of its own, like this:
//
//	A: Vault.Release   it stands still: its sockets have left the loop
//	B: Set.Take        B has it, with all that it holds, and does nothing with it
//	B: Vault.Taken     from now on it is B's, which begins to relay it
//	A: Set.Gone        A closes its descriptors, and nothing else
//
// Whoever dies in between, one complete description is there: A's place until the vault
// has heard Taken, and B's from then on. With Vault.Declined it is [Set.Returned] to A.
package tunnel

import (
	"net"
	"net/netip"
	"time"

	"holdfast/internal/metrics"
	"holdfast/internal/poller"
	"holdfast/internal/stream"
)

// Origin is what the tunnels of one listener, route and endpoint have in common.
// It is made once and shared by pointer; it must not be changed after it was given
// to a Set.
type Origin struct {
	Listener     string
	VirtualHost  string
	Route        string
	Cluster      string
	Endpoint     string         // as configured
	EndpointAddr netip.AddrPort // zero for a unix socket

	Limits Limits

	// SurviveCrash: its tunnels are deposited in the Set's [Vault] before anything of them
	// is relayed. (One that is to move is in any case, and stays so.)
	SurviveCrash bool

	Move bool // its tunnels go elsewhere when [Set.Move] asks for it

	// UpBytes and DownBytes count the bytes that the server's and the client's
	// sockets took, beside what the Set itself counts.
	UpBytes, DownBytes []*metrics.Counter

	// Owner is its maker's own.
	Owner any
}

// Spec describes a tunnel to be started.
type Spec struct {
	// Down is the client's connection, Up the server's. Any net.Conn will do;
	// one that has no CloseWrite method is closed at once for both directions,
	// and only a *net.TCPConn can be reset, or relayed by a loop.
	Down, Up net.Conn

	// FDs are the client's socket and the server's where Down and Up are nil. They do not
	// block and are not in Go's poller. They belong to no loop, or to On.
	FDs [2]int

	// About is what is known of FDs, so that it needs not be found out or done again.
	About [2]About

	// On is the loop that they are registered on, and whose goroutine calls Start. nil: none.
	On *poller.Loop

	// Secure is the TLS that the sockets of FDs have; nil: none. Such a tunnel is relayed by a
	// loop, or not at all, and stays with its Set until it ends.
	Secure [2]*stream.Secure

	// Resets are those of sockets of FDs that are one of a pair; nil: they are not.
	Resets [2]*stream.Resets

	// Loop is the one that such a tunnel is to be on if it has room, by its place in
	// [Options].
	Loop int

	// Head goes to Down before anything else, and counts as none of the tunnel's bytes: the
	// answer that says that there is one.
	Head []byte

	// DownEarly was already read from Down and goes to Up before anything else;
	// UpEarly the other way. The tunnel keeps them until they are sent.
	DownEarly, UpEarly []byte

	Origin *Origin        // nil: one in which everything is zero
	ID     string         // of the request that became the tunnel
	Client netip.AddrPort // zero for a unix socket

	// Tag is the starter's own: it comes back in the Record.
	Tag any
}

// About is what is known of a socket. The zero value: nothing.
type About struct {
	Plain     bool          // it is plain TCP, and not what only looks like it
	KeepAlive KeepAlive     // it has been given that, and SO_OOBINLINE
	Handle    poller.Handle // by which the loop knows it; 0: it does not
	Events    poller.Events // what the kernel has told that loop, and no call has taken back
}

// Limits of a tunnel. A zero value is "off".
type Limits struct {
	IdleTimeout  time.Duration // no byte was passed on in either direction
	MaxAge       time.Duration // since the start; each tunnel has up to a tenth of it taken off, at random
	DrainTimeout time.Duration // since the start of a drain; see [Set.Drain]

	// Buffer bounds the bytes that one direction holds while its receiver is
	// slow, beside what the kernel holds for the sockets. More than a relay buffer
	// has, or a pipe of 1 MiB, is never held. No pipe is used where 64 KiB are too
	// much.
	Buffer int64

	KeepAlive KeepAlive
}

// KeepAlive says how a peer that vanished is found out: by probes while nothing is
// sent (tcp(7)), and while something is, by the same patience, Interval × Count,
// without any answer. The zero value is [DefaultKeepAlive].
type KeepAlive struct {
	Idle     time.Duration // of a connection until it is probed; whole seconds
	Interval time.Duration // between two probes; whole seconds
	Count    int           // of probes without an answer
}

func (k KeepAlive) orDefault() KeepAlive {
	if k == (KeepAlive{}) {
		return DefaultKeepAlive
	}
	return k
}

// patience is how long a peer that has something to acknowledge may be silent.
func (k KeepAlive) patience() time.Duration {
	k = k.orDefault()
	return k.Interval * time.Duration(k.Count)
}

// DefaultKeepAlive is what tunnels have whose Origin says nothing else.
var DefaultKeepAlive = KeepAlive{Idle: 60 * time.Second, Interval: 15 * time.Second, Count: 4}

// Record is what is kept of a tunnel.
type Record struct {
	*Origin

	Number uint64 // counted from 1 in the Set
	ID     string
	Client netip.AddrPort
	Tag    any // of the Spec

	Started time.Time
	Ended   time.Time // zero while the tunnel lives

	ToUp   uint64 // bytes that the server's socket took, early ones included
	ToDown uint64 // bytes that the client's socket took, early ones included

	Reason Reason // Open while the tunnel lives and nothing ends it
}
