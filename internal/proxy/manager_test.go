package proxy_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"holdfast/internal/config"
	"holdfast/internal/exchange"
	"holdfast/internal/proxy"
	"holdfast/internal/tunnel"
)

const connectTimeout = 2 * time.Second

// *tunnel.Set is what takes the tunnels.
var _ proxy.TunnelStarter = (*tunnel.Set)(nil)

func TestMain(m *testing.M) {
	if os.Getenv(apartEnv) != "" {
		os.Exit(generationApart())
	}
	goleak.VerifyTestMain(m)
}

// inBubble runs a test on a clock of its own, and gives the endpoints time to notice
// the end: goroutines that are left after that fail the test.
func inBubble(t *testing.T, test func(*testing.T)) {
	synctest.Test(t, func(t *testing.T) {
		test(t)
		time.Sleep(time.Hour)
	})
}

func refused(context.Context) error { return syscall.ECONNREFUSED }

func hangs(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }

func TestAnswersOfOurOwn(t *testing.T) {
	t.Parallel()
	redirect := config.Route{Match: config.Match{Path: "/old"}, Redirect: &config.Redirect{Path: "/new", Status: 308}}
	bad := &exchange.StatusError{Status: 502, Text: "upstream: two lengths"}
	lost := fmt.Errorf("%w: %w", exchange.ErrNoAnswer, io.EOF)
	tests := []struct {
		name   string
		change func(*farm, *client)
		status int
		log    string // "" if it is no refusal
	}{
		{"no virtual host", func(_ *farm, c *client) { c.request.Authority = "c.example" }, 404, "no virtual host"},
		{"no route", func(f *farm, _ *client) { f.routes = []config.Route{to("/elsewhere", "web")} }, 404, "no route"},
		{"a redirect", func(_ *farm, c *client) { c.request.Target = "/old" }, 308, ""},
		{"a cluster that is not there", func(f *farm, _ *client) { f.routes = []config.Route{to("/", "none")} }, 503, "no such cluster"},
		{"a cluster without endpoints", func(f *farm, _ *client) { f.cluster["web"] = nil }, 503, "no healthy endpoint"},
		{"connection refused", func(f *farm, _ *client) { f.connect[first] = refused }, 503, "connection refused"},
		{"connecting takes too long", func(f *farm, _ *client) { f.connect[first] = hangs }, 504, "no answer within 2s"},
		{"nonsense from the upstream", func(f *farm, _ *client) { f.behave[first] = failing(bad) }, 502, "two lengths"},
		{"no answer from the upstream", func(f *farm, _ *client) { f.behave[first] = failing(lost) }, 503, "before the upstream answered"},
		{"a 101 that nobody asked for", func(f *farm, _ *client) { f.behave[first] = agrees }, 502, "101"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T) {
				f, c := newFarm(t), get(t, "a.example", "/path")
				f.routes = append([]config.Route{redirect}, f.routes...)
				tt.change(f, c)
				c.start(f.manager()).wait()
				c.wantStatus(tt.status)
				c.wantEnd(true)
				c.wantClose(false)
				if int64(len(c.received())) != c.answer.ContentLength || strings.Contains(c.received(), "10.0.0.1") ||
					!strings.HasPrefix(c.received(), fmt.Sprint(tt.status, " ")) {
					t.Errorf("the client reads %q under Content-Length %d", c.received(), c.answer.ContentLength)
				}
				if tt.log != "" {
					f.wantLog("request refused", tt.log, "listener=public", "request_id=", fmt.Sprint("status=", tt.status))
				}
				if n := strings.Count(f.logged(), "request refused"); tt.log != "" && n != 1 {
					t.Errorf("%d lines tell of it", n)
				}
			})
		})
	}
}

func TestRedirectIsBuiltFromTheRequest(t *testing.T) {
	t.Parallel()
	proxies := []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}
	tests := []struct {
		name      string
		trusted   []netip.Prefix
		authority string
		want      string
	}{
		{"the scheme as we know it", nil, "a.example:8080", "http://a.example:8080/new"},
		{"the scheme as a trusted proxy knows it", proxies, "a.example", "https://a.example/new"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T) {
				f, c := newFarm(t), get(t, tt.authority, "/old?q")
				f.trusted = tt.trusted
				f.routes = []config.Route{{Match: config.Match{Prefix: "/"}, Redirect: &config.Redirect{Path: "/new", Status: 301}}}
				c.request.Fields.Add("X-Forwarded-Proto", "https")
				c.start(f.manager()).wait()
				c.wantStatus(301)
				if got, _ := c.answer.Fields.Get("Location"); got != tt.want {
					t.Errorf("Location: %s, want %s", got, tt.want)
				}
			})
		})
	}
}

func TestHeadGetsNoBodyFromUs(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f, c := newFarm(t), get(t, "c.example", "/")
		c.request.Method = "HEAD"
		c.start(f.manager()).wait()
		c.wantStatus(404)
		c.wantBody("")
		c.wantEnd(true)
	})
}

func TestOtherEndpointsAreTried(t *testing.T) {
	t.Parallel()
	all := []string{"10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80", "10.0.0.4:80"}
	tests := []struct {
		name     string
		connect  map[string]func(context.Context) error
		attempts int
		status   int
	}{
		{"the next one answers", map[string]func(context.Context) error{all[0]: refused}, 2, 200},
		{"after a timeout too", map[string]func(context.Context) error{all[0]: hangs, all[1]: refused}, 3, 200},
		{"three at most", map[string]func(context.Context) error{all[0]: refused, all[1]: hangs, all[2]: refused}, 3, 503},
		{"the last failure counts", map[string]func(context.Context) error{all[0]: refused, all[1]: refused, all[2]: hangs}, 3, 504},
	}
	for _, tt := range tests {
		for _, kind := range []func(*testing.T, string, string) *client{get, upgrade} {
			t.Run(tt.name, func(t *testing.T) {
				t.Parallel()
				inBubble(t, func(t *testing.T) {
					f := newFarm(t)
					f.cluster["web"], f.connect = all, tt.connect
					f.routes = []config.Route{webSocket("/", "web")}
					c := kind(t, "a.example", "/").start(f.manager()).wait()
					c.wantStatus(tt.status)
					if !slices.Equal(f.attempts, all[:tt.attempts]) {
						t.Errorf("tried %v", f.attempts)
					}
				})
			})
		}
	}
}

func TestRequestGoesUpstreamRewritten(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name              string
		change            func(*config.Route)
		endpoint          string
		authority, target string
	}{
		{"as it came", func(*config.Route) {}, "10.0.0.7:80", "a.example:8080", "/app/x?y=/app"},
		{"prefix", func(r *config.Route) { r.PrefixRewrite = "/v2" }, "10.0.0.7:80", "a.example:8080", "/v2/x?y=/app"},
		{"host", func(r *config.Route) { r.HostRewrite = "inner" }, "10.0.0.7:80", "inner", "/app/x?y=/app"},
		{"automatic host", func(r *config.Route) { r.AutoHostRewrite = true }, "app.internal:81", "app.internal:81", "/app/x?y=/app"},
		{"automatic host, where there is none", func(r *config.Route) { r.AutoHostRewrite = true }, "unix:/run/a", "a.example:8080", "/app/x?y=/app"},
	}
	for _, tt := range tests {
		for _, kind := range []func(*testing.T, string, string) *client{get, upgrade} {
			t.Run(tt.name, func(t *testing.T) {
				t.Parallel()
				inBubble(t, func(t *testing.T) {
					f := newFarm(t)
					r := webSocket("/app", "web")
					tt.change(&r)
					f.routes, f.cluster["web"] = []config.Route{r}, []string{tt.endpoint}
					kind(t, "a.example:8080", "/app/x?y=/app").start(f.manager()).wait()
					head := f.origin().head
					if head.Authority != tt.authority || head.Target != tt.target {
						t.Errorf("the upstream got %s %s", head.Authority, head.Target)
					}
					if h, _ := head.Fields.Get("X-Forwarded-Host"); h != "a.example:8080" {
						t.Errorf("X-Forwarded-Host: %s", h)
					}
				})
			})
		}
	}
}

func TestClustersGetTheirShare(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f := newFarm(t)
		f.trusted = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}
		f.cluster = map[string][]string{"v1": {"10.0.1.1:80"}, "v2": {"10.0.2.1:80"}}
		f.routes = []config.Route{{Match: config.Match{Prefix: "/"}, Clusters: []config.WeightedCluster{
			{Cluster: "v1", Weight: config.Dynamic{Value: 9}}, {Cluster: "v2", Weight: config.Dynamic{Value: 1}}}}}
		var n atomic.Uint64
		f.options = func(o *proxy.ManagerOptions) { o.Random = func() uint64 { return n.Add(1) } }
		m := f.manager()
		for range 100 {
			c := get(t, "a.example", "/")
			c.down.Remote = netip.MustParseAddrPort("10.0.0.1:1")
			c.request.Fields.Add("X-Request-Id", "given") // it takes numbers otherwise
			c.start(m).wait()
		}
		got := map[string]int{}
		for _, o := range f.origins() {
			got[o.conn.address]++
		}
		if got["10.0.1.1:80"] != 90 || got["10.0.2.1:80"] != 10 {
			t.Errorf("of 100 requests: %v", got)
		}
	})
}

func TestWhatArrivesIsSentAtOnce(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f, c := newFarm(t), post(t, "a.example", "/")
		step := make(chan struct{})
		var heard strings.Builder
		f.behave[first] = func(o *origin) {
			buf := make([]byte, 100)
			n, _ := o.upload.Read(buf)
			heard.Write(buf[:n])
			<-step
			o.answers(103)
			o.answers(200, exchange.Field{Name: "Content-Type", Value: "text/event-stream"})
			<-step
			o.writes("one")
			<-step
			o.writes("two")
			heard.WriteString(o.reads())
			o.ends(exchange.Field{Name: "Sum", Value: "down"})
		}
		c.more = exchange.Fields{{Name: "Sum", Value: "up"}}
		c.start(f.manager())
		io.WriteString(c.send, "up1")
		synctest.Wait()
		if heard.String() != "up1" {
			t.Errorf("the upstream heard %q so far", heard.String())
		}
		step <- struct{}{}
		synctest.Wait()
		if c.status() != 200 || c.flushed == 0 || !slices.Equal(c.informed, []int{103}) {
			t.Errorf("the head should be there: status %d, %d flushes, interim %v", c.status(), c.flushed, c.informed)
		}
		step <- struct{}{}
		synctest.Wait()
		c.wantBody("one")
		step <- struct{}{}
		io.WriteString(c.send, "up2")
		c.send.Close()
		c.wait()
		c.wantBody("onetwo")
		c.wantEnd(true)
		o := f.origin()
		if heard.String() != "up1up2" {
			t.Errorf("the upstream heard %q", heard.String())
		}
		if v, _ := o.more.Get("Sum"); v != "up" {
			t.Errorf("request trailers: %v", o.more)
		}
		if v, _ := c.trailers.Get("Sum"); v != "down" {
			t.Errorf("response trailers: %v", c.trailers)
		}
		if !o.conn.wasKept() || c.stopped {
			t.Errorf("kept %v, stopped reading %v", o.conn.wasKept(), c.stopped)
		}
	})
}

// A head that waits for its body costs a message more.
func TestAHeadLeavesTogetherWithWhatHasComeOfItsBody(t *testing.T) {
	t.Parallel()
	t.Run("of a response", func(t *testing.T) {
		t.Parallel()
		inBubble(t, func(t *testing.T) {
			f := newFarm(t)
			f.behave[first] = func(o *origin) { o.ready = true; ok(o) }
			c := get(t, "a.example", "/").start(f.manager()).wait()
			c.wantBody("ok")
			if c.flushed > 0 {
				t.Error("the head was sent by itself")
			}
		})
	})
	t.Run("of a response that breaks off at once", func(t *testing.T) {
		t.Parallel()
		inBubble(t, func(t *testing.T) {
			f := newFarm(t)
			f.behave[first] = func(o *origin) {
				o.ready = true
				o.respond.CloseWithError(io.ErrUnexpectedEOF)
				o.answers(200)
			}
			c := get(t, "a.example", "/").start(f.manager()).wait()
			c.wantStatus(200)
			c.wantEnd(false)
			if c.flushed != 1 {
				t.Errorf("%d flushes: the client did not get the head", c.flushed)
			}
		})
	})
	t.Run("of a request", func(t *testing.T) {
		t.Parallel()
		inBubble(t, func(t *testing.T) {
			f, c := newFarm(t), post(t, "a.example", "/")
			c.there = []byte("body")
			c.send.Close()
			c.start(f.manager()).wait().wantStatus(200)
			if calls := f.origin().calls; !slices.Equal(calls[:2], []string{"Send", "Write"}) {
				t.Errorf("the upstream's codec was called for %q", calls)
			}
		})
	})
}

func TestEarlyResponseEndsTheUpload(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name   string
		upload bool // the upstream has read a part of the body
		client func(*client)
	}{
		{"the client is silent", true, func(*client) {}},
		{"the client is in the middle", true, func(c *client) { io.WriteString(c.send, "part") }},
		{"the upstream does not read", false, func(c *client) { io.WriteString(c.send, strings.Repeat("x", 1<<20)) }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T) {
				f, c := newFarm(t), post(t, "a.example", "/")
				f.behave[first] = func(o *origin) {
					if tt.upload {
						go io.Copy(io.Discard, o.upload)
					}
					time.Sleep(time.Second)
					o.answers(413)
					o.writes("too much")
					o.ends()
				}
				go tt.client(c)
				c.start(f.manager()).wait()
				c.wantStatus(413)
				c.wantBody("too much")
				c.wantEnd(true)
				if !c.stopped {
					t.Error("the codec was not told that the body is given up")
				}
				if f.origin().conn.wasKept() {
					t.Error("a connection with half a request on it was kept")
				}
			})
		})
	}
}

func TestAPanicOverABodyCostsOnlyItsExchange(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f, c := newFarm(t), post(t, "a.example", "/")
		f.behave[first] = func(o *origin) { io.Copy(io.Discard, o.upload) }
		c.poisonous = true
		c.start(f.manager()).wait() // would end the test, and a process with all its tunnels
		if c.finished && c.answer.Status < 400 {
			t.Errorf("answered with %d", c.answer.Status)
		}
		if f.origin().conn.wasKept() {
			t.Error("a connection with half a request on it was kept")
		}
		f.wantLog("level=ERROR", "panic in an upload", "panic=tested")
	})
}

func TestUploadThatEndsWithTheResponseKeepsTheConnection(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f, c := newFarm(t), post(t, "a.example", "/")
		c.request.ContentLength = 4
		f.behave[first] = func(o *origin) {
			o.upload.Read(make([]byte, 1))
			o.answers(200)
			o.writes("ok")
			o.ends()
			time.Sleep(100 * time.Millisecond)
			o.reads()
		}
		go func() { io.WriteString(c.send, "body"); c.send.Close() }()
		c.start(f.manager()).wait()
		c.wantEnd(true)
		if c.stopped || !f.origin().conn.wasKept() {
			t.Errorf("stopped reading %v, kept %v", c.stopped, f.origin().conn.wasKept())
		}
	})
}

// The response is complete, and so is what the client has sent, but the upstream does not
// take it: nobody waits for that for long.
func TestUploadThatDoesNotEndAfterTheResponseIsGivenUp(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f, c := newFarm(t), post(t, "a.example", "/")
		c.request.ContentLength = 4
		f.behave[first] = func(o *origin) {
			time.Sleep(time.Second) // until the client has sent all
			o.answers(200)
			o.writes("ok")
			o.ends(exchange.Field{Name: "Sum", Value: "down"})
		}
		go func() { io.WriteString(c.send, "body") }()
		start := time.Now()
		c.start(f.manager()).wait()
		if took := time.Since(start); took != 2*time.Second {
			t.Errorf("it took %v", took)
		}
		c.wantBody("ok")
		c.wantEnd(true)
		if v, _ := c.trailers.Get("Sum"); v != "down" {
			t.Errorf("trailers: %v", c.trailers)
		}
		if !f.origin().conn.wasClosed() {
			t.Error("a connection with half a request on it was kept")
		}
	})
}

func TestAClientThatHasGoneAlreadyReachesNoUpstream(t *testing.T) {
	t.Parallel()
	for _, kind := range []func(*testing.T, string, string) *client{get, post, upgrade} {
		inBubble(t, func(t *testing.T) {
			f, c := newFarm(t), kind(t, "a.example", "/")
			f.routes = []config.Route{webSocket("/", "web")}
			c.cancel(errGone)
			c.start(f.manager()).wait()
			if c.status() != 0 || len(f.attempts) > 0 {
				t.Errorf("answered %d, connected to %v", c.status(), f.attempts)
			}
			f.wantLog("the client has gone")
		})
	}
}

// What a request was told, what it has waited for and when its time was over is nothing to
// the next one, which has its memory.
func TestARequestKnowsNothingOfTheOneBefore(t *testing.T) {
	t.Parallel()
	deaf := func(t *testing.T, authority, target string) *client {
		c := get(t, authority, target)
		c.deaf = true
		return c
	}
	sent := func(t *testing.T, authority, target string) *client {
		c := post(t, authority, target)
		c.request.ContentLength, c.there = 4, []byte("body")
		c.send.Close()
		return c
	}
	limited := webSocket("/limited", "web")
	limited.Timeout, limited.StreamIdleTimeout, limited.Tunnels.HandshakeTimeout = 5*time.Second, 5*time.Second, 5*time.Second
	late := func(o *origin) { time.Sleep(time.Minute); ok(o) }
	tests := []struct {
		name   string
		client func(*testing.T, string, string) *client
		behave func(*origin)
		during func(*client) // once everything has come to a standstill
	}{
		{"answered in time", get, ok, nil},
		{"too slow", get, silent, nil},
		{"with a body that does not come", post, silent, nil},
		{"answered early", post, func(o *origin) { o.answers(413); o.ends() }, nil},
		{"refused", get, func(o *origin) { time.Sleep(time.Second); failing(exchange.ErrNoAnswer)(o) }, nil},
		{"with a body that is taken last", sent, func(o *origin) {
			o.answers(200)
			o.writes("ok")
			o.ends()
			time.Sleep(500 * time.Millisecond)
			o.reads()
		}, nil},
		{"cut", get, func(o *origin) { o.answers(200); o.writes("part") }, nil},
		{"a tunnel", upgrade, agrees, nil},
		{"no tunnel", upgrade, answering(401), nil},
		{"a tunnel that hangs", upgrade, silent, nil},
		{"left by its client", get, silent, func(c *client) { c.cancel(errGone) }},
		{"not read by its client", deaf, ok, nil},
		{"left by its client over our answer", deaf, failing(exchange.ErrNoAnswer), func(c *client) { c.cancel(errGone) }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T) {
				f := newFarm(t)
				f.routes = []config.Route{limited, to("/", "web")}
				f.behave[first] = tt.behave
				var access records
				f.options = func(o *proxy.ManagerOptions) { o.AccessLog = access.open(t, nil) }
				m := f.manager()
				a, b := tt.client(t, "a.example", "/limited").start(m), tt.client(t, "a.example", "/limited").start(m)
				if tt.during != nil {
					synctest.Wait()
					tt.during(a)
					tt.during(b)
				}
				a.wait()
				b.wait()
				f.behave[first] = late
				c := get(t, "a.example", "/").start(m).wait() // longer than any limit of the others
				c.wantStatus(200)
				c.wantBody("ok")
				c.wantEnd(true)
				c.wantClose(false)
				if c.stopped || c.aborted {
					t.Error("it was given up")
				}
				wantRecord(t, access.read(t)[2], map[string]any{"event": "request", "status": 200, "reason": "", "sent_bytes": 2, "received_bytes": 0,
					"target": "/", "method": "GET", "route": "site:prefix=/", "endpoint": first, "duration_seconds": 60, "upstream_seconds": 60})
			})
		})
	}
}

func TestFaultInTheRequestBody(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name   string
		err    error
		begun  bool // the response has
		status int
		proper bool
	}{
		{"malformed", &exchange.StatusError{Status: 400, Text: "bad chunk"}, false, 400, true},
		{"too slow", &exchange.StatusError{Status: 408, Text: "slow"}, false, 408, true},
		{"too large", &exchange.StatusError{Status: 413, Text: "large"}, false, 413, true},
		{"within the response", &exchange.StatusError{Status: 400, Text: "bad chunk"}, true, 200, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T) {
				f, c := newFarm(t), post(t, "a.example", "/")
				f.behave[first] = func(o *origin) {
					if tt.begun {
						o.answers(200)
					}
					o.reads()
				}
				c.start(f.manager())
				io.WriteString(c.send, "part")
				synctest.Wait()
				c.send.CloseWithError(tt.err)
				c.wait()
				c.wantStatus(tt.status)
				c.wantEnd(tt.proper)
				o := f.origin()
				if o.sentAll || o.conn.wasKept() {
					t.Error("the upstream got a proper end, or its connection was kept")
				}
			})
		})
	}
}

// Nobody waits for the rest of a body of which the upstream takes no more, and the client
// is told that.
func TestAnUpstreamThatEndsWithinAnUploadCostsTheConnection(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		length int64
		last   bool
	}{
		"of unknown length": {-1, true},
		"of known length":   {100, true},
		"that it had read":  {int64(len("part")), false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T) {
				f, c := newFarm(t), post(t, "a.example", "/")
				c.request.ContentLength = tt.length
				f.behave[first] = func(o *origin) {
					o.upload.CloseWithError(io.ErrClosedPipe)
					time.Sleep(time.Second) // that it sends nothing either is noticed later
					o.heads <- exchange.ErrNoAnswer
				}
				go io.WriteString(c.send, "part")
				c.start(f.manager()).wait()
				c.wantStatus(503)
				c.wantEnd(true)
				c.wantClose(tt.last)
			})
		})
	}
}

func TestResponseCutShortIsCutForTheClient(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f := newFarm(t)
		f.behave[first] = func(o *origin) {
			o.answers(200)
			o.writes("half")
			o.respond.CloseWithError(io.ErrUnexpectedEOF)
		}
		c := get(t, "a.example", "/").start(f.manager()).wait()
		c.wantStatus(200)
		c.wantBody("half")
		c.wantEnd(false)
		f.wantLog("response cut", "unexpected EOF", "status=200", "endpoint=10.0.0.1:80")
	})
}

func TestTimeouts(t *testing.T) {
	t.Parallel()
	// speaks answers at once, and then one byte a second, three times.
	speaks := func(o *origin) {
		o.answers(200)
		for range 3 {
			time.Sleep(time.Second)
			o.writes(".")
		}
		<-o.gone
	}
	tests := []struct {
		name          string
		timeout, idle time.Duration
		behave        func(*origin)
		client        func(*client) // nil: a GET
		after         time.Duration
		status        int
		proper        bool
	}{
		{name: "no response", timeout: 5 * time.Second, behave: silent, after: 5 * time.Second, status: 504, proper: true},
		{name: "the response's head is enough", timeout: 500 * time.Millisecond, idle: 2 * time.Second, behave: speaks, after: 5 * time.Second, status: 200},
		{name: "counted from the end of the request", timeout: 5 * time.Second, behave: silent, after: 15 * time.Second, status: 504, proper: true,
			client: func(c *client) { time.Sleep(10 * time.Second); c.send.Close() }},
		{name: "nothing moves before the head", idle: 7 * time.Second, behave: silent, after: 7 * time.Second, status: 504, proper: true},
		{name: "the client's body was due", idle: 7 * time.Second, behave: silent, after: 8 * time.Second, status: 408, proper: true,
			client: func(c *client) { time.Sleep(time.Second); io.WriteString(c.send, "part") }},
		{name: "nothing moves after the head", idle: 7 * time.Second, behave: speaks, after: 10 * time.Second, status: 200},
		{name: "bytes of the request count", idle: 3 * time.Second, behave: silent, after: 11 * time.Second, status: 504, proper: true,
			client: func(c *client) {
				for range 4 {
					time.Sleep(2 * time.Second)
					io.WriteString(c.send, "part")
				}
				time.Sleep(time.Second)
				c.send.Close() // an end is no byte
			}},
		{name: "a client that does not read", idle: 7 * time.Second, behave: speaks, after: 8 * time.Second, status: 200,
			client: func(c *client) { c.send.Close(); c.mu.Lock(); defer c.mu.Unlock(); c.deaf = true }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T) {
				f, c := newFarm(t), get(t, "a.example", "/")
				f.behave[first] = tt.behave
				f.routes[0].Timeout, f.routes[0].StreamIdleTimeout = tt.timeout, tt.idle
				if tt.client != nil {
					c = post(t, "a.example", "/")
					go tt.client(c)
				}
				start := time.Now()
				c.start(f.manager()).wait()
				if took := time.Since(start); took != tt.after {
					t.Errorf("it took %v, want %v", took, tt.after)
				}
				c.wantStatus(tt.status)
				c.wantEnd(tt.proper)
				if f.origin().conn.wasKept() {
					t.Error("the connection was kept")
				}
			})
		})
	}
}

// A client may send requests and read no answers until its connection is full.
func TestAnswerOfOurOwnWaitsForNoClientThatDoesNotRead(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		target string
		behave func(*origin)
		after  time.Duration
	}{
		"no route":        {"/none", nil, 10 * time.Second},
		"a redirect":      {"/moved", nil, 10 * time.Second},
		"after a limit":   {"/", silent, 15 * time.Second},
		"after a failure": {"/", failing(&exchange.StatusError{Status: 502, Text: "nonsense"}), 10 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T) {
				f, c := newFarm(t), get(t, "a.example", tt.target)
				f.behave[first] = tt.behave
				f.routes = []config.Route{
					{Match: config.Match{Path: "/moved"}, Redirect: &config.Redirect{Path: "/", Status: 308}},
					{Match: config.Match{Path: "/"}, Clusters: f.routes[0].Clusters, Timeout: 5 * time.Second},
				}
				c.deaf = true
				start := time.Now()
				c.start(f.manager())
				select {
				case <-c.served:
				case <-time.After(time.Hour):
					t.Error("it waits for the client without end")
					c.cancel(errGone)
					c.wait()
				}
				if took := time.Since(start); took != tt.after {
					t.Errorf("it took %v, want %v", took, tt.after)
				}
				c.wantEnd(false)
			})
		})
	}
}

func TestTimeoutsAreOffByZero(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f := newFarm(t)
		f.behave[first] = func(o *origin) {
			time.Sleep(1000 * time.Hour)
			ok(o)
		}
		get(t, "a.example", "/").start(f.manager()).wait().wantStatus(200)
	})
}

func TestRouteTimeoutIncludesConnecting(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f := newFarm(t)
		f.connect[first] = hangs
		f.routes[0].Timeout = time.Second
		start := time.Now()
		get(t, "a.example", "/").start(f.manager()).wait().wantStatus(504)
		if time.Since(start) != time.Second {
			t.Errorf("it took %v", time.Since(start))
		}
		f.wantLog("within the route's timeout")
	})
}

func TestClientThatGoesTakesItsUpstreamAlong(t *testing.T) {
	t.Parallel()
	begins := func(o *origin) { o.answers(200); o.writes("half"); o.reads(); <-o.gone }
	tests := []struct {
		name   string
		client func(*testing.T, string, string) *client
		behave func(*origin)
	}{
		{"before the response", get, silent},
		{"within the response", get, begins},
		{"within its body", post, silent},
		{"within both", post, begins},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T) {
				f := newFarm(t)
				f.behave[first] = tt.behave
				c := tt.client(t, "a.example", "/").start(f.manager())
				synctest.Wait()
				c.cancel(errGone)
				c.wait()
				c.wantEnd(false)
				f.wantLog("the client has gone", "err=\"client gone\"")
				if o := f.origin(); !o.conn.wasClosed() {
					t.Error("the upstream's connection was not closed")
				}
			})
		})
	}
	t.Run("while connecting", func(t *testing.T) {
		t.Parallel()
		inBubble(t, func(t *testing.T) {
			f := newFarm(t)
			f.cluster["web"] = []string{first, "10.0.0.2:80"}
			f.connect[first] = hangs
			c := get(t, "a.example", "/").start(f.manager())
			synctest.Wait()
			c.cancel(errGone)
			c.wait()
			if len(f.attempts) != 1 || c.status() != 0 {
				t.Errorf("tried %v, answered %d", f.attempts, c.status())
			}
		})
	})
}

// A codec that has found out about the client tells whoever calls it, and the watcher. It
// does not matter who hears first.
func TestAClientsEndIsKnownFromErrors(t *testing.T) {
	t.Parallel()
	begins := func(o *origin) { o.answers(200); o.writes("half"); <-o.gone }
	tests := map[string]struct {
		client func(*testing.T, string, string) *client
		behave func(*origin)
		end    error
		line   string
	}{
		"within the request's body": {post, silent, errGone, "the client has gone"},
		"within the response":       {get, begins, errGone, "the client has gone"},
		"by the stop, in its body":  {post, silent, net.ErrClosed, "request cut"},
		"by the stop, in the rest":  {get, begins, net.ErrClosed, "request cut"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T) {
				f, c := newFarm(t), tt.client(t, "a.example", "/")
				f.behave[first] = tt.behave
				c.errorsOnly, c.deaf = true, true
				c.start(f.manager())
				synctest.Wait()
				c.cancel(tt.end)
				c.wait()
				c.wantEnd(false)
				f.wantLog(tt.line)
				if strings.Contains(f.logged(), "request refused") || strings.Contains(f.logged(), "response cut") {
					t.Error("and something else: ", f.logged())
				}
			})
		})
	}
}

// What the codec of the client does may come to its end when the time is over already, and
// the upstream's connection another request's.
func TestAConnectionThatWasGivenUpIsLeftAlone(t *testing.T) { // the fakes complain
	t.Parallel()
	tests := map[string]struct {
		client func(*client)
		behave func(*origin)
		took   time.Duration
		status int
	}{
		"an interim response": {
			func(c *client) { c.interim = time.Minute },
			func(o *origin) { o.answers(103); o.answers(200); <-o.gone }, time.Minute, 504},
		"a part of the response": {
			func(c *client) { c.deaf, c.inTime = true, true },
			func(o *origin) { o.answers(200); o.writes("part"); <-o.gone }, 5 * time.Second, 200},
		"a part of the request": {
			func(c *client) { c.request.Method, c.request.ContentLength, c.inTime = "POST", -1, true },
			silent, 5 * time.Second, 408},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T) {
				f, c := newFarm(t), get(t, "a.example", "/")
				f.routes[0].StreamIdleTimeout = 5 * time.Second
				f.behave[first] = tt.behave
				tt.client(c)
				start := time.Now()
				c.start(f.manager()).wait().wantStatus(tt.status)
				if took := time.Since(start); took != tt.took {
					t.Errorf("it took %v", took)
				}
				if strings.Contains(f.logged(), "panic") {
					t.Error(f.logged())
				}
			})
		})
	}
}

func TestWhatIsSentAgain(t *testing.T) {
	t.Parallel()
	lost := fmt.Errorf("%w: %w", exchange.ErrNoAnswer, syscall.ECONNRESET)
	tests := []struct {
		name   string
		method string
		length int64
		reused bool
		err    error
		again  bool
	}{
		{"a GET on a connection that was closed meanwhile", "GET", 0, true, lost, true},
		{"a HEAD", "HEAD", 0, true, lost, true},
		{"a DELETE", "DELETE", 0, true, lost, true},
		{"a PUT without a body", "PUT", 0, true, lost, true},
		{"not a PUT whose body was read", "PUT", 1, true, lost, false},
		{"not a POST", "POST", 0, true, lost, false},
		{"not an unknown method", "BREW", 0, true, lost, false},
		{"not on a fresh connection", "GET", 0, false, lost, false},
		{"not after a part of a response", "GET", 0, true, &exchange.StatusError{Status: 502, Text: "cut in the head"}, false},
		{"not after any other error", "GET", 0, true, io.ErrUnexpectedEOF, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T) {
				f := newFarm(t)
				f.behave[first] = func(o *origin) {
					failed := len(f.origins()) == 1 && !tt.reused || len(f.origins()) == 2 && tt.reused
					if failed {
						o.heads <- tt.err
						return
					}
					ok(o)
				}
				m := f.manager()
				if tt.reused {
					get(t, "a.example", "/").start(m).wait().wantStatus(200)
				}
				before := len(f.origins())
				c := get(t, "a.example", "/")
				c.request.Method, c.request.ContentLength = tt.method, tt.length
				go func() { io.WriteString(c.send, strings.Repeat("x", int(tt.length))); c.send.Close() }()
				c.start(m).wait()
				if again := len(f.origins())-before == 2; again != tt.again {
					t.Fatalf("sent again: %v, want %v", again, tt.again)
				}
				if !tt.again {
					c.wantStatus(exchange.StatusOf(tt.err, 503))
					return
				}
				c.wantStatus(200)
				if last := f.origins()[before+1]; last.reused {
					t.Error("sent again on a kept connection")
				}
			})
		})
	}
}

func TestItIsSentAgainOnceAndOnAFreshConnection(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f := newFarm(t)
		f.behave[first] = func(o *origin) {
			if len(f.origins()) <= 2 {
				time.Sleep(time.Second) // so that there are two connections
				ok(o)
				return
			}
			o.heads <- exchange.ErrNoAnswer
		}
		m := f.manager()
		a, b := get(t, "a.example", "/").start(m), get(t, "a.example", "/").start(m)
		a.wait().wantStatus(200)
		b.wait().wantStatus(200)
		get(t, "a.example", "/").start(m).wait().wantStatus(503)
		all := f.origins()
		if len(all) != 4 || !all[2].reused || all[3].reused {
			t.Errorf("%d exchanges; the third should be on a kept connection, the fourth and last on a fresh one", len(all))
		}
	})
}

func TestCloseOfTheUpstreamIsNotTheClients(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f := newFarm(t)
		f.behave[first] = func(o *origin) {
			o.heads <- &exchange.Response{Status: 200, Close: true, ContentLength: 0}
			o.ends()
		}
		get(t, "a.example", "/").start(f.manager()).wait().wantClose(false)
	})
}

func TestResponseThatCannotBeSentReachesNobody(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f := newFarm(t)
		f.behave[first] = func(o *origin) { o.answers(200); o.writes("body"); <-o.gone }
		c := get(t, "a.example", "/")
		c.deaf = true
		c.start(f.manager())
		synctest.Wait()
		c.cancel(errors.New("connection reset by peer"))
		c.wait()
		c.wantEnd(false)
	})
}

// Beside a dead upstream there is a line for each request: they drown the others unless
// there is no other record of them.
func TestTheLogLeavesToTheAccessLogWhatThatRecords(t *testing.T) {
	t.Parallel()
	breaksOff := func(o *origin) {
		o.answers(200)
		o.writes("part")
		o.respond.CloseWithError(errors.New("connection reset by peer"))
	}
	for name, tt := range map[string]struct {
		client func(*testing.T, string, string) *client
		behave func(*origin)
		end    error // of the client, once everything has come to a standstill
		line   string
	}{
		"an answer of our own":                   {get, failing(exchange.ErrNoAnswer), nil, "request refused"},
		"an answer that breaks off":              {get, breaksOff, nil, "response cut"},
		"an answer that is cut by the stop":      {get, silent, net.ErrClosed, "request cut"},
		"a client that waits no more to upgrade": {upgrade, silent, errGone, "the client has gone"},
	} {
		for level, recorded := range map[string]bool{"INFO": false, "DEBUG": true} {
			t.Run(name+" at "+level, func(t *testing.T) {
				t.Parallel()
				inBubble(t, func(t *testing.T) {
					f := newFarm(t)
					f.routes = []config.Route{webSocket("/", "web")}
					f.behave[first] = tt.behave
					var access records
					if recorded {
						f.options = func(o *proxy.ManagerOptions) { o.AccessLog = access.open(t, nil) }
					}
					c := tt.client(t, "a.example", "/").start(f.manager())
					if tt.end != nil {
						synctest.Wait()
						c.cancel(tt.end)
					}
					c.wait()
					f.wantLog("level=" + level + " msg=\"" + tt.line)
					if recorded && len(access.read(t)) != 1 {
						t.Error("it is not in the access log either")
					}
				})
			})
		}
	}
}

func TestLogHoldsClientStringsInAttributesOnly(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f := newFarm(t)
		get(t, "evil\nlevel=ERROR msg=forged", "/\x1b[31m").start(f.manager()).wait().wantStatus(404)
		if n := strings.Count(f.logged(), "\n"); n != 1 || strings.Contains(f.logged(), "\x1b") {
			t.Errorf("%d lines: %q", n, f.logged())
		}
	})
}
