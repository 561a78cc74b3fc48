package proxy

import (
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/config"
	"holdfast/internal/metrics"
	"holdfast/internal/servertls"
	"holdfast/internal/sni"
	"holdfast/internal/stream"
	"holdfast/internal/task"
)

// How connections begin on listeners with TLS. A handshake is dear, so there is much before it:
//
//	the first bytes are no hello of a TLS client     closed; who speaks HTTP is told
//	the hello is not complete                        parked, without a task or memory
//	it is not complete within handshake_timeout      closed
//	max_handshakes are under way                     parked, in a queue, and its time runs
//	otherwise                                        a handshake
//
// Its time is that of the whole, from the first look at the connection on. What comes out of it
// is served by the protocol that was agreed on.

// A gate has the handshake of each connection of a listener done before it is served. All but
// cut and report is done on the goroutines of loops.
type gate struct {
	config   func() *tls.Config // for the next handshake; it is not changed
	patience time.Duration
	web      bool // clients speak HTTP
	log      *slog.Logger
	metrics  gateMetrics
	parking
	turns turns

	serve  func(l *stream.Loop, c stream.Passed, remote netip.AddrPort)
	serve2 func(l *stream.Loop, c stream.Passed, remote netip.AddrPort) // HTTP/2; nil: nobody was offered it
	drop   func(fd int)                                                 // closes a connection that nobody serves
	ended  func()                                                       // says that one was closed

	failures atomic.Uint64
	reported uint64 // failures when somebody last asked. Owned by the generation's loop
	many     episode
}

// handshakePatience is how long a handshake may take where nothing is said of it.
const handshakePatience = 10 * time.Second

// guard has the connections of a listener begin with TLS. It is called once, after serveBy or
// relayBy and before anything is accepted.
func (l *listener) guard(config func() *tls.Config, r *metrics.Registry) {
	cfg := l.cfg.TLS
	patience := cfg.HandshakeTimeout
	if patience <= 0 {
		patience = handshakePatience
	}
	l.gate = &gate{
		config: config, patience: patience, web: l.cfg.TCP == nil, log: l.log, metrics: newGateMetrics(r, l.cfg.Name),
		parking: newParking(len(l.loops)), serve: l.serve, serve2: l.serve2, drop: l.drop, ended: l.ended,
	}
	l.gate.turns.init(cfg.Handshakes, &l.gate.metrics)
	l.passes = false // what is idle here cannot leave, and what is idle elsewhere may have no TLS
}

// secure makes what listeners need to speak TLS. It is called before anything else is made: what
// is most likely to be refused is files that cannot be read.
func (g *generation) secure() error {
	g.tls = make(map[string]*servertls.Server)
	for i := range g.cfg.HTTPListeners {
		l := &g.cfg.HTTPListeners[i]
		if l.TLS == nil {
			continue
		}
		s, err := servertls.New(servertls.Options{
			Config: l.TLS, Listener: l.Name, Protocols: protocolsOf(l), NoTickets: g.cfg.Tickets.Off, Log: g.log.With("listener", l.Name), Metrics: g.registry,
			Kept: g.copies.legacy, Changed: g.copies.changed,
		})
		if err != nil {
			return err
		}
		g.tls[l.Name] = s
		g.ticketKeys.serve(l.Name, s)
	}
	return nil
}

// pauseTLS says whether files of listeners' TLS are left alone. Who drains accepts nobody, maybe for
// weeks: that a file has changed, or is of no use, is said by the one that serves.
func (g *generation) pauseTLS(on bool) {
	for _, s := range g.tls {
		s.Pause(on)
	}
}

// protocolsOf is what a listener with TLS offers its clients by ALPN (RFC 7301).
func protocolsOf(l *config.Listener) []string {
	switch {
	case l.TCP != nil:
		return nil
	case l.HTTP2.Enabled:
		return []string{"h2", "http/1.1"}
	}
	return []string{"http/1.1"}
}

// secured has a connection served when its TLS handshake is over, if there is to be one.
func (l *listener) secured(on *stream.Loop, c stream.Passed, remote netip.AddrPort) {
	if l.gate == nil {
		l.serve(on, c, remote)
		return
	}
	l.gate.receive(on, c.FD, remote)
}

// guest is a connection until its handshake is over.
type guest struct {
	parked
	of    *gate
	need  int   // bytes of the hello that there have to be before there is more to say
	stage stage // owned by its loop

	turn          turn // guarded by the mutex of turns, as the rest
	ahead, behind *guest
}

// A stage is how far a guest is.
type stage uint8

const (
	greeting stage = iota // its hello is not complete
	inLine                // it waits for its turn
	shaking               // it has a task
)

// receive has a handshake done when there is a hello, and the connection served then. It takes
// fd over, which is on no loop.
func (g *gate) receive(on *stream.Loop, fd int, remote netip.AddrPort) {
	hello, gone, err := look(on, fd)
	if gone || hello.State != sni.More && !isHello(hello.State) {
		g.turnAway(on, fd, hello.State, gone, remote, err)
		return
	}
	w := &guest{of: g, parked: parked{remote: remote}}
	if err := g.park(&w.parked, on, fd, w, g.patience); err != nil {
		g.log.Error("a connection cannot be served", "err", err)
		g.refuse(fd, gateEnded, remote, err)
		return
	}
	w.greet(hello)
}

// look looks for the hello of a TLS client. gone: there is none, and nothing will come.
func look(on *stream.Loop, fd int) (hello sni.Hello, gone bool, err error) {
	b := on.Buffer(sni.MostBytes)
	defer on.Release(b)
	n, _, err := peekAt(fd, b[:sni.MostBytes])
	switch {
	case err == unix.EAGAIN:
		return sni.Hello{Need: 1}, false, nil
	case err != nil || n == 0:
		return hello, true, err
	}
	return sni.Scan(b[:n]), false, nil
}

// isHello says whether it is one that a handshake may begin with.
func isHello(s sni.State) bool { return s == sni.Named || s == sni.Unnamed }

// greet goes on with what is known of the hello.
func (w *guest) greet(hello sni.Hello) {
	if w.need = hello.Need; isHello(hello.State) {
		w.stage = inLine
		if w.of.turns.take(w) {
			w.begin()
		}
	}
}

// begin begins the handshake: it is the guest's turn.
func (w *guest) begin() {
	w.stage = shaking
	w.Loop().Tasks.Go(w)
}

// Ready implements [stream.Owner].
func (w *guest) Ready(*stream.Conn) {
	switch {
	case w.stage == shaking: // which reads by itself
	case w.stage == inLine && w.HungUp():
		w.refuse(gateGone, nil)
	case w.stage == greeting && (w.HungUp() || waiting(w.FD()) >= w.need):
		// Otherwise nobody looks: who sends a hello byte by byte does not have it looked at as
		// often.
		on := w.Loop()
		hello, gone, err := look(on, w.FD())
		switch {
		case gone || hello.State == sni.More && w.HungUp(): // the rest will not come
			w.refuse(gateGone, err)
		case hello.State != sni.More && !isHello(hello.State):
			remote := w.remote
			w.of.turnAway(on, w.unpark(), hello.State, false, remote, nil)
		default:
			w.greet(hello)
		}
	}
}

// waiting is how many bytes are there to be read.
func waiting(fd int) int {
	n, err := unix.IoctlGetInt(fd, unix.TIOCINQ)
	if err != nil { // of no socket that streams
		return sni.MostBytes
	}
	return n
}

// Expired implements [stream.Owner].
func (w *guest) Expired(*stream.Conn) {
	if w.stage == shaking { // its task is about to begin
		w.Interrupt(os.ErrDeadlineExceeded)
		return
	}
	w.refuse(gateLate, nil)
}

// cut implements [attendant].
func (w *guest) cut() {
	if w.stage == shaking {
		w.Interrupt(net.ErrClosed)
		return
	}
	w.refuse(gateEnded, nil)
}

// refuse ends a guest that waits.
func (w *guest) refuse(result gateResult, err error) {
	w.of.turns.leave(w)
	w.of.refuse(w.unpark(), result, w.remote, err)
}

// Run implements [task.Runner]: it is the handshake.
func (w *guest) Run(t *task.Task) {
	g := w.of
	err := errFault
	defer func() { // after a panic, too, which the loop logs
		g.turns.leave(w)
		w.leave()
		if err != nil {
			w.Close()
			g.count(resultOf(err), w.remote, err)
			g.ended()
		}
	}()
	if err = w.Handshake(t, g.config(), true); err != nil {
		return
	}
	c := w.PassOn()
	agreed := agree(c.Secure)
	serve := g.serve
	if agreed.Protocol == "h2" && g.serve2 != nil { // nobody is offered it otherwise
		serve = g.serve2
	}
	g.metrics.agreed(agreed)
	serve(w.Loop(), c, w.remote)
}

// turnAway closes a connection that does not begin with a hello.
func (g *gate) turnAway(on *stream.Loop, fd int, s sni.State, gone bool, remote netip.AddrPort, err error) {
	result := gateGone
	switch {
	case gone:
	case s == sni.TooLarge:
		result = gateLarge
		farewell(on, fd, alertDecodeError)
	case s == sni.Invalid:
		result = gateInvalid
		farewell(on, fd, alertDecodeError)
	default:
		words := ""
		if result = gateNotTLS; g.web && speaksHTTP(on, fd) {
			result, words = gateHTTP, sayTLS
		}
		farewell(on, fd, words)
	}
	g.refuse(fd, result, remote, err)
}

// speaksHTTP says whether what is there begins as a request does. Only somebody who has taken
// the port for another one sends that.
func speaksHTTP(on *stream.Loop, fd int) bool {
	b := on.Buffer(len("OPTIONS "))
	defer on.Release(b)
	n, _, err := peekAt(fd, b)
	if err != nil || n == 0 {
		return false
	}
	for i := range n {
		switch c := b[i]; {
		case c == ' ' && i > 2:
			return true
		case c < 'A' || 'Z' < c:
			return false
		}
	}
	return true
}

// The last words to who sends no hello: HTTP for who speaks that, and to who may understand it
// the alert that says that it makes no sense (RFC 8446 §6.2).
const (
	sayTLS = "HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: 55\r\nConnection: close\r\n\r\n" +
		"This port speaks TLS: the address begins with https://\n"
	alertDecodeError = "\x15\x03\x01\x00\x02\x02\x32"
)

// farewell sends what the socket takes at once, and has the close not be a reset because of
// what nobody has read.
func farewell(on *stream.Loop, fd int, words string) {
	b := on.Buffer(sni.MostBytes)
	defer on.Release(b)
	for range 4 {
		if n, _, err := unix.Recvfrom(fd, b, unix.MSG_DONTWAIT); err != nil || n <= 0 {
			break
		}
	}
	if words != "" {
		_ = unix.Sendto(fd, []byte(words), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL, nil) // whether it arrives is the peer's own trouble
	}
}

// refuse closes a connection of which nothing has become.
func (g *gate) refuse(fd int, result gateResult, remote netip.AddrPort, err error) {
	g.count(result, remote, err)
	g.drop(fd)
}

// count counts a failure.
func (g *gate) count(result gateResult, remote netip.AddrPort, err error) {
	g.metrics.results[result].Inc()
	if result != gateEnded {
		g.failures.Add(1)
	}
	g.log.Debug("a connection has failed to begin TLS", "result", gateResults[result], "peer", remote.String(), "err", err)
}

// connections is how many are not served yet.
func (g *gate) connections() int {
	if g == nil {
		return 0
	}
	return int(g.parking.count.Load())
}

// manyFailures is from how many on between two reports a line tells of them.
const manyFailures = 50

// report says when there are many failures, and when that is over. The generation's loop calls
// it now and then.
func (g *gate) report(now time.Time) {
	if g == nil {
		return
	}
	all := g.failures.Load()
	since := all - g.reported
	if g.reported = all; since >= manyFailures && g.many.comesUp(now) {
		g.log.Warn("many connections fail to begin TLS; holdfast_downstream_tls_handshakes_total says why", "failures", since)
	}
	if _, over := g.many.ends(now); over {
		g.log.Info("few connections fail to begin TLS again")
	}
}

// resultOf says what an error of a handshake is counted as.
func resultOf(err error) gateResult {
	if e, ok := errors.AsType[*net.OpError](err); ok && e.Op == "remote error" {
		return gateAlert
	}
	if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return gateCertificate
	}
	if _, ok := errors.AsType[tls.RecordHeaderError](err); ok {
		return gateInvalid
	}
	switch {
	case errors.Is(err, servertls.ErrClientName):
		return gateCertificate
	case errors.Is(err, servertls.ErrUnknownServer):
		return gateServer
	case errors.Is(err, os.ErrDeadlineExceeded):
		return gateLate
	case errors.Is(err, net.ErrClosed):
		return gateEnded
	case err == errFault:
		return gateFault
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, unix.ECONNRESET), errors.Is(err, unix.EPIPE), errors.Is(err, unix.ETIMEDOUT):
		return gateGone
	}
	// crypto/tls has nothing but words for the rest. A test has each of these said.
	words := err.Error()
	for _, k := range [...]struct {
		part   string
		result gateResult
	}{
		{"client certificate", gateCertificate}, {"provide a certificate", gateCertificate}, {"sent certificate", gateCertificate},
		{"no certificates configured", gateServer},
		{"unsupported versions", gateVersion}, {"protocol fallback", gateVersion},
		{"no cipher suite", gateParameters}, {"no key exchanges", gateParameters}, {"point formats", gateParameters},
		{"unsupported application protocols", gateProtocol},
	} {
		if strings.Contains(words, k.part) {
			return k.result
		}
	}
	return gateOther
}
