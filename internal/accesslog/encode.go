package accesslog

import (
	"net/netip"
	"strconv"
	"time"
	"unicode/utf16"
	"unicode/utf8"

	"holdfast/internal/accesslog/format"
)

// maxLine is the most bytes of a line with its line break: what one write to a pipe
// keeps together, PIPE_BUF (pipe(7)). The limits of the strings add up to less.
const maxLine = 4096

type kind uint8

const (
	jsonFormat kind = iota
	textFormat
	customFormat
)

// encoder makes one line, in one of the formats.
type encoder struct {
	format kind
	line   []byte
}

// What is escaped in strings between quotes, and in those of which a space is the end, too.
var (
	quoted = format.Escaping("")
	spaced = format.Escaping(" ")
)

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

	maxVersion     = 8 // of TLS
	maxCipher      = 64
	maxServerName  = 255
	maxSubject     = 256
	maxSANs        = 256
	maxSerial      = 64
	maxFingerprint = 64
)

// standard makes a line in a format of our own.
func (e *encoder) standard(o *occasion, generation int) {
	e.begin(o)
	e.common(o.Record, generation)
	e.tls(o.TLS)
	switch {
	case o.event != tunnelClose:
		// What is known of TLS takes the room of what anybody may say of himself.
		e.string("user_agent", o.UserAgent, e.within(256, `,"user_agent":"","referer":"","forwarded_for":""}`))
		e.string("referer", o.Referer, e.within(320, `,"referer":"","forwarded_for":""}`))
		e.string("forwarded_for", o.ForwardedFor, e.within(256, `,"forwarded_for":""}`))
	case e.format == textFormat:
		e.line = append(e.line, ` "" "" ""`...) // each line has the same number of fields
	}
	e.finish()
}

// begin appends what differs between a tunnel's opening and its end.
func (e *encoder) begin(o *occasion) {
	const layout = "2006-01-02T15:04:05.000000Z"
	at, name := o.start.Add(o.took).UTC(), events[o.event]
	if e.format == textFormat {
		e.line = at.AppendFormat(e.line, layout)
		e.line = append(append(e.line, ' '), name...)
	} else {
		e.line = append(e.line, `{"time":"`...)
		e.line = at.AppendFormat(e.line, layout)
		e.line = append(append(append(e.line, `","event":"`...), name...), '"')
	}
	e.seconds("duration_seconds", o.took)
	e.number("received_bytes", o.received)
	e.number("sent_bytes", o.sent)
	e.string("reason", o.reason, maxReason)
	e.key("flags")
	e.line = append(e.line, '"')
	e.line = o.flags.Append(e.line)
	e.line = append(e.line, '"')
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
	e.clientAddress(r.ClientAddress)
	e.string("listener", r.Listener, maxName)
	e.string("virtual_host", r.VirtualHost, maxName)
	e.string("route", r.Route, maxRoute)
	e.string("cluster", r.Cluster, maxName)
	e.string("endpoint", r.Endpoint, maxEndpoint)
	e.number("generation", uint64(max(generation, 0)))
	e.string("request_id", r.RequestID, maxRequestID)
}

// within returns how much of its limit a string can take, with this around it and behind it.
func (e *encoder) within(limit int, around string) int {
	return max(min(limit, maxLine-len(e.line)-len(around)-len("\n")), 0)
}

// tls appends what is known of the client's TLS, if there is any.
func (e *encoder) tls(t *TLS) {
	if t == nil || e.format == textFormat {
		return
	}
	e.string("tls_version", t.Version, maxVersion)
	e.string("server_name", t.ServerName, maxServerName)
	if t.Peer != nil {
		e.string("peer_subject", t.Peer.Subject, maxSubject)
		e.string("peer_fingerprint", t.Peer.Fingerprint, maxFingerprint)
	}
}

var noPeer Peer

// peer is of somebody unknown where there is none.
func (t *TLS) peer() *Peer {
	if t == nil || t.Peer == nil {
		return &noPeer
	}
	return t.Peer
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
	e.content(r.Method, maxMethod, spaced)
	e.line = append(e.line, ' ')
	e.content(r.Target, maxTarget, spaced)
	e.line = append(e.line, ' ')
	e.content(r.Protocol, maxProtocol, spaced)
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

func (e *encoder) clientAddress(a netip.Addr) {
	e.key("client_address")
	e.line = append(e.line, '"')
	if a.IsValid() {
		e.line = a.AppendTo(e.line)
	}
	e.line = append(e.line, '"')
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
	e.content(s, limit, quoted)
	e.line = append(e.line, '"')
}

// content appends s as it stands in a JSON string, with everything escaped that cannot
// be printed, and also what escaped says. If that takes more than limit bytes, it is cut
// between two characters; the mark of that takes part of the limit, if there is room.
func (e *encoder) content(s string, limit int, escaped *format.Escaped) {
	if len(s) <= limit && plain(s, escaped) == len(s) { // as nearly all are
		e.line = append(e.line, s...)
		return
	}
	cut := "…"
	if limit <= len(cut) {
		cut = ""
	}
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
			size = e.rune(s, escaped.Wide)
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
func plain(s string, escaped *format.Escaped) int {
	for i := range len(s) {
		if c := s[i]; c >= utf8.RuneSelf || escaped.ASCII[c] {
			return i
		}
	}
	return len(s)
}

// rune appends the character that s begins with and returns how many bytes it takes in s.
func (e *encoder) rune(s string, wide bool) (size int) {
	c, size := utf8.DecodeRuneInString(s)
	switch {
	case c == utf8.RuneError && size == 1: // no character
		e.line = append(e.line, `\ufffd`...)
	case c >= utf8.RuneSelf && !wide && strconv.IsPrint(c):
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
