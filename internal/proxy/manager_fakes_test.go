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
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/config"
	"holdfast/internal/exchange"
	"holdfast/internal/metrics"
	"holdfast/internal/proxy"
	"holdfast/internal/route"
	"holdfast/internal/stream"
	"holdfast/internal/stream/streamtest"
	"holdfast/internal/task"
	"holdfast/internal/tunnel"
	"holdfast/internal/upstream"
)

// manager is one over a farm, with the loop on which it answers.
type manager struct {
	*proxy.Manager
	loop *stream.Loop
}

// client is an exchange whose client is the test.
type client struct {
	t       *testing.T
	loop    *stream.Loop
	request *exchange.Request
	down    exchange.Downstream
	ctx     context.Context // done when the exchange is over
	cancel  context.CancelCauseFunc
	body    *io.PipeReader // as the manager reads it
	buffer  []byte         // in which it reads it
	send    *io.PipeWriter // as the client sends it
	more    exchange.Fields
	early   []byte
	served  chan struct{}
	watcher exchange.Watcher // nil: nobody wants to know any more

	mu       sync.Mutex
	informed []int
	answer   *exchange.Response
	flushed  int
	writes   int
	got      bytes.Buffer
	trailers exchange.Fields
	finished bool
	stopped  bool
	aborted  bool
	deaf     bool // reads nothing of the response
	switched *far

	there       []byte // of the body, and need not be waited for
	unreachable bool   // the 101 cannot be sent
	poisonous   bool   // reading its body panics
	brittle     bool   // its connection takes nothing of the body, and tells nobody else
	panics      bool   // its handler does, which the codec contains
	errorsOnly  bool   // what waits for it learns that it is over, but nobody is told
	inTime      bool   // what waits for it has come to its end just before it is over

	interim time.Duration // that an interim response takes
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
			Listener: "public", Remote: netip.MustParseAddrPort("192.0.2.1:4711")},
		ctx: ctx, cancel: cancel, served: make(chan struct{}), buffer: make([]byte, 4096),
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
func (c *client) start(m *manager) *client {
	c.loop = m.loop
	if !c.errorsOnly {
		context.AfterFunc(c.ctx, func() { c.loop.Post(c.tell) })
	}
	streamtest.Begin(c.loop, func(t *task.Task) {
		defer close(c.served)
		defer c.cancel(errors.New("served"))
		defer func() {
			c.watcher = nil
			if p := recover(); (p != nil) != c.panics {
				c.t.Errorf("the handler panicked: %v, want %v", p, c.panics)
			}
		}()
		m.Serve(t, c)
	})
	return c
}

// tell tells the watcher that the exchange is over, once.
func (c *client) tell() {
	if w := c.watcher; w != nil {
		c.watcher = nil
		w.ExchangeOver(c.Over())
	}
}

func (c *client) wait() *client {
	<-c.served
	streamtest.Do(c.loop, func() {}) // what was counted is added at the end of the turn
	return c
}

func (c *client) Request() *exchange.Request       { return c.request }
func (c *client) Downstream() *exchange.Downstream { return &c.down }
func (c *client) Local() netip.AddrPort            { return netip.MustParseAddrPort("10.0.0.80:8080") }
func (c *client) Loop() *stream.Loop               { return c.loop }
func (c *client) Over() error                      { return context.Cause(c.ctx) }
func (c *client) Trailers() exchange.Fields        { return c.more }

func (c *client) OnOver(w exchange.Watcher) {
	if c.watcher = w; c.Over() != nil {
		c.tell()
	}
}

func (c *client) Read(t *task.Task) ([]byte, error) {
	if c.request.ContentLength == 0 {
		return nil, io.EOF
	}
	if c.poisonous {
		panic("tested")
	}
	if n := copy(c.buffer, c.there); n > 0 {
		c.there = nil
		return c.buffer[:n], nil
	}
	var n int
	var err error
	streamtest.Block(c.loop, t, func() { n, err = c.body.Read(c.buffer) })
	if err != nil && c.inTime {
		c.inTime = false
		return []byte("the last bytes"), nil
	}
	return c.buffer[:n], err
}

func (c *client) StopReading() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stopped = true
	c.body.CloseWithError(errStopped)
}

func (c *client) Inform(t *task.Task, r *exchange.Response) error {
	streamtest.Block(c.loop, t, func() { time.Sleep(c.interim) })
	c.mu.Lock()
	defer c.mu.Unlock()
	c.informed = append(c.informed, r.Status)
	return c.Over()
}

func (c *client) Respond(r *exchange.Response) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.answer != nil {
		c.t.Error("a second response")
	}
	if c.Over() != nil {
		return c.Over()
	}
	c.answer = copyOf(r)
	return nil
}

// copyOf is a response as it was when a codec was given it, which keeps nothing of it.
func copyOf(r *exchange.Response) *exchange.Response {
	answer := *r
	answer.Fields = slices.Clone(r.Fields)
	return &answer
}

func (c *client) Write(t *task.Task, p []byte) error {
	p = slices.Clone(p)
	c.mu.Lock()
	deaf := c.deaf
	c.mu.Unlock()
	if deaf {
		streamtest.Block(c.loop, t, func() { <-c.ctx.Done() })
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.Over() != nil && !c.inTime {
		return c.Over()
	}
	if c.brittle {
		return errGone
	}
	c.writes++
	c.got.Write(p)
	return nil
}

func (c *client) Flush(*task.Task) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.flushed++
	return c.Over()
}

func (c *client) Taken(int) bool { return false }

func (c *client) Finish(_ *task.Task, trailers exchange.Fields) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.finished, c.trailers = c.Over() == nil, slices.Clone(trailers)
	return c.Over()
}

func (c *client) Abort() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.aborted = true
	c.cancel(errAborted)
}

func (c *client) Switch(r *exchange.Response) (p stream.Passed, head []byte, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.unreachable {
		return p, nil, errGone
	}
	if c.Over() != nil {
		return p, nil, c.Over()
	}
	c.answer = copyOf(r)
	p.Early = c.early
	p.FD, c.switched = socketPair(c.t)
	return p, []byte("a head"), nil
}

// far is the other end of a socket that was given up.
type far struct{ fd int }

func socketPair(t *testing.T) (near int, _ *far) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Error(err)
		return -1, new(far)
	}
	t.Cleanup(func() { unix.Close(fds[1]) })
	return fds[0], &far{fds[1]}
}

// closed says whether this end was the last to be closed.
func (f *far) closed() bool {
	n, err := unix.Read(f.fd, make([]byte, 1))
	return n == 0 && err == nil
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
	buffer  []byte         // in which the manager reads it
	respond *io.PipeWriter // the response body, as the endpoint writes it

	mu       sync.Mutex
	calls    []string        // in their order
	more     exchange.Fields // trailers of the request
	last     exchange.Fields // trailers of the response
	sentAll  bool
	gotAll   bool
	closed   bool
	ready    bool // the body comes together with the head
	early    []byte
	switched *far
	pause    time.Duration // between a head's coming and the manager's having it
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
	o := &origin{conn: c, reused: c.used, gone: make(chan struct{}), heads: make(chan any, 8), buffer: make([]byte, 4096)}
	o.upload, o.uploads = io.Pipe()
	o.body, o.respond = io.Pipe()
	c.used = true
	c.farm.mu.Lock()
	defer c.farm.mu.Unlock()
	c.farm.exchanges = append(c.farm.exchanges, o)
	return o, nil
}

func (c *originConn) Alive() bool                    { return true }
func (c *originConn) PassOn() (stream.Passed, error) { return stream.Passed{}, net.ErrClosed }
func (c *originConn) Close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.closed {
		c.closed = true
		c.owner.Ended(false)
	}
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

// open complains about whoever uses an exchange that is over.
func (o *origin) open(what string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.calls = append(o.calls, what)
	if o.closed || o.switched != nil {
		o.conn.farm.t.Errorf("%s of an exchange that was closed: the connection may be another's", what)
	}
}

func (o *origin) Send(_ *task.Task, r *exchange.Request) error {
	o.open("Send")
	o.head = *r
	o.head.Fields = slices.Clone(r.Fields)
	behave := o.conn.farm.behave[o.conn.address]
	if behave == nil {
		behave = ok
	}
	go behave(o)
	return nil
}

func (o *origin) Write(t *task.Task, p []byte) (err error) {
	o.open("Write")
	p = slices.Clone(p)
	streamtest.Block(o.conn.farm.loop, t, func() { _, err = o.uploads.Write(p) })
	return err
}

func (o *origin) Finish(_ *task.Task, trailers exchange.Fields) error {
	o.open("Finish")
	o.mu.Lock()
	defer o.mu.Unlock()
	o.more, o.sentAll = slices.Clone(trailers), true
	return o.uploads.Close()
}

func (o *origin) Receive(t *task.Task) (resp *exchange.Response, err error) {
	o.open("Receive")
	var head any
	streamtest.Block(o.conn.farm.loop, t, func() {
		select {
		case head = <-o.heads:
		case <-o.gone:
			head = net.ErrClosed
		}
		time.Sleep(o.pause)
	})
	if err, bad := head.(error); bad {
		return nil, err
	}
	return head.(*exchange.Response), nil
}

func (o *origin) Ready() bool { return o.ready }

func (o *origin) Read(t *task.Task) ([]byte, error) {
	o.open("Read")
	var n int
	var err error
	streamtest.Block(o.conn.farm.loop, t, func() { n, err = o.body.Read(o.buffer) })
	if err == io.EOF {
		o.mu.Lock()
		defer o.mu.Unlock()
		o.gotAll = true
	}
	return o.buffer[:n], err
}

func (o *origin) Trailers() exchange.Fields {
	o.open("Trailers")
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.last
}

func (o *origin) Switch() (p stream.Passed, err error) {
	o.open("Switch")
	o.mu.Lock()
	defer o.mu.Unlock()
	p.Early = o.early
	p.FD, o.switched = socketPair(o.conn.farm.t)
	o.conn.owner.Taken()
	return p, nil
}

func (o *origin) Close() {
	o.mu.Lock()
	if o.switched != nil {
		o.mu.Unlock()
		return
	}
	if o.closed {
		o.conn.farm.t.Error("a second Close of an exchange: the connection may be another's")
	}
	o.closed = true
	clear(o.last) // they were the connection's
	keep := o.sentAll && o.gotAll
	o.mu.Unlock()
	close(o.gone)
	o.upload.CloseWithError(net.ErrClosed)
	o.uploads.CloseWithError(io.ErrUnexpectedEOF)
	o.body.CloseWithError(net.ErrClosed)
	if !keep {
		o.conn.Close()
		return
	}
	o.conn.mu.Lock()
	o.conn.kept++
	o.conn.mu.Unlock()
	o.conn.owner.Idle(o.conn)
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
	loop     *stream.Loop
	routes   []config.Route
	hosts    config.Edits // of the virtual host
	clusters config.Edits // of each cluster
	trusted  []netip.Prefix
	edge     config.Edge
	behave   map[string]func(*origin)                   // by address; nil: ok
	connect  map[string]func(ctx context.Context) error // by address; nil: succeeds
	cluster  map[string][]string                        // endpoints by cluster
	budget   config.RetryBudget                         // of each cluster
	limits   config.Breakers                            // of each cluster
	options  func(o *proxy.ManagerOptions)
	change   func(*config.Config) // what the manager is built from
	listener string               // whose proxies are trusted
	registry *metrics.Registry

	mu        sync.Mutex
	attempts  []string
	headers   []string // that connections begin with
	exchanges []*origin
	tunnels   []tunnel.Spec
	log       strings.Builder
}

// newFarm has one cluster "web" of one endpoint, and sends everything there.
func newFarm(t *testing.T) *farm {
	return &farm{
		t:        t,
		loop:     streamtest.NewVirtual(t),
		listener: "public",
		registry: metrics.NewRegistry(),
		routes:   []config.Route{to("/", "web")},
		behave:   map[string]func(*origin){},
		connect:  map[string]func(context.Context) error{},
		cluster:  map[string][]string{"web": {"10.0.0.1:80"}},
		budget:   config.RetryBudget{MinConcurrency: 3},
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
		Clusters: []config.WeightedCluster{{Cluster: cluster, Weight: config.Dynamic{Value: 1}}},
	}
}

func webSocket(prefix, cluster string) config.Route {
	r := to(prefix, cluster)
	r.WebSocket = true
	return r
}

// manager builds the manager over the farm.
func (f *farm) manager() *manager {
	f.t.Helper()
	cfg := &config.Config{
		HTTPListeners: []config.Listener{{Name: f.listener, TrustedProxies: f.trusted, Edge: f.edge}},
		VirtualHosts: []config.VirtualHost{{
			Name: "site", Listeners: []string{"public"}, Domains: []string{"a.example", "b.example", "[::1]"}, Routes: f.routes, Edits: f.hosts}},
	}
	for name, endpoints := range f.cluster {
		c := config.Cluster{Name: name, ConnectTimeout: connectTimeout, RetryBudget: f.budget, Breakers: f.limits, Edits: f.clusters}
		for _, e := range endpoints {
			c.Endpoints = append(c.Endpoints, config.Endpoint{Address: e})
		}
		cfg.Clusters = append(cfg.Clusters, c)
	}
	if f.change != nil {
		f.change(cfg)
	}
	clusters, err := upstream.New(f.t.Context(), upstream.Options{Config: cfg, Metrics: f.registry, Loops: []*stream.Loop{f.loop}, Network: upstream.Network{
		Lookup: func(_ context.Context, name string) ([]netip.Addr, error) {
			return []netip.Addr{netip.MustParseAddr("10.0.9.9")}, nil
		},
		Connect: func(t *task.Task, _ *stream.Loop, _, address string, until time.Time, a *upstream.Attempt, owner upstream.Owner) (upstream.Conn, error) {
			if err := f.dial(t, address, until, a); err != nil {
				return nil, err
			}
			return &originConn{farm: f, address: address, owner: owner}, nil
		},
	}})
	if err != nil {
		f.t.Fatal(err)
	}
	o := proxy.ManagerOptions{
		Routes: route.New(cfg, nil), Clusters: clusters, Listeners: cfg.HTTPListeners, Tunnels: f,
		Log:     slog.New(slog.NewTextHandler(f, &slog.HandlerOptions{Level: slog.LevelDebug})),
		Metrics: f.registry,
	}
	if f.options != nil {
		f.options(&o)
	}
	return &manager{proxy.NewManager(o), f.loop}
}

// interrupter makes an [upstream.Interrupter] of a function.
type interrupter func(error)

func (i interrupter) Interrupt(err error) { i(err) }

// dial does what connect says of the address.
func (f *farm) dial(t *task.Task, address string, until time.Time, a *upstream.Attempt) (err error) {
	f.mu.Lock()
	f.attempts = append(f.attempts, address)
	if h := a.Header(); h != nil {
		f.headers = append(f.headers, string(h))
	}
	fail := f.connect[address]
	f.mu.Unlock()
	if fail == nil {
		return nil
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	ctx, stop := context.WithDeadlineCause(ctx, until, os.ErrDeadlineExceeded)
	defer stop()
	a.Wait(interrupter(cancel))
	streamtest.Block(f.loop, t, func() { err = fail(ctx) })
	if err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

func (f *farm) Start(s tunnel.Spec) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.tunnels = append(f.tunnels, s)
	unix.Close(s.FDs[0])
	unix.Close(s.FDs[1])
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
