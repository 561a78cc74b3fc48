// Package clienttls is what a cluster needs to speak TLS to its endpoints: its roots and its
// certificate, which are read again when their files have changed, who is believed to be an
// endpoint, and what is said of one who is not.
//
//	client, err := clienttls.New(clienttls.Options{...})
//	peer := client.Peer("chat.internal:9000")
//	config, err := peer.Config(clienttls.Requests)
//	... a handshake by config, which fails with err
//	err = client.Failed(err)
package clienttls

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"time"

	"holdfast/internal/certfiles"
	"holdfast/internal/config"
	"holdfast/internal/control"
	"holdfast/internal/filewatch"
	"holdfast/internal/metrics"
)

// Options say what a cluster's TLS is made of.
type Options struct {
	Config   *config.ClusterTLS
	Cluster  string // its name
	Protocol config.Protocol
	Log      *slog.Logger      // nil: nothing is logged
	Metrics  *metrics.Registry // nil: nothing is counted

	// Watcher has the files read again when they have changed; nil: nobody has. [Client.Looked] is
	// to be called once in a while.
	Watcher *filewatch.Watcher

	// Urgent has a client come about whose files are of no use: it has no configuration until
	// they are.
	Urgent bool

	// Kept are the contents of files as a dead generation has used them last, by path; see
	// [Client.Keep]. With Urgent they take the place of files that are of no use now.
	Kept map[string][]byte

	// Changed is called whenever files have taken the place of others. nil: nobody wants to know.
	Changed func()
}

// Client is the TLS of one cluster. Its methods may be called by anybody.
type Client struct {
	o       Options
	current atomic.Pointer[content] // what was of use last; replaced as a whole
	problem atomic.Pointer[string]  // for which the files were refused last; nil: none
	quiet   atomic.Bool             // nothing is said of files
	metrics clientMetrics

	expired time.Time // until when the last certificate was good of which it was said. Owned by who calls Looked
}

// content is what files had.
type content struct {
	roots       *x509.CertPool    // nil: the system's
	certificate *tls.Certificate  // nil: none
	files       map[string][]byte // as they were, by path
}

// New reads what the configuration names.
func New(o Options) (*Client, error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	o.Log = o.Log.With(slog.String("cluster", o.Cluster))
	c := &Client{o: o, metrics: newClientMetrics(o.Metrics, o.Cluster, o.Config.Certificate != config.KeyPair{})}
	if o.Config.Unverified {
		o.Log.Warn(`anybody is believed to be an endpoint of the cluster: its tls has verify = "none"`)
	}
	if paths := Paths(o.Config); len(paths) > 0 && o.Watcher != nil {
		o.Watcher.Add(filewatch.Files{Paths: paths, Read: c.read, Refuse: c.refuse, Patience: filewatch.Patience})
	}
	switch all, err := load(o.Config, config.ReadTLS); {
	case err == nil:
		c.current.Store(all)
	case o.Urgent:
		c.refuse(err)
	default:
		return nil, inCluster(o.Cluster, err)
	}
	c.o.Kept = nil
	c.Looked()
	return c, nil
}

// Paths are the files that a configuration names.
func Paths(c *config.ClusterTLS) (paths []string) {
	for _, path := range []string{c.CA, c.Certificate.Certificate, c.Certificate.Key} {
		if path != "" {
			paths = append(paths, path)
		}
	}
	return paths
}

// Check reads the files of all clusters. The error joins one for each cluster whose files are of
// no use.
func Check(cfg *config.Config) error {
	var errs []error
	for i := range cfg.Clusters {
		if c := &cfg.Clusters[i]; c.TLS != nil {
			if _, err := load(c.TLS, config.ReadTLS); err != nil {
				errs = append(errs, inCluster(c.Name, err))
			}
		}
	}
	return errors.Join(errs...)
}

// inCluster says of each error that was joined whose files it is about.
func inCluster(name string, err error) error {
	if all, ok := err.(interface{ Unwrap() []error }); ok {
		var errs []error
		for _, err := range all.Unwrap() {
			errs = append(errs, inCluster(name, err))
		}
		return errors.Join(errs...)
	}
	return fmt.Errorf("cluster %q: tls: %w", name, err)
}

// load has what read returns of the files.
func load(cfg *config.ClusterTLS, from func(path string) ([]byte, error)) (*content, error) {
	all := &content{files: make(map[string][]byte)}
	read := func(path string) (data []byte, err error) {
		data, err = from(path)
		all.files[path] = data
		return data, err
	}
	var errs [2]error
	if cfg.CA != "" {
		all.roots, errs[0] = certfiles.Roots(cfg.CA, read)
	}
	if cfg.Certificate != (config.KeyPair{}) {
		all.certificate, errs[1] = certfiles.Pair(cfg.Certificate, read)
	}
	if err := errors.Join(errs[:]...); err != nil {
		return nil, err
	}
	return all, nil
}

// read reads the files.
func (c *Client) read() (take func(), err error) {
	all, err := load(c.o.Config, config.ReadTLS)
	return func() { c.take(all) }, err
}

// take has what was read hold from now on.
func (c *Client) take(all *content) {
	c.problem.Store(nil)
	c.current.Store(all)
	if !c.quiet.Load() {
		c.o.Log.Info("the files of a cluster's TLS were read again: what they have now holds for new connections")
	}
	if c.o.Changed != nil {
		c.o.Changed()
	}
}

// refuse tells of files that are of no use.
func (c *Client) refuse(err error) {
	problem := err.Error()
	c.problem.Store(&problem)
	if c.o.Urgent && c.o.Kept != nil && c.current.Load() == nil {
		if kept, err := load(c.o.Config, c.kept); err == nil {
			c.current.Store(kept)
		}
	}
	if !c.quiet.Load() {
		c.complain(problem)
	}
}

// Quiet says whether nothing is to be logged and counted of files, which are used as ever: somebody
// else does, as long as a generation drains. When it is over what is wrong with them is said.
func (c *Client) Quiet(on bool) {
	if was := c.quiet.Swap(on); was && !on {
		if problem := c.problem.Load(); problem != nil {
			c.complain(*problem)
		}
	}
}

func (c *Client) complain(err string) {
	c.metrics.refused.Inc()
	if c.current.Load() != nil {
		c.o.Log.Warn("the files of a cluster's TLS are of no use: what they had before holds", "err", err)
	} else {
		c.o.Log.Error("the files of a cluster's TLS are of no use: no endpoint is connected to", "err", err)
	}
}

func (c *Client) kept(path string) ([]byte, error) {
	data, ok := c.o.Kept[path]
	if !ok {
		return nil, errors.New("no copy of it was kept")
	}
	return data, nil
}

// Keep adds to kept, by path, what the files had that holds. There may be a private key among it.
func (c *Client) Keep(kept map[string][]byte) {
	if all := c.current.Load(); all != nil {
		maps.Copy(kept, all.files)
	}
}

// Looked brings up to date what is said of the certificate. It is called by one goroutine at a time.
func (c *Client) Looked() {
	if until, ok := c.Expires(); ok {
		if time.Now().After(until) && !until.Equal(c.expired) {
			c.expired = until
			c.o.Log.Warn("the certificate that a cluster shows its endpoints has expired", "path", c.o.Config.Certificate.Certificate, "expired", until.UTC())
		}
		c.metrics.days.Set(int64(math.Floor(time.Until(until).Hours() / 24)))
	}
}

// Expires says until when the cluster's own certificate is good, if it has one.
func (c *Client) Expires() (until time.Time, ok bool) {
	all := c.current.Load()
	if all == nil || all.certificate == nil {
		return until, false
	}
	return all.certificate.Leaf.NotAfter, true
}

// Certificate says which certificate endpoints are shown, if there is one to be shown.
func (c *Client) Certificate() (d control.Certificate, ok bool) {
	files := c.o.Config.Certificate
	if files == (config.KeyPair{}) {
		return d, false
	}
	if all := c.current.Load(); all != nil && all.certificate != nil {
		d = certfiles.Describe(all.certificate.Leaf)
	}
	d.Cluster, d.File, d.Problem = c.o.Cluster, files.Certificate, c.Problem()
	return d, true
}

// Verifies says whether it is found out who an endpoint is.
func (c *Client) Verifies() bool { return !c.o.Config.Unverified }

// Problem is what was wrong with the files when they were refused last; "": nothing.
func (c *Client) Problem() string {
	if p := c.problem.Load(); p != nil {
		return *p
	}
	return ""
}

// A Purpose is what a connection is for: another protocol is agreed on then.
type Purpose uint8

// The purposes.
const (
	Requests Purpose = iota
	Upgrades         // requests for another protocol, and what else HTTP/1.1 alone is for
	Bytes            // whatever a client says
	numPurposes
)

// protocols are those that are offered, the best first; none: ALPN is not spoken of.
func (c *Client) protocols(p Purpose) []string {
	switch {
	case p == Bytes:
		return nil
	case p == Upgrades || c.o.Protocol == config.HTTP1:
		return []string{http1}
	case c.o.Protocol == config.Negotiated:
		return []string{h2, http1}
	}
	return []string{h2}
}

const (
	h2    = "h2"
	http1 = "http/1.1"
)

// Peer is one endpoint. Its methods may be called by anybody.
type Peer struct {
	client   *Client
	name     string   // that it is asked for by; "": none
	names    []string // of which it must have one
	prepared [numPurposes]atomic.Pointer[prepared]
}

type prepared struct {
	by     *content
	config *tls.Config
}

// Peer returns an endpoint by its address, "host:port" or that of a unix socket.
func (c *Client) Peer(address string) *Peer {
	cfg := c.o.Config
	host := hostOf(address)
	p := &Peer{client: c, name: cfg.SNI, names: cfg.Names}
	if p.name == "" {
		p.name = host
	}
	if len(p.names) == 0 && p.name != "" {
		p.names = []string{p.name}
	}
	if _, err := netip.ParseAddr(p.name); err == nil {
		p.name = "" // nobody is asked for by an address (RFC 6066 §3)
	}
	return p
}

// hostOf is the host of an address, without the dot at the end of one that is complete; "": it has
// none.
func hostOf(address string) string {
	if strings.HasPrefix(address, "unix:") {
		return ""
	}
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return ""
	}
	return strings.TrimSuffix(host, ".")
}

// Config is for the next handshake with the endpoint. It is not to be changed. It fails with an
// [*Error] as long as the cluster's files are of no use.
func (p *Peer) Config(purpose Purpose) (*tls.Config, error) {
	current := p.client.current.Load()
	if current == nil {
		p.client.metrics.failed[ourFiles].Inc()
		return nil, &Error{ourFiles, "the files of the cluster's TLS are of no use"}
	}
	last := p.prepared[purpose].Load()
	if last == nil || last.by != current {
		last = &prepared{current, p.prepare(current, purpose)}
		p.prepared[purpose].Store(last)
	}
	return last.config, nil
}

// versions by their names in the configuration.
var versions = map[string]uint16{"1.2": tls.VersionTLS12, "1.3": tls.VersionTLS13}

func (p *Peer) prepare(by *content, purpose Purpose) *tls.Config {
	c := &tls.Config{
		MinVersion: max(versions[p.client.o.Config.MinVersion], tls.VersionTLS12),
		ServerName: p.name, NextProtos: p.client.protocols(purpose), ClientSessionCache: new(session),

		// Who an endpoint is we find out ourselves: crypto/tls knows of one name, and looks at
		// the certificate of a session that is resumed with less care.
		InsecureSkipVerify: true,
	}
	verifies, h2Only := p.client.Verifies(), len(c.NextProtos) == 1 && c.NextProtos[0] == h2
	c.VerifyConnection = func(s tls.ConnectionState) error {
		if h2Only && s.NegotiatedProtocol != h2 {
			return &Error{badProtocol, "it does not speak HTTP/2"}
		}
		if !verifies {
			return nil
		}
		return verify(s.PeerCertificates, by.roots, p.names, time.Now())
	}
	if by.certificate != nil {
		c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return by.certificate, nil // whatever authorities it says that it knows
		}
	}
	return c
}

// session is the last one with an endpoint. It implements [tls.ClientSessionCache].
type session struct {
	last atomic.Pointer[tls.ClientSessionState]
}

func (s *session) Get(string) (*tls.ClientSessionState, bool) {
	last := s.last.Load()
	return last, last != nil
}

func (s *session) Put(_ string, state *tls.ClientSessionState) { s.last.Store(state) }
