package upstream

import (
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/tlstest"
)

// overHTTP2 makes the backend speak HTTP/2 and nothing else, with TLS if there is a leaf. It
// answers 505 to what comes over anything else.
func overHTTP2(t *testing.T, leaf *tlstest.Leaf) *backend {
	return newBackendWith(t, func(b *backend) {
		handler := b.Config.Handler
		b.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.ProtoMajor != 2 || (r.TLS != nil) != (leaf != nil) {
				w.WriteHeader(http.StatusHTTPVersionNotSupported)
				return
			}
			handler.ServeHTTP(w, r)
		})
		if leaf == nil {
			b.Config.Protocols = new(http.Protocols)
			b.Config.Protocols.SetUnencryptedHTTP2(true)
			return
		}
		b.EnableHTTP2 = true
		b.TLS = &tls.Config{Certificates: []tls.Certificate{leaf.Certificate}}
	})
}

// The endpoints of a cluster that speaks HTTP/2 are asked by that.
func TestChecksByHTTP2(t *testing.T) {
	t.Parallel()
	authority := tlstest.NewAuthority(t)
	ca := authority.File(t.TempDir(), "ca.pem")
	for _, secure := range []bool{false, true} {
		for _, reuse := range []bool{true, false} {
			t.Run(fmt.Sprintf("TLS %v, kept %v", secure, reuse), func(t *testing.T) {
				t.Parallel()
				var leaf *tlstest.Leaf
				if secure {
					leaf = authority.Leaf([]string{"127.0.0.1"})
				}
				b := overHTTP2(t, leaf)
				check := byHTTP()
				check.HTTP.Reuse, check.HTTP.Body, check.UnhealthyThreshold = reuse, "ready", 1
				b.do(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, r.Method+" "+r.URL.Path+" ready") })
				c := newCheckedWith(t, Options{}, check, func(c *config.Cluster) {
					if c.Protocol = config.HTTP2; secure {
						c.TLS = &config.ClusterTLS{CA: ca}
					}
				}, b.address).begin()
				for range 4 {
					c.round(1)
				}
				c.wantChosen(b.address)
				want := int64(5)
				if reuse {
					want = 1
				}
				if got := b.connections.Load(); got != want {
					t.Errorf("%d connections for 5 checks, want %d", got, want)
				}
				b.CloseClientConnections() // which is no failure
				c.round(1)
				c.wantChosen(b.address)
				if n := c.counted("success"); n != 6 {
					t.Errorf("%d checks have passed, want 6; the log:\n%s", n, c.log)
				}
				b.answer(500)
				c.round(1)
				if s, conditions := c.state(b.address); conditions != Failing || s.Reason != "status 500" {
					t.Errorf("conditions %b, reason %q", conditions, s.Reason)
				}
				if n := c.on.Counter(clusterConnections, "web").Value() + c.on.Counter(clusterHTTP2Connections, "web").Value(); n != 0 {
					t.Errorf("checks were counted as %d connections of the cluster", n)
				}
			})
		}
	}
}

// A check has its time for all that it does, and the next one begins anew.
func TestAHangingCheckByHTTP2(t *testing.T) {
	t.Parallel()
	for _, where := range []string{"before its settings", "in the answer"} {
		t.Run(where, func(t *testing.T) {
			t.Parallel()
			b := overHTTP2(t, nil)
			address, asked := b.address, make(chan struct{}, 100)
			b.do(func(_ http.ResponseWriter, r *http.Request) {
				asked <- struct{}{}
				<-r.Context().Done() // the stream is reset
			})
			if where != "in the answer" {
				address = raw(t, "tcp", "127.0.0.1:0", func(c net.Conn) {
					if _, err := c.Read(make([]byte, 1)); err != nil {
						return
					}
					asked <- struct{}{}
					io.Copy(io.Discard, c)
				})
			}
			check := byHTTP()
			check.Timeout = time.Minute // of which a part is real time: it must not be over before
			c := newCheckedWith(t, Options{}, check, func(c *config.Cluster) { c.Protocol = config.HTTP2 }, address)
			c.all.Run()
			for n := range uint64(3) {
				<-asked
				c.clock.Advance(59900 * time.Millisecond)
				c.clock.Advance(200 * time.Millisecond)
				c.wait("the end of the check", func() bool { return c.ended() == n+1 })
				if s, conditions := c.state(address); conditions != Failing || s.Reason != "no answer within 1m0s" {
					t.Errorf("conditions %b, reason %q", conditions, s.Reason)
				}
				c.clock.Advance(11 * time.Second)
			}
		})
	}
}

// What speaks something else fails its checks.
func TestChecksByHTTP2OfWhatSpeaksHTTP1(t *testing.T) {
	t.Parallel()
	b := newBackend(t)
	c := newCheckedWith(t, Options{}, byHTTP(), func(c *config.Cluster) { c.Protocol = config.HTTP2 }, b.address).begin()
	if s, conditions := c.state(b.address); conditions != Failing || !strings.Contains(s.Reason, "does not answer in HTTP/2") || strings.Contains(s.Reason, "\n") {
		t.Errorf("conditions %b, reason %q", conditions, s.Reason)
	}
}
