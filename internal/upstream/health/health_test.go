package health_test

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"holdfast/internal/config"
	"holdfast/internal/stream"
	"holdfast/internal/stream/streamtest"
	"holdfast/internal/task"
	"holdfast/internal/upstream/health"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	errDown  = errors.New("connection refused")
	wrong    = &health.Failure{Text: "status 500"}
	overload = &health.Failure{Text: "status 503", AtOnce: true}
)

// endpoint is what is checked, and who has it checked.
type endpoint struct {
	t     *testing.T
	loop  *stream.Loop
	check *health.Check

	// Owned by the loop.
	answer  error // of the next checks
	hangs   bool
	idle    bool
	waits   *task.Task
	gaveUp  error
	closed  int
	began   []time.Time
	results []health.Result
	beside  *int // checks that are under way, with those of others
	most    *int
}

func settings() *config.EndpointCheck {
	return &config.EndpointCheck{
		Interval: 10 * time.Second, UnhealthyInterval: 10 * time.Second, NoTrafficInterval: time.Minute, Timeout: 2 * time.Second,
		UnhealthyThreshold: 3, HealthyThreshold: 2,
	}
}

// check returns an endpoint whose checks have not begun.
func newEndpoint(t *testing.T, l *stream.Loop, of *health.Loop, cfg *config.EndpointCheck, s health.State) *endpoint {
	e := &endpoint{t: t, loop: l, beside: new(int), most: new(int)}
	e.check = of.NewCheck(health.Options{Config: cfg, Probe: e, Owner: e, State: s})
	return e
}

func (e *endpoint) Probe(t *task.Task) error {
	e.began = append(e.began, e.loop.Now())
	*e.beside++
	*e.most = max(*e.most, *e.beside)
	defer func() { *e.beside-- }()
	e.gaveUp = nil
	e.waits = t
	for e.hangs && e.gaveUp == nil {
		t.Wait()
	}
	e.waits = nil
	if e.gaveUp != nil {
		return e.gaveUp
	}
	return e.answer
}

func (e *endpoint) Cancel(err error) {
	e.gaveUp = err
	if e.waits != nil {
		e.waits.Wake()
	}
}

func (e *endpoint) Close()                  { e.closed++ }
func (e *endpoint) Idle() bool              { return e.idle }
func (e *endpoint) Checked(r health.Result) { e.results = append(e.results, r) }
func (e *endpoint) do(fn func())            { streamtest.Do(e.loop, fn) }
func (e *endpoint) set(err error)           { e.do(func() { e.answer = err }) }
func (e *endpoint) start(now bool)          { e.do(func() { e.check.Start(now) }) }
func (e *endpoint) stop()                   { e.do(e.check.Stop) }

func (e *endpoint) count() (n int) {
	e.do(func() { n = len(e.results) })
	return n
}

// next lets time go on until the next check has ended.
func (e *endpoint) next() health.Result {
	e.t.Helper()
	n := e.count()
	for range 10_000 {
		if e.count() > n {
			var r health.Result
			e.do(func() { r = e.results[n] })
			return r
		}
		time.Sleep(100 * time.Millisecond)
	}
	e.t.Fatal("there was no check")
	panic("unreachable")
}

// inBubble runs a test of one endpoint in virtual time.
func inBubble(t *testing.T, cfg *config.EndpointCheck, s health.State, test func(t *testing.T, e *endpoint)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		l := streamtest.NewVirtual(t)
		e := newEndpoint(t, l, health.NewLoop(l), cfg, s)
		defer e.stop()
		test(t, e)
	})
}

func TestTheThresholdsDecide(t *testing.T) {
	t.Parallel()
	ok, bad, down, now := error(nil), error(wrong), errDown, error(overload)
	const (
		u = health.Unknown
		h = health.Healthy
		f = health.Failing
	)
	for name, test := range map[string]struct {
		begin   health.State
		answers []error
		states  []health.State
	}{
		"the first success is enough":           {u, []error{ok}, []health.State{h}},
		"the first failure is enough":           {u, []error{bad}, []health.State{f}},
		"three failures in a row":               {h, []error{bad, bad, bad}, []health.State{h, h, f}},
		"three failures that are none in a row": {h, []error{bad, down, ok, bad, down, ok}, []health.State{h, h, h, h, h, h}},
		"no answers count as failures":          {h, []error{down, bad, down}, []health.State{h, h, f}},
		"a 503 fails at once":                   {h, []error{now}, []health.State{f}},
		"two successes in a row":                {f, []error{ok, ok}, []health.State{f, h}},
		"two that are none in a row":            {f, []error{ok, bad, ok, bad}, []health.State{f, f, f, f}},
		"what has come back begins anew":        {u, []error{down, ok, ok, bad, bad, ok, bad, bad, bad}, []health.State{f, f, h, h, h, h, h, h, f}},
		"one that flaps with each check":        {u, []error{ok, bad, ok, bad, ok, bad}, []health.State{h, h, h, h, h, h}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			inBubble(t, settings(), test.begin, func(t *testing.T, e *endpoint) {
				var got []health.State
				was := test.begin
				e.set(test.answers[0])
				e.start(true)
				for i, answer := range test.answers {
					e.set(answer)
					if i == 0 {
						synctest.Wait()
					} else {
						e.next()
					}
					var r health.Result
					e.do(func() { r = e.results[i] })
					if r.Changed != (r.State != was) || (r.Err == nil) != (answer == nil) || r.Network != (answer == errDown) {
						t.Errorf("check %d: %+v after %v", i, r, was)
					}
					was = r.State
					got = append(got, r.State)
				}
				if !slices.Equal(got, test.states) {
					t.Errorf("got %v, want %v", got, test.states)
				}
			})
		})
	}
}

func TestTheFirstCheckComesAtOnceAndTheOthersApart(t *testing.T) {
	t.Parallel()
	cfg := settings()
	cfg.Jitter = 2 * time.Second
	inBubble(t, cfg, health.Unknown, func(t *testing.T, e *endpoint) {
		begin := time.Now()
		e.start(true)
		if e.count() != 1 || time.Since(begin) != 0 {
			t.Fatalf("%d checks after %v, want one at once", e.count(), time.Since(begin))
		}
		time.Sleep(time.Hour)
		e.do(func() {
			var shortest, longest time.Duration
			for i := 2; i < len(e.began); i++ {
				gap := e.began[i].Sub(e.began[i-1])
				if shortest == 0 || gap < shortest {
					shortest = gap
				}
				longest = max(longest, gap)
			}
			// Deadlines are late by up to two ticks.
			if shortest < cfg.Interval || longest > cfg.Interval+cfg.Jitter+time.Second/2 {
				t.Errorf("from %v to %v between two checks, want 10s to 12s", shortest, longest)
			}
			if longest-shortest < time.Second {
				t.Errorf("from %v to %v between two checks: that is no jitter", shortest, longest)
			}
			if first := e.began[1].Sub(e.began[0]); first > cfg.Interval+time.Second/2 {
				t.Errorf("%v between the first two", first)
			}
		})
	})
}

func TestChecksOfManyEndpointsAreSpread(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := streamtest.NewVirtual(t)
		of := health.NewLoop(l)
		cfg := settings() // without any jitter
		const n = 600
		var all []*endpoint
		for range n {
			all = append(all, newEndpoint(t, l, of, cfg, health.Unknown))
		}
		streamtest.Do(l, func() {
			for _, e := range all {
				e.check.Start(true)
			}
		})
		begin := time.Now()
		time.Sleep(time.Minute)
		perSecond := map[int]int{}
		streamtest.Do(l, func() {
			for _, e := range all {
				for _, at := range e.began {
					perSecond[int(at.Sub(begin)/time.Second)]++
				}
				e.check.Stop()
			}
		})
		for second := 20; second < 60; second++ {
			if got := perSecond[second]; got < n/30 || got > n/4 {
				t.Errorf("%d of %d checks in second %d, want about a tenth", got, n, second)
			}
		}
	})
}

func TestAClusterWithoutTrafficIsCheckedLessOften(t *testing.T) {
	t.Parallel()
	inBubble(t, settings(), health.Healthy, func(t *testing.T, e *endpoint) {
		e.do(func() { e.idle = true })
		e.start(true)
		e.next() // by which its beat becomes its own
		at := func() (at time.Time) {
			e.do(func() { at = e.began[len(e.began)-1] })
			return at
		}
		last := at()
		e.next()
		if gap := at().Sub(last); gap < time.Minute || gap > time.Minute+time.Second {
			t.Errorf("%v between two checks without traffic, want 1m", gap)
		}
		time.Sleep(25 * time.Second)
		e.do(func() { e.idle = false })
		before := time.Now()
		e.next()
		if took := time.Since(before); took > 11*time.Second {
			t.Errorf("%v from the first request to the next check, want at most 10s", took)
		}
		e.do(func() { e.idle = true })
		e.set(wrong)
		for range 3 { // something speaks against it
			last = at()
			e.next()
		}
		if gap := at().Sub(last); gap > 11*time.Second {
			t.Errorf("%v between two checks of an endpoint that is in doubt, want 10s", gap)
		}
		last = at()
		e.next()
		if gap := at().Sub(last); gap > 11*time.Second {
			t.Errorf("%v between two checks of one that fails, want 10s", gap)
		}
	})
}

func TestOneThatFailsHasAnIntervalOfItsOwn(t *testing.T) {
	t.Parallel()
	cfg := settings()
	cfg.UnhealthyInterval = time.Second
	inBubble(t, cfg, health.Healthy, func(t *testing.T, e *endpoint) {
		e.set(overload)
		e.start(true)
		n := e.count()
		time.Sleep(20 * time.Second)
		if got := e.count() - n; got < 15 || got > 20 {
			t.Errorf("%d checks in 20s, want one each second", got)
		}
	})
}

func TestOneThatHangsCostsItsTimeout(t *testing.T) {
	t.Parallel()
	inBubble(t, settings(), health.Healthy, func(t *testing.T, e *endpoint) {
		e.do(func() { e.hangs = true })
		begin := time.Now()
		e.start(true)
		r := e.next()
		if took := time.Since(begin); took < 2*time.Second || took > 2500*time.Millisecond {
			t.Errorf("given up after %v, want 2s", took)
		}
		if r.Err == nil || r.Err.Error() != "no answer within 2s" || !r.Network {
			t.Errorf("the result is %+v", r)
		}
	})
}

func TestOnlySomeAreCheckedAtTheSameTime(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := streamtest.NewVirtual(t)
		of := health.NewLoop(l)
		const n = 3000
		var all []*endpoint
		beside, most := 0, 0
		for i := range n {
			e := newEndpoint(t, l, of, settings(), health.Unknown)
			e.hangs, e.beside, e.most = i%2 == 0, &beside, &most
			all = append(all, e)
		}
		streamtest.Do(l, func() {
			for _, e := range all {
				e.check.Start(true)
			}
		})
		time.Sleep(3 * time.Second)
		streamtest.Do(l, func() {
			for i, e := range all {
				if i > 2900 && e.hangs {
					e.check.Stop() // in the queue, or under way, or over
				}
			}
		})
		time.Sleep(6 * time.Second)
		streamtest.Do(l, func() {
			if most != 1024 {
				t.Errorf("%d at the same time, want 1024", most)
			}
			for i, e := range all {
				if len(e.results) == 0 && i <= 2900 {
					t.Errorf("endpoint %d was not checked", i)
				}
				e.check.Stop()
			}
		})
	})
}

func TestAnEndpointMaySayItselfThatItFails(t *testing.T) {
	t.Parallel()
	inBubble(t, settings(), health.Healthy, func(t *testing.T, e *endpoint) {
		e.do(func() { e.check.Fail("not running") })
		if e.count() != 0 {
			t.Fatal("one that is not checked has failed, and nobody would find it well again")
		}
		e.start(true)
		e.do(func() {
			e.check.Fail("it says so")
			e.check.Fail("once more")
			if last := e.results[len(e.results)-1]; len(e.results) != 2 || !last.Told || !last.Changed || last.State != health.Failing || last.Err.Error() != "it says so" {
				t.Errorf("the results are %+v", e.results)
			}
		})
		if r := e.next(); r.State != health.Failing {
			t.Errorf("it is %v after one check", r.State)
		}
		if r := e.next(); r.State != health.Healthy || !r.Changed {
			t.Errorf("it is %v after two checks", r.State)
		}
	})
}

func TestAStopEndsWhatIsUnderWay(t *testing.T) {
	t.Parallel()
	inBubble(t, settings(), health.Healthy, func(t *testing.T, e *endpoint) {
		e.do(func() { e.hangs = true })
		e.start(true)
		e.stop()
		e.do(func() {
			if len(e.results) != 0 || *e.beside != 0 || e.closed != 1 || e.gaveUp == nil {
				t.Errorf("%d results, %d under way, closed %d times, cancelled with %v", len(e.results), *e.beside, e.closed, e.gaveUp)
			}
		})
		time.Sleep(time.Hour)
		if got := e.count(); got != 0 {
			t.Errorf("%d checks after the stop", got)
		}
		// It goes on at once, also within the turn that has stopped it.
		e.start(true)
		e.do(func() {
			e.check.Stop()
			e.hangs = false
			e.check.Start(true)
		})
		synctest.Wait()
		if got := e.count(); got != 1 {
			t.Errorf("%d results after it was started again, want 1", got)
		}
	})
}

func TestWhatIsInheritedIsCheckedSoon(t *testing.T) {
	t.Parallel()
	inBubble(t, settings(), health.Healthy, func(t *testing.T, e *endpoint) {
		e.start(false)
		if e.count() != 0 {
			t.Error("it was checked at once, with all others")
		}
		begin := time.Now()
		e.next()
		if took := time.Since(begin); took > 11*time.Second {
			t.Errorf("checked after %v, want within 10s", took)
		}
	})
}

// Whoever was asleep himself has not looked at what has come meanwhile.
func TestALoopThatWasLateDoesNotBlameTheEndpoint(t *testing.T) {
	t.Parallel()
	inBubble(t, settings(), health.Unknown, func(t *testing.T, e *endpoint) {
		e.do(func() { e.hangs = true })
		e.start(true)
		late := time.Now()
		e.do(func() {
			time.Sleep(5 * time.Second) // the whole process
			e.loop.Post(func() {
				e.hangs = false
				e.waits.Wake()
			})
		})
		synctest.Wait()
		if e.count() != 1 || e.results[0].Err != nil {
			t.Errorf("the results are %+v, after %v", e.results, time.Since(late))
		}
	})
}

func TestWhoCouldNotAskKnowsNothing(t *testing.T) {
	t.Parallel()
	inBubble(t, settings(), health.Healthy, func(t *testing.T, e *endpoint) {
		e.set(fmt.Errorf("%w: too many open files", health.ErrNoResult))
		e.start(true)
		time.Sleep(time.Minute)
		if e.count() != 0 || len(e.began) < 5 {
			t.Errorf("%d results of %d checks", e.count(), len(e.began))
		}
	})
}
