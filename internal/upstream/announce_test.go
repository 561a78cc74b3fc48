package upstream_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/exchange"
	"holdfast/internal/stream/streamtest"
	"holdfast/internal/task"
	"holdfast/internal/upstream"
)

// recorder is an upstream that notes what connections begin with, up to the end of the head of
// their first request, and answers one request on each.
type recorder struct {
	net.Listener
	heads chan string
	peers chan netip.AddrPort
}

func record(t *testing.T, network, address string) *recorder {
	t.Helper()
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	r := &recorder{l, make(chan string, 10), make(chan netip.AddrPort, 10)}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			peer, _ := netip.ParseAddrPort(c.RemoteAddr().String())
			r.peers <- peer
			r.answer(c)
		}
	}()
	t.Cleanup(func() {
		l.Close()
		<-ended
	})
	return r
}

// received is what comes next, for which nobody waits for ever.
func received[T any](t *testing.T, what string, from <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-from:
	case <-time.After(30 * time.Second):
		t.Fatalf("%s did not come", what)
	}
	return v
}

func (r *recorder) answer(c net.Conn) {
	defer c.Close()
	c.SetDeadline(time.Now().Add(time.Minute))
	in, head := bufio.NewReader(c), ""
	for !strings.Contains(head, "HTTP/1.1") || !strings.HasSuffix(head, "\r\n\r\n") {
		line, err := in.ReadString('\n')
		if head += line; err != nil {
			break
		}
	}
	r.heads <- head
	fmt.Fprint(c, "HTTP/1.1 204 N\r\n\r\n")
	in.ReadByte() // its end
}

// request makes a request as opener does, as whoever the announcement is about. It says whether
// the connection was used before, and which address it goes to.
func (e *endpoint) request(open opener, an upstream.Announcement) (reused bool, remote netip.AddrPort) {
	e.t.Helper()
	var err error
	l := e.loops[0]
	streamtest.Go(l, func(t *task.Task) {
		a := upstream.Attempt{Announcement: an}
		var up exchange.Upstream
		if up, err = open(e.Endpoint, t, l, &a); err != nil {
			return
		}
		reused, remote = up.Reused(), a.Remote()
		defer up.Close()
		if err = up.Send(t, &exchange.Request{Method: "GET", Authority: "x", Target: "/"}); err == nil {
			if err = up.Finish(t, nil); err == nil {
				_, err = up.Receive(t)
			}
		}
		for err == nil {
			_, err = up.Read(t)
		}
	})
	if err != io.EOF {
		e.t.Fatal(err)
	}
	return reused, remote
}

func TestAConnectionAnnouncesItsClient(t *testing.T) {
	t.Parallel()
	client := upstream.Announcement{Source: netip.MustParseAddrPort("192.0.2.1:1234"), Destination: netip.MustParseAddrPort("10.0.0.1:80")}
	for _, c := range []struct {
		network, address string
		version          int
		of               upstream.Announcement
		want             string
	}{
		{"tcp", "127.0.0.1:0", 1, client, "PROXY TCP4 192.0.2.1 10.0.0.1 1234 80\r\n"},
		{"tcp", "127.0.0.1:0", 2, client, "\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c\xc0\x00\x02\x01\x0a\x00\x00\x01\x04\xd2\x00\x50"},
		{"tcp", "127.0.0.1:0", 1, upstream.Announcement{}, "PROXY UNKNOWN\r\n"},
		{"tcp", "127.0.0.1:0", 2, upstream.Announcement{}, "\r\n\r\n\x00\r\nQUIT\n\x20\x00\x00\x00"},
		{"tcp", "127.0.0.1:0", 0, client, ""},
		{"unix", "@" + t.Name(), 1, client, "PROXY TCP4 192.0.2.1 10.0.0.1 1234 80\r\n"},
	} {
		t.Run(fmt.Sprintf("version %d over %s of %v", c.version, c.network, c.of), func(t *testing.T) {
			t.Parallel()
			r := record(t, c.network, c.address)
			address := r.Addr().String()
			if c.network == "unix" {
				address = "unix:" + address
			}
			cfg := web(address)
			cfg.Connecting.ProxyProtocol = c.version
			e := realClusters(t, nil, nil, cfg).of("web")[0]
			for _, open := range []opener{(*upstream.Endpoint).Get, (*upstream.Endpoint).Get, (*upstream.Endpoint).Fresh, (*upstream.Endpoint).Dial} {
				if reused, _ := e.request(open, c.of); reused {
					if c.version != 0 {
						t.Error("somebody else's connection was used")
					}
					continue
				}
				if got := received(t, "a request", r.heads); got != c.want+"GET / HTTP/1.1\r\nHost: x\r\n\r\n" {
					t.Errorf("the connection begins with %q", got)
				}
				if c.version == 0 {
					return
				}
			}
			var left int
			if streamtest.Do(e.loops[0], func() { left = e.loops[0].Conns() }); left != 0 {
				t.Errorf("%d connections are kept", left)
			}
		})
	}
}

func TestAConnectionComesFromTheSourceAddress(t *testing.T) {
	t.Parallel()
	r := record(t, "tcp", "127.0.0.1:0")
	cfg := web(r.Addr().String())
	cfg.Connecting = config.Connecting{Source: netip.MustParseAddr("127.0.0.123")}
	e := realClusters(t, nil, nil, cfg).of("web")[0]
	if _, remote := e.request((*upstream.Endpoint).Dial, upstream.Announcement{}); remote.String() != r.Addr().String() {
		t.Errorf("connected to %v", remote)
	}
	if peer := received(t, "a connection", r.peers); peer.Addr() != cfg.Connecting.Source || peer.Port() == 0 {
		t.Errorf("it comes from %v", peer)
	}
	cfg.Connecting.Source = netip.MustParseAddr("192.0.2.77") // nobody's here
	e = realClusters(t, nil, nil, cfg).of("web")[0]
	if _, err := e.try((*upstream.Endpoint).Dial, 0); err == nil || !strings.HasSuffix(err.Error(), "bind: cannot assign requested address") {
		t.Errorf("%v", err)
	}
	cfg.Connecting.Source = netip.IPv6Loopback()
	e = realClusters(t, nil, nil, cfg).of("web")[0]
	if _, err := e.try((*upstream.Endpoint).Dial, 0); err == nil || !strings.HasSuffix(err.Error(), "are of two families") {
		t.Errorf("%v", err)
	}
}

// The addresses of one endpoint, on which nobody listens but on one.
func TestARealRace(t *testing.T) {
	t.Parallel()
	r := record(t, "tcp", "127.0.0.1:0")
	at := netip.MustParseAddrPort(r.Addr().String())
	e := realClusters(t, nil, nil, web(at.String())).of("web")[0]
	e.SetTargets(
		netip.AddrPortFrom(netip.MustParseAddr("127.0.0.66"), at.Port()), netip.AddrPortFrom(netip.IPv6Loopback(), at.Port()),
		netip.AddrPortFrom(netip.MustParseAddr("127.0.0.67"), at.Port()), at,
	)
	if _, remote := e.request((*upstream.Endpoint).Dial, upstream.Announcement{}); remote != at {
		t.Errorf("connected to %v", remote)
	}
	var left int
	if streamtest.Do(e.loops[0], func() { left = e.loops[0].Conns() }); left != 0 {
		t.Errorf("%d connections are left", left)
	}
}
