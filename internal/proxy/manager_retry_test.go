package proxy_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/dynamic"
	"holdfast/internal/exchange"
	"holdfast/internal/proxy"
)

// three are the endpoints of a cluster of several.
var three = []string{"10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80"}

// retrying is a route to "web" that tries again.
func retrying(on config.RetryOn, change ...func(*config.Retry)) config.Route {
	r := to("/", "web")
	r.Retry = &config.Retry{
		On: on, StatusCodes: []int{429}, Attempts: config.Dynamic{Value: 1},
		BackoffBase: 25 * time.Millisecond, BackoffMax: 250 * time.Millisecond, Buffer: 64 << 10,
	}
	for _, c := range change {
		c(r.Retry)
	}
	return r
}

func attempts(n int64) func(*config.Retry) { return func(r *config.Retry) { r.Attempts.Value = n } }

// inTurn does one thing after the other, and the last one from then on.
func inTurn(behave ...func(*origin)) func(*origin) {
	var n atomic.Int64
	return func(o *origin) { behave[min(int(n.Add(1)), len(behave))-1](o) }
}

// addresses are those of the endpoints that were given the request, in order.
func (f *farm) addresses() (all []string) {
	for _, o := range f.origins() {
		all = append(all, o.conn.address)
	}
	return all
}

// wantRetries compares what was counted of retries, by name without what is common.
func (f *farm) wantRetries(want string) {
	f.t.Helper()
	got := map[string]int64{}
	for name, v := range figures(f.registry) {
		short, isRoute := strings.CutPrefix(name, "route_")
		short = strings.TrimSuffix(short, "_total{site,site:prefix=/}")
		if isRoute && (strings.Contains(short, "retr") || strings.Contains(short, "per_try") || strings.Contains(short, "mirror")) {
			got[short] = v
		}
	}
	wantFigures(f.t, got, want)
}

const (
	onConnect = config.RetryConnectFailure
	onRefused = config.RetryRefusedStream
	onReset   = config.RetryReset
	on5xx     = config.Retry5xx
	onGateway = config.RetryGatewayError
	on4xx     = config.Retry4xx
	onCodes   = config.RetryStatusCodes
)

// Every reason and every thing that happens: what is tried again.
func TestWhatIsTriedAgain(t *testing.T) {
	t.Parallel()
	lost := fmt.Errorf("%w: %w", exchange.ErrNoAnswer, io.EOF)
	half := fmt.Errorf("upstream: %w", io.ErrUnexpectedEOF)
	bad := &exchange.StatusError{Status: 502, Text: "upstream: two lengths"}
	any5xx := onReset | on5xx | onGateway
	happens := []struct {
		name    string
		connect func(context.Context) error
		behave  func(*origin)
		again   config.RetryOn // the reasons that it is one of
		status  int            // without a retry
	}{
		{"connection refused", refused, nil, onConnect | any5xx, 503},
		{"connecting takes too long", hangs, nil, onConnect | any5xx, 504},
		{"no answer", nil, failing(lost), any5xx, 503},
		{"a refused stream", nil, failing(exchange.ErrRefused), any5xx | onRefused, 503},
		{"half a head", nil, failing(half), any5xx, 503},
		{"nonsense", nil, failing(bad), any5xx, 502},
		{"an unasked 101", nil, agrees, any5xx, 502},
		{"no answer in the time of a try", nil, silent, any5xx, 504},
		{"500", nil, answering(500), on5xx, 500},
		{"501", nil, answering(501), on5xx, 501},
		{"502", nil, answering(502), on5xx | onGateway, 502},
		{"503", nil, answering(503), on5xx | onGateway, 503},
		{"504", nil, answering(504), on5xx | onGateway, 504},
		{"505", nil, answering(505), on5xx, 505},
		{"409", nil, answering(409), on4xx, 409},
		{"404", nil, answering(404), 0, 404},
		{"429", nil, answering(429), onCodes, 429},
		{"200", nil, ok, 0, 200},
	}
	for _, h := range happens {
		for _, on := range []config.RetryOn{onConnect, onRefused, onReset, on5xx, onGateway, on4xx, onCodes} {
			t.Run(fmt.Sprint(h.name, " for ", on), func(t *testing.T) {
				t.Parallel()
				inBubble(t, func(t *testing.T) {
					f := newFarm(t)
					f.routes = []config.Route{retrying(on, func(r *config.Retry) { r.PerTryTimeout = time.Second })}
					f.behave[first] = inTurn(h.behave, ok)
					var tries atomic.Int64
					if h.connect != nil {
						f.behave[first] = ok
						f.connect[first] = func(ctx context.Context) error {
							if tries.Add(1) == 1 {
								return h.connect(ctx)
							}
							return nil
						}
					}
					c := post(t, "a.example", "/")
					go func() { io.WriteString(c.send, "body"); c.send.Close() }()
					c.start(f.manager()).wait()
					c.wantEnd(true)
					if again := h.again&on != 0; again {
						c.wantStatus(200)
						f.wantRetries("retries 1\nretry_successes 1" + map[bool]string{true: "\nper_try_timeouts 1"}[strings.Contains(h.name, "of a try")])
						if got := f.origins()[len(f.origins())-1]; got.call("Finish") != 1 {
							t.Error("the last try did not get the whole body")
						}
					} else {
						c.wantStatus(h.status)
						f.wantRetries(map[bool]string{true: "per_try_timeouts 1"}[strings.Contains(h.name, "of a try")])
					}
				})
			})
		}
	}
}

// call is how often something was called of an exchange.
func (o *origin) call(what string) (n int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, c := range o.calls {
		if c == what {
			n++
		}
	}
	return n
}

func TestARetryGoesToTheNextEndpoint(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f := newFarm(t)
		f.cluster["web"] = three
		f.routes = []config.Route{retrying(onGateway, attempts(4))}
		for _, e := range three {
			f.behave[e] = answering(503)
		}
		m := f.manager()
		c := get(t, "a.example", "/").start(m).wait()
		c.wantStatus(503)
		c.wantBody("answer 503") // the last one, as it is
		if want := slices.Concat(three, three[:2]); !slices.Equal(f.addresses(), want) {
			t.Errorf("tried %v, want %v", f.addresses(), want)
		}
		f.wantRetries("retries 4\nretry_limit_exceeded 1")
		get(t, "a.example", "/").start(m).wait() // each try has taken a turn
		if got := f.addresses()[5]; got != three[2] {
			t.Errorf("the next request begins with %s", got)
		}
	})
}

// Others have been connected to in vain before the first retry, which begins behind them.
func TestEndpointsThatCannotBeConnectedToAreNoRetries(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f := newFarm(t)
		f.cluster["web"] = append(slices.Clone(three), "10.0.0.4:80")
		f.routes = []config.Route{retrying(onConnect)}
		for _, e := range three {
			f.connect[e] = refused
		}
		c := get(t, "a.example", "/").start(f.manager()).wait()
		c.wantStatus(200)
		if want := append(slices.Clone(three), "10.0.0.4:80"); !slices.Equal(f.attempts, want) {
			t.Errorf("tried %v, want %v", f.attempts, want)
		}
		f.wantRetries("retries 1\nretry_successes 1")
	})
}

func TestPausesBetweenTries(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name   string
		random uint64
		want   []time.Duration // in ms, at least
	}{
		{"the longest", 524_999_999, []time.Duration{24, 74, 174, 24, 249}}, // 524.999999 ms modulo 25, 75, 175, 375 (wraps), ...
		{"none", 0, []time.Duration{0, 0, 0, 0, 0}},
	}
	tests[0].want = nil
	for n := 1; n <= 5; n++ {
		longest := min(time.Duration(1<<n-1)*25*time.Millisecond, 250*time.Millisecond)
		tests[0].want = append(tests[0].want, time.Duration(tests[0].random%uint64(longest)))
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T) {
				f := newFarm(t)
				f.routes = []config.Route{retrying(on5xx, attempts(5))}
				f.options = numbered(tt.random)
				var came []time.Time
				f.behave[first] = func(o *origin) {
					came = append(came, time.Now())
					answering(500)(o)
				}
				get(t, "a.example", "/").start(f.manager()).wait()
				for i, want := range tt.want {
					got := came[i+1].Sub(came[i])
					if got < want || got > want+5*time.Millisecond {
						t.Errorf("retry %d came after %v, want %v", i+1, got, want)
					}
				}
			})
		})
	}
}

// Whatever the random number, a pause is below its bound.
func TestAPauseIsShorterThanItsBound(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f := newFarm(t)
		f.routes = []config.Route{retrying(on5xx, attempts(100))}
		f.options = func(o *proxy.ManagerOptions) { o.Random = rand.New(rand.NewPCG(1, 2)).Uint64 }
		var came []time.Time
		f.behave[first] = func(o *origin) {
			came = append(came, time.Now())
			answering(500)(o)
		}
		get(t, "a.example", "/").start(f.manager()).wait()
		if len(came) != 101 {
			t.Fatalf("%d tries", len(came))
		}
		for i := range 100 {
			longest := time.Duration(math.Min(float64(250*time.Millisecond), (math.Pow(2, float64(i+1))-1)*float64(25*time.Millisecond)))
			if got := came[i+1].Sub(came[i]); got > longest+5*time.Millisecond {
				t.Errorf("retry %d came after %v", i+1, got)
			}
		}
	})
}

func TestTheRoutesTimeIsForAllTries(t *testing.T) {
	t.Parallel()
	for name, kind := range map[string]func(*testing.T, string, string) *client{"a GET": get, "a POST": post} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T) {
				f := newFarm(t)
				f.routes = []config.Route{retrying(onReset, attempts(100), func(r *config.Retry) { r.PerTryTimeout = time.Second })}
				f.routes[0].Timeout = 5 * time.Second
				f.behave[first] = silent
				began := time.Now()
				c := kind(t, "a.example", "/")
				go c.send.Close()
				c.start(f.manager()).wait()
				c.wantStatus(504)
				c.wantEnd(true)
				if took := time.Since(began); took < 5*time.Second || took > 5500*time.Millisecond {
					t.Errorf("answered after %v", took)
				}
				if n := len(f.origins()); n < 4 || n > 5 {
					t.Errorf("%d tries", n)
				}
				f.wantLog("no response within the route's timeout")
			})
		})
	}
}

func TestTheTimeOfATryBeginsWithTheEndOfTheRequest(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f, c := newFarm(t), post(t, "a.example", "/")
		f.routes = []config.Route{retrying(onConnect, func(r *config.Retry) { r.PerTryTimeout = time.Second })}
		f.behave[first] = silent
		began := time.Now()
		go func() { time.Sleep(10 * time.Second); c.send.Close() }()
		c.start(f.manager()).wait()
		c.wantStatus(504)
		if took := time.Since(began); took < 11*time.Second || took > 11100*time.Millisecond {
			t.Errorf("answered after %v", took)
		}
		f.wantRetries("per_try_timeouts 1")
		f.wantLog("retry.per_try_timeout")
	})
}

func TestNothingIsTriedAgainOnceTheResponseHasBegun(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f := newFarm(t)
		f.routes = []config.Route{retrying(onReset|on5xx, attempts(5), func(r *config.Retry) { r.PerTryTimeout = time.Second })}
		f.behave[first] = func(o *origin) {
			o.answers(200)
			o.writes("half")
			time.Sleep(time.Minute) // no limit of a try any more
			o.respond.CloseWithError(io.ErrUnexpectedEOF)
		}
		c := get(t, "a.example", "/").start(f.manager()).wait()
		c.wantStatus(200)
		c.wantBody("half")
		c.wantEnd(false)
		f.origin()
		f.wantRetries("")
	})
}

func TestInterimResponsesComeFromEveryTry(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f := newFarm(t)
		f.routes = []config.Route{retrying(on5xx)}
		f.behave[first] = inTurn(
			func(o *origin) { o.answers(103); answering(503)(o) },
			func(o *origin) { o.answers(102); ok(o) })
		c := get(t, "a.example", "/").start(f.manager()).wait()
		c.wantStatus(200)
		if !slices.Equal(c.informed, []int{103, 102}) {
			t.Errorf("the client was informed of %v", c.informed)
		}
	})
}

// A response that nobody gets costs the connection only if it is not there already.
func TestDiscardedResponses(t *testing.T) {
	t.Parallel()
	for _, there := range []bool{true, false} {
		inBubble(t, func(t *testing.T) {
			f := newFarm(t)
			f.routes = []config.Route{retrying(on5xx)}
			f.behave[first] = inTurn(func(o *origin) {
				o.ready = there
				answering(503)(o)
			}, ok)
			c := get(t, "a.example", "/").start(f.manager()).wait()
			c.wantStatus(200)
			c.wantBody("ok")
			if got := f.origins()[0].conn.wasKept(); got != there {
				t.Errorf("the connection was kept: %v, want %v", got, there)
			}
			if got := figures(f.registry)["cluster_cancelled_total{web}"]; got != 0 {
				t.Error("counted as if the client had gone")
			}
		})
	}
}

func TestUpgradesAreTriedOnce(t *testing.T) {
	t.Parallel()
	for name, behave := range map[string]func(*origin){"refused": answering(503), "not answered": failing(exchange.ErrNoAnswer)} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T) {
				f := newFarm(t)
				r := retrying(onConnect|onReset|on5xx, attempts(5))
				r.WebSocket = true
				r.RequestBuffer, r.Mirror = 1<<10, &config.Mirror{Cluster: "web", Percent: config.Dynamic{Value: dynamic.Whole}}
				f.routes = []config.Route{r}
				f.behave[first] = behave
				upgrade(t, "a.example", "/").start(f.manager()).wait().wantStatus(503)
				f.origin()
				f.wantRetries("")
			})
		})
	}
}

func TestAClientThatGoesWhileItsRetryWaits(t *testing.T) {
	t.Parallel()
	for name, kind := range map[string]func(*testing.T, string, string) *client{"a GET": get, "a POST that is not complete": post} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T) {
				f := newFarm(t)
				f.routes = []config.Route{retrying(onReset, func(r *config.Retry) {
					r.BackoffBase, r.BackoffMax = time.Hour, time.Hour
				})}
				f.options = numbered(uint64(30 * time.Minute))
				f.behave[first] = func(o *origin) { o.heads <- exchange.ErrNoAnswer }
				c := kind(t, "a.example", "/").start(f.manager())
				synctest.Wait()
				began := time.Now()
				c.cancel(errGone)
				c.wait()
				if time.Since(began) > time.Second {
					t.Error("the request was kept")
				}
				f.origin()
				c.wantStatus(0)
			})
		})
	}
}

func TestTheRetryBudgetIsSharedByTheRequestsOfACluster(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f := newFarm(t)
		f.budget = config.RetryBudget{MinConcurrency: 1}
		f.routes = []config.Route{retrying(onGateway)}
		release := make(chan struct{})
		f.behave[first] = inTurn(answering(503), func(o *origin) { <-release; ok(o) }, answering(503), answering(503), ok)
		m := f.manager()
		a := get(t, "a.example", "/").start(m)
		time.Sleep(time.Minute) // its retry is under way
		get(t, "a.example", "/").start(m).wait().wantStatus(503)
		f.wantRetries("retries 1\nretry_overflows 1")
		close(release)
		a.wait().wantStatus(200)
		get(t, "a.example", "/").start(m).wait().wantStatus(200)
		f.wantRetries("retries 2\nretry_overflows 1\nretry_successes 2")
	})
}

// A response that goes on for long is no retry any more.
func TestAResponseThatHasBegunIsNotInTheBudget(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f := newFarm(t)
		f.budget = config.RetryBudget{MinConcurrency: 1}
		f.routes = []config.Route{retrying(onGateway)}
		release := make(chan struct{})
		f.behave[first] = inTurn(answering(503), func(o *origin) {
			o.answers(200)
			o.writes("data: 1")
			<-release
			o.ends()
		}, answering(503), ok)
		m := f.manager()
		a := get(t, "a.example", "/").start(m)
		time.Sleep(time.Minute)
		get(t, "a.example", "/").start(m).wait().wantStatus(200)
		close(release)
		a.wait().wantStatus(200)
		f.wantRetries("retries 2\nretry_successes 2")
	})
}

func TestTheRetryBudgetIsAShareOfWhatIsUnderWay(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f := newFarm(t)
		f.budget = config.RetryBudget{Percent: config.Dynamic{Value: dynamic.Whole / 5}}
		f.routes = []config.Route{retrying(onGateway)}
		release := make(chan struct{})
		f.behave[first] = func(o *origin) {
			o.reads()
			<-release
			o.answers(503)
			o.ends()
		}
		m := f.manager()
		var all []*client
		for range 10 {
			all = append(all, get(t, "a.example", "/").start(m))
		}
		synctest.Wait()
		close(release)
		for _, c := range all {
			c.wait().wantStatus(503)
		}
		// Two of ten; those that come back find fewer under way.
		if got := figures(f.registry)["route_retries_total{site,site:prefix=/}"]; got < 1 || got > 2 {
			t.Errorf("%d retries", got)
		}
	})
}

func TestRetriesAreOverriddenAtRunTime(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f := newFarm(t)
		set := new(dynamic.Set)
		f.options = func(o *proxy.ManagerOptions) { o.Values = set }
		f.budget.Percent.Key = "budget"
		f.routes = []config.Route{retrying(onGateway, func(r *config.Retry) { r.Attempts.Key = "tries" })}
		f.behave[first] = answering(503)
		m := f.manager()
		tries := func() int {
			before := len(f.origins())
			get(t, "a.example", "/").start(m).wait().wantStatus(503)
			return len(f.origins()) - before
		}
		got := []int{tries()}
		for _, n := range []float64{0, 3, -1, 1e6} {
			set.Apply(map[string]float64{"tries": n})
			got = append(got, tries())
		}
		if want := []int{2, 1, 4, 1, 101}; !slices.Equal(got, want) {
			t.Errorf("tries %v, want %v", got, want)
		}
	})
}

// What the client sends after the first try has failed reaches the second one behind what
// it has sent before, and nobody waits for the end.
func TestABodyGoesOnWithTheNextTry(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f, c := newFarm(t), post(t, "a.example", "/")
		f.routes = []config.Route{retrying(onReset)}
		got := make(chan string)
		f.behave[first] = inTurn(
			func(o *origin) {
				b := make([]byte, 5)
				io.ReadFull(o.upload, b)
				got <- string(b)
				o.heads <- exchange.ErrNoAnswer
			},
			func(o *origin) {
				b := make([]byte, 5)
				io.ReadFull(o.upload, b)
				got <- string(b)
				got <- o.reads()
				o.answers(200)
				o.writes("ok")
				o.ends()
			})
		c.more = exchange.Fields{{Name: "X-Sum", Value: "1"}}
		c.start(f.manager())
		io.WriteString(c.send, "first")
		if s := <-got; s != "first" {
			t.Errorf("the first try got %q", s)
		}
		if s := <-got; s != "first" {
			t.Errorf("the second try got %q", s)
		}
		io.WriteString(c.send, " and more")
		c.send.Close()
		if s := <-got; s != " and more" {
			t.Errorf("the second try got %q then", s)
		}
		c.wait().wantStatus(200)
		c.wantEnd(true)
		c.wantClose(false)
		if last := f.origins()[1]; len(last.more) != 1 || !last.conn.wasKept() {
			t.Errorf("the second try got trailers %v, its connection was kept: %v", last.more, last.conn.wasKept())
		}
	})
}

func TestABodyBeyondTheBufferIsSentOnce(t *testing.T) {
	t.Parallel()
	body := strings.Repeat("0123456789", 1000)
	for name, tt := range map[string]struct {
		length int64
		buffer int64
	}{
		"of unknown length": {-1, 5000},
		"of known length":   {10_000, 5000},
		"nothing is kept":   {10_000, 0},
		"one byte more":     {-1, 9999},
	} {
		for _, fails := range []bool{false, true} {
			t.Run(fmt.Sprint(name, fails), func(t *testing.T) {
				t.Parallel()
				inBubble(t, func(t *testing.T) {
					f, c := newFarm(t), post(t, "a.example", "/")
					c.request.ContentLength = tt.length
					f.routes = []config.Route{retrying(on5xx, func(r *config.Retry) { r.Buffer = tt.buffer })}
					var got string
					f.behave[first] = func(o *origin) {
						got = o.reads()
						status := 200
						if fails {
							status = 500
						}
						o.answers(status)
						o.writes("ok")
						o.ends()
					}
					go func() { io.WriteString(c.send, body); c.send.Close() }()
					c.start(f.manager()).wait()
					c.wantBody("ok")
					if f.origin(); got != body {
						t.Errorf("the endpoint got %d bytes", len(got))
					}
					if fails {
						c.wantStatus(500)
						f.wantRetries("retries_abandoned 1")
					} else {
						c.wantStatus(200)
						f.wantRetries("")
					}
				})
			})
		}
	}
}

// A body that does not fit the buffer can be tried again until an endpoint has got some.
func TestABodyThatNobodyHasGotIsTriedAgainWhateverItsLength(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f, c := newFarm(t), post(t, "a.example", "/")
		f.routes = []config.Route{retrying(onConnect, func(r *config.Retry) { r.Buffer = 0 })}
		var tries atomic.Int64
		f.connect[first] = func(context.Context) error {
			if tries.Add(1) == 1 {
				return errors.New("refused")
			}
			return nil
		}
		go func() { io.WriteString(c.send, "body"); c.send.Close() }()
		c.start(f.manager()).wait().wantStatus(200)
		f.wantRetries("retries 1\nretry_successes 1")
	})
}

// A PUT whose body is kept is sent again on a fresh connection when a kept one was closed
// under it, which is no retry.
func TestAKeptBodyIsSentAgainOnAFreshConnection(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f := newFarm(t)
		f.routes = []config.Route{retrying(onConnect)}
		var got string
		f.behave[first] = inTurn(ok, failing(exchange.ErrNoAnswer), func(o *origin) {
			got = o.reads()
			o.answers(200)
			o.ends()
		})
		m := f.manager()
		get(t, "a.example", "/").start(m).wait().wantStatus(200)
		c := post(t, "a.example", "/")
		c.request.Method = "PUT"
		go func() { io.WriteString(c.send, "body"); c.send.Close() }()
		c.start(m).wait().wantStatus(200)
		if all := f.origins(); len(all) != 3 || !all[1].reused || all[2].reused || got != "body" {
			t.Errorf("%d exchanges, the last one with %q", len(all), got)
		}
		f.wantRetries("")
	})
}

// An answer that comes before the body is complete is one all the same.
func TestAnEarlyResponseIsAReasonToTryAgain(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f, c := newFarm(t), post(t, "a.example", "/")
		f.routes = []config.Route{retrying(onGateway)}
		got := make(chan string, 1)
		f.behave[first] = inTurn(
			func(o *origin) { o.answers(503); o.ends() },
			func(o *origin) { got <- o.reads(); o.answers(200); o.ends() })
		go func() {
			io.WriteString(c.send, "one")
			time.Sleep(time.Second)
			io.WriteString(c.send, " two")
			c.send.Close()
		}()
		c.start(f.manager()).wait().wantStatus(200)
		if s := <-got; s != "one two" {
			t.Errorf("the second try got %q", s)
		}
	})
}

// Whatever of the body a try has seen is the beginning of what the client has sent, and the
// one that sees its end has all of it: whenever tries fail, and however the body comes.
func TestEveryTryGetsTheBodyOfTheClient(t *testing.T) {
	t.Parallel()
	for seed := range uint64(150) {
		inBubble(t, func(t *testing.T) { bodyOfTheClient(t, seed) })
	}
}

func FuzzEveryTryGetsTheBodyOfTheClient(f *testing.F) {
	for seed := range uint64(20) {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, seed uint64) {
		inBubble(t, func(t *testing.T) { bodyOfTheClient(t, seed) })
	})
}

func bodyOfTheClient(t *testing.T, seed uint64) {
	random := rand.New(rand.NewPCG(seed, 1))
	body := make([]byte, random.IntN(40_000))
	for i := range body {
		body[i] = byte(random.Uint32())
	}
	f, c := newFarm(t), post(t, "a.example", "/")
	if random.IntN(3) == 0 && len(body) > 0 {
		c.request.ContentLength = int64(len(body))
	}
	failures := random.IntN(4)
	r := retrying(onReset|on5xx, attempts(int64(failures)), func(r *config.Retry) { r.Buffer = int64(random.IntN(60_000)) })
	if random.IntN(3) == 0 {
		r.RequestBuffer = 40_000
	}
	if random.IntN(3) == 0 {
		r.Mirror = &config.Mirror{Cluster: "mirror", Percent: config.Dynamic{Value: dynamic.Whole}, Buffer: int64(random.IntN(60_000))}
	}
	f.routes = []config.Route{r}
	f.cluster["web"], f.cluster["mirror"] = three, []string{"10.1.0.1:80"}
	f.budget.MinConcurrency = 100
	f.options = func(o *proxy.ManagerOptions) { o.Random = rand.New(rand.NewPCG(seed, 2)).Uint64 }
	f.behave["10.1.0.1:80"] = func(o *origin) {
		if got := o.reads(); got != string(body) {
			t.Errorf("seed %d: the mirror got %d bytes of %d", seed, len(got), len(body))
		}
		o.answers(200)
		o.ends()
	}
	type plan struct {
		reads, pause int
		status       bool
	}
	plans := make([]plan, failures)
	for i := range plans {
		plans[i] = plan{random.IntN(len(body) + 2), random.IntN(3), random.IntN(2) == 0}
	}
	var tries atomic.Int64
	complete := false
	behave := func(o *origin) {
		i := int(tries.Add(1)) - 1
		want := body
		if i < failures {
			want = body[:min(plans[i].reads, len(body))]
		}
		got := make([]byte, len(want))
		n, err := io.ReadFull(o.upload, got)
		if string(got[:n]) != string(want[:n]) {
			t.Errorf("seed %d: try %d got something else than the client sent", seed, i)
		}
		if i < failures {
			time.Sleep(time.Duration(plans[i].pause) * time.Millisecond)
			if plans[i].status {
				o.answers(503)
				o.ends()
			} else {
				o.heads <- exchange.ErrNoAnswer
			}
			return
		}
		if rest, endErr := io.ReadAll(o.upload); err != nil || endErr != nil || len(rest) > 0 {
			t.Errorf("seed %d: the last try got %d bytes of %d and %d more: %v, %v", seed, n, len(want), len(rest), err, endErr)
		}
		complete = true
		o.answers(200)
		o.ends()
	}
	for _, e := range three {
		f.behave[e] = behave
	}
	go func() {
		for left := body; len(left) > 0; {
			n := 1 + random.IntN(min(len(left), 9000))
			if _, err := c.send.Write(left[:n]); err != nil {
				return
			}
			left = left[n:]
			if random.IntN(3) == 0 {
				time.Sleep(time.Millisecond)
			}
		}
		c.send.Close()
	}()
	c.start(f.manager()).wait()
	switch status := c.status(); {
	case status == 200 && !complete, status != 200 && status != 503, !c.finished:
		t.Errorf("seed %d: the client got %d, finished %v, and the upstream all of it: %v", seed, status, c.finished, complete)
	case status == 503 && r.RequestBuffer > 0, status == 503 && int64(len(body)) <= r.Retry.Buffer:
		t.Errorf("seed %d: given up after %d tries", seed, tries.Load())
	}
}
