package http1

import (
	"time"
)

// What a codec of another version of HTTP shares with this one, so that both take and refuse
// the same.

// DefaultHeadSize is what a head may have where the configuration does not say.
const DefaultHeadSize = defaultHeadSize

// MaxFields is how many fields a head, or trailers, may have.
const MaxFields = maxFields

// IsToken says whether s is a token, as methods and names of fields are (RFC 9110 §5.6.2).
func IsToken(s string) bool { return isToken(s) }

// IsWord says whether s is the word, which is in lower case, in whatever case.
func IsWord(s, word string) bool { return isWord(s, word) }

// IsFieldValue says whether s may be the value of a field.
func IsFieldValue(s string) bool { return isValue(s) }

// ParseLength reads the value of Content-Length.
func ParseLength(s string) (int64, error) { return parseLength(s) }

// CheckTarget says why a target in origin-form, or "*", cannot be taken; nil: it can.
func CheckTarget(method, target string) error {
	switch {
	case len(target) > maxTarget:
		return refusal(414, "a target that is too long")
	case target == "" || target[0] != '/' && (target != "*" || method != "OPTIONS"):
		return malformed("a target in no known form")
	case !consistsOf(target, targetChar):
		return malformed("a target with a forbidden character")
	}
	return nil
}

// Refuse returns the error of a request that is answered by the codec.
func Refuse(status int, text string) error { return refusal(status, text) }

// Reason is the phrase of a status that codecs answer with.
func Reason(status int) string { return reasons[status] }

// ErrSlowBody is the error of a request's body that comes too slowly.
var ErrSlowBody = errSlowBody

// Pace is how fast a request's body comes, while somebody waits for it.
type Pace struct {
	pace
	waiting bool
}

// NewPace returns the pace of a body that has to come at a rate of so many bytes a second, 0: any,
// over a window; 0: no bounds are set.
func NewPace(window time.Duration, rate int64) Pace {
	return Pace{pace: pace{window: window, rate: rate}}
}

// Await says that somebody waits from now on, and returns until when the next byte must come;
// zero: whenever it does.
func (p *Pace) Await(now time.Time) time.Time {
	if !p.waiting {
		p.waiting, p.since = true, now
	}
	return p.limit()
}

// Awaited says that nobody waits any more.
func (p *Pace) Awaited(now time.Time) {
	if p.waiting {
		p.waiting = false
		p.pace.waited += now.Sub(p.since)
	}
}

// Keeps notes that n bytes have come, and says whether that is fast enough.
func (p *Pace) Keeps(n int) bool { return p.keeps(n) }

// Drained counts a connection that is ended because its generation drains.
func (m *ServerMetrics) Drained() { m.drained.Inc() }

// IdleTimeout counts a connection that is ended because no request came.
func (m *ServerMetrics) IdleTimeout() { m.idleTimeouts.Inc() }

// Malformed counts a request that is not valid.
func (m *ServerMetrics) Malformed() { m.errors.Inc() }

// Received counts bytes that came from a client.
func (m *ServerMetrics) Received(n int) { m.traffic.Received.Add(uint64(n)) }

// Sent counts bytes that were sent to one.
func (m *ServerMetrics) Sent(n int) { m.traffic.Sent.Add(uint64(n)) }

// Continued counts a connection that another codec has had, and accepted.
func (m *ConnectionMetrics) Continued() { m.active.Add(1) }

// TakesTrailers says whether the value of a TE field has the word "trailers".
func TakesTrailers(te string) bool {
	var ctl control
	ctl.addTE(te)
	return ctl.trailers
}
