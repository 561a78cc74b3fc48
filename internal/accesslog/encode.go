package accesslog

import (
	"strconv"
	"time"
	"unicode/utf16"
	"unicode/utf8"
)

// maxLine is the most bytes of a line with its line break: what one write to a pipe
// keeps together, PIPE_BUF (pipe(7)). The limits of the strings add up to less.
const maxLine = 4096

type format uint8

const (
	jsonFormat format = iota
	textFormat
	numFormats
)

// encoder makes one line, in one of the formats.
type encoder struct {
	format format
	line   []byte
}

// The most bytes that strings take in a line, between their quotes.
const (
	maxReason    = 128
	maxMethod    = 32
	maxTarget    = 1024
	maxProtocol  = 16
	maxScheme    = 8
	maxAuthority = 264
	maxClient    = 128
	maxName      = 128 // of a listener, a virtual host or a cluster
	maxRoute     = 256
	maxEndpoint  = 256
	maxRequestID = 128
)

// record makes the line of a request or of a tunnel's opening.
func (e *encoder) record(event string, r *Record, generation int) {
	e.begin(r.Start.Add(r.Duration), event, r.Duration, r.Received, r.Sent, r.Reason)
	e.common(r, generation)
	e.string("user_agent", r.UserAgent, 256)
	e.string("referer", r.Referer, 384)
	e.string("forwarded_for", r.ForwardedFor, 256)
	e.finish()
}

// end makes the line of a tunnel's end. opening is what is known of its opening.
func (e *encoder) end(opening *Record, end End, generation int) {
	e.begin(end.At, "tunnel_close", end.Duration, end.ToUpstream, end.ToDownstream, end.Reason)
	e.common(opening, generation)
	if e.format == textFormat {
		e.line = append(e.line, ` "" "" ""`...) // each line has the same number of fields
	}
	e.finish()
}

// begin appends what differs between a tunnel's opening and its end.
func (e *encoder) begin(at time.Time, event string, took time.Duration, received, sent uint64, reason string) {
	const layout = "2006-01-02T15:04:05.000000Z"
	if e.format == textFormat {
		e.line = at.UTC().AppendFormat(e.line, layout)
		e.line = append(append(e.line, ' '), event...)
	} else {
		e.line = append(e.line, `{"time":"`...)
		e.line = at.UTC().AppendFormat(e.line, layout)
		e.line = append(append(append(e.line, `","event":"`...), event...), '"')
	}
	e.seconds("duration_seconds", took)
	e.number("received_bytes", received)
	e.number("sent_bytes", sent)
	e.string("reason", reason, maxReason)
}

// common appends what stays over the life of a tunnel.
func (e *encoder) common(r *Record, generation int) {
	e.number("status", uint64(max(r.Status, 0)))
	if r.Upstream > 0 {
		e.seconds("upstream_seconds", r.Upstream)
	} else if e.key("upstream_seconds"); e.format == textFormat {
		e.line = append(e.line, '-')
	} else {
		e.line = append(e.line, "null"...)
	}
	e.requestLine(r)
	e.string("scheme", r.Scheme, maxScheme)
	e.string("authority", r.Authority, maxAuthority)
	e.client(r)
	e.string("listener", r.Listener, maxName)
	e.string("virtual_host", r.VirtualHost, maxName)
	e.string("route", r.Route, maxRoute)
	e.string("cluster", r.Cluster, maxName)
	e.string("endpoint", r.Endpoint, maxEndpoint)
	e.number("generation", uint64(max(generation, 0)))
	e.string("request_id", r.RequestID, maxRequestID)
}

func (e *encoder) requestLine(r *Record) {
	if e.format == jsonFormat {
		e.string("method", r.Method, maxMethod)
		e.string("target", r.Target, maxTarget)
		e.string("protocol", r.Protocol, maxProtocol)
		return
	}
	// The request's grammar allows a space in none of them, so that they can be told
	// apart; should one be there all the same, it is escaped.
	e.line = append(e.line, ` "`...)
	e.content(r.Method, maxMethod, ' ')
	e.line = append(e.line, ' ')
	e.content(r.Target, maxTarget, ' ')
	e.line = append(e.line, ' ')
	e.content(r.Protocol, maxProtocol, ' ')
	e.line = append(e.line, '"')
}

func (e *encoder) client(r *Record) {
	switch {
	case !r.Client.IsValid():
		e.string("client", "unix", 4)
	case r.Client.Addr().Zone() != "": // the name of an interface may be anything
		e.string("client", r.Client.String(), maxClient)
	default:
		e.key("client")
		e.line = append(e.line, '"')
		e.line = r.Client.AppendTo(e.line)
		e.line = append(e.line, '"')
	}
}

func (e *encoder) finish() {
	if e.format == jsonFormat {
		e.line = append(e.line, '}')
	}
	e.line = append(e.line, '\n')
}

func (e *encoder) key(name string) {
	if e.format == textFormat {
		e.line = append(e.line, ' ')
		return
	}
	e.line = append(append(append(e.line, `,"`...), name...), `":`...)
}

func (e *encoder) number(key string, n uint64) {
	e.key(key)
	e.line = strconv.AppendUint(e.line, n, 10)
}

// seconds appends a duration with its microseconds. A negative one, which is what a
// clock that was set back may give, is 0.
func (e *encoder) seconds(key string, d time.Duration) {
	e.key(key)
	const micros = 1_000_000
	us := uint64(max(d.Microseconds(), 0))
	e.line = strconv.AppendUint(e.line, us/micros, 10)
	e.line = append(e.line, '.')
	for digit := uint64(micros / 10); digit > 0; digit /= 10 {
		e.line = append(e.line, byte('0'+us/digit%10))
	}
}

// string appends a string that takes at most limit bytes between its quotes.
func (e *encoder) string(key, s string, limit int) {
	e.key(key)
	e.line = append(e.line, '"')
	e.content(s, limit, '"')
	e.line = append(e.line, '"')
}

// content appends s as it stands in a JSON string, with everything escaped that cannot
// be printed, and also the character that escaped is. If that takes more than limit
// bytes, it is cut between two characters; the mark of that takes part of the limit.
func (e *encoder) content(s string, limit int, escaped byte) {
	if len(s) <= limit && plain(s, escaped) == len(s) { // as nearly all are
		e.line = append(e.line, s...)
		return
	}
	const cut = "…"
	begin := len(e.line)
	fits := begin // how far the line is kept if it has to be cut
	for s != "" {
		size := 1
		switch {
		case plain(s[:1], escaped) == 1:
			e.line = append(e.line, s[0])
		case s[0] == '"' || s[0] == '\\':
			e.line = append(e.line, '\\', s[0])
		default:
			size = e.rune(s)
		}
		s = s[size:]
		switch n := len(e.line) - begin; {
		case n > limit:
			e.line = append(e.line[:fits], cut...)
			return
		case n <= limit-len(cut):
			fits = len(e.line)
		}
	}
}

// plain returns how many bytes at the beginning of s stand for themselves.
func plain(s string, escaped byte) int {
	for i := range len(s) {
		if c := s[i]; c < ' ' || c >= 0x7f || c == '"' || c == '\\' || c == escaped {
			return i
		}
	}
	return len(s)
}

// rune appends the character that s begins with and returns how many bytes it takes in s.
func (e *encoder) rune(s string) (size int) {
	c, size := utf8.DecodeRuneInString(s)
	switch {
	case c == utf8.RuneError && size == 1: // no character
		e.line = append(e.line, `\ufffd`...)
	case c >= utf8.RuneSelf && strconv.IsPrint(c):
		e.line = utf8.AppendRune(e.line, c)
	case c > 0xffff:
		high, low := utf16.EncodeRune(c)
		e.escape(high)
		e.escape(low)
	default:
		e.escape(c)
	}
	return size
}

// escape appends a character, or half of one, of 16 bits.
func (e *encoder) escape(c rune) {
	const digits = "0123456789abcdef"
	e.line = append(e.line, '\\', 'u', digits[c>>12&15], digits[c>>8&15], digits[c>>4&15], digits[c&15])
}
