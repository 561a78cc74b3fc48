package proxy

import (
	"cmp"
	"errors"
	"log/slog"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/config"
	"holdfast/internal/metrics"
	"holdfast/internal/proxyheader"
	"holdfast/internal/stream"
)

// How connections begin that proxies before us pass on: with a header that names their
// client (the PROXY protocol), who is from then on whoever the connection is from.
//
// Until the header is complete the connection is parked. It counts as one of the listener's
// from the beginning.

var proxyHeaders = metrics.Define(metrics.Desc{
	Name: "holdfast_downstream_proxy_protocol_total",
	Help: "Connections of listeners with proxy_protocol, by what their PROXY header has said: named a client; local or of an unknown kind, so that the peer is the client; absent, where that is allowed. Or why they were closed: untrusted peer, invalid or late header, gone before it was complete. And what ended with the generation.",
	Type: metrics.TypeCounter, Labels: []string{"listener", "result"},
})

// A proxyResult is what became of a header.
type proxyResult uint8

const (
	proxyNamed proxyResult = iota
	proxyLocal
	proxyAbsent
	proxyUntrusted
	proxyInvalid
	proxyLate
	proxyGone
	proxyEnded
	numProxyResults
)

var proxyResults = [numProxyResults]string{
	proxyNamed: "named", proxyLocal: "local", proxyAbsent: "absent", proxyUntrusted: "untrusted", proxyInvalid: "invalid", proxyLate: "timeout", proxyGone: "gone", proxyEnded: "ended",
}

// heralds have the header of each connection of a listener read before it is served. All but
// end is done on the goroutines of loops.
type heralds struct {
	cfg      config.ReceivedProxy
	patience time.Duration
	log      *slog.Logger
	results  [numProxyResults]*metrics.Counter
	parking

	serve func(l *stream.Loop, c stream.Passed, remote netip.AddrPort)
	drop  func(fd int) // closes a connection that nobody serves
}

// headerPatience is how long a header may take on a listener that knows no heads.
const headerPatience = 10 * time.Second

// newHeralds returns nil for a listener whose connections begin with no header. patience is
// how long one may take; 0: as long as a head by default.
func newHeralds(cfg config.ReceivedProxy, name string, patience time.Duration, loops int, log *slog.Logger, r *metrics.Registry) *heralds {
	if cfg.Mode == config.ProxyOff {
		return nil
	}
	h := &heralds{cfg: cfg, patience: cmp.Or(patience, headerPatience), log: log, parking: newParking(loops)}
	for i, result := range proxyResults {
		h.results[i] = r.Counter(proxyHeaders, name, result)
	}
	return h
}

// herald is a connection whose header has not come. It is told of that as its
// [stream.Owner].
type herald struct {
	parked
	of *heralds
}

// receive has a connection served when its header has come, as that of the client that it
// names. It takes fd over, which is on no loop.
func (h *heralds) receive(on *stream.Loop, fd int, remote netip.AddrPort) {
	if !trusts(h.cfg.Trusted, remote) {
		if h.cfg.Mode == config.ProxyOptional {
			h.serve(on, stream.Passed{FD: fd}, remote)
			return
		}
		h.refuse(fd, proxyUntrusted, remote, nil)
		return
	}
	if n, named, result, err := h.look(on, fd, remote); n >= 0 {
		h.answer(on, fd, n, named, result, remote, err)
		return
	}
	w := &herald{of: h, parked: parked{remote: remote}}
	if err := h.park(&w.parked, on, fd, w, h.patience); err != nil {
		h.log.Error("a connection cannot be served", "err", err)
		h.refuse(fd, proxyEnded, remote, err)
	}
}

// look looks for the header. n is its length: -1 until it is complete, and 0 for one that is
// refused, or that is not there.
func (h *heralds) look(on *stream.Loop, fd int, remote netip.AddrPort) (n int, named netip.AddrPort, result proxyResult, err error) {
	b := on.Buffer(proxyheader.MaxSize)
	defer on.Release(b)
	got, _, err := peekAt(fd, b[:proxyheader.MaxSize])
	switch {
	case err == unix.EAGAIN:
		return -1, remote, 0, nil
	case err != nil || got == 0:
		return 0, remote, proxyGone, err
	}
	n, err = proxyheader.Scan(b[:got])
	switch {
	case err == nil && n == 0:
		return -1, remote, 0, nil
	case err == proxyheader.ErrAbsent && h.cfg.Mode == config.ProxyOptional:
		return 0, remote, proxyAbsent, nil
	case err != nil:
		return 0, remote, proxyInvalid, err
	}
	a, err := proxyheader.Parse(b[:n])
	switch {
	case err != nil:
		return 0, remote, proxyInvalid, err
	case !a.Source.IsValid():
		return n, remote, proxyLocal, nil
	}
	return n, a.Source, proxyNamed, nil
}

// answer serves or refuses a connection of whose header that is known.
func (h *heralds) answer(on *stream.Loop, fd, n int, named netip.AddrPort, result proxyResult, remote netip.AddrPort, err error) {
	if result > proxyAbsent {
		h.refuse(fd, result, remote, err)
		return
	}
	if n > 0 && !skip(on, fd, n) {
		h.refuse(fd, proxyInvalid, remote, errors.New("the PROXY header cannot be read a second time"))
		return
	}
	h.results[result].Inc()
	h.serve(on, stream.Passed{FD: fd}, named)
}

// skip takes from the kernel what was looked at. Not a byte more is taken, whatever there is.
func skip(on *stream.Loop, fd, n int) bool {
	b := on.Buffer(n)
	defer on.Release(b)
	for n > 0 {
		got, _, err := unix.Recvfrom(fd, b[:n], unix.MSG_DONTWAIT)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil || got <= 0:
			return false
		}
		n -= got
	}
	return true
}

// refuse closes a connection. Nothing is answered: nobody knows which protocol the peer
// speaks.
func (h *heralds) refuse(fd int, result proxyResult, remote netip.AddrPort, err error) {
	h.results[result].Inc()
	h.log.Debug("a connection without a usable PROXY header is closed", "result", proxyResults[result], "peer", remote.String(), "err", err)
	h.drop(fd)
}

// Ready implements [stream.Owner].
func (w *herald) Ready(*stream.Conn) {
	h, on, fd := w.of, w.Loop(), w.FD()
	n, named, result, err := h.look(on, fd, w.remote)
	switch {
	case n >= 0:
		w.unpark()
		h.answer(on, fd, n, named, result, w.remote, err)
	case w.HungUp(): // the rest will not come
		h.refuse(w.unpark(), proxyGone, w.remote, nil)
	}
}

// Expired implements [stream.Owner].
func (w *herald) Expired(*stream.Conn) { w.of.refuse(w.unpark(), proxyLate, w.remote, nil) }

func (w *herald) cut() { w.of.refuse(w.unpark(), proxyEnded, w.remote, nil) }

// connections is how many wait for their header.
func (h *heralds) connections() int {
	if h == nil {
		return 0
	}
	return int(h.count.Load())
}

// cut closes all connections that the listener still has, those that wait for a header or for
// TLS included. It does not wait.
func (l *listener) cut() {
	if l.heralds != nil {
		l.heralds.cut(l.loops)
	}
	if l.gate != nil {
		l.gate.cut(l.loops)
	}
	l.server.Close()
}

// arrive has an accepted connection served, on the goroutine of the loop.
func (l *listener) arrive(on *stream.Loop, c accepted) {
	if l.heralds != nil {
		l.heralds.receive(on, c.fd, c.remote)
		return
	}
	l.secured(on, stream.Passed{FD: c.fd}, c.remote)
}

// announced has connections begin with PROXY headers, if the configuration says so. It is
// called once, before anything is accepted.
func (l *listener) announced(r *metrics.Registry) {
	if l.heralds = newHeralds(l.cfg.ReceivedProxy, l.cfg.Name, l.cfg.Limits.HeadTimeout, len(l.loops), l.log, r); l.heralds == nil {
		return
	}
	l.heralds.serve = l.secured
	l.heralds.drop = l.drop
}
