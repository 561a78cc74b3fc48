package config

import (
	"errors"
	"slices"
	"strconv"
	"strings"
	"time"

	"holdfast/internal/dynamic"
)

// Retry says which ordinary requests of a route are tried again, and how.
type Retry struct {
	On            RetryOn // never empty
	StatusCodes   []int   // of RetryStatusCodes
	Attempts      Dynamic // most retries of a request; the first try is none
	PerTryTimeout time.Duration
	BackoffBase   time.Duration
	BackoffMax    time.Duration
	Buffer        int64 // most bytes of a request's body that are kept for a retry
}

// RetryOn is a set of what a request is tried again for.
type RetryOn uint8

// What it may hold.
const (
	RetryConnectFailure RetryOn = 1 << iota
	RetryRefusedStream
	RetryReset
	Retry5xx
	RetryGatewayError
	Retry4xx
	RetryStatusCodes
)

// retryWords are the elements of [RetryOn], in their order.
var retryWords = []string{"connect-failure", "refused-stream", "reset", "5xx", "gateway-error", "retriable-4xx", "retriable-status-codes"}

// String returns the words of a configuration.
func (on RetryOn) String() string {
	var words []string
	for i, word := range retryWords {
		if on&(1<<i) != 0 {
			words = append(words, word)
		}
	}
	return strings.Join(words, ", ")
}

// RetryBudget is how many requests of a cluster may be retries at the same time: a share of
// those that are with it, or a least number, whichever is more.
type RetryBudget struct {
	Percent        Dynamic
	MinConcurrency int64
}

// Mirror sends a copy of ordinary requests to another cluster, whose answers nobody gets.
type Mirror struct {
	Cluster string
	Percent Dynamic // of the requests
	Buffer  int64   // most bytes of a body that is copied
}

// MostAttempts is the most retries that a request can be given: one must not be a flood.
const MostAttempts = 100

// readRetry reads the retries of a route, nil if it has none.
func readRetry(route *table, timeout time.Duration) *Retry {
	if !route.asked("retry") {
		return nil
	}
	t := route.table("retry")
	if t.keys == nil {
		return nil // it is something else, which was said
	}
	r := &Retry{Attempts: Dynamic{Value: 1}, BackoffBase: 25 * time.Millisecond, Buffer: 64 << 10}
	r.On = readRetryOn(t)
	r.StatusCodes = readStatusCodes(t, r.On&RetryStatusCodes != 0)
	t.integer("attempts", &r.Attempts.Value, 1, MostAttempts)
	t.runtimeKey("runtime_key", &r.Attempts)
	read(t, "per_try_timeout", &r.PerTryTimeout, durationOrOff)
	if timeout > 0 && r.PerTryTimeout >= timeout {
		t.at("per_try_timeout").fail("never ends a try: the route's timeout, %s, is for all of them", writeDuration(timeout))
	}
	readBackoff(t.table("backoff"), r)
	read(t, "buffer", &r.Buffer, keptSize)
	t.strict()
	return r
}

func readRetryOn(t *table) (on RetryOn) {
	for _, e := range list(t, "on", oneOf(retryWords...)) {
		bit := RetryOn(1) << slices.Index(retryWords, e.value)
		if on&bit != 0 {
			e.fail("%s is listed twice", quote(e.value))
		}
		on |= bit
	}
	if t.empty("on") {
		t.at("on").fail("missing; must be an array with at least one of %s", alternatives(retryWords))
	}
	return on
}

func readStatusCodes(t *table, wanted bool) (codes []int) {
	var written []string
	for _, n := range t.array("status_codes") {
		code, ok := n.raw.(int64)
		if !ok || code < 400 || code > 599 {
			n.fail("must be a status from 400 to 599, found %s", describe(n.raw))
			continue
		}
		codes = append(codes, int(code))
		written = append(written, strconv.Itoa(int(code)))
	}
	switch {
	case wanted && t.empty("status_codes"):
		t.at("status_codes").fail(`missing; "retriable-status-codes" needs an array of statuses, like [429, 503]`)
	case !wanted && t.has("status_codes"):
		t.at("status_codes").fail(`has a meaning only with "retriable-status-codes" in on`)
	case wanted:
		t.set("status_codes", written)
	}
	return codes
}

// capOfBackoff times the base is the longest pause, unless the file has another.
const capOfBackoff = 10

func readBackoff(t *table, r *Retry) {
	read(t, "base", &r.BackoffBase, duration)
	r.BackoffMax = capOfBackoff * r.BackoffBase
	read(t, "max", &r.BackoffMax, duration)
	if t.has("max") && r.BackoffMax < r.BackoffBase {
		t.at("max").fail("is shorter than base, %s", writeDuration(r.BackoffBase))
	}
	t.strict()
}

// keptSize is how much of a body is kept for later.
var keptSize = form[int64]{`a size from "0B" to "16MiB"`, func(s string) (int64, error) {
	n, err := parseSize(s)
	if err == nil && n > 16<<20 {
		err = errForm
	}
	return n, err
}, writeSize}

// bufferedSize is a size of a whole body, or the word for none, which becomes 0.
var bufferedSize = form[int64]{`a size up to "64MiB", or "off"`, func(s string) (int64, error) {
	if s == "off" {
		return 0, nil
	}
	n, err := parseSize(s)
	switch {
	case err == nil && n == 0:
		err = errors.New(`write "off" for none`)
	case err == nil && n > 64<<20:
		err = errForm
	}
	return n, err
}, func(n int64) string {
	if n == 0 {
		return "off"
	}
	return writeSize(n)
}}

// readMirror reads where a route's requests are copied to, nil if they are not.
func readMirror(route *table, refs *references) *Mirror {
	if !route.asked("mirror") {
		return nil
	}
	t := route.table("mirror")
	if t.keys == nil {
		return nil // it is something else, which was said
	}
	m := &Mirror{Percent: Dynamic{Value: dynamic.Whole}, Buffer: 64 << 10}
	if n, ok := t.get("cluster"); !ok {
		n.fail("missing; must be the name of a cluster")
	} else if name, ok := refer(n, "cluster", refs.clusterNames); ok {
		m.Cluster = name
		t.set("cluster", strconv.Quote(name))
	}
	t.percent("percent", &m.Percent)
	t.runtimeKey("runtime_key", &m.Percent)
	read(t, "buffer", &m.Buffer, keptSize)
	t.strict()
	return m
}

// readRetryBudget reads that of a cluster.
func readRetryBudget(t *table) RetryBudget {
	b := RetryBudget{Percent: Dynamic{Value: dynamic.Whole / 5}, MinConcurrency: 3}
	t.percent("percent", &b.Percent)
	t.runtimeKey("runtime_key", &b.Percent)
	t.integer("min_concurrency", &b.MinConcurrency, 0, 1_000_000)
	t.strict()
	return b
}
