package tunnel

import (
	"errors"
	"io"

	"golang.org/x/sys/unix"

	"holdfast/internal/stream"
)

// Tunnels of which a side is not plain TCP, but has TLS or is a unix socket, are relayed by the
// loops like all others, with the same table, phases, dates and account. They are foreign to all
// that goes beyond the process: what they hold is in private memory and not in the store, no
// pipe is used for them, and nobody else could go on with them, since the keys of TLS are here.

const (
	// tlsCost is what a byte costs of a turn that is encrypted or decrypted, as [copyCost].
	tlsCost = 8

	// recordCost is the least that a record costs which has come: each is read and passed on by
	// itself, and a peer may send one for every byte.
	recordCost = 2 << 10
)

// beyond is what a socket has beside its descriptor.
type beyond struct {
	secure *stream.Secure // nil: the bytes are on the socket as they are
	resets *stream.Resets // nil: nobody tells of resets
}

// isForeign says whether a tunnel of descriptors has a side that is not plain TCP.
func (a *arrival) isForeign() bool {
	return a.hasTLS() || !a.isTCP(down) || !a.isTCP(up)
}

func (a *arrival) hasTLS() bool { return a.Secure[down] != nil || a.Secure[up] != nil }

// relayable says whether a loop can relay from and to a socket of a foreign tunnel. Of multipath
// TCP not all is true that is said of TCP; what TLS needs of it is.
func (a *arrival) relayable(i int) bool { return a.Secure[i] != nil || a.isTCP(i) || isLocal(a.FDs[i]) }

// isLocal says whether a descriptor is a unix socket.
func isLocal(fd int) bool {
	domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
	return err == nil && domain == unix.AF_UNIX
}

// enterForeign notes what a foreign tunnel has beside its descriptors.
func (e *engine) enterForeign(n uint32, t *slot, a *arrival) {
	t.foreign = true
	for i := range t.sockets {
		s := &t.sockets[i]
		s.local = !a.About[i].Plain && isLocal(int(s.fd))
		s.secure = a.Secure[i] != nil
		if s.secure {
			s.readable = true // it may have read more than anybody has asked for
		}
		if b := (beyond{a.Secure[i], a.Resets[i]}); b != (beyond{}) {
			e.beyond[key(n, i)] = b
		}
		if s.secure && a.Secure[i].Owes() {
			e.holdForeign(n, t, 1-i, nil)
		}
	}
	if e.courier.vault != nil && a.Origin.SurviveCrash {
		e.entrust(t, notPlain)
	}
}

// leaveForeign forgets that.
func (e *engine) leaveForeign(n uint32, t *slot) {
	if t.foreign {
		delete(e.beyond, key(n, down))
		delete(e.beyond, key(n, up))
	}
}

// owesFin says whether a FIN waits for what TLS is owed before it.
func (t *slot) owesFin() bool { return t.sockets[down].finOwed || t.sockets[up].finOwed }

// secure is the TLS of a socket that has some.
func (e *engine) secure(n uint32, i int) *stream.Secure { return e.beyond[key(n, i)].secure }

// space is what foreign flows are read into: all those of a loop.
func (e *engine) space() []byte {
	if e.private == nil {
		e.private = new([bufferSize]byte)
	}
	return e.private[:]
}

// copyForeign passes on what one read takes. What the receiver does not take is held in memory
// of its own.
func (e *engine) copyForeign(n uint32, t *slot, from int) {
	p := e.space()
	p = p[:min(len(p), e.origins.used[t.origin].read)]
	got := e.receive(n, t, from, p, 0)
	if got == 0 {
		return
	}
	if moved := e.give(n, t, from, p[:got]); moved < got {
		e.holdForeign(n, t, from, append([]byte(nil), p[moved:got]...))
	}
}

// holdForeign keeps bytes for a flow, or notes that its receiver is owed some by TLS.
func (e *engine) holdForeign(n uint32, t *slot, from int, p []byte) {
	f, d := &t.flows[from], key(n, from)
	if f.holds {
		h := e.held[d]
		h.early = p
		e.held[d] = h
		return
	}
	e.hold(f, d, held{early: p, private: true})
}

// decrypt is receive for a sender that has TLS.
func (e *engine) decrypt(n uint32, t *slot, from int, p []byte) int {
	src, tls := &t.sockets[from], e.secure(n, from)
	got, err := tls.Read(p)
	if tls.Owes() { // an answer to what the peer has said of TLS itself
		e.owe(n, t, 1-from)
	}
	switch {
	case got > 0: // readable still: only EAGAIN says that TLS has nothing more
		t.flows[from].heard = true
		t.flows[from].left -= max(tlsCost/2*int32(got), recordCost)
		return got
	case err == stream.Again && !src.broken:
		src.readable = false
	case err == io.EOF || src.broken:
		src.readable = false
		if err == io.EOF && tls.Truncated() && !src.broken && !src.ended {
			e.set.metrics.truncated[from].Inc()
		}
		e.end(n, t, from)
	default: // it is said wrong, or cut within a record: nothing of it can be trusted from here on
		src.readable = false
		e.lose(n, t, from, errnoOf(err))
	}
	return 0
}

// encrypt is give for a receiver that has TLS. What it has taken may be owed.
func (e *engine) encrypt(n uint32, t *slot, from int, p []byte) (taken int) {
	tls := e.secure(n, 1-from)
	taken, err := tls.Write(p)
	t.flows[from].left -= tlsCost / 2 * int32(taken)
	errno := unix.EAGAIN
	if err != nil {
		errno = errnoOf(err)
	}
	e.gave(n, t, from, taken, len(p), errno)
	if err == nil && tls.Owes() {
		e.owe(n, t, from)
	}
	return taken
}

// owe notes that the receiver of a flow is owed something by TLS, which goes out before anything
// else does.
func (e *engine) owe(n uint32, t *slot, from int) {
	t.sockets[1-from].writable = false
	switch f := &t.flows[from]; f.phase {
	case relaying, closing, delivering:
		if !f.holds {
			e.holdForeign(n, t, from, nil)
		}
	}
}

// sendOwed sends what TLS owes a socket, and then the FIN that waits for that. It returns false
// while something is owed.
func (e *engine) sendOwed(n uint32, t *slot, i int) bool {
	s, tls := &t.sockets[i], e.secure(n, i)
	if !tls.Owes() {
		return true
	}
	if s.broken {
		return false
	}
	err := tls.Flush()
	switch {
	case err != nil:
		s.writable = false
		e.lose(n, t, i, errnoOf(err))
		return false
	case tls.Owes():
		s.writable = false
		return false
	}
	s.readable = true // it may have been left alone while it was owed too much
	if s.finOwed {
		s.finOwed = false
		if errno := sendFin(s.fd); errno != 0 {
			e.fail(n, t, i)
		}
	}
	return true
}

// sendEnd ends our direction to a socket. Where TLS says so first, and the socket does not take
// that, the FIN is owed as well.
func (e *engine) sendEnd(n uint32, t *slot, i int) unix.Errno {
	s := &t.sockets[i]
	if !s.secure {
		return sendFin(s.fd)
	}
	tls := e.secure(n, i)
	if err := tls.End(); err != nil {
		return errnoOf(err)
	}
	if tls.Owes() {
		s.finOwed, s.writable = true, false
		return 0
	}
	return sendFin(s.fd)
}

// givenUpByPeer says whether the other end of a pair was given up.
func (e *engine) givenUpByPeer(n uint32, t *slot, i int) bool {
	if !t.sockets[i].local {
		return false
	}
	r := e.beyond[key(n, i)].resets
	return r != nil && r.ByPeer.Load()
}

// tellReset tells the other end of a pair that a socket was given up.
func (e *engine) tellReset(n uint32, t *slot, i int) {
	if r := e.beyond[key(n, i)].resets; t.foreign && r != nil {
		r.ByTunnel.Store(true)
	}
}

// errnoOf is what the kernel has said, or that TLS is not as it should be.
func errnoOf(err error) unix.Errno {
	var errno unix.Errno
	if errors.As(err, &errno) && errno != 0 {
		return errno
	}
	return unix.EPROTO
}
