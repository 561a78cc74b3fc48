package proxy_test

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/dynamic"
	"holdfast/internal/exchange"
	"holdfast/internal/proxy"
	"holdfast/internal/stream"
	"holdfast/internal/stream/streamtest"
)

// glass is the endpoint of the cluster "mirror".
const glass = "10.1.0.1:80"

// mirrored is a farm whose requests are copied.
func mirrored(t *testing.T, change ...func(*config.Route)) *farm {
	f := newFarm(t)
	r := to("/", "web")
	r.Mirror = &config.Mirror{Cluster: "mirror", Percent: config.Dynamic{Value: dynamic.Whole}, Buffer: 64 << 10}
	for _, c := range change {
		c(&r)
	}
	f.routes = []config.Route{r}
	f.cluster["mirror"] = []string{glass}
	return f
}

// copies are the exchanges of the mirror.
func (f *farm) copies() (all []*origin) {
	for _, o := range f.origins() {
		if o.conn.address == glass {
			all = append(all, o)
		}
	}
	return all
}

// over says that the exchange was closed.
func (o *origin) over() bool {
	select {
	case <-o.gone:
		return true
	default:
		return false
	}
}

func TestTheMirrorGetsACopy(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("x", 50_000)
	tests := []struct {
		name      string
		client    func(*testing.T, string, string) *client
		authority string
		body      string
		length    int64 // as the client states it
		host      string
		change    func(*config.Route)
	}{
		{"a GET", get, "a.example", "", 0, "a.example-shadow", nil},
		{"a host with a port", get, "a.example:8080", "", 0, "a.example-shadow:8080", nil},
		{"a rewritten host", get, "a.example", "", 0, "b-shadow:1", func(r *config.Route) { r.HostRewrite = "b:1" }},
		{"a body of unknown length", post, "a.example", "some", -1, "a.example-shadow", nil},
		{"a body of known length", post, "a.example", "some", 4, "a.example-shadow", nil},
		{"an empty body of unknown length", post, "a.example", "", -1, "a.example-shadow", nil},
		{"a longer body", post, "a.example", long, -1, "a.example-shadow", nil},
		{"a body that is buffered", post, "a.example", long, -1, "a.example-shadow", func(r *config.Route) { r.RequestBuffer = 1 << 20 }},
		{"a body that may be tried again", post, "a.example", long, -1, "a.example-shadow", func(r *config.Route) { r.Retry = retrying(on5xx).Retry }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T) {
				f := mirrored(t, func(r *config.Route) {
					r.PrefixRewrite = "/new/"
					if tt.change != nil {
						tt.change(r)
					}
				})
				var original, copied string
				f.behave[first] = func(o *origin) {
					original = o.reads()
					o.answers(200)
					o.writes("the answer")
					o.ends()
				}
				f.behave[glass] = func(o *origin) {
					copied = o.reads()
					o.answers(500)
					o.writes("nobody gets this")
					o.ends()
				}
				c := tt.client(t, tt.authority, "/path?q")
				c.request.ContentLength = tt.length
				c.request.Fields.Add("X-Own", "1")
				go func() { io.WriteString(c.send, tt.body); c.send.Close() }()
				c.start(f.manager()).wait()
				c.wantStatus(200)
				c.wantBody("the answer")
				synctest.Wait()
				all := f.copies()
				if len(all) != 1 || original != tt.body || copied != tt.body {
					t.Fatalf("%d copies; of %d bytes the endpoint got %d and the mirror %d", len(all), len(tt.body), len(original), len(copied))
				}
				head := all[0].head
				if v, _ := head.Fields.Get("X-Own"); head.Authority != tt.host || head.Target != "/new/path?q" || head.Method != c.request.Method || v != "1" {
					t.Errorf("the mirror got %+v", head)
				}
				if head.ContentLength != int64(len(tt.body)) {
					t.Errorf("Content-Length %d", head.ContentLength)
				}
				if !all[0].conn.wasKept() {
					t.Error("the mirror's connection was not kept")
				}
				f.wantRetries("mirrored 1")
				if n := figures(f.registry)["downstream_requests_total{public}"]; n != 1 {
					t.Errorf("%d requests", n)
				}
			})
		})
	}
}

func TestTheMirrorNeitherSlowsNorHarms(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name    string
		behave  func(*origin)
		connect bool // it cannot be connected to
		outcome string
	}{
		{"it does not answer", silent, false, "mirror_failures 1"},
		{"it reads nothing", func(o *origin) { <-o.gone }, false, "mirror_failures 1"},
		{"it answers for ever", func(o *origin) {
			o.reads()
			o.answers(200)
			for {
				if _, err := io.WriteString(o.respond, strings.Repeat("x", 1000)); err != nil {
					return
				}
			}
		}, false, ""},
		{"it answers with a byte now and then", func(o *origin) {
			o.reads()
			o.answers(200)
			for {
				if _, err := io.WriteString(o.respond, "x"); err != nil {
					return
				}
				time.Sleep(time.Second)
			}
		}, false, "mirror_failures 1"},
		{"it talks nonsense", failing(&exchange.StatusError{Status: 502, Text: "bad"}), false, "mirror_failures 1"},
		{"it agrees to an upgrade", agrees, false, "mirror_failures 1"},
		{"it cannot be connected to", nil, true, "mirror_failures 1"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T) {
				f := mirrored(t, func(r *config.Route) { r.Timeout = 5 * time.Second })
				f.behave[glass] = tt.behave
				if tt.connect {
					f.connect[glass] = refused
				}
				c := post(t, "a.example", "/")
				go func() { io.WriteString(c.send, strings.Repeat("x", 10_000)); c.send.Close() }()
				began := time.Now()
				c.start(f.manager()).wait()
				c.wantStatus(200)
				c.wantBody("ok")
				c.wantEnd(true)
				if time.Since(began) > 0 {
					t.Error("the client was held up")
				}
				time.Sleep(6 * time.Second)
				for _, o := range f.copies() {
					if !o.over() {
						t.Error("the copy goes on")
					}
				}
				f.wantRetries("mirrored 1\n" + tt.outcome)
				if log := f.logged(); strings.Contains(log, "request refused") || strings.Contains(log, "response cut") {
					t.Error(log)
				}
			})
		})
	}
}

func TestWhatIsNotMirrored(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name   string
		route  func(*config.Route)
		client func(*client)
		counts string
	}{
		{"none of the requests", func(r *config.Route) { r.Mirror.Percent.Value = 0 }, nil, ""},
		{"an upgrade", func(r *config.Route) { r.WebSocket = true }, func(c *client) { c.request.Upgrade, c.request.ContentLength = "websocket", 0 }, ""},
		{"a body of unknown length that is too long", nil, func(c *client) { c.there = []byte(strings.Repeat("x", 4000)) },
			"mirror_drops_total{site,site:prefix=/,body too large} 1"},
		{"a body of known length that is too long", nil, func(c *client) { c.request.ContentLength = 100_000 }, "mirror_drops_total{site,site:prefix=/,body too large} 1"},
		{"a long body that is buffered", func(r *config.Route) { r.RequestBuffer = 1 << 20 }, func(c *client) { c.request.ContentLength = 100_000 },
			"mirror_drops_total{site,site:prefix=/,body too large} 1"},
		{"a body that is not complete", nil, func(c *client) { c.send.CloseWithError(io.ErrUnexpectedEOF) }, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T) {
				f := mirrored(t)
				if tt.route != nil {
					tt.route(&f.routes[0])
				}
				c := post(t, "a.example", "/")
				if tt.client != nil {
					tt.client(c)
				}
				body := strings.Repeat("x", int(max(c.request.ContentLength, int64(20*len(c.there)))))
				go func() {
					io.WriteString(c.send, body)
					c.send.Close()
				}()
				c.start(f.manager()).wait()
				if n := len(f.copies()); n != 0 {
					t.Errorf("%d copies", n)
				}
				f.wantRetries(tt.counts)
			})
		})
	}
}

func TestAShareOfTheRequestsIsMirrored(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f := mirrored(t, func(r *config.Route) { r.Mirror.Percent = config.Dynamic{Value: dynamic.Whole / 4, Key: "share"} })
		set := new(dynamic.Set)
		var n uint64
		f.options = func(o *proxy.ManagerOptions) {
			o.Values = set
			o.Random = func() uint64 { n++; return n * 7919 * dynamic.Whole / 1000 } // spread evenly
		}
		m := f.manager()
		copied := func() int {
			before := len(f.copies())
			for range 100 {
				get(t, "a.example", "/").start(m).wait()
			}
			synctest.Wait()
			return len(f.copies()) - before
		}
		got := []int{copied()}
		for _, percent := range []float64{0, 100} {
			set.Apply(map[string]float64{"share": percent})
			got = append(got, copied())
		}
		if got[0] < 15 || got[0] > 35 || got[1] != 0 || got[2] != 100 {
			t.Errorf("copied %v of 100 each", got)
		}
	})
}

func TestCopiesAreBounded(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		length, most int
	}{"their number": {0, 256}, "their bodies": {1 << 20, 16}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T) {
				f := mirrored(t, func(r *config.Route) { r.Mirror.Buffer = 16 << 20 })
				f.behave[glass] = silent
				m := f.manager()
				for range tt.most + 5 {
					c := get(t, "a.example", "/")
					if tt.length > 0 {
						c = post(t, "a.example", "/")
						c.request.ContentLength = int64(tt.length)
						go func() { io.WriteString(c.send, strings.Repeat("x", tt.length)); c.send.Close() }()
					}
					c.start(m).wait().wantStatus(200)
				}
				f.wantRetries(fmt.Sprintf("mirrored %d\nmirror_drops_total{site,site:prefix=/,too many} 5", tt.most))
				time.Sleep(time.Minute) // they were given up
				get(t, "a.example", "/").start(m).wait()
				f.wantRetries(fmt.Sprintf("mirrored %d\nmirror_failures %d\nmirror_drops_total{site,site:prefix=/,too many} 5", tt.most+1, tt.most))
			})
		})
	}
}

// Nobody has the request any more: its texts are another one's.
func TestACopyOutlivesItsRequest(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f := mirrored(t)
		release := make(chan struct{})
		f.connect[glass] = waitFor(release)
		memory := []byte("GET/pathX-Ownvaluea.example")
		texts := func(from, to int) string { return unsafeString(memory[from:to]) }
		c := get(t, "a.example", "/path")
		c.request.Method, c.request.Target = texts(0, 3), texts(3, 8)
		c.request.Fields.Add(texts(8, 13), texts(13, 18))
		c.request.Authority = texts(18, 27)
		c.start(f.manager()).wait().wantStatus(200)
		streamtest.Do(f.loop, func() {
			for i := range memory {
				memory[i] = '!'
			}
		})
		close(release)
		synctest.Wait()
		head := f.copies()[0].head
		if v, _ := head.Fields.Get("X-Own"); head.Method != "GET" || head.Target != "/path" || v != "value" || head.Authority != "a.example-shadow" {
			t.Errorf("the mirror got %+v", head)
		}
	})
}

func TestCopiesEndWithTheGeneration(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f := mirrored(t)
		f.behave[glass] = silent
		m := f.manager()
		for range 3 {
			get(t, "a.example", "/").start(m).wait()
		}
		synctest.Wait()
		began := time.Now()
		m.EndMirrors(t.Context(), []*stream.Loop{f.loop})
		if time.Since(began) > 0 || slices.ContainsFunc(f.copies(), func(o *origin) bool { return !o.over() }) {
			t.Error("copies are left")
		}
		get(t, "a.example", "/").start(m).wait().wantStatus(200)
		synctest.Wait()
		if n := len(f.copies()); n != 3 {
			t.Errorf("%d copies", n)
		}
		m.EndMirrors(t.Context(), []*stream.Loop{f.loop})
	})
}
