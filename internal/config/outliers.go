package config

import (
	"math"
	"strconv"
	"time"

	"holdfast/internal/dynamic"
)

// Outliers is how endpoints of a cluster are found, and kept from new work, that do not do as
// the others.
type Outliers struct {
	// How many failures in a row make an outlier; 0: no number does.
	Consecutive5xx             int // responses with 5xx, none in time or whole, and no connection
	ConsecutiveGatewayFailures int // the same, of 5xx only 502, 503 and 504
	ConsecutiveConnectFailures int // connections that could not be made

	Interval         time.Duration // between two looks at all endpoints
	BaseEjectionTime time.Duration // of the first ejection; of the n-th n times as much
	MaxEjectionTime  time.Duration // not below BaseEjectionTime
	EjectionJitter   time.Duration // up to which is added
	MaxEjected       Dynamic       // percentage of the cluster's endpoints

	SuccessRateDeviations float64 // standard deviations below the mean from which on a success rate is an outlier's; 0: off
	SuccessRateHosts      int     // with enough requests in an interval, for there to be a mean
	SuccessRateRequests   int     // that are enough

	Enforcing            Dynamic // percentage of what is found by a number in a row that is ejected
	EnforcingSuccessRate Dynamic // the same by a success rate
}

// readOutliers reads how a cluster finds its outliers, nil if it does not.
func readOutliers(cluster *table) *Outliers {
	if !cluster.asked("outlier_detection") {
		return nil
	}
	t := cluster.table("outlier_detection")
	if t.keys == nil {
		return nil // it is something else, which was said
	}
	o := &Outliers{
		Consecutive5xx: 5, ConsecutiveConnectFailures: 5,
		Interval: 10 * time.Second, BaseEjectionTime: 30 * time.Second, MaxEjectionTime: 5 * time.Minute, MaxEjected: Dynamic{Value: dynamic.Whole / 10},
		SuccessRateDeviations: 1.9, SuccessRateHosts: 5, SuccessRateRequests: 100,
		Enforcing: Dynamic{Value: dynamic.Whole}, EnforcingSuccessRate: Dynamic{Value: dynamic.Whole},
	}
	t.inARow("consecutive_5xx", &o.Consecutive5xx)
	t.inARow("consecutive_gateway_failures", &o.ConsecutiveGatewayFailures)
	t.inARow("consecutive_connect_failures", &o.ConsecutiveConnectFailures)
	read(t, "interval", &o.Interval, duration)
	read(t, "base_ejection_time", &o.BaseEjectionTime, duration)
	o.MaxEjectionTime = max(o.MaxEjectionTime, o.BaseEjectionTime)
	read(t, "max_ejection_time", &o.MaxEjectionTime, duration)
	if t.has("max_ejection_time") && o.MaxEjectionTime < o.BaseEjectionTime {
		t.at("max_ejection_time").fail("is shorter than base_ejection_time, %s", writeDuration(o.BaseEjectionTime))
	}
	read(t, "ejection_jitter", &o.EjectionJitter, durationOrZero)
	t.percent("max_ejection_percent", &o.MaxEjected)
	t.deviations("success_rate_stdev_factor", &o.SuccessRateDeviations)
	t.count("success_rate_minimum_hosts", &o.SuccessRateHosts, 2)
	t.count("success_rate_request_volume", &o.SuccessRateRequests, 1)
	t.percent("enforcing", &o.Enforcing)
	t.runtimeKey("runtime_key", &o.Enforcing)
	t.percent("enforcing_success_rate", &o.EnforcingSuccessRate)
	t.runtimeKey("success_rate_runtime_key", &o.EnforcingSuccessRate)
	t.strict()
	if o.Consecutive5xx == 0 && o.ConsecutiveGatewayFailures == 0 && o.ConsecutiveConnectFailures == 0 && o.SuccessRateDeviations == 0 {
		cluster.at("outlier_detection").fail("finds nothing: all that makes an outlier is off")
	}
	return o
}

// mostInARow is the largest number that is counted to.
const mostInARow = 1_000_000

// inARow reads how many times in a row are enough, or "off", which becomes 0.
func (t *table) inARow(key string, dst *int) {
	if n, ok := t.get(key); ok {
		v, ok := n.raw.(int64)
		if n.raw == "off" {
			v = 0
		} else if !ok || v < 1 || v > mostInARow {
			n.fail(`must be an integer from 1 to %d, or "off", found %s`, mostInARow, describe(n.raw))
			return
		}
		*dst = int(v)
	}
	if *dst == 0 {
		t.set(key, `"off"`)
	} else {
		t.set(key, strconv.Itoa(*dst))
	}
}

// count reads a number of things that has a least one.
func (t *table) count(key string, dst *int, least int64) {
	n := int64(*dst)
	t.integer(key, &n, least, mostInARow)
	*dst = int(n)
}

// deviations reads a number of standard deviations, or "off", which becomes 0.
func (t *table) deviations(key string, dst *float64) {
	if n, ok := t.get(key); ok {
		var v float64
		switch raw := n.raw.(type) {
		case int64:
			v = float64(raw)
		case float64:
			v = raw
		}
		if n.raw == "off" {
			v = 0
		} else if !(v >= 0.01 && v <= 100) { // nor NaN
			n.fail(`must be a number from 0.01 to 100, or "off", found %s`, describe(n.raw))
			return
		}
		*dst = math.Round(v*1000) / 1000
	}
	if *dst == 0 {
		t.set(key, `"off"`)
	} else {
		t.set(key, strconv.FormatFloat(*dst, 'f', -1, 64))
	}
}
