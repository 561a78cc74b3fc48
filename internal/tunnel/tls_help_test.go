package tunnel_test

import (
	"crypto/tls"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"holdfast/internal/stream"
	"holdfast/internal/stream/streamtest"
	"holdfast/internal/task"
	"holdfast/internal/tlstest"
	"holdfast/internal/tunnel"
)

// tcpConn is the far end of a tunnel's connection: a *net.TCPConn, or a peer that has TLS.
type tcpConn interface {
	net.Conn
	syscall.Conn
	CloseWrite() error
	SetReadBuffer(int) error
	SetWriteBuffer(int) error
	SetLinger(int) error
	SetNoDelay(bool) error
}

// peer is one that has TLS.
type peer struct {
	*net.TCPConn
	tls *tls.Conn
	raw *sniffed
}

// sniffed is the socket of a peer, and says whether TLS has read its FIN: it does not where the end
// is said in TLS (crypto/tls reads nothing behind close_notify).
type sniffed struct {
	net.Conn
	fin atomic.Bool

	batch *[]byte // where records go that are to be sent at once; nil: they are sent
}

func (s *sniffed) Write(b []byte) (int, error) {
	if s.batch != nil {
		*s.batch = append(*s.batch, b...)
		return len(b), nil
	}
	return s.Conn.Write(b)
}

func (s *sniffed) Read(b []byte) (int, error) {
	n, err := s.Conn.Read(b)
	if err == io.EOF {
		s.fin.Store(true)
	}
	return n, err
}

func (p *peer) Read(b []byte) (int, error) {
	return p.tls.Read(b)
}

func (p *peer) Write(b []byte) (int, error) {
	return p.tls.Write(b)
}

// CloseWrite ends the direction as TLS does it, and by a FIN.
func (p *peer) CloseWrite() error {
	if err := p.tls.CloseWrite(); err != nil {
		return err
	}
	return p.TCPConn.CloseWrite()
}

func (p *peer) Close() error {
	p.tls.CloseWrite()
	return p.TCPConn.Close()
}

// securer makes the tunnels of a Set have TLS.
type securer struct {
	loop  *stream.Loop // where the handshakes are
	sides [2]bool
}

// secured are the sets of which the tunnels have TLS.
var secured sync.Map // of *tunnel.Set: *securer

// testTLS are the configurations of both sides of a handshake.
var testTLS = sync.OnceValues(func() (server, client *tls.Config) {
	authority := tlstest.NewAuthority(standin{})
	leaf := authority.Leaf([]string{"peer.test"})
	return &tls.Config{Certificates: []tls.Certificate{leaf.Certificate}},
		&tls.Config{RootCAs: authority.Pool(), ServerName: "peer.test"}
})

// standin is for what is made once for all tests.
type standin struct{ testing.TB }

func (standin) Helper() {}

// secure shakes hands over near, and returns what a tunnel has of it then, and its peer.
func (s *securer) secure(t testing.TB, far, near *net.TCPConn, server bool) (*peer, stream.Passed) {
	t.Helper()
	fd := duplicate(t, near)
	near.Close()
	if err := unix.SetNonblock(fd, true); err != nil {
		t.Fatal(err)
	}
	serverConfig, clientConfig := testTLS()
	raw := &sniffed{Conn: far}
	p := &peer{TCPConn: far, tls: tls.Client(raw, clientConfig), raw: raw}
	config := serverConfig
	if !server {
		p.tls, config = tls.Server(raw, serverConfig), clientConfig
	}
	var shaking sync.WaitGroup
	shaking.Go(func() {
		if err := p.tls.Handshake(); err != nil {
			t.Errorf("the peer's handshake: %v", err)
		}
	})
	var c stream.Conn
	var passed stream.Passed
	var err error
	streamtest.Go(s.loop, func(t *task.Task) {
		if err = s.loop.Adopt(&c, fd, nil, nil); err != nil {
			return
		}
		if err = c.Handshake(t, config, server); err == nil {
			passed = c.PassOn()
			passed.Leave(s.loop)
		}
	})
	shaking.Wait()
	if err != nil {
		t.Fatal(err)
	}
	return p, passed
}

// begin starts a tunnel of two connections, whose near ends it takes, with TLS if that is so in
// the Set.
func begin(t testing.TB, set *tunnel.Set, spec tunnel.Spec, far, near [2]*net.TCPConn) (client, server tcpConn) {
	t.Helper()
	peers := [2]tcpConn{far[0], far[1]}
	found, ok := secured.Load(set)
	if !ok {
		spec.Down, spec.Up = near[0], near[1]
		set.Start(spec)
		return peers[0], peers[1]
	}
	s := found.(*securer)
	early := [2]*[]byte{&spec.DownEarly, &spec.UpEarly}
	for i := range peers {
		if s.sides[i] {
			var passed stream.Passed
			peers[i], passed = s.secure(t, far[i], near[i], i == 0)
			spec.FDs[i], spec.Secure[i] = passed.FD, passed.Secure
			*early[i] = append(*early[i], passed.Early...)
			continue
		}
		spec.FDs[i] = duplicate(t, near[i])
		near[i].Close()
	}
	set.Start(spec)
	return peers[0], peers[1]
}
