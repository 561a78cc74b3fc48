package upstream_test

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/metrics"
	"holdfast/internal/stream/streamtest"
	"holdfast/internal/task"
	"holdfast/internal/tlstest"
	"holdfast/internal/upstream"
)

// secure is a cluster that speaks TLS, and whom it trusts.
func secure(t *testing.T, ours *tlstest.Authority, address string) config.Cluster {
	c := web(address)
	c.TLS = &config.ClusterTLS{CA: ours.File(t.TempDir(), "ca.pem")}
	return c
}

// listenTLS has l speak TLS with a certificate for these names.
func listenTLS(l net.Listener, leaf *tlstest.Leaf) net.Listener {
	return tls.NewListener(l, &tls.Config{Certificates: []tls.Certificate{leaf.Certificate}})
}

func listen(t *testing.T, network, address string) net.Listener {
	t.Helper()
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// series returns the value of a series of the only cluster; -1: there is none.
func series(r *metrics.Registry, name string, labels ...string) int64 {
	for _, f := range r.Families() {
		for _, s := range f.Series {
			if f.Desc.Name == name && strings.Join(s.Labels[1:], " ") == strings.Join(labels, " ") {
				return s.Value
			}
		}
	}
	return -1
}

func TestConnectionsWithTLS(t *testing.T) {
	t.Parallel()
	ours := tlstest.NewAuthority(t)
	for _, tc := range []struct {
		name, network, address string
		names                  []string
		sni                    string
	}{
		{"an address", "tcp", "127.0.0.1:0", []string{"127.0.0.1"}, ""},
		{"a unix socket", "unix", filepath.Join(t.TempDir(), "s"), []string{"web.internal"}, "web.internal"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			l := listen(t, tc.network, tc.address)
			serve(t, listenTLS(l, ours.Leaf(tc.names)))
			address := l.Addr().String()
			if tc.network == "unix" {
				address = "unix:" + address
			}
			c := secure(t, ours, address)
			c.TLS.SNI = tc.sni
			r := metrics.NewRegistry()
			w := realClusters(t, r, nil, c)
			e := w.of("web")[0]
			for i := range 5 { // what TLS says of sessions meanwhile does not end the connection
				e.roundTrip(i > 0)
			}
			up, err := e.try((*upstream.Endpoint).Fresh, 0)
			if err != nil {
				t.Fatal(err)
			}
			streamtest.Do(e.loops[0], up.Close)
			if full, resumed := series(r, "holdfast_cluster_tls_handshakes_total", "full"), series(r, "holdfast_cluster_tls_handshakes_total", "resumed"); full != 1 || resumed != 1 {
				t.Errorf("%d full handshakes and %d resumed, want one of both", full, resumed)
			}
		})
	}
}

// An idle connection stays when TLS says something of itself, and ends when the endpoint says what
// nobody has asked for.
func TestAnIdleConnectionWithTLS(t *testing.T) {
	t.Parallel()
	ours := tlstest.NewAuthority(t)
	l := listen(t, "tcp", "127.0.0.1:0")
	say, said := make(chan []byte), make(chan struct{})
	const ok = "\x17HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
	go func() {
		defer close(said)
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		a := newAuthor(t, conn, ours.Leaf([]string{"127.0.0.1"}))
		for b := range say {
			if string(b) == ok { // which is the answer to a request
				_, _ = a.Read(make([]byte, 1<<10))
			}
			if _, err := conn.Write(a.record(b)); err != nil {
				t.Error(err)
			}
			said <- struct{}{}
		}
	}()
	r := metrics.NewRegistry()
	e := realClusters(t, r, nil, secure(t, ours, l.Addr().String())).of("web")[0]
	exchange := func(reused bool) {
		t.Helper()
		go func() { say <- []byte(ok) }()
		e.roundTrip(reused)
		<-said
	}
	exchange(false)
	say <- []byte("\x16\x04\x00\x00\x12\x00\x00\x0e\x10\x00\x00\x00\x00\x01\x00\x00\x04tick\x00\x00") // a session (RFC 8446 §4.6.1)
	<-said
	streamtest.Do(e.loops[0], func() {})
	exchange(true)
	say <- []byte("\x17HTTP/1.1 408 Request Timeout\r\n\r\n")
	<-said
	for end := time.Now().Add(30 * time.Second); series(r, "holdfast_cluster_connections_active") != 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the connection stays")
		}
	}
	close(say)
	<-said
}

// author writes the records of a server by hand, behind a handshake.
type author struct {
	*tls.Conn // to read from
	aead      cipher.AEAD
	iv        []byte
	seq       uint64
}

func newAuthor(t *testing.T, conn net.Conn, leaf *tlstest.Leaf) *author {
	var secrets bytes.Buffer
	s := tls.Server(conn, &tls.Config{Certificates: []tls.Certificate{leaf.Certificate}, KeyLogWriter: &secrets, SessionTicketsDisabled: true})
	if err := s.Handshake(); err != nil {
		t.Error(err)
		return nil
	}
	suite := s.ConnectionState().CipherSuite
	if suite != tls.TLS_AES_128_GCM_SHA256 {
		t.Errorf("the cipher suite is %s", tls.CipherSuiteName(suite))
		return nil
	}
	_, text, _ := strings.Cut(secrets.String(), "SERVER_TRAFFIC_SECRET_0 ")
	secret, err := hex.DecodeString(strings.Fields(text)[1])
	if err != nil {
		t.Error(err)
	}
	expand := func(label string, n int) []byte { // RFC 8446 §7.1
		label = "tls13 " + label
		b, err := hkdf.Expand(sha256.New, secret, "\x00"+string(rune(n))+string(rune(len(label)))+label+"\x00", n)
		if err != nil {
			t.Error(err)
		}
		return b
	}
	block, err := aes.NewCipher(expand("key", 16))
	if err != nil {
		t.Error(err)
	}
	a := &author{Conn: s, iv: expand("iv", 12)}
	if a.aead, err = cipher.NewGCM(block); err != nil {
		t.Error(err)
	}
	return a
}

// record is one of a kind, which is the first byte, with the others.
func (a *author) record(b []byte) []byte {
	inner := append(b[1:len(b):len(b)], b[0])
	head := []byte{0x17, 3, 3, 0, byte(len(inner) + a.aead.Overhead())}
	nonce := bytes.Clone(a.iv)
	nonce[len(nonce)-1] ^= byte(a.seq)
	a.seq++
	return a.aead.Seal(head, nonce, inner, head)
}

// What a TCP listener relays is spoken within TLS, and nothing is said of what that is.
func TestAConnectionThatIsGivenAwayHasItsTLS(t *testing.T) {
	t.Parallel()
	ours := tlstest.NewAuthority(t)
	l := listen(t, "tcp", "127.0.0.1:0")
	offered := make(chan []string, 1)
	cfg := &tls.Config{Certificates: []tls.Certificate{ours.Leaf([]string{"127.0.0.1"}).Certificate}}
	cfg.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) { offered <- h.SupportedProtos; return nil, nil }
	serve(t, tls.NewListener(l, cfg))
	w := realClusters(t, nil, nil, secure(t, ours, l.Addr().String()))
	e, loop := w.of("web")[0], w.loops[0]
	streamtest.Go(loop, func(task *task.Task) {
		var a upstream.Attempt
		passed, err := e.Connect(task, loop, &a)
		if err != nil {
			t.Error(err)
			return
		}
		defer e.TunnelDropped(&a)
		if passed.Secure == nil || !passed.Secure.State().HandshakeComplete {
			t.Error("it has no TLS")
		}
		passed.Close(loop)
	})
	if got := <-offered; len(got) != 0 {
		t.Errorf("%q is offered", got)
	}
}

func TestWhoIsNotBelievedIsNotConnectedTo(t *testing.T) {
	t.Parallel()
	ours, strangers := tlstest.NewAuthority(t), tlstest.NewAuthority(t)
	for _, tc := range []struct {
		name         string
		talk         func(net.Listener) net.Listener
		reason, text string
	}{
		{"a stranger", func(l net.Listener) net.Listener { return listenTLS(l, strangers.Leaf([]string{"127.0.0.1"})) }, "unknown authority", "TLS error: its certificate is signed by an authority that is not known"},
		{"another name", func(l net.Listener) net.Listener { return listenTLS(l, ours.Leaf([]string{"localhost"})) }, "name", "TLS error: its certificate is not for 127.0.0.1"},
		{"one without TLS", func(l net.Listener) net.Listener { return greeting{l} }, "protocol", "TLS error: it does not speak TLS"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			l := listen(t, "tcp", "127.0.0.1:0")
			serve(t, tc.talk(l))
			r := metrics.NewRegistry()
			e := realClusters(t, r, nil, secure(t, ours, l.Addr().String())).of("web")[0]
			_, err := e.try((*upstream.Endpoint).Get, 0)
			c, ok := errors.AsType[*upstream.ConnectError](err)
			if !ok || c.Timeout || err.Error() != "connect to "+e.String()+": "+tc.text {
				t.Errorf("error is %v, want %q", err, tc.text)
			}
			if failed, open := series(r, "holdfast_cluster_connect_failures_total"), series(r, "holdfast_cluster_connections_active"); failed != 1 || open != 0 {
				t.Errorf("%d failures to connect, %d connections are open", failed, open)
			}
			if n := series(r, "holdfast_cluster_tls_handshake_failures_total", tc.reason); n != 1 {
				t.Errorf("%d handshakes have failed by %q, want 1", n, tc.reason)
			}
		})
	}
}

// greeting has each connection begin with a line.
type greeting struct{ net.Listener }

func (g greeting) Accept() (net.Conn, error) {
	c, err := g.Listener.Accept()
	if err == nil {
		_, _ = io.WriteString(c, "220 mail.example ESMTP\r\n")
	}
	return c, err
}

// The time to connect is that of the handshake, too, and who gives up does so within it.
func TestAHandshakeThatHangs(t *testing.T) {
	t.Parallel()
	ours := tlstest.NewAuthority(t)
	l := listen(t, "tcp", "127.0.0.1:0") // nobody accepts
	c := secure(t, ours, l.Addr().String())
	c.ConnectTimeout = 300 * time.Millisecond
	r := metrics.NewRegistry()
	w := realClusters(t, r, nil, c)
	e := w.of("web")[0]
	_, err := e.try((*upstream.Endpoint).Get, 0)
	failed, ok := errors.AsType[*upstream.ConnectError](err)
	if !ok || !failed.Timeout || !strings.HasSuffix(err.Error(), "TLS error: the handshake took too long") {
		t.Errorf("error is %v", err)
	}
	if n := series(r, "holdfast_cluster_tls_handshake_failures_total", "timeout"); n != 1 {
		t.Errorf("%d timeouts are counted, want 1", n)
	}

	e = realClusters(t, r, nil, secure(t, ours, l.Addr().String())).of("web")[0]
	loop := e.loops[0]
	var a upstream.Attempt
	gone := errors.New("client gone")
	ended := streamtest.Begin(loop, func(t *task.Task) { _, err = e.Get(t, loop, &a) })
	if _, err := l.Accept(); err != nil {
		t.Fatal(err)
	}
	if c, err := l.Accept(); err != nil { // the hello is under way
		t.Fatal(err)
	} else if _, err := c.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	streamtest.Do(loop, func() { a.Cancel(gone) })
	if <-ended; err != gone {
		t.Errorf("a cancelled attempt ends with %v", err)
	}
	if n := series(r, "holdfast_cluster_tls_handshake_failures_total", "timeout"); n != 1 {
		t.Errorf("%d timeouts are counted, want 1", n)
	}
}

// Of several addresses one wins with which TLS is agreed on, not the first that takes a connection.
func TestTheRaceIsWonByTLS(t *testing.T) {
	t.Parallel()
	ours, strangers := tlstest.NewAuthority(t), tlstest.NewAuthority(t)
	bad := listen(t, "tcp", "127.0.0.1:0")
	_, port, _ := net.SplitHostPort(bad.Addr().String())
	good := listen(t, "tcp", "127.0.0.2:"+port)
	serve(t, listenTLS(bad, strangers.Leaf([]string{"web.internal"})))
	serve(t, listenTLS(good, ours.Leaf([]string{"web.internal"})))
	c := secure(t, ours, "web.internal:"+port)
	c.Discovery.By = config.ByLogicalDNS
	r := metrics.NewRegistry()
	w := realClusters(t, r, nil, c)
	cluster, _ := w.Get("web")
	cluster.SetMembers([]upstream.Member{{Address: "web.internal:" + port, Addresses: []netip.AddrPort{addrOf(bad), addrOf(good)}}})
	e := w.of("web")[0]
	e.roundTrip(false)
	if n := series(r, "holdfast_cluster_tls_handshake_failures_total", "unknown authority"); n != 1 {
		t.Errorf("%d handshakes have failed, want 1", n)
	}
	if n := series(r, "holdfast_cluster_connect_failures_total"); n != 0 {
		t.Errorf("%d attempts have failed", n)
	}
}

func addrOf(l net.Listener) netip.AddrPort { return l.Addr().(*net.TCPAddr).AddrPort() }

func TestFilesThatAreOfNoUseRefuseTheStart(t *testing.T) {
	t.Parallel()
	c := web("127.0.0.1:1")
	c.TLS = &config.ClusterTLS{CA: filepath.Join(t.TempDir(), "none.pem")}
	_, err := upstream.New(t.Context(), upstream.Options{Config: &config.Config{Clusters: []config.Cluster{c}}})
	if !errors.Is(err, os.ErrNotExist) || !strings.HasPrefix(err.Error(), `cluster "web": tls: `) {
		t.Errorf("error is %v", err)
	}
}

// A request goes to another cluster when one has no endpoint: what was agreed on with TLS does
// not go with it.
func TestAnAttemptWithoutTLSFollowsOneWith(t *testing.T) {
	t.Parallel()
	ours := tlstest.NewAuthority(t)
	plain, encrypted := listen(t, "tcp", "127.0.0.1:0"), listen(t, "tcp", "127.0.0.1:0")
	serve(t, plain)
	serve(t, listenTLS(encrypted, ours.Leaf([]string{"127.0.0.1"})))
	one := realClusters(t, nil, nil, secure(t, ours, encrypted.Addr().String())).of("web")[0]
	other := realClusters(t, nil, nil, web(plain.Addr().String())).of("web")[0]
	var a upstream.Attempt
	for _, e := range []*endpoint{one, other, one} {
		l := e.loops[0]
		streamtest.Go(l, func(task *task.Task) {
			up, err := e.Get(task, l, &a)
			if err != nil {
				t.Error(err)
				return
			}
			roundTrip(t, task, up)
		})
	}
}
