package clienttls_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"holdfast/internal/clienttls"
	"holdfast/internal/config"
	"holdfast/internal/filewatch"
	"holdfast/internal/metrics"
	"holdfast/internal/tlstest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// cluster is a client with what it has logged and counted.
type cluster struct {
	*clienttls.Client
	t   *testing.T
	log bytes.Buffer
	all *metrics.Registry
}

func newCluster(t *testing.T, cfg config.ClusterTLS, change ...func(*clienttls.Options)) *cluster {
	t.Helper()
	c, err := tryCluster(t, cfg, change...)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func tryCluster(t *testing.T, cfg config.ClusterTLS, change ...func(*clienttls.Options)) (*cluster, error) {
	t.Helper()
	c := &cluster{t: t, all: metrics.NewRegistry()}
	o := clienttls.Options{Config: &cfg, Cluster: "web", Log: slog.New(slog.NewTextHandler(&c.log, nil)), Metrics: c.all}
	for _, f := range change {
		f(&o)
	}
	var err error
	c.Client, err = clienttls.New(o)
	return c, err
}

// shake has both sides shake hands, and returns what each says. The client is told as a cluster
// would be.
func (c *cluster) shake(address string, server *tls.Config) (state tls.ConnectionState, err, servers error) {
	c.t.Helper()
	cfg, err := c.Peer(address).Config(clienttls.Requests)
	if err != nil {
		return state, err, nil
	}
	return c.shakeBy(cfg, server)
}

func (c *cluster) shakeBy(cfg, server *tls.Config) (state tls.ConnectionState, err, servers error) {
	here, there := newPipe()
	answered := make(chan error, 1)
	go func() {
		defer there.Close()
		s := tls.Server(there, server)
		err := s.Handshake()
		if err == nil {
			_, err = s.Write([]byte("x")) // behind the session
		}
		answered <- err
	}()
	conn := tls.Client(here, cfg)
	if err = conn.Handshake(); err != nil {
		here.Close()
		return state, c.Failed(err), <-answered
	}
	state = conn.ConnectionState()
	c.Succeeded(state.DidResume)
	_, err = io.ReadAll(conn)
	here.Close()
	return state, err, <-answered
}

func serving(l *tlstest.Leaf) *tls.Config {
	return &tls.Config{Certificates: []tls.Certificate{l.Certificate}}
}

// says fails unless an error is a handshake's for this reason, and says this.
func says(t *testing.T, err error, reason, text string) {
	t.Helper()
	e, ok := errors.AsType[*clienttls.Error](err)
	if !ok || e.Reason.String() != reason || !strings.Contains(e.Error(), text) {
		t.Errorf("error is %v (%+v), want the reason %q and %q", err, e, reason, text)
	}
}

func TestWhoIsNoEndpointIsRefused(t *testing.T) {
	t.Parallel()
	now := time.Now()
	ours, strangers := tlstest.NewAuthority(t), tlstest.NewAuthority(t)
	alone := func(names ...string) *tlstest.Leaf {
		l := ours.Leaf(names)
		der, err := x509.CreateCertificate(nil, l.Certificate.Leaf, l.Certificate.Leaf, l.Certificate.Leaf.PublicKey, l.Certificate.PrivateKey)
		if err != nil {
			t.Fatal(err)
		}
		l.Certificate.Certificate = [][]byte{der}
		return l
	}
	for _, tc := range []struct {
		name    string
		leaf    *tlstest.Leaf
		address string
		cfg     config.ClusterTLS
		reason  string // "": it is believed
		text    string
	}{
		{name: "the host", leaf: ours.Leaf([]string{"a.example", "b.example"}), address: "b.example:443"},
		{name: "the host in capitals with a dot", leaf: ours.Leaf([]string{"a.example"}), address: "A.example.:443"},
		{name: "a star", leaf: ours.Leaf([]string{"*.example"}), address: "a.example:443"},
		{name: "an IPv4 address", leaf: ours.Leaf([]string{"10.0.0.1"}), address: "10.0.0.1:443"},
		{name: "an IPv6 address", leaf: ours.Leaf([]string{"2001:db8::1"}), address: "[2001:db8::1]:443"},
		{name: "sni in place of the host", leaf: ours.Leaf([]string{"sni.example"}), address: "10.0.0.1:443", cfg: config.ClusterTLS{SNI: "sni.example"}},
		{name: "sni for a unix socket", leaf: ours.Leaf([]string{"sni.example"}), address: "unix:/run/a", cfg: config.ClusterTLS{SNI: "sni.example"}},
		{name: "one of some names", leaf: ours.Leaf([]string{"y.example"}), address: "a.example:443", cfg: config.ClusterTLS{Names: []string{"x.example", "y.example"}}},
		{name: "a name that is an address", leaf: ours.Leaf([]string{"10.0.0.9"}), address: "a.example:443", cfg: config.ClusterTLS{Names: []string{"10.0.0.9"}}},
		{name: "a URI", leaf: ours.Leaf([]string{"spiffe://example.org/web"}), address: "a.example:443", cfg: config.ClusterTLS{Names: []string{"spiffe://example.org/web"}}},
		{name: "anybody", leaf: strangers.Leaf([]string{"x.example"}), address: "a.example:443", cfg: config.ClusterTLS{Unverified: true}},

		{name: "another host", leaf: ours.Leaf([]string{"b.example"}), address: "a.example:443", reason: "name", text: "its certificate is not for a.example"},
		{name: "a star for two parts", leaf: ours.Leaf([]string{"*.example"}), address: "b.a.example:443", reason: "name"},
		{name: "the common name alone", leaf: ours.Leaf(nil, tlstest.CommonName("a.example")), address: "a.example:443", reason: "name"},
		{name: "another address", leaf: ours.Leaf([]string{"10.0.0.2"}), address: "10.0.0.1:443", reason: "name", text: "not for 10.0.0.1"},
		{name: "an address as a host's name", leaf: ours.Leaf(nil, tlstest.Change(func(c *x509.Certificate) { c.DNSNames = []string{"10.0.0.1"} })), address: "10.0.0.1:443", reason: "name"},
		{name: "the host, but not the sni", leaf: ours.Leaf([]string{"a.example"}), address: "a.example:443", cfg: config.ClusterTLS{SNI: "sni.example"}, reason: "name"},
		{name: "the host, but none of the names", leaf: ours.Leaf([]string{"a.example"}), address: "a.example:443", cfg: config.ClusterTLS{Names: []string{"w.example", "x.example", "y.example", "z.example"}}, reason: "name", text: "w.example, x.example, y.example, or 1 other names"},
		{name: "another URI", leaf: ours.Leaf([]string{"spiffe://example.org/web2"}), address: "a.example:443", cfg: config.ClusterTLS{Names: []string{"spiffe://example.org/web"}}, reason: "name"},
		{name: "no name at all", leaf: ours.Leaf([]string{"a.example"}), address: "unix:/run/a", reason: "name", text: "an endpoint that has no name"},
		{name: "a stranger's", leaf: strangers.Leaf([]string{"a.example"}), address: "a.example:443", reason: "unknown authority"},
		{name: "its own", leaf: alone("a.example"), address: "a.example:443", reason: "self-signed"},
		{name: "expired", leaf: ours.Leaf([]string{"a.example"}, tlstest.Valid(now.Add(-48*time.Hour), now.Add(-24*time.Hour))), address: "a.example:443", reason: "expired", text: "has expired on 2"},
		{name: "too early", leaf: ours.Leaf([]string{"a.example"}, tlstest.Valid(now.Add(24*time.Hour), now.Add(48*time.Hour))), address: "a.example:443", reason: "not yet valid", text: "is not valid before 2"},
		{name: "a client's", leaf: ours.Leaf([]string{"a.example"}, tlstest.Client()), address: "a.example:443", reason: "certificate", text: "is not for servers"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			cfg := tc.cfg
			if !cfg.Unverified {
				cfg.CA = ours.File(t.TempDir(), "ca.pem")
			}
			c := newCluster(t, cfg)
			_, err, servers := c.shake(tc.address, serving(tc.leaf))
			if tc.reason == "" {
				if err != nil || servers != nil {
					t.Errorf("errors: %v, %v", err, servers)
				}
				return
			}
			says(t, err, tc.reason, tc.text)
			if servers == nil {
				t.Error("the endpoint was not told")
			}
		})
	}
}

func TestStrangeEndpoints(t *testing.T) {
	t.Parallel()
	ours := tlstest.NewAuthority(t)
	leaf := ours.Leaf([]string{"a.example"})
	old := serving(leaf)
	old.MaxVersion = tls.VersionTLS12
	wants := serving(leaf)
	wants.ClientAuth, wants.MaxVersion = tls.RequireAnyClientCert, tls.VersionTLS12
	grpc := serving(leaf)
	grpc.NextProtos = []string{"grpc"}
	for _, tc := range []struct {
		name         string
		cfg          config.ClusterTLS
		server       *tls.Config
		reason, text string
	}{
		{"too old", config.ClusterTLS{MinVersion: "1.3"}, old, "refused", "protocol version not supported"},
		{"wants a certificate", config.ClusterTLS{}, wants, "refused", "handshake failure"},
		{"speaks something else", config.ClusterTLS{}, grpc, "refused", "no application protocol"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			tc.cfg.CA = ours.File(t.TempDir(), "ca.pem")
			_, err, _ := newCluster(t, tc.cfg).shake("a.example:443", tc.server)
			says(t, err, tc.reason, tc.text)
		})
	}
}

func TestWhatIsNoTLS(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct{ name, answer, reason, text string }{
		{"HTTP", "HTTP/1.1 400 Bad Request\r\n\r\n", "protocol", "does not speak TLS"},
		{"nothing", "", "closed", "has closed the connection"},
		{"an alert", "\x15\x03\x01\x00\x02\x02\x28", "refused", "handshake failure"},
		{"half a record", "\x16\x03\x03\x40", "closed", ""},
		{"nonsense in a record", "\x16\x03\x03\x00\x04\x02\x00\x00\x00", "protocol", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			c := newCluster(t, config.ClusterTLS{})
			cfg, err := c.Peer("a.example:443").Config(clienttls.Requests)
			if err != nil {
				t.Fatal(err)
			}
			here, there := newPipe()
			defer here.Close()
			answered := make(chan struct{})
			go func() {
				defer close(answered)
				_, _ = there.Read(make([]byte, 1<<16))
				_, _ = there.Write([]byte(tc.answer))
				there.Close()
			}()
			err = tls.Client(here, cfg).Handshake()
			here.Close()
			<-answered
			if err == nil {
				t.Fatal("no error")
			}
			says(t, c.Failed(err), tc.reason, tc.text)
		})
	}
	c := newCluster(t, config.ClusterTLS{})
	says(t, c.Failed(os.ErrDeadlineExceeded), "timeout", "took too long")
	if !errors.Is(c.Failed(os.ErrDeadlineExceeded), os.ErrDeadlineExceeded) {
		t.Error("a timeout is none any more")
	}
	long := c.Failed(errors.New("tls: \x1b" + strings.Repeat("x", 10_000)))
	if says(t, long, "protocol", "?xxx"); len(long.Error()) > 200 {
		t.Errorf("an error has %d bytes", len(long.Error()))
	}
}

func TestWhatIsAskedFor(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		address, sni, name string
		protocol           config.Protocol
		purpose            clienttls.Purpose
		offered            []string
	}{
		{"a.example:443", "", "a.example", config.HTTP1, clienttls.Requests, []string{"http/1.1"}},
		{"a.example:443", "b.example", "b.example", config.HTTP1, clienttls.Upgrades, []string{"http/1.1"}},
		{"10.0.0.1:443", "", "", config.HTTP2, clienttls.Requests, []string{"h2"}},
		{"[::1]:443", "", "", config.HTTP2, clienttls.Upgrades, []string{"http/1.1"}},
		{"10.0.0.1:443", "b.example", "b.example", config.Negotiated, clienttls.Requests, []string{"h2", "http/1.1"}},
		{"unix:/a", "", "", config.Negotiated, clienttls.Upgrades, []string{"http/1.1"}},
		{"a.example:443", "", "a.example", config.HTTP2, clienttls.Bytes, nil},
	} {
		c := newCluster(t, config.ClusterTLS{SNI: tc.sni}, func(o *clienttls.Options) { o.Protocol = tc.protocol })
		p := c.Peer(tc.address)
		cfg, err := p.Config(tc.purpose)
		if err != nil {
			t.Fatal(err)
		}
		if cfg.ServerName != tc.name || !slices.Equal(cfg.NextProtos, tc.offered) || cfg.MinVersion != tls.VersionTLS12 {
			t.Errorf("%+v: asks for %q, and offers %q from version %x", tc, cfg.ServerName, cfg.NextProtos, cfg.MinVersion)
		}
		if again, _ := p.Config(tc.purpose); again != cfg {
			t.Error("there is another one for each handshake")
		}
	}
}

func TestHTTP2IsNotTakenForGranted(t *testing.T) {
	t.Parallel()
	ours := tlstest.NewAuthority(t)
	c := newCluster(t, config.ClusterTLS{CA: ours.File(t.TempDir(), "ca.pem")}, func(o *clienttls.Options) { o.Protocol = config.HTTP2 })
	server := serving(ours.Leaf([]string{"a.example"})) // which knows nothing of ALPN
	_, err, _ := c.shake("a.example:443", server)
	says(t, err, "protocol", "does not speak HTTP/2")
	server.NextProtos = []string{"h2"}
	if _, err, _ := c.shake("a.example:443", server); err != nil {
		t.Error(err)
	}
}

func TestTheCertificateIsShown(t *testing.T) {
	t.Parallel()
	ours, dir := tlstest.NewAuthority(t), t.TempDir()
	var cfg config.ClusterTLS
	cfg.CA = ours.File(dir, "ca.pem")
	cfg.Certificate.Certificate, cfg.Certificate.Key = tlstest.NewAuthority(t).Leaf([]string{"client"}, tlstest.Client(), tlstest.Valid(time.Now().Add(-time.Hour), time.Now().Add(50*time.Hour))).Files(dir, "client")
	c := newCluster(t, cfg)
	server := serving(ours.Leaf([]string{"a.example"}))
	var shown []*x509.Certificate
	server.ClientAuth, server.ClientCAs = tls.RequireAnyClientCert, ours.Pool() // it is shown nevertheless
	server.VerifyConnection = func(s tls.ConnectionState) error { shown = s.PeerCertificates; return nil }
	if _, err, servers := c.shake("a.example:443", server); err != nil || servers != nil {
		t.Fatal(err, servers)
	}
	if len(shown) != 1 || shown[0].DNSNames[0] != "client" {
		t.Errorf("the endpoint was shown %v", shown)
	}
	if got := value(c.all, "holdfast_cluster_tls_certificate_expiry_days"); got != 2 {
		t.Errorf("it expires in %v days, want 2", got)
	}
}

func TestSessionsAreResumedUntilFilesChange(t *testing.T) {
	t.Parallel()
	ours, strangers, dir := tlstest.NewAuthority(t), tlstest.NewAuthority(t), t.TempDir()
	w := filewatch.New(filewatch.Options{})
	c := newCluster(t, config.ClusterTLS{CA: ours.File(dir, "ca.pem")}, func(o *clienttls.Options) { o.Watcher = w })
	p := c.Peer("a.example:443")
	server := serving(ours.Leaf([]string{"a.example"}))
	shake := func() (bool, error) {
		t.Helper()
		cfg, err := p.Config(clienttls.Requests)
		if err != nil {
			t.Fatal(err)
		}
		state, err, _ := c.shakeBy(cfg, server)
		return state.DidResume, err
	}
	for i, want := range []bool{false, true, true} {
		if resumed, err := shake(); err != nil || resumed != want {
			t.Fatalf("handshake %d: resumed %t, error %v", i, resumed, err)
		}
	}
	if full, resumed := value(c.all, "holdfast_cluster_tls_handshakes_total", "kind", "full"), value(c.all, "holdfast_cluster_tls_handshakes_total", "kind", "resumed"); full != 1 || resumed != 2 {
		t.Errorf("%v are full and %v resumed, want 1 and 2", full, resumed)
	}
	strangers.File(dir, "ca.pem")
	w.Read()
	_, err := shake()
	says(t, err, "unknown authority", "")
	if got := value(c.all, "holdfast_cluster_tls_handshake_failures_total", "reason", "unknown authority"); got != 1 {
		t.Errorf("%v failures are counted, want 1", got)
	}
}

// What a certificate is now counts, not what it was when the session was made.
func TestAResumedSessionIsVerifiedAgain(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ours := tlstest.NewAuthority(t)
		chain := ours.Leaf([]string{"a.example"}, tlstest.Valid(time.Now().Add(-time.Hour), time.Now().Add(100*time.Hour)))
		c := newCluster(t, config.ClusterTLS{CA: ours.File(t.TempDir(), "ca.pem")})
		cfg, err := c.Peer("a.example:443").Config(clienttls.Requests)
		if err != nil {
			t.Fatal(err)
		}
		server := serving(chain)
		if _, err, _ := c.shakeBy(cfg, server); err != nil {
			t.Fatal(err)
		}
		if state, err, _ := c.shakeBy(cfg, server); err != nil || !state.DidResume {
			t.Fatal(state.DidResume, err)
		}
		time.Sleep(30 * time.Hour) // the authority has expired
		_, err, _ = c.shakeBy(cfg, server)
		says(t, err, "expired", "an authority of its certificate")
	})
}

func TestFilesAreWatched(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ours, dir := tlstest.NewAuthority(t), t.TempDir()
		var cfg config.ClusterTLS
		cfg.CA = ours.File(dir, "ca.pem")
		first, second := ours.Leaf([]string{"first"}, tlstest.Client()), ours.Leaf([]string{"second"}, tlstest.Client())
		cfg.Certificate.Certificate, cfg.Certificate.Key = first.Files(dir, "client")
		var looked func()
		w := filewatch.New(filewatch.Options{
			Watch:  func(ctx context.Context, _ []string, _ func()) { <-ctx.Done() },
			Looked: func() { looked() },
		})
		c := newCluster(t, cfg, func(o *clienttls.Options) { o.Watcher = w })
		looked = c.Looked
		ctx, stop := context.WithCancel(t.Context())
		over := make(chan struct{})
		go func() { defer close(over); w.Run(ctx) }()
		defer func() { stop(); <-over }()
		shown := func() string {
			t.Helper()
			cfg, err := c.Peer("a.example:443").Config(clienttls.Requests)
			if err != nil {
				t.Fatal(err)
			}
			cert, _ := cfg.GetClientCertificate(nil)
			return cert.Leaf.DNSNames[0]
		}
		after := func(d time.Duration) { time.Sleep(d); synctest.Wait() }
		after(time.Minute)
		tlstest.Write(t, dir, "client.pem", second.CertificatePEM()) // without its key
		after(10 * time.Second)
		if shown() != "first" || c.Problem() == "" || value(c.all, "holdfast_cluster_tls_files_refused_total") != 1 {
			t.Errorf("%s is shown, the problem is %q", shown(), c.Problem())
		}
		if got := c.log.String(); strings.Count(got, "\n") != 1 || !strings.Contains(got, "private key does not match") || !strings.Contains(got, "what they had before holds") {
			t.Errorf("logged %q", got)
		}
		tlstest.Write(t, dir, "client.key", second.KeyPEM())
		after(10 * time.Second)
		if shown() != "second" || c.Problem() != "" {
			t.Errorf("%s is shown, the problem is %q", shown(), c.Problem())
		}
		if err := os.Remove(cfg.CA); err != nil {
			t.Fatal(err)
		}
		after(time.Minute)
		if shown() != "second" || !strings.Contains(c.Problem(), "no such file") {
			t.Errorf("%s is shown, the problem is %q", shown(), c.Problem())
		}

		// Who drains follows the files, and leaves it to others to tell of them.
		lines, refused := strings.Count(c.log.String(), "\n"), value(c.all, "holdfast_cluster_tls_files_refused_total")
		c.Quiet(true)
		ours.File(dir, "ca.pem")
		after(time.Minute)
		if c.Problem() != "" {
			t.Errorf("the problem is still %q", c.Problem())
		}
		tlstest.Write(t, dir, "client.pem", []byte("nonsense"))
		after(time.Minute)
		if got := c.log.String(); c.Problem() == "" || strings.Count(got, "\n") != lines || value(c.all, "holdfast_cluster_tls_files_refused_total") != refused {
			t.Errorf("logged %q", got)
		}
		c.Quiet(false)
		if got := c.log.String(); strings.Count(got, "\n") != lines+1 || value(c.all, "holdfast_cluster_tls_files_refused_total") != refused+1 {
			t.Errorf("when it serves again logged %q", got)
		}
	})
}

func TestFilesOfNoUse(t *testing.T) {
	t.Parallel()
	ours, dir := tlstest.NewAuthority(t), t.TempDir()
	cert, key := ours.Leaf([]string{"a"}).Files(dir, "a")
	_, otherKey := ours.Leaf([]string{"b"}).Files(dir, "b")
	certPEM, err := os.ReadFile(cert)
	if err != nil {
		t.Fatal(err)
	}
	upsideDown := tlstest.Write(t, dir, "upside-down.pem", append(ours.PEM(), certPEM...))
	pair := func(cert, key string) config.ClusterTLS {
		return config.ClusterTLS{Certificate: config.KeyPair{Certificate: cert, Key: key}}
	}
	for _, tc := range []struct {
		name string
		cfg  config.ClusterTLS
		text string
	}{
		{"no CA", config.ClusterTLS{CA: dir + "/none"}, "no such file"},
		{"a directory", config.ClusterTLS{CA: dir}, "not a regular file"},
		{"an empty CA", config.ClusterTLS{CA: tlstest.Write(t, dir, "empty", nil)}, "no certificate in PEM"},
		{"a key as CA", config.ClusterTLS{CA: key}, "something else than certificates"},
		{"a broken CA", config.ClusterTLS{CA: tlstest.Write(t, dir, "broken", []byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"))}, "certificate 1"},
		{"a huge CA", config.ClusterTLS{CA: tlstest.Write(t, dir, "huge", make([]byte, 1<<20+1))}, "more than 1 MiB"},
		{"no key", pair(cert, dir+"/none"), "no such file"},
		{"another's key", pair(cert, otherKey), "private key does not match"},
		{"the wrong way round", pair(key, cert), "PEM"},
		{"the root first", pair(upsideDown, key), "the key is that of certificate 2 of the file, which must be the first"},
		{"two files", config.ClusterTLS{CA: dir + "/none", Certificate: pair(cert, otherKey).Certificate}, "no such file or directory\ncluster \"web\": tls: " + cert},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			_, err := tryCluster(t, tc.cfg)
			if err == nil || !strings.Contains(err.Error(), tc.text) || !strings.Contains(err.Error(), `cluster "web": tls: `) {
				t.Errorf("error is %v, want %q", err, tc.text)
			}
			if err != nil && strings.Contains(err.Error(), "BEGIN") {
				t.Errorf("a file is in the error: %v", err)
			}
			all := &config.Config{Clusters: []config.Cluster{{Name: "plain"}, {Name: "web", TLS: &tc.cfg}}}
			if checked := clienttls.Check(all); checked == nil || err == nil || checked.Error() != err.Error() {
				t.Errorf("the check says %v", checked)
			}
		})
	}
}

// A crash must not take a cluster's neighbours with it.
func TestTheReplacementOfADeadGenerationStartsWithoutFiles(t *testing.T) {
	t.Parallel()
	ours, dir := tlstest.NewAuthority(t), t.TempDir()
	w := filewatch.New(filewatch.Options{})
	c := newCluster(t, config.ClusterTLS{CA: dir + "/ca.pem"}, func(o *clienttls.Options) { o.Urgent, o.Watcher = true, w })
	server := serving(ours.Leaf([]string{"a.example"}))
	_, err, _ := c.shake("a.example:443", server)
	if says(t, err, "files", ""); !clienttls.IsOurs(err) {
		t.Error("an endpoint is to blame")
	}
	ours.File(dir, "ca.pem")
	w.Read()
	if _, err, _ := c.shake("a.example:443", server); err != nil {
		t.Error(err)
	}
}

// What the dead one has used last is used on, and the files when they are of use again.
func TestTheReplacementOfADeadGenerationHasWhatWasKept(t *testing.T) {
	t.Parallel()
	ours, dir, kept := tlstest.NewAuthority(t), t.TempDir(), make(map[string][]byte)
	cfg := config.ClusterTLS{CA: ours.File(dir, "ca.pem")}
	cfg.Certificate.Certificate, cfg.Certificate.Key = ours.Leaf([]string{"us"}, tlstest.Client()).Files(dir, "us")
	newCluster(t, cfg).Keep(kept)
	if len(kept) != 3 {
		t.Fatalf("%d files are kept", len(kept))
	}
	tlstest.Write(t, dir, "us.key", []byte("junk"))
	told := 0
	keeps := func(o *clienttls.Options) { o.Kept, o.Changed = kept, func() { told++ } }
	if _, err := tryCluster(t, cfg, keeps); err == nil {
		t.Error("who is in no hurry takes what was kept")
	}
	w := filewatch.New(filewatch.Options{})
	c := newCluster(t, cfg, keeps, func(o *clienttls.Options) { o.Urgent, o.Watcher = true, w })
	server := serving(ours.Leaf([]string{"a.example"}))
	server.ClientAuth, server.ClientCAs = tls.RequireAndVerifyClientCert, ours.Pool()
	if _, err, servers := c.shake("a.example:443", server); err != nil || servers != nil {
		t.Error(err, servers)
	}
	if c.Problem() == "" || !strings.Contains(c.log.String(), "what they had before holds") || told != 0 {
		t.Errorf("problem %q, told %d times, logged %s", c.Problem(), told, c.log.String())
	}
	ours.Leaf([]string{"us"}, tlstest.Client()).Files(dir, "us")
	w.Read()
	if c.Problem() != "" || told != 1 {
		t.Errorf("problem %q, told %d times", c.Problem(), told)
	}
}

func TestWhoBelievesEverybodyIsWarned(t *testing.T) {
	t.Parallel()
	if c := newCluster(t, config.ClusterTLS{Unverified: true}); !strings.Contains(c.log.String(), "level=WARN") || c.Verifies() {
		t.Errorf("logged %q", c.log.String())
	}
	if c := newCluster(t, config.ClusterTLS{}); c.log.Len() != 0 || !c.Verifies() {
		t.Errorf("logged %q", c.log.String())
	}
}

// value is that of a series of which a label is so.
func value(r *metrics.Registry, name string, label ...string) int64 {
	for _, f := range r.Families() {
		for _, s := range f.Series {
			if f.Desc.Name == name && (len(label) == 0 || s.Labels[slices.Index(f.Desc.Labels, label[0])] == label[1]) {
				return s.Value
			}
		}
	}
	return -1
}

func TestThatTheCertificateOfAClusterExpiresIsSaidOnce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		now := time.Now()
		cert, key := tlstest.NewAuthority(t).Leaf([]string{"us"}, tlstest.Client(), tlstest.Valid(now.Add(-time.Hour), now.Add(time.Hour))).Files(t.TempDir(), "us")
		c := newCluster(t, config.ClusterTLS{Certificate: config.KeyPair{Certificate: cert, Key: key}})
		for said := range 2 {
			c.Looked()
			c.Looked()
			if got := strings.Count(c.log.String(), "has expired"); got != said {
				t.Errorf("said %d times, want %d: %s", got, said, c.log.String())
			}
			time.Sleep(2 * time.Hour)
		}
	})
}
