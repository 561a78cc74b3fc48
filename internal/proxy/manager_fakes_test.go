package proxy_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/exchange"
	"holdfast/internal/metrics"
	"holdfast/internal/proxy"
	"holdfast/internal/route"
	"holdfast/internal/tunnel"
	"holdfast/internal/upstream"
)

// client is an exchange whose client is the test.
type client struct {
	t       *testing.T
	request *exchange.Request
	down    exchange.Downstream
	ctx     context.Context
	cancel  context.CancelCauseFunc
	body    *io.PipeReader // as the manager reads it
	send    *io.PipeWriter // as the client sends it
	more    exchange.Fields
	early   []byte
	served  chan struct{}

	mu       sync.Mutex
	informed []int
	answer   *exchange.Response
	flushed  int
	got      bytes.Buffer
	trailers exchange.Fields
	finished bool
	stopped  bool
	aborted  bool
	deaf     bool // reads nothing of the response
	switched net.Conn

	unreachable bool // the 101 cannot be sent
	poisonous   bool // reading its body panics
	brittle     bool // its connection takes nothing of the body, and tells nobody else
	panics      bool // its handler does, which the codec contains
}

var (
	errGone    = errors.New("client gone")
	errStopped = errors.New("stopped reading")
	errAborted = errors.New("aborted")
)

// get is a client that sends a GET without a body.
func get(t *testing.T, authority, target string) *client {
	ctx, cancel := context.WithCancelCause(context.Background())
	c := &client{
		t: t,
		request: &exchange.Request{
			Method: "GET", Scheme: "http", Authority: authority, Target: target, Major: 1, Minor: 1},
		down: exchange.Downstream{
			Listener: "public", Remote: netip.MustParseAddrPort("192.0.2.1:4711"), Local: netip.MustParseAddrPort("192.0.2.9:80")},
		ctx: ctx, cancel: cancel, served: make(chan struct{}),
	}
	c.body, c.send = io.Pipe()
	context.AfterFunc(ctx, func() { c.body.CloseWithError(context.Cause(ctx)) })
	return c
}

// post is a client that sends a body of unknown length by itself.
func post(t *testing.T, authority, target string) *client {
	c := get(t, authority, target)
	c.request.Method, c.request.ContentLength = "POST", -1
	return c
}

// upgrade is a client that asks for WebSocket and has sent bytes behind its head.
func upgrade(t *testing.T, authority, target string) *client {
	c := get(t, authority, target)
	c.request.Upgrade, c.early = "websocket", []byte("early from the client")
	return c
}

// start hands the exchange to the manager.
func (c *client) start(m *proxy.Manager) *client {
	go func() {
		defer close(c.served)
		defer c.cancel(errors.New("served"))
		defer func() {
			if p := recover(); (p != nil) != c.panics {
				c.t.Errorf("the handler panicked: %v, want %v", p, c.panics)
			}
		}()
		m.Serve(c)
	}()
	return c
}

func (c *client) wait() *client {
	<-c.served
	return c
}

func (c *client) Request() *exchange.Request       { return c.request }
func (c *client) Downstream() *exchange.Downstream { return &c.down }
func (c *client) Context() context.Context         { return c.ctx }
func (c *client) Trailers() exchange.Fields        { return c.more }

func (c *client) Read(p []byte) (int, error) {
	if c.request.ContentLength == 0 {
		return 0, io.EOF
	}
	if c.poisonous {
		panic("tested")
	}
	return c.body.Read(p)
}

func (c *client) StopReading() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stopped = true
	c.body.CloseWithError(errStopped)
}

func (c *client) Inform(r *exchange.Response) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.informed = append(c.informed, r.Status)
	return c.ctx.Err()
}

func (c *client) Respond(r *exchange.Response) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.answer != nil {
		c.t.Error("a second response")
	}
	if c.ctx.Err() != nil {
		return context.Cause(c.ctx)
	}
	c.answer = r
	return nil
}

func (c *client) Write(p []byte) (int, error) {
	c.mu.Lock()
	deaf := c.deaf
	c.mu.Unlock()
	if deaf {
		<-c.ctx.Done()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ctx.Err() != nil {
		return 0, context.Cause(c.ctx)
	}
	if c.brittle {
		return 0, errGone
	}
	return c.got.Write(p)
}

func (c *client) Flush() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.flushed++
	return c.ctx.Err()
}

func (c *client) Finish(trailers exchange.Fields) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.finished, c.trailers = c.ctx.Err() == nil, trailers
	return c.ctx.Err()
}

func (c *client) Abort() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.aborted = true
	c.cancel(errAborted)
}

func (c *client) Switch(r *exchange.Response) (conn net.Conn, head, early []byte, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.unreachable {
		return nil, nil, nil, errGone
	}
	if c.ctx.Err() != nil {
		return nil, nil, nil, context.Cause(c.ctx)
	}
	c.answer = r
	ours, theirs := net.Pipe()
	c.switched = theirs
	return ours, nil, c.early, nil
}

// status is that of the response so far, 0 for none.
func (c *client) status() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.answer == nil {
		return 0
	}
	return c.answer.Status
}

func (c *client) received() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.got.String()
}

func (c *client) wantStatus(status int) {
	c.t.Helper()
	if got := c.status(); got != status {
		c.t.Errorf("the client got status %d, want %d", got, status)
	}
}

func (c *client) wantBody(body string) {
	c.t.Helper()
	if got := c.received(); got != body {
		c.t.Errorf("the client got %q, want %q", got, body)
	}
}

// wantEnd says whether the response came to its proper end, or was cut.
func (c *client) wantEnd(proper bool) {
	c.t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.finished != proper {
		c.t.Errorf("the response came to its proper end: %v, want %v", c.finished, proper)
	}
}

func (c *client) wantClose(closing bool) {
	c.t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.answer == nil || c.answer.Close != closing {
		c.t.Errorf("the response is %+v; its Close should be %v", c.answer, closing)
	}
}

// origin is an endpoint's side of one exchange.
type origin struct {
	conn   *originConn
	reused bool
	head   exchange.Request // as it was sent
	gone   chan struct{}    // closed with the exchange

	upload  *io.PipeReader // the request body, as the endpoint reads it
	uploads *io.PipeWriter
	heads   chan any // *exchange.Response or error
	body    *io.PipeReader
	respond *io.PipeWriter // the response body, as the endpoint writes it

	mu       sync.Mutex
	more     exchange.Fields // trailers of the request
	last     exchange.Fields // trailers of the response
	sentAll  bool
	gotAll   bool
	closed   bool
	early    []byte
	switched net.Conn
	pause    time.Duration // that Switch makes
}

// originConn is a connection of an endpoint. Each exchange on it is served by
// behave in a goroutine of its own.
type originConn struct {
	farm    *farm
	address string
	owner   upstream.Owner
	used    bool

	mu     sync.Mutex
	kept   int
	closed bool
}

func (c *originConn) Exchange() (exchange.Upstream, error) {
	o := &origin{conn: c, reused: c.used, gone: make(chan struct{}), heads: make(chan any, 8)}
	o.upload, o.uploads = io.Pipe()
	o.body, o.respond = io.Pipe()
	c.used = true
	c.farm.mu.Lock()
	defer c.farm.mu.Unlock()
	c.farm.exchanges = append(c.farm.exchanges, o)
	return o, nil
}

func (c *originConn) Alive() bool { return true }
func (c *originConn) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.closed {
		c.closed = true
		c.owner.Ended(false)
	}
	return nil
}

func (c *originConn) wasKept() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.kept > 0
}

func (c *originConn) wasClosed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.closed
}

func (o *origin) Reused() bool { return o.reused }

func (o *origin) Send(r *exchange.Request) error {
	o.head = *r
	o.head.Fields = slices.Clone(r.Fields)
	behave := o.conn.farm.behave[o.conn.address]
	if behave == nil {
		behave = ok
	}
	go behave(o)
	return nil
}

func (o *origin) Write(p []byte) (int, error) { return o.uploads.Write(p) }

func (o *origin) Finish(trailers exchange.Fields) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.more, o.sentAll = trailers, true
	return o.uploads.Close()
}

func (o *origin) Receive() (*exchange.Response, error) {
	select {
	case h := <-o.heads:
		if err, bad := h.(error); bad {
			return nil, err
		}
		return h.(*exchange.Response), nil
	case <-o.gone:
		return nil, net.ErrClosed
	}
}

func (o *origin) Read(p []byte) (int, error) {
	n, err := o.body.Read(p)
	if err == io.EOF {
		o.mu.Lock()
		defer o.mu.Unlock()
		o.gotAll = true
	}
	return n, err
}

func (o *origin) Trailers() exchange.Fields {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.last
}

func (o *origin) Switch() (net.Conn, []byte, error) {
	defer time.Sleep(o.pause) // without the lock, on which the fake clock cannot wait
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closed {
		return nil, nil, net.ErrClosed
	}
	ours, theirs := net.Pipe()
	o.switched = theirs
	o.conn.owner.Taken()
	return ours, o.early, nil
}

func (o *origin) Close() error {
	o.mu.Lock()
	if o.closed || o.switched != nil {
		o.mu.Unlock()
		return nil
	}
	o.closed = true
	keep := o.sentAll && o.gotAll
	o.mu.Unlock()
	close(o.gone)
	o.upload.CloseWithError(net.ErrClosed)
	o.uploads.CloseWithError(io.ErrUnexpectedEOF)
	o.body.CloseWithError(net.ErrClosed)
	if !keep {
		return o.conn.Close()
	}
	o.conn.mu.Lock()
	o.conn.kept++
	o.conn.mu.Unlock()
	o.conn.owner.Idle(o.conn)
	return nil
}

// What an endpoint does, said from its side.

func (o *origin) answers(status int, fields ...exchange.Field) {
	o.heads <- &exchange.Response{Status: status, Fields: fields, ContentLength: -1}
}

func (o *origin) writes(s string) { io.WriteString(o.respond, s) }

func (o *origin) ends(trailers ...exchange.Field) {
	o.mu.Lock()
	o.last = trailers
	o.mu.Unlock()
	o.respond.Close()
}

func (o *origin) reads() string {
	b, _ := io.ReadAll(o.upload)
	return string(b)
}

// ok answers after the whole request.
func ok(o *origin) {
	o.reads()
	o.answers(200)
	o.writes("ok")
	o.ends()
}

// silent takes the request and says nothing.
func silent(o *origin) { o.reads() }

func answering(status int) func(*origin) {
	return func(o *origin) {
		o.reads()
		o.answers(status)
		o.writes(fmt.Sprint("answer ", status))
		o.ends()
	}
}

func failing(err error) func(*origin) {
	return func(o *origin) {
		o.reads()
		o.heads <- err
	}
}

// agrees answers an upgrade as it should be.
func agrees(o *origin) {
	o.early = []byte("early from the server")
	o.heads <- &exchange.Response{Status: 101, Upgrade: "websocket", Fields: exchange.Fields{{Name: "Sec-WebSocket-Accept", Value: "x"}}}
}

// farm is all that is behind the manager: endpoints, tunnels, log.
type farm struct {
	t        *testing.T
	routes   []config.Route
	trusted  []netip.Prefix
	behave   map[string]func(*origin)                   // by address; nil: ok
	connect  map[string]func(ctx context.Context) error // by address; nil: succeeds
	cluster  map[string][]string                        // endpoints by cluster
	options  func(o *proxy.ManagerOptions)
	listener string // whose proxies are trusted
	registry *metrics.Registry

	mu        sync.Mutex
	attempts  []string
	exchanges []*origin
	tunnels   []tunnel.Spec
	log       strings.Builder
}

// newFarm has one cluster "web" of one endpoint, and sends everything there.
func newFarm(t *testing.T) *farm {
	return &farm{
		t:        t,
		listener: "public",
		registry: metrics.NewRegistry(),
		routes:   []config.Route{to("/", "web")},
		behave:   map[string]func(*origin){},
		connect:  map[string]func(context.Context) error{},
		cluster:  map[string][]string{"web": {"10.0.0.1:80"}},
	}
}

const first = "10.0.0.1:80" // the endpoint of "web"

// numbered makes the manager's random numbers these, again and again.
func numbered(numbers ...uint64) func(*proxy.ManagerOptions) {
	var n atomic.Uint64
	return func(o *proxy.ManagerOptions) {
		o.Random = func() uint64 { return numbers[(n.Add(1)-1)%uint64(len(numbers))] }
	}
}

func to(prefix, cluster string) config.Route {
	return config.Route{
		Match:    config.Match{Prefix: prefix},
		Clusters: []config.WeightedCluster{{Cluster: cluster, Weight: 1}},
	}
}

func webSocket(prefix, cluster string) config.Route {
	r := to(prefix, cluster)
	r.WebSocket = true
	return r
}

// manager builds the manager over the farm.
func (f *farm) manager() *proxy.Manager {
	f.t.Helper()
	cfg := &config.Config{
		HTTPListeners: []config.Listener{{Name: f.listener, TrustedProxies: f.trusted}},
		VirtualHosts: []config.VirtualHost{{
			Name: "site", Listeners: []string{"public"}, Domains: []string{"a.example", "b.example"}, Routes: f.routes}},
	}
	for name, endpoints := range f.cluster {
		c := config.Cluster{Name: name, ConnectTimeout: connectTimeout}
		for _, e := range endpoints {
			c.Endpoints = append(c.Endpoints, config.Endpoint{Address: e})
		}
		cfg.Clusters = append(cfg.Clusters, c)
	}
	clusters, err := upstream.NewOn(f.t.Context(), cfg, nil, f.registry, upstream.Network{
		Lookup: func(_ context.Context, name string) ([]netip.Addr, error) {
			return []netip.Addr{netip.MustParseAddr("10.0.9.9")}, nil
		},
		Connect: func(ctx context.Context, network, address string, owner upstream.Owner) (upstream.Conn, error) {
			f.mu.Lock()
			f.attempts = append(f.attempts, address)
			fail := f.connect[address]
			f.mu.Unlock()
			if fail != nil {
				if err := fail(ctx); err != nil {
					return nil, err
				}
			}
			return &originConn{farm: f, address: address, owner: owner}, nil
		},
	})
	if err != nil {
		f.t.Fatal(err)
	}
	o := proxy.ManagerOptions{
		Routes: route.New(cfg), Clusters: clusters, Listeners: cfg.HTTPListeners, Tunnels: f,
		Log:     slog.New(slog.NewTextHandler(f, &slog.HandlerOptions{Level: slog.LevelDebug})),
		Metrics: f.registry,
	}
	if f.options != nil {
		f.options(&o)
	}
	return proxy.NewManager(o)
}

func (f *farm) Start(s tunnel.Spec) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.tunnels = append(f.tunnels, s)
	s.Down.Close()
	s.Up.Close()
}

func (f *farm) Write(p []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.log.Write(p)
}

func (f *farm) logged() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.log.String()
}

func (f *farm) wantLog(parts ...string) {
	f.t.Helper()
	for _, p := range parts {
		if !strings.Contains(f.logged(), p) {
			f.t.Errorf("the log does not say %q:\n%s", p, f.logged())
		}
	}
}

// origins are the exchanges that endpoints have seen.
func (f *farm) origins() []*origin {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.exchanges)
}

// origin is the only exchange.
func (f *farm) origin() *origin {
	f.t.Helper()
	all := f.origins()
	if len(all) != 1 {
		f.t.Fatalf("endpoints have seen %d exchanges, want 1", len(all))
	}
	return all[0]
}
