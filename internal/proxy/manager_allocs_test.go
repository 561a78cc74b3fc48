package proxy_test

import (
	"bytes"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"holdfast/internal/accesslog"
	"holdfast/internal/accesslog/format"
	"holdfast/internal/config"
	"holdfast/internal/exchange"
	"holdfast/internal/metrics"
	"holdfast/internal/proxy"
	"holdfast/internal/route"
	"holdfast/internal/stream"
	"holdfast/internal/stream/streamtest"
	"holdfast/internal/task"
	"holdfast/internal/upstream"
)

// plain is an exchange, and its upstream's side, where all has come already and nothing
// is allocated.
type plain struct {
	loop     *stream.Loop
	template exchange.Request
	request  exchange.Request
	texts    [512]byte
	down     exchange.Downstream
	response exchange.Response
	body     []byte
	sent     bool // the request's body
	given    bool // the response's
	status   int
	got      int
	ended    int
	log      *accesslog.Log
	edge     config.Edge
}

func newPlain(l *stream.Loop) *plain {
	p := &plain{
		loop: l, body: []byte("some bytes"), down: exchange.Downstream{Listener: "public", Remote: netip.MustParseAddrPort("192.0.2.1:4711")},
		template: exchange.Request{Method: "GET", Scheme: "http", Authority: "a.example:80", Target: "/", Major: 1, Minor: 1,
			Fields: fields("Accept: */*", "User-Agent: test", "Accept-Language: en")},
	}
	p.response = exchange.Response{Status: 200, ContentLength: int64(len(p.body))}
	return p
}

func (p *plain) renew() {
	fields := append(p.request.Fields[:0], p.template.Fields...)
	p.response.Fields = p.response.Fields[:0]
	p.request = p.template
	p.request.Fields = fields
	p.request.Texts.Use(p.texts[:])
	p.response.Fields = p.response.Fields[:0]
	p.sent, p.given, p.status, p.got = false, false, 0, 0
}

func (p *plain) Request() *exchange.Request                  { return &p.request }
func (p *plain) Downstream() *exchange.Downstream            { return &p.down }
func (p *plain) Local() netip.AddrPort                       { return netip.AddrPort{} }
func (p *plain) Loop() *stream.Loop                          { return p.loop }
func (p *plain) Over() error                                 { return nil }
func (p *plain) OnOver(exchange.Watcher)                     {}
func (p *plain) StopReading()                                {}
func (p *plain) Trailers() exchange.Fields                   { return nil }
func (p *plain) Inform(*task.Task, *exchange.Response) error { return nil }
func (p *plain) Respond(r *exchange.Response) error          { p.status = r.Status; return nil }
func (p *plain) Flush(*task.Task) error                      { return nil }
func (p *plain) Finish(*task.Task, exchange.Fields) error    { p.ended++; return nil }
func (p *plain) Abort()                                      {}
func (p *plain) Taken(int) bool                              { return false }
func (p *plain) Write(_ *task.Task, b []byte) error          { p.got += len(b); return nil }
func (p *plain) Switch(*exchange.Response) (stream.Passed, []byte, error) {
	return stream.Passed{}, nil, net.ErrClosed
}

func (p *plain) Read(*task.Task) ([]byte, error) {
	if p.sent {
		return nil, io.EOF
	}
	p.sent = true
	return p.body, nil
}

// plainUpstream is the upstream's side of a plain. It is its connection, too.
type plainUpstream struct {
	*plain
	owner upstream.Owner
}

func (u *plainUpstream) Exchange() (exchange.Upstream, error)           { return u, nil }
func (u *plainUpstream) Alive() bool                                    { return true }
func (u *plainUpstream) PassOn() (p stream.Passed, err error)           { return p, net.ErrClosed }
func (u *plainUpstream) Send(*task.Task, *exchange.Request) error       { return nil }
func (u *plainUpstream) Write(*task.Task, []byte) error                 { return nil }
func (u *plainUpstream) Receive(*task.Task) (*exchange.Response, error) { return &u.response, nil }
func (u *plainUpstream) Ready() bool                                    { return true }
func (u *plainUpstream) Switch() (p stream.Passed, err error)           { return p, net.ErrClosed }
func (u *plainUpstream) Reused() bool                                   { return true }
func (u *plainUpstream) Finish(*task.Task, exchange.Fields) error       { return nil }
func (u *plainUpstream) Close()                                         { u.owner.Idle(u) }
func (u *plainUpstream) Read(*task.Task) ([]byte, error) {
	if u.given {
		return nil, io.EOF
	}
	u.given = true
	return u.body, nil
}

// A request in steady state allocates nothing in the manager, and in what it does with
// metrics, routes and pools.
func TestAnOrdinaryRequestAllocatesNothing(t *testing.T) { // not parallel: it counts allocations
	tests := map[string]func(*plain){
		"a GET": func(*plain) {},
		"a POST": func(p *plain) {
			p.template.Method, p.template.ContentLength = "POST", int64(len(p.body))
		},
		"a POST of unknown length": func(p *plain) {
			p.template.Method, p.template.ContentLength = "POST", -1
		},
		"a client with an IPv6 address": func(p *plain) {
			p.down.Remote = netip.MustParseAddrPort("[2001:db8:1111:2222:3333:4444:5555:6666]:80")
		},
		"a trusted peer": func(p *plain) {
			p.down.Remote = netip.MustParseAddrPort("10.1.2.3:80")
			p.template.Fields = fields("X-Forwarded-For: 192.0.2.1", "X-Forwarded-Proto: https", "X-Request-Id: a")
		},
		"names with underscores": func(p *plain) { p.template.Fields = fields("x_forwarded_for: 6.6.6.6", "x_own_field: 1") },
		"a path to normalise":    func(p *plain) { p.template.Target = "/a/%2e%2e//b/%c3%a4?c" },
		"an edge with everything": func(p *plain) {
			p.down.Remote = netip.MustParseAddrPort("10.1.2.3:80")
			p.template.Fields = fields("X-Forwarded-For: 192.0.2.1, 10.1.2.4", "Forwarded: for=192.0.2.1", "X-Internal-User: a", "X-Request-Id: a")
			p.edge = config.Edge{
				InternalHeaders: []string{"X-Internal-*", "X-User"}, Forwarded: true, RequestIDInResponse: true,
				Server: config.ServerHeader{Action: config.OverwriteServer, Name: "edge"},
			}
		},
		"a limit for everything": func(p *plain) { p.template.Target = "/limited" },
		"access logs in formats of their own": func(p *plain) {
			p.response.Fields = fields("Content-Type: text/plain", "X-B: b")
			p.log = toNull(`%START_TIME% "%REQ(:PATH)%" %REQ(User-Agent)% %REQ(X-A?Accept)% %RESP(Content-Type)% %RESP(X-B):20% %RESPONSE_FLAGS%`)
		},
		"a request that is hashed": func(p *plain) {
			p.template.Target = "/hashed"
			p.template.Fields = fields("User-Agent: test", "Cookie: a=b; seat=12")
		},
		"a GET that may be tried": func(p *plain) { p.template.Target = "/again" },
		"a POST that may be tried again": func(p *plain) {
			p.template.Target, p.template.Method, p.template.ContentLength = "/again", "POST", -1
		},
		"a POST that is buffered": func(p *plain) {
			p.template.Target, p.template.Method, p.template.ContentLength = "/buffered", "POST", -1
		},
		"filters that let it pass": func(p *plain) { p.template.Target = "/filtered" },
	}
	for name, change := range tests {
		t.Run(name, func(t *testing.T) {
			l := streamtest.NewVirtual(t)
			p := newPlain(l)
			change(p)
			if p.log != nil {
				defer p.log.Close(time.Second)
			}
			m := p.manager(t)
			const n = 100
			var allocated uint64
			streamtest.Go(l, func(t *task.Task) {
				serve := func() { p.renew(); m.Serve(t, p) }
				for range 10 {
					serve()
				}
				allocated = mallocs(func() {
					for range n {
						serve()
					}
				})
			})
			if p.ended != n+10 || p.status != 200 || p.got != len(p.body) {
				t.Fatalf("%d responses, the last one with %d and %d bytes", p.ended, p.status, p.got)
			}
			most := uint64(n / 2) // the runtime has its own
			if p.log != nil && poolsForget {
				most = 2 * n
			}
			if allocated > most {
				t.Errorf("%d allocations for %d requests", allocated, n)
			}
		})
	}
}

// toNull is an access log that nobody reads.
func toNull(line string) *accesslog.Log {
	custom, err := format.Text(line)
	if err != nil {
		panic(err)
	}
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		panic(err)
	}
	return accesslog.New([]accesslog.Output{{Path: os.DevNull, File: null, Custom: custom}}, 1, nil)
}

// mallocs returns how many objects the process allocates while fn runs.
func mallocs(fn func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	fn()
	runtime.ReadMemStats(&after)
	return after.Mallocs - before.Mallocs
}

// manager is one of which all requests go to p.
func (p *plain) manager(t testing.TB) *proxy.Manager {
	limited := to("/limited", "web")
	limited.Timeout, limited.StreamIdleTimeout = time.Minute, time.Minute
	edited := to("/edited", "web")
	edited.Edits = config.Edits{
		RequestHeaders: &config.Headers{Remove: []string{"Accept-Language"}, Add: []config.Header{{Name: "X-Start", Value: "%START_TIME%"}},
			Set: []config.Header{{Name: "X-Client", Value: "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT% with %REQ(User-Agent)%"}}},
		ResponseHeaders: set("X-Upstream", "%UPSTREAM_HOST% of %UPSTREAM_CLUSTER%"),
	}
	hashed := to("/hashed", "web")
	hashed.HashPolicy = []config.HashPolicy{{Header: "User-Agent"}, {Cookie: &config.HashCookie{Name: "seat"}}, {SourceAddress: true}}
	tried, buffered := to("/again", "web"), to("/buffered", "web")
	tried.Retry = retrying(on5xx, func(r *config.Retry) { r.PerTryTimeout = time.Minute }).Retry
	buffered.RequestBuffer = 1 << 20
	filtered := to("/filtered", "web")
	filtered.Filters = &config.Filters{
		Allow: networks("0.0.0.0/0", "::/0"), Deny: networks("198.51.100.0/24"),
		RateLimit: &config.RateLimit{Requests: config.Dynamic{Value: config.MaxRate}, Per: time.Second, Burst: config.MaxRate, ByClient: true},
		Fault:     &config.Fault{Headers: []config.FaultHeader{{Name: "X-Fault"}}},
	}
	cfg := &config.Config{
		HTTPListeners: []config.Listener{{Name: "public", TrustedProxies: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}, Edge: p.edge}},
		VirtualHosts: []config.VirtualHost{{Name: "site", Listeners: []string{"public"}, Domains: []string{"a.example"},
			Routes: []config.Route{limited, edited, hashed, tried, buffered, filtered, to("/", "web")}}},
		Clusters: oneCluster,
	}
	return p.managerOf(t, cfg)
}

var oneCluster = []config.Cluster{{Name: "web", IdleTimeout: time.Minute, Endpoints: []config.Endpoint{{Address: first}, {Address: first}}}}

// managerOf is manager for another configuration.
func (p *plain) managerOf(t testing.TB, cfg *config.Config) *proxy.Manager {
	counted := metrics.NewRegistry()
	clusters, err := upstream.New(t.Context(), upstream.Options{Config: cfg, Metrics: counted, Loops: []*stream.Loop{p.loop}, Network: upstream.Network{
		Connect: func(_ *task.Task, _ *stream.Loop, _, _ string, _ time.Time, _ *upstream.Attempt, owner upstream.Owner) (upstream.Conn, error) {
			return &plainUpstream{p, owner}, nil
		},
	}})
	if err != nil {
		t.Fatal(err)
	}
	return proxy.NewManager(proxy.ManagerOptions{
		Routes: route.New(cfg, nil), Clusters: clusters, Listeners: cfg.HTTPListeners, Log: slog.New(slog.DiscardHandler), Metrics: counted,
		AccessLog: p.log,
	})
}

// The whole way of a request, with the codecs.
func TestSocketsOrdinaryRequestsAllocateNothing(t *testing.T) { // not parallel: it counts allocations
	const get = "GET /path?query HTTP/1.1\r\nHost: a.example:8080\r\nUser-Agent: test\r\nAccept: */*\r\nConnection: keep-alive\r\n\r\n"
	tests := map[string]struct{ request, response string }{
		"a length": {get, "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 10\r\n\r\nsome bytes"},
		"chunks":   {get, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nsome\r\n6\r\n bytes\r\n0\r\n\r\n"},
		"a body both ways": {strings.Replace(strings.TrimSuffix(get, "\r\n"), "GET", "POST", 1) + "Content-Length: 5\r\n\r\nhello",
			"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nsome bytes"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			s := newSite(t, func(s *site) { s.unrecorded = true })
			c := s.client()
			io.WriteString(c, tt.request)
			u := s.endpoint()
			ended := make(chan struct{})
			go func() {
				defer close(ended)
				answerAlike(u, []byte(tt.request[strings.Index(tt.request, "\r\n\r\n"):]), []byte(tt.response))
			}()
			request, answer := []byte(tt.request), make([]byte, 4096)
			all := readAnswer(c, answer)
			trip := func() {
				c.Conn.Write(request)
				if _, err := io.ReadFull(c.Conn, answer[:all]); err != nil {
					t.Fatal(err)
				}
			}
			for range 100 {
				trip()
			}
			const n = 500
			allocated := mallocs(func() {
				for range n {
					trip()
				}
			})
			if allocated > n/2 { // the runtime has its own
				t.Errorf("%d allocations for %d requests", allocated, n)
			}
			c.Close()
			u.Close()
			<-ended
		})
	}
}

// answerAlike answers every request, of which end are the last bytes.
func answerAlike(u *wire, end, response []byte) {
	buffer := make([]byte, 4096)
	n := 0
	for {
		got, err := u.Conn.Read(buffer[n:])
		if err != nil {
			return
		}
		if n += got; bytes.HasSuffix(buffer[:n], end) {
			n = 0
			u.Conn.Write(response)
		}
	}
}

// readAnswer reads the first answer, and returns how many bytes each has.
func readAnswer(c *wire, buffer []byte) (n int) {
	for {
		got, err := c.Conn.Read(buffer[n:])
		n += got
		if s := string(buffer[:n]); err != nil || strings.HasSuffix(s, "bytes") || strings.HasSuffix(s, "0\r\n\r\n") {
			return n
		}
	}
}
