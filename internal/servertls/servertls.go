// Package servertls is what a listener needs to speak TLS: its certificates, chosen by the server
// that a client asks for, and who may connect by the client's own certificate. Files are watched,
// and what they say holds from the next handshake on:
//
//	s, err := servertls.New(servertls.Options{Config: cfg.TLS, Listener: cfg.Name, Log: log, Metrics: registry})
//	s.Run()
//	defer s.Close()
//	conn.Handshake(t, s.Config(), true)
package servertls

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/filewatch"
	"holdfast/internal/metrics"
)

// Options say what a listener's TLS is made of.
type Options struct {
	Config    *config.ListenerTLS
	Listener  string       // its name
	Protocols []string     // for ALPN, the best first
	NoTickets bool         // sessions are not resumed
	Log       *slog.Logger // knows the listener
	Metrics   *metrics.Registry

	// Kept are the contents of files as a dead generation has used them last, by path; see
	// [Server.Keep]. They take the place of files that are of no use now. nil: there are none, and
	// files must be right.
	Kept map[string][]byte

	// Changed is called whenever files have taken the place of others, so that what Keep says is
	// another. nil: nobody wants to know.
	Changed func()

	// Watch is [filewatch.Options.Watch].
	Watch func(ctx context.Context, directories []string, tell func())
}

// Server is the TLS of one listener. Its methods may be called by anybody.
type Server struct {
	o       Options
	names   *clientNames // nil: any will do
	keyLog  *os.File     // nil: off
	counts  counts
	config  atomic.Pointer[tls.Config]
	watcher *filewatch.Watcher
	paused  atomic.Bool
	cancel  context.CancelFunc
	work    sync.WaitGroup

	mu      sync.Mutex       // guards what follows, and stores to config
	pairs   []*pair          // aligned with the configuration's
	expired []bool           // of which pairs it was said that they have
	clients *authorities     // nil: clients are asked for nothing
	keys    [][32]byte       // of tickets; nil: crypto/tls makes its own
	refused map[string]error // why files are of no use as they are now, by path
}

// New reads what the configuration names. The error joins one for each file that is of no use.
func New(o Options) (*Server, error) {
	s := &Server{o: o, names: newClientNames(o.Config.ClientNames), counts: newCounts(o.Metrics, o.Listener, o.Config), refused: make(map[string]error), cancel: func() {}}
	s.watcher = filewatch.New(filewatch.Options{Watch: o.Watch, Paused: s.paused.Load, Looked: s.sample})
	s.addFiles()
	if err := s.read(); err != nil {
		return nil, err
	}
	if err := s.openKeyLog(); err != nil {
		return nil, fmt.Errorf("listener %q: key log: %w", o.Listener, err)
	}
	s.o.Kept, s.expired = nil, make([]bool, len(s.pairs))
	s.remark()
	s.swapLocked()
	s.sample()
	return s, nil
}

// Check reads what the configuration names, and says what is wrong with it.
func Check(cfg *config.Config) error {
	var errs []error
	for _, l := range cfg.HTTPListeners {
		if l.TLS != nil {
			s := &Server{o: Options{Config: l.TLS, Listener: l.Name}}
			errs = append(errs, s.read())
		}
	}
	return errors.Join(errs...)
}

// Run begins to watch the files.
func (s *Server) Run() {
	ctx, cancel := context.WithCancel(context.Background())
	s.cancel = cancel
	s.work.Go(func() { s.watcher.Run(ctx) })
}

// Pause says whether the files are left alone for now: nobody connects. When somebody does again,
// they are looked at at once.
func (s *Server) Pause(on bool) {
	s.paused.Store(on)
	if !on {
		s.watcher.Look()
	}
}

// Close ends what goes on in the background, and waits for that. No handshake begins or goes on
// after it.
func (s *Server) Close() {
	s.cancel()
	s.work.Wait()
	if s.keyLog != nil {
		_ = s.keyLog.Close() // each line was written as it came
	}
}

// Config is for handshakes. It is not to be changed, and stays as it is: who begins a handshake
// asks for it.
func (s *Server) Config() *tls.Config { return s.config.Load() }

// SetTicketKeys says which keys session tickets are made with (the first) and understood with
// (all). Until it is called each change of a file makes the tickets so far useless.
func (s *Server) SetTicketKeys(keys [][32]byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.keys = keys
	s.swapLocked()
}

// Keep adds to kept, by path, what the files would have to hold for what is served now. There are
// private keys among it.
func (s *Server) Keep(kept map[string][]byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, c := range s.o.Config.Certificates {
		certificate, key, err := s.pairs[i].encode()
		if err != nil {
			return fmt.Errorf("listener %q: %w", s.o.Listener, err)
		}
		kept[c.Certificate], kept[c.Key] = certificate, key
	}
	if s.clients != nil {
		kept[s.o.Config.ClientCA] = s.clients.encode()
	}
	return nil
}

// addFiles has the files watched.
func (s *Server) addFiles() {
	add := func(read func() (func(), error), path string, more ...string) {
		refuse := func(err error) { s.refuse(path, err) }
		s.watcher.Add(filewatch.Files{Paths: append(more, path), Read: read, Refuse: refuse, Patience: filewatch.Patience})
	}
	for i, c := range s.o.Config.Certificates {
		add(func() (func(), error) { return s.readPair(i) }, c.Certificate, c.Key)
	}
	if ca := s.o.Config.ClientCA; ca != "" {
		add(s.readClients, ca)
	}
}

// read reads all files for the first time.
func (s *Server) read() error {
	var errs []error
	from := func(path string) ([]byte, error) {
		data, ok := s.o.Kept[path]
		if !ok {
			return nil, errors.New("no copy of it was kept")
		}
		return data, nil
	}
	// Where the files are of no use, and what was kept is, that is what is wrong with the files.
	instead := func(path string, wrong, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("listener %q: %s: %w", s.o.Listener, path, wrong))
			return
		}
		s.refused[path] = wrong
		s.counts.failures(path).Inc()
		s.o.Log.Error("a file of a listener's TLS is of no use: what the generation before served with is served on", "path", path, "err", wrong)
	}
	for _, c := range s.o.Config.Certificates {
		p, err := readPair(config.ReadTLS, c)
		if err != nil {
			var otherwise error
			p, otherwise = readPair(from, c)
			instead(c.Certificate, err, otherwise)
		}
		s.pairs = append(s.pairs, p)
	}
	if path := s.o.Config.ClientCA; path != "" {
		var err error
		if s.clients, err = readAuthorities(config.ReadTLS, path); err != nil {
			var otherwise error
			s.clients, otherwise = readAuthorities(from, path)
			instead(path, err, otherwise)
		}
	}
	return errors.Join(errs...)
}

// readPair reads a certificate and its key as the files have them now.
func (s *Server) readPair(i int) (take func(), err error) {
	p, err := readPair(config.ReadTLS, s.o.Config.Certificates[i])
	return func() { s.takePair(i, p) }, err
}

// takePair has a certificate and its key hold.
func (s *Server) takePair(i int, p *pair) {
	c := s.o.Config.Certificates[i]
	s.mu.Lock()
	before := s.pairs[i]
	changed := !p.same(before)
	s.pairs[i] = p
	s.expired[i] = s.expired[i] && !changed // the next sample says it
	s.tookLocked(c.Certificate, changed)
	left := newChoice(s.pairs, true)
	s.mu.Unlock()
	if changed {
		s.o.Log.Info("a listener has another certificate", "path", c.Certificate, "names", shown(p.names()), "serial", p.serial(), "expires", p.expires.UTC())
		if lost := slices.DeleteFunc(slices.Clone(before.names()), left.covers); len(lost) > 0 {
			s.o.Log.Warn("a certificate has taken the place of one with other names: no certificate is for these any more", "path", c.Certificate, "names", shown(lost))
		}
		s.remarkPair(c.Certificate, p)
		s.tell()
	}
}

// readClients reads who signs clients' certificates by the file now.
func (s *Server) readClients() (take func(), err error) {
	a, err := readAuthorities(config.ReadTLS, s.o.Config.ClientCA)
	return func() { s.takeClients(a) }, err
}

// takeClients has those hold who sign clients' certificates.
func (s *Server) takeClients(a *authorities) {
	path := s.o.Config.ClientCA
	s.mu.Lock()
	changed := !a.same(s.clients)
	s.clients = a
	s.tookLocked(path, changed)
	s.mu.Unlock()
	if changed {
		s.o.Log.Info("others sign the certificates of a listener's clients", "path", path, "certificates", len(a.all))
		s.tell()
	}
}

// tookLocked notes that what a file says holds.
func (s *Server) tookLocked(path string, changed bool) {
	if s.refused[path] != nil {
		delete(s.refused, path)
		s.o.Log.Info("a file of a listener's TLS is of use again", "path", path)
	}
	if changed {
		s.counts.updates(path).Inc()
		s.swapLocked()
	}
	s.counts.refused.Set(int64(len(s.refused)))
}

// refuse notes that what a file says does not hold.
func (s *Server) refuse(path string, err error) {
	s.o.Log.Error("a file of a listener's TLS is of no use: what it said before is served on", "path", path, "err", err)
	s.counts.failures(path).Inc()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.refused[path] = err
	s.counts.refused.Set(int64(len(s.refused)))
}

func (s *Server) tell() {
	if s.o.Changed != nil {
		s.o.Changed()
	}
}

// suites are those of TLS 1.2 with forward secrecy and AEAD. crypto/tls has its own order, and does
// not ask for those of TLS 1.3.
var suites = []uint16{
	tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
	tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
	tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256, tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
}

// swapLocked has handshakes that begin from now on see what there is now.
func (s *Server) swapLocked() {
	choice := newChoice(s.pairs, s.o.Config.StrictSNI)
	c := &tls.Config{
		MinVersion: s.o.Config.MinVersion, CipherSuites: suites, NextProtos: s.o.Protocols, GetCertificate: choice.certificate, SessionTicketsDisabled: s.o.NoTickets,
	}
	if s.keyLog != nil {
		c.KeyLogWriter = s.keyLog
	}
	if s.clients != nil {
		c.ClientCAs, c.ClientAuth = s.clients.pool, tls.VerifyClientCertIfGiven
		if s.o.Config.ClientCertificates == config.ClientCertificatesRequired {
			c.ClientAuth = tls.RequireAndVerifyClientCert
		}
	}
	// A session that is resumed brings the client's certificate along, and no other check looks
	// whom it asks for. That it is signed by one of those of now crypto/tls looks after itself.
	if s.names != nil || s.o.Config.StrictSNI {
		c.VerifyConnection = func(state tls.ConnectionState) error {
			if state.DidResume && !choice.has(state.ServerName) {
				return ErrUnknownServer
			}
			return s.names.verify(state.PeerCertificates)
		}
	}
	if len(s.keys) > 0 {
		c.SetSessionTicketKeys(s.keys)
	}
	s.config.Store(c)
}

// sample measures what changes by itself, and says once of each certificate that it has expired.
func (s *Server) sample() {
	for i, p := range s.sampled(time.Now()) {
		s.o.Log.Warn("a certificate has expired", "path", s.o.Config.Certificates[i].Certificate, "expired", p.expires.UTC())
	}
}

// sampled returns those of which nobody has said so, by their place.
func (s *Server) sampled(now time.Time) map[int]*pair {
	s.mu.Lock()
	defer s.mu.Unlock()
	expired := make(map[int]*pair)
	for i, p := range s.pairs {
		s.counts.expiry[i].Set(p.days(now))
		if p.expires.Before(now) && !s.expired[i] {
			s.expired[i], expired[i] = true, p
		}
	}
	s.counts.refused.Set(int64(len(s.refused)))
	if s.keyLog != nil {
		s.counts.keyLog.Set(1)
	}
	return expired
}

// remark warns of what works and is hardly wanted.
func (s *Server) remark() {
	for i, c := range s.o.Config.Certificates {
		s.remarkPair(c.Certificate, s.pairs[i])
	}
	if s.keyLog != nil {
		s.o.Log.Warn("THE SECRETS OF ALL CONNECTIONS OF A LISTENER ARE WRITTEN TO A FILE: whoever reads it reads what they carry; remove key_log when you are done", "path", s.o.Config.KeyLog)
	}
}

func (s *Server) remarkPair(path string, p *pair) {
	leaf := p.certificate.Leaf
	if leaf.NotBefore.After(time.Now()) {
		s.o.Log.Warn("a certificate is not valid yet", "path", path, "from", leaf.NotBefore.UTC())
	}
	if len(leaf.DNSNames) == 0 {
		s.o.Log.Warn("a certificate has no DNS name: no client that asks for a server gets it because of that; a common name means nothing", "path", path)
	}
}
