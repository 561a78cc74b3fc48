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
//
// While a receiver is slow at most one buffer per direction is held, and the
// sender is not read: its window closes.
//
// The Set keeps account and knows the limits; what moves the bytes is behind
// [Set.Start] alone. Here that is a pair of goroutines per tunnel, which hold a
// buffer only while bytes move (see relay.go).
package tunnel

import (
	"net"
	"net/netip"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"holdfast/internal/metrics"
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
	// and only a *net.TCPConn can be reset.
	Down, Up net.Conn

	// DownEarly was already read from Down and goes to Up before anything else;
	// UpEarly the other way. The tunnel keeps them until they are sent.
	DownEarly, UpEarly []byte

	Origin *Origin        // nil: one in which everything is zero
	ID     string         // of the request that became the tunnel
	Client netip.AddrPort // zero for a unix socket

	// Tag is the starter's own: it comes back in the Record.
	Tag any
}

// Limits of a tunnel. A zero value is "off".
type Limits struct {
	IdleTimeout  time.Duration // no byte was passed on in either direction
	MaxAge       time.Duration // since the start
	DrainTimeout time.Duration // since the start of a drain; see [Set.Drain]

	// Buffer bounds the bytes that one direction holds while its receiver is
	// slow, beside what the kernel holds for the sockets. More than the size of
	// a relay buffer is never held.
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

// tunnel is one pair of connections.
type tunnel struct {
	set *Set

	// Set once.
	record   Record // without what changes: Ended, ToUp, ToDown, Reason
	limits   Limits
	down, up *side
	toUp     direction
	toDown   direction

	running atomic.Int32 // directions whose goroutine has not ended; the last one ends the tunnel
	active  atomic.Int64 // when a byte was last passed on, in nanoseconds since the Set's epoch

	// Guarded by the Set's mutex.
	drainAt     time.Time // zero: not
	closeAt     time.Time // zero: not
	closeReason Reason    // of closeAt

	mu       sync.Mutex // guards what follows, and the deadlines of both connections until the tunnel is cut
	reason   Reason     // Open until the tunnel is cut
	cutAt    time.Time
	lost     *side  // the side that was cut off from us, for reasons of that kind
	closed   Reason // who closed first, by a FIN; Open while nobody did
	finished int    // directions in which the FIN was passed on
}

func newTunnel(s *Set, spec *Spec) *tunnel {
	t := &tunnel{
		set:    s,
		limits: spec.Origin.Limits,
		down:   newSide(spec.Down, DownstreamClosed, DownstreamReset),
		up:     newSide(spec.Up, UpstreamClosed, UpstreamReset),
		record: Record{
			Origin:  spec.Origin,
			ID:      spec.ID,
			Client:  spec.Client,
			Tag:     spec.Tag,
			Started: time.Now(),
		},
	}
	t.toUp.init(t, t.down, t.up, spec.DownEarly, s.metrics.toUpstream, spec.Origin.UpBytes)
	t.toDown.init(t, t.up, t.down, spec.UpEarly, s.metrics.toDownstream, spec.Origin.DownBytes)
	t.down.prepare(s.log, t.limits.KeepAlive)
	t.up.prepare(s.log, t.limits.KeepAlive)
	t.active.Store(int64(time.Since(s.epoch)))
	return t
}

// start begins to relay and returns at once.
func (t *tunnel) start() {
	t.running.Store(2)
	go t.toUp.run()
	go t.toDown.run()
}

// snapshot returns the record as it stands.
func (t *tunnel) snapshot() Record {
	r := t.record
	r.ToUp, r.ToDown = t.toUp.moved.Load(), t.toDown.moved.Load()
	t.mu.Lock()
	defer t.mu.Unlock()
	r.Reason = t.reason
	return r
}

// cut ends the tunnel for a reason; only the first call has an effect. lost is
// the side that can no longer be reached, for reasons of that kind.
//
// It returns at once: the directions are woken by their deadlines and end the
// tunnel as the reason asks for.
func (t *tunnel) cut(reason Reason, lost *side) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.reason != Open {
		return
	}
	t.reason, t.lost, t.cutAt = reason, lost, time.Now()
	for _, d := range []*direction{&t.toUp, &t.toDown} {
		d.src.conn.SetReadDeadline(longAgo)
		d.dst.conn.SetWriteDeadline(t.writeBoundLocked())
	}
}

// longAgo is a deadline that makes everything fail that would wait.
var longAgo = time.Unix(1, 0)

// state returns why the tunnel was cut, Open if it was not, and which side was
// lost. When it returns a reason, the cut is complete: nobody else touches the
// deadlines any more.
func (t *tunnel) state() (reason Reason, lost *side) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.reason, t.lost
}

// endBound returns when a tunnel that was cut has to be gone.
func (t *tunnel) endBound() time.Time {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.endBoundLocked()
}

func (t *tunnel) endBoundLocked() time.Time {
	if t.lost != nil {
		return t.cutAt.Add(t.set.bounds.flush)
	}
	return t.cutAt.Add(t.set.bounds.linger)
}

// writeBoundLocked returns until when a write in a tunnel that was cut may wait.
func (t *tunnel) writeBoundLocked() time.Time {
	bound, stalled := t.endBoundLocked(), time.Now().Add(t.set.bounds.stall)
	if stalled.Before(bound) {
		return stalled
	}
	return bound
}

// finRead notes that src has sent its FIN. It must be called before the FIN is
// passed on: the other side may answer with its own at once.
func (t *tunnel) finRead(src *side) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed == Open {
		t.closed = src.closed
	}
}

// finPassedOn notes that a direction has ended by a FIN. The second one ends the
// tunnel, with the reason of the first.
func (t *tunnel) finPassedOn() {
	t.mu.Lock()
	t.finished++
	both, closed := t.finished == 2, t.closed
	t.mu.Unlock()
	if both {
		t.cut(closed, nil)
	}
}

// leave is called as each direction ends. The last one ends the tunnel.
func (t *tunnel) leave() {
	if t.running.Add(-1) > 0 {
		return
	}
	defer t.set.remove(t)
	defer t.recoverPanic()
	reason, lost := t.state()
	for _, s := range []*side{t.down, t.up} {
		switch {
		case reason == Failed || s.truncated.Load():
			s.reset()
		case lost != nil && lost != s:
			s.waitSent(t.endBound(), t.set.bounds.stall)
			s.reset()
		default:
			s.conn.Close()
		}
	}
}

// recoverPanic, deferred, keeps a fault in one tunnel from ending all others.
func (t *tunnel) recoverPanic() {
	if p := recover(); p != nil {
		t.set.log.Error("panic in a tunnel", "tunnel", t.record.Number, "request_id", t.record.ID,
			"panic", p, "stack", string(debug.Stack()))
		t.cut(Failed, nil)
	}
}
