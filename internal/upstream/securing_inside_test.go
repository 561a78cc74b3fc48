package upstream

import (
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/tlstest"
)

func TestChecksUseTheTLSOfTheirCluster(t *testing.T) {
	t.Parallel()
	ours, strangers := tlstest.NewAuthority(t), tlstest.NewAuthority(t)
	leaf := ours.Leaf([]string{"127.0.0.1"})
	ca, other := ours.File(t.TempDir(), "ca.pem"), strangers.File(t.TempDir(), "ca.pem")
	web := httptest.NewUnstartedServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	web.TLS = &tls.Config{Certificates: []tls.Certificate{leaf.Certificate}}
	web.StartTLS()
	t.Cleanup(web.Close)
	pong := raw(t, "tcp", "127.0.0.1:0", func(c net.Conn) {
		s := tls.Server(c, web.TLS)
		if _, err := io.ReadFull(s, make([]byte, 4)); err == nil {
			_, _ = io.WriteString(s, "+PONG")
			_, _ = s.Read(make([]byte, 1))
		}
	})
	plain := newBackend(t)
	for _, tc := range []struct {
		name, address, ca string
		check             *config.EndpointCheck
		plain             bool
		reason            string
	}{
		{"HTTP", web.Listener.Addr().String(), ca, byHTTP(), false, ""},
		{"TCP", pong, ca, byTCP("PING", "+PONG"), false, ""},
		{"HTTP of a stranger", web.Listener.Addr().String(), other, byHTTP(), false, "it cannot be connected to: TLS error: its certificate is signed by an authority that is not known"},
		{"TCP of a stranger", pong, other, byTCP("PING", "+PONG"), false, "it cannot be connected to: TLS error: its certificate is signed by an authority that is not known"},
		{"HTTP in plain where TLS is expected", plain.address, ca, byHTTP(), false, "it cannot be connected to: TLS error: it does not speak TLS"},
		{"HTTP in plain", plain.address, ca, byHTTP(), true, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			tc.check.Plain = tc.plain
			c := newCheckedWith(t, Options{}, tc.check, func(c *config.Cluster) { c.TLS = &config.ClusterTLS{CA: tc.ca} }, tc.address).begin()
			for range 3 {
				c.round(1)
			}
			s, conditions := c.state(tc.address)
			if healthy := conditions == 0; healthy != (tc.reason == "") || !strings.HasPrefix(s.Reason, tc.reason) {
				t.Errorf("conditions %b, reason %q, want %q", conditions, s.Reason, tc.reason)
			}
		})
	}
}

func TestAClusterTellsOfItsTLS(t *testing.T) {
	t.Parallel()
	ours, dir := tlstest.NewAuthority(t), t.TempDir()
	until := time.Now().Add(5 * time.Hour).UTC().Truncate(time.Second)
	cfg := config.Cluster{Name: "web", TLS: &config.ClusterTLS{Unverified: true}}
	cfg.TLS.Certificate.Certificate, cfg.TLS.Certificate.Key = ours.Leaf([]string{"client"}, tlstest.Valid(time.Now().Add(-time.Hour), until)).Files(dir, "client")
	all, err := New(t.Context(), Options{Config: &config.Config{Clusters: []config.Cluster{cfg, {Name: "plain"}}}})
	if err != nil {
		t.Fatal(err)
	}
	s := all.State()
	if plain, web := s.Clusters[0].TLS, s.Clusters[1].TLS; plain != nil || web == nil || !web.Unverified || !web.Expires.Equal(until) || web.Problem != "" {
		t.Errorf("told are %v and %v", plain, fmt.Sprintf("%+v", web))
	}
}
