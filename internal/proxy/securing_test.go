package proxy

import (
	"bufio"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/config"
	"holdfast/internal/metrics"
	"holdfast/internal/servertls"
	"holdfast/internal/stream"
	"holdfast/internal/stream/streamtest"
	"holdfast/internal/tlstest"
)

// guarded is a listener on loopback whose connections begin with TLS.
type guarded struct {
	*acceptance
	authority *tlstest.Authority
	server    *tls.Config // set before anybody connects
	served    chan *agreement
}

func guardedOn(t *testing.T, loops, handshakes int) *guarded {
	t.Helper()
	a := acceptOn(t, loops, 0)
	for i, l := range a.loops {
		streamtest.Do(l, func() { l.Index = i })
	}
	g := &guarded{acceptance: a, authority: tlstest.NewAuthority(t), served: make(chan *agreement, 1024)}
	a.l.cfg.TLS = &config.ListenerTLS{HandshakeTimeout: 10 * time.Second, Handshakes: handshakes}
	g.server = &tls.Config{Certificates: []tls.Certificate{g.authority.Leaf([]string{"a.test"}).Certificate}, NextProtos: protocolsOf(&a.l.cfg)}
	serve := a.l.serve
	a.l.serve = func(l *stream.Loop, c stream.Passed, remote netip.AddrPort) {
		g.served <- agreementOf(c.Secure)
		c.Leave(l)
		serve(l, c, remote)
	}
	a.l.guard(func() *tls.Config { return g.server }, a.registry)
	t.Cleanup(func() { a.l.gate.cut(a.loops) })
	a.accept()
	return g
}

// client is what clients of the listener have.
func (g *guarded) client() *tls.Config {
	return &tls.Config{RootCAs: g.authority.Pool(), ServerName: "a.test"}
}

func (g *guarded) count(r gateResult) uint64 {
	return g.registry.Counter(tlsHandshakes, "public", gateResults[r]).Value()
}

// shake has a client do its handshake, and returns what it says of it.
func (g *guarded) shake(c *tls.Config) (*tls.Conn, error) {
	conn := tls.Client(g.dial(), c)
	return conn, conn.Handshake()
}

// wantEnd fails unless the listener has closed the connection, for that reason.
func (g *guarded) wantEnd(conn net.Conn, why gateResult) string {
	g.t.Helper()
	said, err := io.ReadAll(conn)
	if isTimeoutOf(err) {
		g.t.Errorf("%s: the connection is open", gateResults[why])
	}
	until(g.t, gateResults[why], func() bool { return g.count(why) == 1 && g.l.open.Load() == 0 && g.l.connections() == 0 })
	g.wantNobody()
	if n := g.l.gate.connections(); n != 0 {
		g.t.Errorf("%d connections are left", n)
	}
	return string(said)
}

// helloOf is what a client sends first.
func helloOf(t *testing.T, c *tls.Config) string {
	t.Helper()
	client, server := net.Pipe()
	defer client.Close()
	defer server.Close()
	go tls.Client(client, c).Handshake() // ends with its connection
	server.SetReadDeadline(time.Now().Add(limit))
	head := make([]byte, 5)
	if _, err := io.ReadFull(server, head); err != nil {
		t.Fatal(err)
	}
	body := make([]byte, int(head[3])<<8+int(head[4]))
	if _, err := io.ReadFull(server, body); err != nil {
		t.Fatal(err)
	}
	return string(head) + string(body)
}

func TestAConnectionIsServedWhenItsHandshakeIsOver(t *testing.T) {
	t.Parallel()
	for version, name := range map[uint16]string{tls.VersionTLS12: "TLSv1.2", tls.VersionTLS13: "TLSv1.3"} {
		g := guardedOn(t, 2, 1)
		c := g.client()
		c.MinVersion, c.MaxVersion, c.NextProtos = version, version, []string{"h2", "http/1.1"}
		for range 4 {
			conn, err := g.shake(c)
			if err != nil {
				t.Fatal(err)
			}
			a := await(t, "it is served", g.served)
			if a.TLS.Version != name || a.TLS.ServerName != "a.test" || a.TLS.Cipher == "" || a.TLS.Peer != nil || a.Protocol != "http/1.1" || a.element != "" {
				t.Errorf("agreed on %+v", a)
			}
			given := g.next()
			if given.remote != addrPort(conn.LocalAddr()) {
				t.Errorf("%v is served", given.remote)
			}
			g.end(given)
		}
		if n := g.count(gateOK); n != 4 {
			t.Errorf("%d are counted", n)
		}
		if n := g.registry.Counter(tlsVersions, "public", strings.TrimPrefix(name, "TLSv")).Value(); n != 4 {
			t.Errorf("%d of %s are counted", n, name)
		}
		until(t, "no handshake is left", func() bool { return g.registry.Gauge(tlsActive, "public").Value() == 0 })
	}
}

// What is no hello of a TLS client is known without a task, a goroutine or a buffer that stays.
func TestWhatIsNoHelloCostsNothing(t *testing.T) {
	t.Parallel()
	const alert = "\x15\x03\x01\x00\x02\x02\x32"
	for _, c := range []struct {
		name, sends, says string
		why               gateResult
	}{
		{"a request", "GET / HTTP/1.1\r\nHost: a.test\r\n\r\n", "HTTP/1.1 400 Bad Request\r\n", gateHTTP},
		{"its beginning", "GE", "HTTP/1.1 400 Bad Request\r\n", gateHTTP},
		{"the preface of HTTP/2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "HTTP/1.1 400 Bad Request\r\n", gateHTTP},
		{"a greeting of SSH", "SSH-2.0-OpenSSH_9.2\r\n", "", gateNotTLS},
		{"SSL 2", "\x80\x2e\x01\x00\x02\x00\x15\x00\x00\x00\x10", "", gateNotTLS},
		{"zeros", strings.Repeat("\x00", 100), "", gateNotTLS},
		{"a hello without sense", "\x16\x03\x01\x00\x06\x01\x00\x00\x02\x03\x03", alert, gateInvalid},
		{"the hello of a server", "\x16\x03\x01\x00\x04\x02\x00\x00\x00", alert, gateInvalid},
		{"a hello of 16 MiB", "\x16\x03\x01\x40\x00\x01\xff\xff\xff", alert, gateLarge},
		{"a hello in records of one byte", strings.Repeat("\x16\x03\x01\x00\x01\x01", 70), alert, gateLarge},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			g := guardedOn(t, 1, 0)
			conn := g.dial()
			io.WriteString(conn, c.sends)
			if said := g.wantEnd(conn, c.why); !strings.HasPrefix(said, c.says) || c.says == "" && said != "" {
				t.Errorf("it says %q", said)
			}
			if n := g.registry.Gauge(tlsActive, "public").Value(); n != 0 {
				t.Errorf("%d handshakes", n)
			}
		})
	}
}

func TestWhoSpeaksHTTPIsToldInIt(t *testing.T) {
	t.Parallel()
	r, err := http.ReadResponse(bufio.NewReader(strings.NewReader(sayTLS)), nil)
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(r.Body)
	if err != nil || r.StatusCode != 400 || !r.Close || int64(len(body)) != r.ContentLength || len(body) != len(sayTLS)-strings.Index(sayTLS, "This") {
		t.Errorf("%v: %q, %v", r, body, err)
	}
}

// Until its hello is whole a connection is parked: no task, no handshake.
func TestAHelloMayTrickle(t *testing.T) {
	t.Parallel()
	g := guardedOn(t, 1, 0)
	conn := g.dial()
	slow := &trickle{Conn: conn, each: func() {
		g.settle()
		if n := g.registry.Gauge(tlsActive, "public").Value(); n != 0 {
			t.Errorf("%d handshakes before the hello is there", n)
		}
	}}
	client := tls.Client(slow, g.client())
	if err := client.Handshake(); err != nil {
		t.Fatal(err)
	}
	await(t, "it is served", g.served)
	g.end(g.next())
}

// trickle sends what is sent first byte by byte.
type trickle struct {
	net.Conn
	each func()
	over bool
}

func (c *trickle) Write(p []byte) (n int, err error) {
	if c.over {
		return c.Conn.Write(p)
	}
	c.over = true
	for i := range p {
		if i > 0 && i%16 == 0 {
			c.each()
		}
		if n, err := c.Conn.Write(p[i : i+1]); err != nil {
			return i + n, err
		}
	}
	return len(p), nil
}

func TestAHandshakeThatTakesTooLongEnds(t *testing.T) {
	t.Parallel()
	hello := func(g *guarded) string { return helloOf(t, g.client()) }
	for name, sends := range map[string]func(*guarded) string{
		"nothing":          func(*guarded) string { return "" },
		"half of a hello":  func(g *guarded) string { s := hello(g); return s[:len(s)/2] },
		"a hello, no more": hello,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := guardedOn(t, 1, 0)
			clock := streamtest.NewClock(g.loops...)
			conn := g.dial()
			io.WriteString(conn, sends(g))
			until(t, "it waits", func() bool { return g.l.gate.connections() == 1 })
			if strings.HasPrefix(name, "a hello") {
				until(t, "it has begun", func() bool { return g.registry.Gauge(tlsActive, "public").Value() == 1 })
			}
			clock.Advance(9 * time.Second)
			if n := g.l.connections(); n != 1 {
				t.Fatalf("after 9 s there are %d connections", n)
			}
			clock.Advance(2 * time.Second)
			g.wantEnd(conn, gateLate)
		})
	}
}

func TestAClientMayGoBeforeItsHandshakeIsOver(t *testing.T) {
	t.Parallel()
	g := guardedOn(t, 1, 0)
	hello := helloOf(t, g.client())
	for i, sent := range []string{"", hello[:20], hello} {
		conn := g.dial()
		io.WriteString(conn, sent)
		conn.(*net.TCPConn).CloseWrite()
		io.Copy(io.Discard, conn)
		until(t, "it is gone", func() bool { return g.count(gateGone) == uint64(i+1) && g.l.connections() == 0 })
	}
	g.wantNobody()
}

// More handshakes than there may be wait for their turn in the order in which they came, whatever
// loop they are on, and their time runs.
func TestHandshakesWaitForTheirTurn(t *testing.T) {
	t.Parallel()
	g := guardedOn(t, 2, 2)
	hello := helloOf(t, g.client())
	var conns []net.Conn
	active, waiting := g.registry.Gauge(tlsActive, "public"), g.registry.Gauge(tlsWaiting, "public")
	for i := range 6 {
		conn := g.dial()
		io.WriteString(conn, hello)
		conns = append(conns, conn)
		until(t, "it has its place", func() bool { return active.Value()+waiting.Value() == int64(i+1) })
	}
	if active.Value() != 2 || waiting.Value() != 4 {
		t.Fatalf("%d are under way, %d wait", active.Value(), waiting.Value())
	}
	if n := g.registry.Counter(tlsQueued, "public").Value(); n != 4 {
		t.Errorf("%d are counted that had to wait", n)
	}
	// Nothing is answered to who waits.
	answered := func(conn net.Conn, within time.Duration) bool {
		conn.SetReadDeadline(time.Now().Add(within))
		n, _ := conn.Read(make([]byte, 1))
		return n == 1
	}
	for i, conn := range conns[:2] {
		if !answered(conn, limit) {
			t.Errorf("%d has no answer", i)
		}
	}
	conns[3].Close() // one that waits does not have the turn of another
	until(t, "it is gone", func() bool { return waiting.Value() == 3 })
	for _, step := range []struct{ ends, begins int }{{0, 2}, {1, 4}, {2, 5}} {
		if answered(conns[step.begins], 20*time.Millisecond) {
			t.Errorf("%d is answered before its turn", step.begins)
		}
		conns[step.ends].Close()
		if !answered(conns[step.begins], limit) {
			t.Errorf("%d has no answer", step.begins)
		}
	}
	conns[4].Close()
	conns[5].Close()
	until(t, "all is over", func() bool { return active.Value() == 0 && waiting.Value() == 0 && g.l.connections() == 0 })
}

func TestWhoWaitsForHisTurnWaitsNoLongerThanTheHandshakeMayTake(t *testing.T) {
	t.Parallel()
	g := guardedOn(t, 1, 1)
	clock := streamtest.NewClock(g.loops...)
	hello := helloOf(t, g.client())
	first, second := g.dial(), g.dial()
	io.WriteString(first, hello)
	until(t, "it has begun", func() bool { return g.registry.Gauge(tlsActive, "public").Value() == 1 })
	io.WriteString(second, hello)
	until(t, "it waits", func() bool { return g.registry.Gauge(tlsWaiting, "public").Value() == 1 })
	clock.Advance(11 * time.Second)
	until(t, "both are over", func() bool { return g.count(gateLate) == 2 && g.l.connections() == 0 })
	if n := g.registry.Gauge(tlsActive, "public").Value() + g.registry.Gauge(tlsWaiting, "public").Value(); n != 0 {
		t.Errorf("%d are left", n)
	}
	conn, err := g.shake(g.client())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	await(t, "it is served", g.served)
	g.end(g.next())
}

// Whatever order connections come and go in, all that may be served are, and no turn is lost.
func TestNoTurnIsLost(t *testing.T) {
	t.Parallel()
	const clients = 60
	g := guardedOn(t, 3, 2)
	hello := helloOf(t, g.client())
	results := make(chan error, clients)
	go func() {
		for i := range clients {
			go func() {
				if i%2 == 0 { // who goes in the middle of it
					conn, err := net.Dial("tcp", g.socket.Addr().String())
					if err == nil {
						io.WriteString(conn, hello)
						conn.Close()
					}
					results <- err
					return
				}
				conn, err := tls.DialWithDialer(&net.Dialer{Timeout: limit}, "tcp", g.socket.Addr().String(), g.client())
				if err == nil {
					conn.Close()
				}
				results <- err
			}()
		}
	}()
	for range clients / 2 {
		<-g.served
		g.end(g.next())
	}
	for range clients {
		if err := await(t, "a client is done", results); err != nil {
			t.Error(err)
		}
	}
	until(t, "all is over", func() bool {
		return g.l.connections() == 0 && g.registry.Gauge(tlsActive, "public").Value() == 0 && g.registry.Gauge(tlsWaiting, "public").Value() == 0
	})
}

// What has not been served when all connections are cut is cut as well.
func TestHandshakesAreCut(t *testing.T) {
	t.Parallel()
	g := guardedOn(t, 2, 2)
	hello := helloOf(t, g.client())
	var conns []net.Conn
	for i := range 8 {
		conn := g.dial()
		io.WriteString(conn, hello[:len(hello)*(i%2)])
		conns = append(conns, conn)
	}
	until(t, "they wait", func() bool {
		return g.l.gate.connections() == 8 && g.registry.Gauge(tlsActive, "public").Value() == 2 && g.registry.Gauge(tlsWaiting, "public").Value() == 2
	})
	g.l.gate.cut(g.loops)
	for _, c := range conns {
		if _, err := io.Copy(io.Discard, c); isTimeoutOf(err) {
			t.Error(err)
		}
	}
	until(t, "they are gone", func() bool { return g.count(gateEnded) == 8 && g.l.connections() == 0 && g.l.gate.connections() == 0 })
	if n := g.registry.Gauge(tlsActive, "public").Value() + g.registry.Gauge(tlsWaiting, "public").Value(); n != 0 {
		t.Errorf("%d are left", n)
	}
}

// A connection that is not served yet counts, and holds up the next one at the limit.
func TestALimitHoldsForHandshakes(t *testing.T) {
	t.Parallel()
	g := guardedOn(t, 1, 0)
	g.l.stop(false)
	g.l.cfg.Limits.Connections = 1
	g.accept()
	first := g.dial()
	until(t, "it waits", func() bool { return g.l.open.Load() == 1 })
	second := g.dial()
	until(t, "the limit is reached", func() bool { return g.full() == 1 })
	first.Close()
	client := tls.Client(second, g.client())
	if err := client.Handshake(); err != nil {
		t.Fatal(err)
	}
	g.end(g.next())
}

// Behind a PROXY header comes the hello, of the client that the header names.
func TestATLSConnectionIsItsClients(t *testing.T) {
	t.Parallel()
	g := guardedOn(t, 2, 0)
	g.l.stop(false)
	g.l.cfg.ReceivedProxy = config.ReceivedProxy{Mode: config.ProxyRequired, Trusted: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}}
	g.l.announced(g.registry)
	g.accept()
	conn := g.dial()
	io.WriteString(conn, namedV1)
	client := tls.Client(conn, g.client())
	if err := client.Handshake(); err != nil {
		t.Fatal(err)
	}
	given := g.next()
	if given.remote.String() != "192.0.2.1:12345" {
		t.Errorf("%v is served", given.remote)
	}
	g.end(given)
}

// Each way to fail is counted as what it is.
func TestFailuresAreCountedByTheirReason(t *testing.T) {
	t.Parallel()
	stranger := tlstest.NewAuthority(t)
	for _, c := range []struct {
		name   string
		client func(*guarded, *tls.Config)
		server func(*guarded, *tls.Config)
		why    gateResult
	}{
		{"an old client", func(_ *guarded, c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS10, tls.VersionTLS11 }, nil, gateVersion},
		{"no cipher", func(_ *guarded, c *tls.Config) {
			c.MaxVersion, c.CipherSuites = tls.VersionTLS12, []uint16{tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256}
		}, nil, gateParameters},
		{"no group", func(_ *guarded, c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.CurveP521} }, func(_ *guarded, c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.X25519} }, gateParameters},
		{"no protocol", func(_ *guarded, c *tls.Config) { c.NextProtos = []string{"imap"} }, nil, gateProtocol},
		{"who does not trust us", func(_ *guarded, c *tls.Config) { c.RootCAs = stranger.Pool() }, nil, gateAlert},
		{"no certificate", nil, demand, gateCertificate},
		{"no certificate with TLS 1.2", func(_ *guarded, c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }, demand, gateCertificate},
		{"one that nobody trusts", func(_ *guarded, c *tls.Config) {
			c.Certificates = []tls.Certificate{stranger.Leaf([]string{"me.test"}, tlstest.Client()).Certificate}
		}, demand, gateCertificate},
		{"one for servers", func(g *guarded, c *tls.Config) {
			c.Certificates = []tls.Certificate{g.authority.Leaf([]string{"me.test"}).Certificate}
		}, demand, gateCertificate},
		{"a name that may not connect", nil, func(_ *guarded, c *tls.Config) {
			c.VerifyConnection = func(tls.ConnectionState) error { return servertls.ErrClientName }
		}, gateCertificate},
		{"a server that no certificate is for", nil, func(_ *guarded, c *tls.Config) {
			c.Certificates, c.GetCertificate = nil, func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return nil, nil }
		}, gateServer},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			g := guardedOn(t, 1, 0)
			config := g.client()
			if c.client != nil {
				c.client(g, config)
			}
			if c.server != nil {
				streamtest.Do(g.loops[0], func() { c.server(g, g.server) })
			}
			conn, err := g.shake(config)
			if err == nil {
				_, err = conn.Read(make([]byte, 1)) // with TLS 1.3 the client is told then
			}
			if err == nil || isTimeoutOf(err) {
				t.Errorf("the client: %v", err)
			}
			conn.Close()
			until(t, gateResults[c.why], func() bool {
				for r := range numGateResults {
					if n := g.count(r); n > 0 && r != c.why {
						t.Fatalf("counted as %s", gateResults[r])
					}
				}
				return g.count(c.why) == 1 && g.l.connections() == 0
			})
			g.wantNobody()
		})
	}
}

func demand(g *guarded, c *tls.Config) {
	c.ClientAuth, c.ClientCAs = tls.RequireAndVerifyClientCert, g.authority.Pool()
}

func TestErrorsOfHandshakesHaveReasons(t *testing.T) {
	t.Parallel()
	for want, err := range map[gateResult]error{
		gateGone: fmt.Errorf("read: %w", unix.ECONNRESET), gateFault: errFault, gateEnded: net.ErrClosed, gateOther: errors.New("tls: unexpected message"),
		gateInvalid: tls.RecordHeaderError{Msg: "x"}, gateCertificate: servertls.ErrClientName, gateServer: servertls.ErrUnknownServer,
	} {
		if got := resultOf(err); got != want {
			t.Errorf("%v is %s, want %s", err, gateResults[got], gateResults[want])
		}
	}
	if slices.Contains(gateResults[:], "") {
		t.Error("a result has no name")
	}
}

// A resumed session is the same client's, with the certificate that it has shown before.
func TestAResumedSessionKeepsItsCertificate(t *testing.T) {
	t.Parallel()
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		g := guardedOn(t, 1, 0)
		streamtest.Do(g.loops[0], func() { demand(g, g.server) })
		c := g.client()
		c.MaxVersion, c.ClientSessionCache = version, tls.NewLRUClientSessionCache(1)
		c.Certificates = []tls.Certificate{g.authority.Leaf([]string{"me.test", "spiffe://me/a"}, tlstest.Client(), tlstest.CommonName("me")).Certificate}
		for i := range 2 {
			conn, err := g.shake(c)
			if err != nil {
				t.Fatal(err)
			}
			a := await(t, "it is served", g.served)
			given := g.next()
			conn.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
			conn.Read(make([]byte, 1)) // the ticket
			if a.resumed != (i == 1) || a.TLS.Peer == nil || a.TLS.Peer.Subject != "CN=me" || !strings.HasSuffix(a.element, `;Subject="CN=me";URI=spiffe://me/a;DNS=me.test`) {
				t.Errorf("connection %d: %+v", i, a)
			}
			g.end(given)
		}
		if n, m := g.registry.Counter(tlsResumed, "public").Value(), g.registry.Counter(tlsCertified, "public").Value(); n != 1 || m != 2 {
			t.Errorf("%d and %d are counted", n, m)
		}
	}
}

func TestManyFailuresAreOneLine(t *testing.T) {
	t.Parallel()
	g := guardedOn(t, 1, 0)
	now := time.Now()
	report := func() { now = now.Add(time.Second); g.l.report(now) }
	g.l.gate.failures.Add(manyFailures - 1)
	report()
	for range 3 {
		g.l.gate.failures.Add(manyFailures)
		report()
	}
	for range 20 {
		report()
	}
	text := g.log.String()
	if strings.Count(text, "many connections fail") != 1 || strings.Count(text, "few connections fail") != 1 {
		t.Errorf("%s", text)
	}
}

// Who has gone when his turn comes does not keep it from the next one.
func TestATurnThatComesTooLateIsPassedOn(t *testing.T) {
	t.Parallel()
	loops := []*stream.Loop{streamtest.New(t), streamtest.New(t)}
	m := newGateMetrics(metrics.NewRegistry(), "public")
	var q turns
	q.init(1, &m)
	adopted := func(l *stream.Loop) *guest {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		w := &guest{stage: inLine}
		streamtest.Do(l, func() { err = l.Adopt(&w.Conn, fds[0], nil, nil) })
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { streamtest.Do(l, w.Close); unix.Close(fds[1]) })
		return w
	}
	first, second, third := adopted(loops[0]), adopted(loops[1]), adopted(loops[0])
	if !q.take(first) || q.take(second) || q.take(third) {
		t.Fatal("one may begin")
	}
	first.stage = shaking
	next := q.release(first)
	if next != second {
		t.Fatal("it is the second one's turn")
	}
	if next = q.release(second); next != third { // it goes before it is told
		t.Fatal("it is the third one's turn")
	}
	if next = q.release(third); next != nil || q.busy != 0 || m.active.Value() != 0 || m.waiting.Value() != 0 {
		t.Fatalf("%d are busy", q.busy)
	}
}
