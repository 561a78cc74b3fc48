package servertls_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/metrics"
	"holdfast/internal/servertls"
	"holdfast/internal/tlstest"
)

// deaf hears nothing of the kernel, so that time may be virtual.
func deaf(ctx context.Context, _ []string, _ func()) { <-ctx.Done() }

// served is a listener's TLS.
type served struct {
	*servertls.Server
	t      *testing.T
	counts *metrics.Registry
	said   *words
}

// words is a log.
type words struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (w *words) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.buf.Write(p)
}

func (w *words) String() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.buf.String()
}

func options(c *config.ListenerTLS) (servertls.Options, *words) {
	said := new(words)
	if c.MinVersion == 0 {
		c.MinVersion = config.TLS12
	}
	return servertls.Options{
		Config: c, Listener: "public", Log: slog.New(slog.NewTextHandler(said, nil)), Metrics: metrics.NewRegistry(), Watch: deaf,
	}, said
}

func serve(t *testing.T, c *config.ListenerTLS) *served {
	t.Helper()
	o, said := options(c)
	s, err := servertls.New(o)
	if err != nil {
		t.Fatal(err)
	}
	s.Run()
	t.Cleanup(s.Close)
	return &served{s, t, o.Metrics, said}
}

// shake has a client and the server agree.
func (s *served) shake(client *tls.Config) (state tls.ConnectionState, clientErr, serverErr error) {
	a, b := connected(s.t) // net.Pipe has no buffers: both sides may write at the same time
	server := tls.Server(b, s.Config())
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer b.Close()
		if serverErr = server.Handshake(); serverErr == nil {
			_, serverErr = server.Write([]byte("hello")) // the client has read the tickets then
		}
	}()
	c := tls.Client(a, client)
	if clientErr = c.Handshake(); clientErr == nil {
		_, clientErr = c.Read(make([]byte, 5))
	}
	a.Close()
	<-done
	return c.ConnectionState(), clientErr, serverErr
}

// connected returns both ends of a connection.
func connected(t *testing.T) (a, b net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if a, err = net.Dial("tcp", l.Addr().String()); err == nil {
		b, err = l.Accept()
	}
	if err != nil {
		t.Fatal(err)
	}
	return a, b
}

// leaf is the serial number of the certificate that a client gets.
func (s *served) leaf(client *tls.Config) string {
	s.t.Helper()
	client.InsecureSkipVerify = true
	state, err, _ := s.shake(client)
	if err != nil {
		return err.Error()
	}
	return state.PeerCertificates[0].SerialNumber.String()
}

func serial(l *tlstest.Leaf) string { return l.Certificate.Leaf.SerialNumber.String() }

func (s *served) count(name string, labels ...string) int64 {
	for _, f := range s.counts.Families() {
		for _, v := range f.Series {
			if f.Desc.Name == "holdfast_downstream_tls_"+name && strings.Join(v.Labels[1:], ",") == strings.Join(labels, ",") {
				return v.Value
			}
		}
	}
	s.t.Errorf("no series %s of %q", name, labels)
	return 0
}

func keyPair(t *testing.T, dir, name string, l *tlstest.Leaf) config.KeyPair {
	cert, key := l.Files(dir, name)
	return config.KeyPair{Certificate: cert, Key: key}
}

func TestTheCertificateIsChosenByTheServerThatIsAskedFor(t *testing.T) {
	t.Parallel()
	dir, a := t.TempDir(), tlstest.NewAuthority(t)
	leaves := map[string]*tlstest.Leaf{
		"first":     a.Leaf([]string{"first.example"}),
		"exact":     a.Leaf([]string{"A.example", "www.b.example"}),
		"wild":      a.Leaf([]string{"*.example", "*.b.example"}),
		"both":      a.Leaf([]string{"both.test"}),
		"both-rsa":  a.Leaf([]string{"both.test"}, tlstest.RSA()),
		"twice":     a.Leaf([]string{"a.example"}),
		"common":    a.Leaf(nil, tlstest.CommonName("common.test")),
		"first-rsa": a.Leaf([]string{"first.example"}, tlstest.RSA()),
	}
	c := new(config.ListenerTLS)
	for _, name := range []string{"first", "exact", "wild", "both-rsa", "both", "twice", "common", "first-rsa"} {
		c.Certificates = append(c.Certificates, keyPair(t, dir, name, leaves[name]))
	}
	s := serve(t, c)
	strictly := *c
	strictly.StrictSNI = true
	strict := serve(t, &strictly)
	// What a client of TLS 1.2 understands, it says by its suites.
	onlyRSA := []uint16{tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256}
	for _, tc := range []struct {
		name, server string
		suites       []uint16
		want         string
		refused      bool // with strict_sni
	}{
		{"an exact name", "a.example", nil, "exact", false},
		{"in another case", "A.EXAMPLE", nil, "exact", false},
		{"an exact name before a wildcard", "www.b.example", nil, "exact", false},
		{"a wildcard", "c.b.example", nil, "wild", false},
		{"a wildcard is one label", "d.c.b.example", nil, "first", true},
		{"a wildcard is not none", "b.example", nil, "wild", false},
		{"a wildcard is not none, really", "example", nil, "first", true},
		{"another", "other.test", nil, "first", true},
		{"none", "", nil, "first", true},
		{"ECDSA before RSA", "both.test", nil, "both", false},
		{"RSA for who knows nothing else", "both.test", onlyRSA, "both-rsa", false},
		{"a common name means nothing", "common.test", nil, "first", true},
		{"the fallback by what is understood", "other.test", onlyRSA, "first-rsa", true},
		{"nothing that is understood", "a.example", onlyRSA, "handshake failure", true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			client := &tls.Config{ServerName: tc.server}
			if tc.suites != nil {
				client.CipherSuites, client.MaxVersion = tc.suites, tls.VersionTLS12
			}
			want := tc.want
			if l := leaves[want]; l != nil {
				want = serial(l)
			}
			if got := s.leaf(client.Clone()); !strings.Contains(got, want) {
				t.Errorf("got %s, want %s", got, want)
			}
			if got := strict.leaf(client.Clone()); strings.Contains(got, "unrecognized name") != tc.refused && tc.want != "handshake failure" {
				t.Errorf("with strict_sni got %s", got)
			}
		})
	}
}

func TestOnlyGoodVersionsAndSuitesAreSpoken(t *testing.T) {
	t.Parallel()
	dir, a := t.TempDir(), tlstest.NewAuthority(t)
	pair := keyPair(t, dir, "rsa", a.Leaf([]string{"a.example"}, tlstest.RSA()))
	s := serve(t, &config.ListenerTLS{Certificates: []config.KeyPair{pair}})
	newer := serve(t, &config.ListenerTLS{Certificates: []config.KeyPair{pair}, MinVersion: config.TLS13})
	for _, tc := range []struct {
		name   string
		server *served
		client *tls.Config
		ok     bool
	}{
		{"1.1", s, &tls.Config{MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11}, false},
		{"1.2", s, &tls.Config{MaxVersion: tls.VersionTLS12}, true},
		{"1.3", s, &tls.Config{MinVersion: tls.VersionTLS13}, true},
		{"1.2 with min_version 1.3", newer, &tls.Config{MaxVersion: tls.VersionTLS12}, false},
		{"1.3 with min_version 1.3", newer, &tls.Config{}, true},
		{"without forward secrecy", s, &tls.Config{MaxVersion: tls.VersionTLS12, CipherSuites: []uint16{tls.TLS_RSA_WITH_AES_128_GCM_SHA256}}, false},
		{"CBC", s, &tls.Config{MaxVersion: tls.VersionTLS12, CipherSuites: []uint16{tls.TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA, tls.TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA256}}, false},
	} {
		tc.client.InsecureSkipVerify = true
		if _, err, _ := tc.server.shake(tc.client); (err == nil) != tc.ok {
			t.Errorf("%s: %v", tc.name, err)
		}
	}
}

func TestFilesOfNoUseAreRefusedAtLoad(t *testing.T) {
	t.Parallel()
	dir, a := t.TempDir(), tlstest.NewAuthority(t)
	one := keyPair(t, dir, "one", a.Leaf([]string{"a.example"}))
	other := keyPair(t, dir, "other", a.Leaf([]string{"a.example"}))
	encrypted := tlstest.Write(t, dir, "encrypted.key", []byte("-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n"))
	empty := tlstest.Write(t, dir, "empty", nil)
	first := a.Leaf([]string{"a.example"})
	upsideDown := tlstest.Write(t, dir, "upside-down", append(a.PEM(), first.CertificatePEM()...))
	large := tlstest.Write(t, dir, "large", bytes.Repeat([]byte("\n"), 1<<20+1))
	for _, tc := range []struct {
		name, cert, key, ca, want string
	}{
		{"no certificate", filepath.Join(dir, "none"), one.Key, "", "no such file"},
		{"no key", one.Certificate, filepath.Join(dir, "none"), "", "no such file"},
		{"another key", one.Certificate, other.Key, "", "private key does not match public key"},
		{"the root first", upsideDown, tlstest.Write(t, dir, "first.key", first.KeyPEM()), "", "the key is that of certificate 2 of the file, which must be the first"},
		{"the key as certificate", one.Key, one.Key, "", "with key " + one.Key},
		{"encrypted", one.Certificate, encrypted, "", "the key is encrypted"},
		{"empty", empty, one.Key, "", "failed to find"},
		{"large", large, one.Key, "", "more than 1 MiB"},
		{"a directory", dir, one.Key, "", "not a regular file"},
		{"an empty CA", one.Certificate, one.Key, empty, "no certificate in PEM"},
		{"a key as CA", one.Certificate, one.Key, one.Key, "something else than certificates"},
	} {
		c := &config.ListenerTLS{Certificates: []config.KeyPair{{Certificate: tc.cert, Key: tc.key}}, ClientCA: tc.ca}
		o, _ := options(c)
		_, err := servertls.New(o)
		checked := servertls.Check(&config.Config{HTTPListeners: []config.Listener{{Name: "public", TLS: c}}})
		if err == nil || !strings.Contains(err.Error(), tc.want) || !strings.HasPrefix(err.Error(), `listener "public": /`) {
			t.Errorf("%s: %v", tc.name, err)
		}
		if fmt.Sprint(checked) != fmt.Sprint(err) {
			t.Errorf("%s: the check says %v", tc.name, checked)
		}
	}
}

// An intermediate may expire before the leaf does, and is of no less use to clients.
func TestTheFirstOfAFilesCertificatesThatExpiresCounts(t *testing.T) {
	t.Parallel()
	dir, a := t.TempDir(), tlstest.NewAuthority(t)
	now := time.Now()
	leaf := a.Leaf([]string{"a.example"}, tlstest.Valid(now, now.Add(20*24*time.Hour+time.Hour)))
	other := a.Leaf([]string{"intermediate"}, tlstest.Valid(now, now.Add(3*24*time.Hour+time.Hour)))
	pair := keyPair(t, dir, "a", leaf)
	tlstest.Write(t, dir, "a.pem", append(leaf.CertificatePEM(), other.CertificatePEM()...))
	s := serve(t, &config.ListenerTLS{Certificates: []config.KeyPair{pair}})
	if got := s.count("certificate_expiry_days", pair.Certificate); got != 3 {
		t.Errorf("the file expires in %d days", got)
	}
}

func TestWhatWorksAndIsHardlyWantedIsLogged(t *testing.T) {
	t.Parallel()
	dir, a := t.TempDir(), tlstest.NewAuthority(t)
	now := time.Now()
	s := serve(t, &config.ListenerTLS{
		Certificates: []config.KeyPair{
			keyPair(t, dir, "old", a.Leaf([]string{"old.example"}, tlstest.Valid(now.Add(-48*time.Hour), now.Add(-25*time.Hour)))),
			keyPair(t, dir, "new", a.Leaf([]string{"new.example"}, tlstest.Valid(now.Add(time.Hour), now.Add(73*time.Hour)))),
			keyPair(t, dir, "cn", a.Leaf(nil, tlstest.CommonName("a.example"))),
		},
		KeyLog: filepath.Join(dir, "keys"),
	})
	for _, want := range []string{"has expired", "not valid yet", "has no DNS name", "THE SECRETS OF ALL CONNECTIONS"} {
		if strings.Count(s.said.String(), want) != 1 {
			t.Errorf("%q is not said once in\n%s", want, s.said)
		}
	}
	if got := s.count("certificate_expiry_days", filepath.Join(dir, "old.pem")); got != -2 {
		t.Errorf("the old one expires in %d days", got)
	}
	if got := s.count("certificate_expiry_days", filepath.Join(dir, "new.pem")); got != 3 {
		t.Errorf("the new one expires in %d days", got)
	}
	if got := s.count("key_log"); got != 1 {
		t.Errorf("the key log is %d", got)
	}
	if _, err, _ := s.shake(&tls.Config{InsecureSkipVerify: true}); err != nil {
		t.Error(err)
	}
	written, err := os.ReadFile(filepath.Join(dir, "keys"))
	info, err2 := os.Stat(filepath.Join(dir, "keys"))
	if err = errors.Join(err, err2); err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(written, []byte("CLIENT_TRAFFIC_SECRET_0")) || info.Mode().Perm() != 0o600 {
		t.Errorf("the key log has mode %v and\n%s", info.Mode(), written)
	}
	open := tlstest.Write(t, dir, "open", nil)
	o, _ := options(&config.ListenerTLS{Certificates: []config.KeyPair{keyPair(t, dir, "a", a.Leaf(nil))}, KeyLog: open})
	if _, err := servertls.New(o); err == nil || !strings.Contains(err.Error(), "others may read it") {
		t.Errorf("a key log that others may read: %v", err)
	}
}

func TestClientsShowWhoTheyAre(t *testing.T) {
	t.Parallel()
	dir, a, other := t.TempDir(), tlstest.NewAuthority(t), tlstest.NewAuthority(t)
	pair := keyPair(t, dir, "a", a.Leaf([]string{"a.example"}))
	ca := a.File(dir, "ca.pem")
	names := []config.ClientName{
		{Kind: "dns", Text: "app.example"}, {Kind: "dns", Text: "*.pods.example"}, {Kind: "uri", Text: "spiffe://example/app"},
		{Kind: "email", Text: "ops@example.com"}, {Kind: "ip", Text: "10.0.0.1"},
	}
	now := time.Now()
	client := func(by *tlstest.Authority, names ...string) *tlstest.Leaf { return by.Leaf(names, tlstest.Client()) }
	for _, tc := range []struct {
		name      string
		shown     *tlstest.Leaf
		required  string // what the server says: "" for nothing
		optional  string
		withNames string // required, with names
	}{
		{"nothing", nil, "didn't provide a certificate", "", "didn't provide a certificate"},
		{"a good one", client(a, "app.example"), "", "", ""},
		{"in another case", client(a, "APP.example"), "", "", ""},
		{"another name", client(a, "app.example.com"), "", "", "none of the names"},
		{"one label", client(a, "x.pods.example"), "", "", ""},
		{"no label", client(a, "pods.example"), "", "", "none of the names"},
		{"two labels", client(a, "y.x.pods.example"), "", "", "none of the names"},
		{"a URI", client(a, "spiffe://example/app"), "", "", ""},
		{"a longer URI", client(a, "spiffe://example/app2"), "", "", "none of the names"},
		{"mail", client(a, "ops@EXAMPLE.com"), "", "", ""},
		{"another's mail", client(a, "OPS@example.com"), "", "", "none of the names"},
		{"an address", client(a, "10.0.0.1"), "", "", ""},
		{"another address", client(a, "10.0.0.2"), "", "", "none of the names"},
		{"a name of another kind", client(a, "10.0.0.2", "spiffe://app.example/"), "", "", "none of the names"},
		{"a common name", a.Leaf(nil, tlstest.Client(), tlstest.CommonName("app.example")), "", "", "none of the names"},
		{"signed by another", client(other, "app.example"), "unknown authority", "unknown authority", "unknown authority"},
		{"expired", a.Leaf([]string{"app.example"}, tlstest.Client(), tlstest.Valid(now.Add(-2*time.Hour), now.Add(-time.Hour))), "expired", "expired", "expired"},
		{"one for servers", a.Leaf([]string{"app.example"}), "incompatible key usage", "incompatible key usage", "incompatible key usage"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			for _, mode := range []struct {
				config.ListenerTLS
				want string
			}{
				{config.ListenerTLS{ClientCertificates: config.ClientCertificatesRequired}, tc.required},
				{config.ListenerTLS{ClientCertificates: config.ClientCertificatesOptional}, tc.optional},
				{config.ListenerTLS{ClientCertificates: config.ClientCertificatesRequired, ClientNames: names}, tc.withNames},
			} {
				c := mode.ListenerTLS
				c.Certificates, c.ClientCA = []config.KeyPair{pair}, ca
				s := serve(t, &c)
				for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
					conf := &tls.Config{InsecureSkipVerify: true, MaxVersion: version}
					if tc.shown != nil {
						conf.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &tc.shown.Certificate, nil }
					}
					_, clientErr, err := s.shake(conf)
					if mode.want == "" && (err != nil || clientErr != nil) || mode.want != "" && (err == nil || !strings.Contains(err.Error(), mode.want)) {
						t.Errorf("mode %d, version %x: server %v, client %v; want %q", c.ClientCertificates, version, err, clientErr, mode.want)
					}
				}
			}
		})
	}
}

func TestFilesAreSwappedAndTheOldOnesServeOnWhereTheNewAreOfNoUse(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		dir, a := t.TempDir(), tlstest.NewAuthority(t)
		first, second, third := a.Leaf([]string{"a.example"}), a.Leaf([]string{"a.example"}), a.Leaf([]string{"a.example"})
		pair := keyPair(t, dir, "a", first)
		s := serve(t, &config.ListenerTLS{Certificates: []config.KeyPair{pair}})
		s.SetTicketKeys([][32]byte{{1}})
		client := &tls.Config{ServerName: "a.example", ClientSessionCache: tls.NewLRUClientSessionCache(1)}
		if got := s.leaf(client); got != serial(first) {
			t.Fatalf("got %s", got)
		}
		wait := func() { time.Sleep(6 * time.Second); synctest.Wait() }
		wait()

		before := s.Config()
		second.Files(dir, "a")
		wait()
		if got := s.leaf(&tls.Config{ServerName: "a.example"}); got != serial(second) {
			t.Errorf("after the swap got %s, want %s", got, serial(second))
		}
		if s.Config() == before {
			t.Error("a configuration was changed in its place")
		}
		if n := s.count("file_updates_total", pair.Certificate); n != 1 {
			t.Errorf("%d swaps were counted", n)
		}
		client.InsecureSkipVerify = true
		if state, err, _ := s.shake(client); err != nil || !state.DidResume {
			t.Errorf("a session of before the swap is not resumed: %v", err)
		}

		tlstest.Write(t, dir, "a.pem", third.CertificatePEM()) // its key does not come
		wait()
		if s.count("files_refused") != 0 || s.count("file_failures_total", pair.Certificate) != 0 {
			t.Error("it was refused before its key could come")
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if got := s.leaf(&tls.Config{}); got != serial(second) {
			t.Errorf("after a bad replacement got %s, want %s", got, serial(second))
		}
		if s.count("files_refused") != 1 || s.count("file_failures_total", pair.Certificate) != 1 || !strings.Contains(s.said.String(), "private key does not match") {
			t.Errorf("it was not refused:\n%s", s.said)
		}
		third.Files(dir, "a")
		wait()
		if got := s.leaf(&tls.Config{}); got != serial(third) {
			t.Errorf("when its key has come got %s, want %s", got, serial(third))
		}
		if s.count("files_refused") != 0 {
			t.Error("it is still refused")
		}
		if strings.Contains(s.said.String(), "PRIVATE") {
			t.Error("the log has a key")
		}
	})
}

func TestFilesAreLeftAloneWhileNobodyConnects(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		dir, a := t.TempDir(), tlstest.NewAuthority(t)
		first, second := a.Leaf([]string{"a.example"}), a.Leaf([]string{"a.example"})
		pair := keyPair(t, dir, "a", first)
		s := serve(t, &config.ListenerTLS{Certificates: []config.KeyPair{pair}})
		wait := func() { time.Sleep(time.Minute); synctest.Wait() }
		s.Pause(true)
		tlstest.Write(t, dir, "a.pem", second.CertificatePEM()) // without its key
		wait()
		if said := s.said.String(); said != "" || s.count("file_failures_total", pair.Certificate) != 0 {
			t.Errorf("it says\n%s", said)
		}
		second.Files(dir, "a")
		wait()
		if got := s.leaf(&tls.Config{}); got != serial(first) || s.count("file_updates_total", pair.Certificate) != 0 {
			t.Error("it has looked at its files")
		}
		s.Pause(false)
		time.Sleep(time.Second) // which is less than files are left alone for otherwise
		synctest.Wait()
		if got := s.leaf(&tls.Config{}); got != serial(second) {
			t.Errorf("then got %s, want %s", got, serial(second))
		}
	})
}

func TestNamesThatNoCertificateIsForAnyMoreAreSaid(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		dir, a := t.TempDir(), tlstest.NewAuthority(t)
		many := []string{"a.example"}
		for i := range 20 {
			many = append(many, fmt.Sprintf("n%d.example", i))
		}
		s := serve(t, &config.ListenerTLS{Certificates: []config.KeyPair{
			keyPair(t, dir, "a", a.Leaf([]string{"a.example", "*.a.example", "B.example", "x.c.example"})),
			keyPair(t, dir, "b", a.Leaf([]string{"b.example", "*.c.example"})),
		}})
		lines := 0
		for _, step := range []struct {
			names []string
			lost  string
		}{
			{[]string{"a.example", "*.a.example", "more.example"}, ""}, // others are for the rest
			{many, `names="[*.a.example more.example]"`},
			{[]string{"z.example"}, "n8.example and 11 more]"},
		} {
			a.Leaf(step.names).Files(dir, "a")
			time.Sleep(time.Minute)
			synctest.Wait()
			if step.lost != "" {
				lines++
			}
			if said := s.said.String(); strings.Count(said, "no certificate is for these any more") != lines || !strings.Contains(said, step.lost) {
				t.Errorf("after %v it says\n%s", step.names, said)
			}
		}
	})
}

func TestATicketDoesNotOutliveThatItsClientMayConnect(t *testing.T) {
	t.Parallel()
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		t.Run(tls.VersionName(version), func(t *testing.T) {
			t.Parallel()
			dir, a, b := t.TempDir(), tlstest.NewAuthority(t), tlstest.NewAuthority(t)
			pair := keyPair(t, dir, "a", a.Leaf([]string{"a.example"}))
			shown := a.Leaf([]string{"app.example"}, tlstest.Client())
			config2 := func(ca *tlstest.Authority, name string, mode config.ClientCertificates) *served {
				s := serve(t, &config.ListenerTLS{
					Certificates: []config.KeyPair{pair}, ClientCertificates: mode, ClientCA: ca.File(t.TempDir(), "ca.pem"),
					ClientNames: []config.ClientName{{Kind: "dns", Text: name}},
				})
				s.SetTicketKeys([][32]byte{{1}})
				return s
			}
			same := config2(a, "app.example", config.ClientCertificatesRequired)
			others := map[string]*served{
				"another name":              config2(a, "b.example", config.ClientCertificatesRequired),
				"another name, if any":      config2(a, "b.example", config.ClientCertificatesOptional),
				"another authority":         config2(b, "app.example", config.ClientCertificatesRequired),
				"another authority, if any": config2(b, "app.example", config.ClientCertificatesOptional),
			}
			for name, other := range others {
				client := &tls.Config{
					ServerName: "a.example", RootCAs: a.Pool(), MaxVersion: version, Certificates: []tls.Certificate{shown.Certificate},
					ClientSessionCache: tls.NewLRUClientSessionCache(1),
				}
				if _, err, _ := same.shake(client); err != nil {
					t.Fatal(err)
				}
				if state, err, _ := same.shake(client); err != nil || !state.DidResume {
					t.Fatalf("where nothing has changed it is not resumed: %v", err)
				}
				client.Certificates = nil // all it has is its ticket
				state, err, serverErr := other.shake(client)
				if serverErr == nil && state.DidResume {
					t.Errorf("%s: the ticket lets it in", name)
				}
				if serverErr == nil && !strings.HasSuffix(name, "if any") {
					t.Errorf("%s: it came in: %v", name, err)
				}
			}
		})
	}
}

func TestWhoSignsClientsIsSwapped(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		dir, a, b := t.TempDir(), tlstest.NewAuthority(t), tlstest.NewAuthority(t)
		ca := a.File(dir, "ca.pem")
		s := serve(t, &config.ListenerTLS{
			Certificates: []config.KeyPair{keyPair(t, dir, "a", a.Leaf([]string{"a.example"}))}, ClientCertificates: config.ClientCertificatesRequired, ClientCA: ca,
		})
		comesIn := func(by *tlstest.Authority) bool {
			shown := by.Leaf([]string{"app.example"}, tlstest.Client()).Certificate
			_, _, err := s.shake(&tls.Config{InsecureSkipVerify: true, GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &shown, nil }})
			return err == nil
		}
		if !comesIn(a) || comesIn(b) {
			t.Error("before the swap the wrong one comes in")
		}
		time.Sleep(6 * time.Second)
		b.File(dir, "ca.pem")
		time.Sleep(6 * time.Second)
		synctest.Wait()
		if comesIn(a) || !comesIn(b) {
			t.Error("after the swap the wrong one comes in")
		}
		tlstest.Write(t, dir, "ca.pem", []byte("nothing"))
		time.Sleep(time.Minute)
		synctest.Wait()
		if comesIn(a) || !comesIn(b) || s.count("files_refused") != 1 {
			t.Error("a file of no use has changed something, or is not refused")
		}
	})
}

func TestAGenerationInTheirPlaceBeginsWithWhatADeadOneServed(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		dir, a := t.TempDir(), tlstest.NewAuthority(t)
		first, rsa, next := a.Leaf([]string{"a.example"}), a.Leaf([]string{"b.example"}, tlstest.RSA()), a.Leaf([]string{"a.example"})
		c := &config.ListenerTLS{
			Certificates: []config.KeyPair{keyPair(t, dir, "a", first), keyPair(t, dir, "b", rsa)}, MinVersion: config.TLS12,
			ClientCertificates: config.ClientCertificatesOptional, ClientCA: a.File(dir, "ca.pem"),
		}
		kept := map[string][]byte{}
		if err := serve(t, c).Keep(kept); err != nil {
			t.Fatal(err)
		}
		tlstest.Write(t, dir, "a.pem", []byte("broken"))
		for _, gone := range []string{"b.key", "ca.pem"} {
			if err := os.Remove(filepath.Join(dir, gone)); err != nil {
				t.Fatal(err)
			}
		}
		o, said := options(c)
		if _, err := servertls.New(o); err == nil {
			t.Error("without a copy it was made of broken files")
		}
		o.Kept = kept
		server, err := servertls.New(o)
		if err != nil {
			t.Fatal(err)
		}
		server.Run()
		t.Cleanup(server.Close)
		s := &served{server, t, o.Metrics, said}
		if got := s.leaf(&tls.Config{ServerName: "a.example"}); got != serial(first) {
			t.Errorf("got %s, want %s", got, serial(first))
		}
		if got := s.leaf(&tls.Config{ServerName: "b.example"}); got != serial(rsa) {
			t.Errorf("got %s, want %s", got, serial(rsa))
		}
		if n := s.count("files_refused"); n != 3 {
			t.Errorf("%d files are refused, want 3", n)
		}
		time.Sleep(6 * time.Second)
		next.Files(dir, "a")
		time.Sleep(6 * time.Second)
		synctest.Wait()
		if got := s.leaf(&tls.Config{ServerName: "a.example"}); got != serial(next) {
			t.Errorf("when the file is mended got %s, want %s", got, serial(next))
		}
		again := map[string][]byte{}
		if err := s.Keep(again); err != nil || bytes.Equal(again[c.Certificates[0].Certificate], kept[c.Certificates[0].Certificate]) || len(again) != 5 {
			t.Errorf("what is kept is not what is served now: %v", err)
		}
	})
}

// A certificate that nobody renews expires while it is served, long after what was said at the start.
func TestThatACertificateExpiresIsSaidOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, dir, now := tlstest.NewAuthority(t), t.TempDir(), time.Now()
		cert, key := a.Leaf([]string{"a.test"}, tlstest.Valid(now.Add(-time.Hour), now.Add(time.Hour))).Files(dir, "a")
		s := serve(t, &config.ListenerTLS{Certificates: []config.KeyPair{{Certificate: cert, Key: key}}})
		defer s.Close()
		want := func(n int) {
			t.Helper()
			if got := strings.Count(s.said.String(), "a certificate has expired"); got != n {
				t.Errorf("said %d times, want %d:\n%s", got, n, s.said)
			}
		}
		time.Sleep(59 * time.Minute)
		want(0)
		time.Sleep(time.Hour)
		want(1)
		a.Leaf([]string{"a.test"}, tlstest.Valid(now.Add(-time.Hour), now.Add(90*time.Minute))).Files(dir, "a") // expired as well
		time.Sleep(time.Minute)
		want(2)
	})
}
