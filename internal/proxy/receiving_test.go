package proxy

import (
	"io"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/config"
	"holdfast/internal/stream"
	"holdfast/internal/stream/streamtest"
)

const namedV1 = "PROXY TCP4 192.0.2.1 10.0.0.1 12345 80\r\n"

// announcedOn is a listener on loopback whose connections begin with PROXY headers.
func announcedOn(t *testing.T, loops int, mode config.ProxyMode, trusted ...string) *acceptance {
	t.Helper()
	a := acceptOn(t, loops, 0)
	for i, l := range a.loops {
		streamtest.Do(l, func() { l.Index = i })
	}
	a.l.cfg.ReceivedProxy = config.ReceivedProxy{Mode: mode}
	for _, n := range trusted {
		a.l.cfg.ReceivedProxy.Trusted = append(a.l.cfg.ReceivedProxy.Trusted, netip.MustParsePrefix(n))
	}
	a.l.cfg.Limits.HeadTimeout = 10 * time.Second
	a.l.announced(a.registry)
	return a
}

func (a *acceptance) result(r proxyResult) uint64 {
	return a.registry.Counter(proxyHeaders, "public", proxyResults[r]).Value()
}

// wantClosed fails unless the listener has closed the connection, which then is none of its
// any more.
func (a *acceptance) wantClosed(conn net.Conn, why proxyResult) {
	a.t.Helper()
	if n, err := conn.Read(make([]byte, 1)); n != 0 || err == nil || isTimeoutOf(err) {
		a.t.Errorf("%s: %d bytes came, %v", proxyResults[why], n, err)
	}
	until(a.t, proxyResults[why], func() bool { return a.result(why) == 1 && a.l.open.Load() == 0 && a.l.connections() == 0 })
	a.wantNobody()
}

func isTimeoutOf(err error) bool {
	n, ok := err.(net.Error)
	return ok && n.Timeout()
}

// rest is what the server of a connection reads of it.
func (a *acceptance) rest(g given, n int) string {
	a.t.Helper()
	b := make([]byte, n+1)
	got := 0
	until(a.t, "the rest comes", func() bool {
		n, err := unix.Read(g.fd, b[got:])
		if err == nil {
			got += n
		}
		return got >= len(b)-1
	})
	return string(b[:got])
}

// Wherever a header is cut, and whatever stands behind it, the server is given the client
// that it names, and what stands behind it.
func TestAConnectionIsItsClients(t *testing.T) {
	t.Parallel()
	const named, request = "192.0.2.1:12345", "GET / HTTP/1.1\r\n\r\n"
	headers := []struct {
		name, header, client string // "": the peer
		result               proxyResult
		all                  bool // every cut
	}{
		{"v1", namedV1, named, proxyNamed, true},
		{"v1 unknown", "PROXY UNKNOWN\r\n", "", proxyLocal, false},
		{"v2", "\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c\xc0\x00\x02\x01\x0a\x00\x00\x01\x30\x39\x00\x50", named, proxyNamed, true},
		{"v2 local", "\r\n\r\n\x00\r\nQUIT\n\x20\x00\x00\x00", "", proxyLocal, false},
		{"v2 of unix", "\r\n\r\n\x00\r\nQUIT\n\x21\x31\x00\xd8" + strings.Repeat("/", 216), "", proxyLocal, false},
	}
	for _, h := range headers {
		t.Run(h.name, func(t *testing.T) {
			t.Parallel()
			a := announcedOn(t, 2, config.ProxyRequired, "127.0.0.0/8")
			a.accept()
			whole := h.header + request
			served := uint64(0)
			for cut := range len(whole) + 1 {
				if cut > 0 && !h.all && cut%7 != 0 {
					continue
				}
				conn := a.dial()
				if cut > 0 {
					io.WriteString(conn, whole[:cut])
				}
				if cut < len(h.header) {
					a.wantNobody()
				}
				io.WriteString(conn, whole[cut:])
				g := a.next()
				want := addrPort(conn.LocalAddr())
				if h.client != "" {
					want = netip.MustParseAddrPort(h.client)
				}
				if g.remote != want || g.early != "" {
					t.Errorf("cut at %d: %v is served with %q, want %v", cut, g.remote, g.early, want)
				}
				if got := a.rest(g, len(request)); got != request {
					t.Errorf("cut at %d: %q is behind the header", cut, got)
				}
				a.end(g)
				conn.Close()
				if served++; a.result(h.result) != served {
					t.Errorf("counted %d of %d", a.result(h.result), served)
				}
			}
		})
	}
}

// A byte at a time, and nothing behind it.
func TestAHeaderMayTrickle(t *testing.T) {
	t.Parallel()
	a := announcedOn(t, 1, config.ProxyRequired, "127.0.0.1/32")
	a.accept()
	conn := a.dial()
	for i := range len(namedV1) {
		io.WriteString(conn, namedV1[i:i+1])
		a.settle()
	}
	if g := a.next(); g.remote.String() != "192.0.2.1:12345" {
		t.Errorf("%v is served", g.remote)
	} else {
		a.end(g)
	}
}

func TestWhoIsNotBelieved(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name    string
		mode    config.ProxyMode
		trusted string
		sends   string
		why     proxyResult
	}{
		{"a stranger with a header", config.ProxyRequired, "10.0.0.0/8", namedV1, proxyUntrusted},
		{"a stranger who says nothing", config.ProxyRequired, "10.0.0.0/8", "", proxyUntrusted},
		{"no header", config.ProxyRequired, "127.0.0.1/32", "GET / HTTP/1.1\r\n\r\n", proxyInvalid},
		{"a header without sense", config.ProxyRequired, "127.0.0.1/32", "PROXY TCP4 a b c d\r\n", proxyInvalid},
		{"a header without sense where one may be", config.ProxyOptional, "127.0.0.1/32", "PROXY TCP4 a b c d\r\n", proxyInvalid},
		{"a line without end", config.ProxyRequired, "127.0.0.1/32", "PROXY " + strings.Repeat("x", 500), proxyInvalid},
		{"a header of 64 KiB", config.ProxyRequired, "127.0.0.1/32", "\r\n\r\n\x00\r\nQUIT\n\x21\x11\xff\xff", proxyInvalid},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			a := announcedOn(t, 2, c.mode, c.trusted)
			a.accept()
			conn := a.dial()
			io.WriteString(conn, c.sends)
			a.wantClosed(conn, c.why)
		})
	}
}

// Where headers are optional, what begins like none is the client's own. Of who is not trusted
// nobody looks at the beginning.
func TestAnOptionalHeader(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		trusted, sends, behind string
		named                  bool
	}{
		{"127.0.0.1/32", "GET / HTTP/1.1\r\n\r\n", "GET / HTTP/1.1\r\n\r\n", false},
		{"127.0.0.1/32", namedV1 + "GET", "GET", true},
		{"10.0.0.0/8", namedV1 + "GET", namedV1 + "GET", false},
	} {
		a := announcedOn(t, 1, config.ProxyOptional, c.trusted)
		a.accept()
		conn := a.dial()
		io.WriteString(conn, c.sends)
		g := a.next()
		if named := g.remote.String() == "192.0.2.1:12345"; named != c.named || !named && g.remote != addrPort(conn.LocalAddr()) {
			t.Errorf("%q from %s: %v is served", c.sends, c.trusted, g.remote)
		}
		if got := a.rest(g, len(c.behind)); got != c.behind {
			t.Errorf("%q from %s: the server reads %q", c.sends, c.trusted, got)
		}
		a.end(g)
	}
}

// A peer on a unix socket is trusted where everybody is.
func TestAHeaderOnAUnixSocket(t *testing.T) {
	t.Parallel()
	for trusted, ok := range map[string]bool{"0.0.0.0/0": true, "127.0.0.1/32": false} {
		a := announcedOn(t, 1, config.ProxyRequired, trusted)
		a.listen("unix", filepath.Join(t.TempDir(), "s"))
		a.accept()
		conn := a.dial()
		io.WriteString(conn, namedV1)
		if !ok {
			a.wantClosed(conn, proxyUntrusted)
			continue
		}
		g := a.next()
		if g.remote.String() != "192.0.2.1:12345" {
			t.Errorf("%v is served", g.remote)
		}
		a.end(g)
	}
}

func TestAHeaderThatDoesNotComeEndsTheConnection(t *testing.T) {
	t.Parallel()
	for _, sent := range []string{"", "PROXY TCP4"} {
		a := announcedOn(t, 1, config.ProxyRequired, "127.0.0.1/32")
		clock := streamtest.NewClock(a.loops...)
		a.accept()
		conn := a.dial()
		io.WriteString(conn, sent)
		until(t, "it waits", func() bool { return a.l.open.Load() == 1 && conns(a.loops[0]) == 1 })
		clock.Advance(9 * time.Second)
		if n := a.l.connections(); n != 1 {
			t.Fatalf("after 9 s there are %d connections", n)
		}
		clock.Advance(2 * time.Second)
		a.wantClosed(conn, proxyLate)
	}
}

func conns(l *stream.Loop) (n int) {
	streamtest.Do(l, func() { n = l.Conns() })
	return n
}

func TestAClientMayGoBeforeItsHeaderIsComplete(t *testing.T) {
	t.Parallel()
	for _, sent := range []string{"", "PROXY TCP4"} {
		a := announcedOn(t, 1, config.ProxyRequired, "127.0.0.1/32")
		a.accept()
		conn := a.dial()
		io.WriteString(conn, sent)
		conn.(*net.TCPConn).CloseWrite()
		a.wantClosed(conn, proxyGone)
	}
}

// A connection that waits for its header counts, and holds up the next one at the limit.
func TestALimitHoldsForThoseThatWait(t *testing.T) {
	t.Parallel()
	a := announcedOn(t, 1, config.ProxyRequired, "127.0.0.1/32")
	a.l.cfg.Limits.Connections = 1
	a.accept()
	first := a.dial()
	until(t, "it waits", func() bool { return a.l.open.Load() == 1 })
	second := a.dial()
	io.WriteString(second, namedV1)
	until(t, "the limit is reached", func() bool { return a.full() == 1 })
	a.wantNobody()
	first.Close()
	a.end(a.next())
}

// What waits when all connections are cut is cut as well.
func TestThoseThatWaitAreCut(t *testing.T) {
	t.Parallel()
	a := announcedOn(t, 2, config.ProxyRequired, "127.0.0.1/32")
	a.accept()
	var waiting []net.Conn
	for range 5 {
		waiting = append(waiting, a.dial())
	}
	until(t, "they wait", func() bool { return conns(a.loops[0])+conns(a.loops[1]) == 5 })
	a.l.heralds.cut(a.loops)
	for _, c := range waiting {
		if _, err := c.Read(make([]byte, 1)); err == nil || isTimeoutOf(err) {
			t.Errorf("%v", err)
		}
	}
	until(t, "they are gone", func() bool { return a.result(proxyEnded) == 5 && a.l.connections() == 0 })
}

func TestAListenerWithoutHeadersHasNoHeralds(t *testing.T) {
	t.Parallel()
	if h := newHeralds(config.ReceivedProxy{}, "public", time.Second, 1, slog.New(slog.DiscardHandler), nil); h != nil {
		t.Error("it has some")
	}
}
