package accesslog

import (
	"slices"
	"strconv"
	"strings"
	"time"

	"holdfast/internal/accesslog/flags"
	"holdfast/internal/accesslog/format"
)

// The most bytes that a field of a head takes in a line, unless the format says it.
const maxField = 256 // of a head

// names are those of fields, in lower case, that a Log wants to be told of.
type names []string

// number returns the place of a name, which it adds if it is not there; -1 for none and for
// what is no field's.
func (n *names) number(name string) int {
	if name == "" || name[0] == ':' {
		return -1
	}
	i := slices.Index(*n, name)
	if i < 0 {
		i = len(*n)
		*n = append(*n, name)
	}
	return i
}

// custom is a format that the configuration has, for one Log.
type custom struct {
	pieces []customPiece
}

type customPiece struct {
	*format.Piece
	field, other int // places of the fields' names in the Log's
}

func newCustom(f *format.Format, request, response *names) *custom {
	c := new(custom)
	for i := range f.Pieces {
		p := customPiece{&f.Pieces[i], -1, -1}
		switch p.Op {
		case format.Request, format.RequestWithoutQuery:
			p.field, p.other = request.number(p.Name), request.number(p.Other)
		case format.Response:
			p.field, p.other = response.number(p.Name), response.number(p.Other)
		}
		c.pieces = append(c.pieces, p)
	}
	return c
}

// keep notes what an output that has the ends of tunnels wants to know then.
func (l *Log) keep(c *custom, f *Filter) {
	var none names
	if c != nil {
		for i := range c.pieces {
			into := &l.keptRequest
			switch c.pieces[i].Op {
			case format.Request, format.RequestWithoutQuery:
			case format.Response:
				into = &l.keptResponse
			default:
				into = &none
			}
			into.number(c.pieces[i].Name)
			into.number(c.pieces[i].Other)
		}
	}
	if f != nil {
		for _, h := range f.Headers {
			l.keptRequest.number(strings.ToLower(h.Name))
		}
	}
}

// occasion is what a line is made for: a record, or the end of a tunnel, of which the record
// is that of its opening.
type occasion struct {
	*Record
	event          event
	start          time.Time
	took           time.Duration
	received, sent uint64
	reason         string
	flags          flags.Set
}

// occasion makes a line, in a custom format unless that is nil.
func (e *encoder) occasion(c *custom, o *occasion, generation int) {
	if c == nil {
		e.standard(o, generation)
		return
	}
	e.custom(c, o, generation)
}

// custom makes a line. It takes at most maxLine bytes, because every piece leaves to those
// behind it what they need at least.
func (e *encoder) custom(c *custom, o *occasion, generation int) {
	for i := range c.pieces {
		e.piece(&c.pieces[i], o, generation)
	}
	e.line = append(e.line, '\n')
}

func (e *encoder) piece(p *customPiece, o *occasion, generation int) {
	switch p.Op {
	case format.Literal:
		e.line = append(e.line, p.Text...)
	case format.StartTime:
		e.quote(p)
		e.line = p.AppendTime(e.line, o.start)
		e.quote(p)
	case format.RemoteAddress, format.RemoteAddressWithoutPort:
		e.address(p, o)
	case format.ClientAddress:
		if !o.ClientAddress.IsValid() {
			e.absent(p)
			return
		}
		var room [64]byte
		e.quote(p)
		e.line = append(e.line, o.ClientAddress.AppendTo(room[:0])...)
		e.quote(p)
	case format.ResponseCode:
		e.line = strconv.AppendUint(e.line, uint64(max(o.Status, 0)), 10)
	case format.BytesReceived:
		e.line = strconv.AppendUint(e.line, o.received, 10)
	case format.BytesSent:
		e.line = strconv.AppendUint(e.line, o.sent, 10)
	case format.Duration:
		e.line = strconv.AppendUint(e.line, milliseconds(o.took), 10)
	case format.Generation:
		e.line = strconv.AppendUint(e.line, uint64(max(generation, 0)), 10)
	case format.ResponseDuration:
		if o.Upstream <= 0 {
			e.absent(p)
			return
		}
		e.line = strconv.AppendUint(e.line, milliseconds(o.Upstream), 10)
	case format.RemotePort:
		if !o.Client.IsValid() {
			e.absent(p)
			return
		}
		e.line = strconv.AppendUint(e.line, uint64(o.Client.Port()), 10)
	case format.ResponseFlags:
		if o.flags == 0 {
			e.absent(p)
			return
		}
		e.quote(p)
		e.line = o.flags.Append(e.line)
		e.quote(p)
	case format.ResponseCodeDetails:
		e.details(p, o)
	default:
		s, limit := o.text(p)
		e.text(p, s, limit)
	}
}

// text returns the value of an operator that is a string, and what it may take in a line.
// tlsError is what a reason has before why an endpoint could not be spoken to by TLS.
const tlsError = ": TLS error: "

func (o *occasion) text(p *customPiece) (s string, limit int) {
	switch p.Op {
	case format.Event:
		return events[o.event], maxName
	case format.Request:
		return o.requestField(p)
	case format.RequestWithoutQuery:
		s, limit = o.requestField(p)
		s, _, _ = strings.Cut(s, "?")
		return s, limit
	case format.Response:
		if s = valueOf(o.ResponseFields, p.field); s == "" {
			s = valueOf(o.ResponseFields, p.other)
		}
		return s, maxField
	case format.Protocol:
		return o.Protocol, maxProtocol
	case format.RequestedServerName:
		switch {
		case o.TLS != nil:
			return o.TLS.ServerName, maxServerName
		case o.Protocol == TCP:
			return o.Authority, maxAuthority
		}
		return "", 0
	case format.TLSVersion:
		if o.TLS != nil {
			return o.TLS.Version, maxVersion
		}
		return "", 0
	case format.TLSCipher:
		if o.TLS != nil {
			return o.TLS.Cipher, maxCipher
		}
		return "", 0
	case format.PeerSubject:
		return o.TLS.peer().Subject, maxSubject
	case format.PeerIssuer:
		return o.TLS.peer().Issuer, maxSubject
	case format.PeerSerial:
		return o.TLS.peer().Serial, maxSerial
	case format.PeerFingerprint:
		return o.TLS.peer().Fingerprint, maxFingerprint
	case format.PeerURIs:
		return o.TLS.peer().URIs, maxSANs
	case format.PeerDNSNames:
		return o.TLS.peer().DNSNames, maxSANs
	case format.Reason:
		return o.reason, maxReason
	case format.TransportFailureReason:
		_, why, _ := strings.Cut(o.reason, tlsError)
		return why, maxReason
	case format.UpstreamHost:
		return o.Endpoint, maxEndpoint
	case format.UpstreamCluster:
		return o.Cluster, maxName
	case format.RouteName:
		return o.Route, maxRoute
	case format.VirtualHostName:
		return o.VirtualHost, maxName
	case format.ListenerName:
		return o.Listener, maxName
	case format.RequestID:
		return o.RequestID, maxRequestID
	}
	return "", 0
}

// requestField returns the first of a piece's two fields that is there.
func (o *occasion) requestField(p *customPiece) (s string, limit int) {
	if s, limit = o.ofRequest(p.Name, p.field); s == "" {
		s, limit = o.ofRequest(p.Other, p.other)
	}
	return s, limit
}

func (o *occasion) ofRequest(name string, field int) (s string, limit int) {
	switch name {
	case ":method":
		return o.Method, maxMethod
	case ":path":
		return o.Target, maxTarget
	case ":authority":
		return o.Authority, maxAuthority
	case ":scheme":
		return o.Scheme, maxScheme
	}
	return valueOf(o.RequestFields, field), maxField
}

// valueOf returns a field's value, "" where it is not there or not known.
func valueOf(values []Value, field int) string {
	if field < 0 || field >= len(values) {
		return ""
	}
	return values[field].Text
}

// quote appends the quotes of a JSON value.
func (e *encoder) quote(p *customPiece) {
	if p.Whole {
		e.line = append(e.line, '"')
	}
}

// absent appends what stands for nothing.
func (e *encoder) absent(p *customPiece) {
	if p.Whole {
		e.line = append(e.line, "null"...)
	} else {
		e.line = append(e.line, '-')
	}
}

// text appends a string within its limit, and within what the rest of the line leaves to it.
func (e *encoder) text(p *customPiece, s string, limit int) {
	if s == "" {
		e.absent(p)
		return
	}
	if p.Max > 0 {
		limit = p.Max
	}
	e.quote(p)
	e.content(s, e.room(p, limit), p.Escaped)
	e.quote(p)
}

// room returns how much of its limit a string can take.
func (e *encoder) room(p *customPiece, limit int) int {
	return min(limit, maxLine-len("\n")-len(`"`)-p.Rest-len(e.line))
}

// details appends how the response came about, in one word.
func (e *encoder) details(p *customPiece, o *occasion) {
	if o.reason == "" {
		s := ""
		switch {
		case o.Upstream > 0:
			s = "via_upstream"
		case o.Status > 0:
			s = "direct_response"
		}
		e.text(p, s, maxReason)
		return
	}
	e.quote(p)
	end := len(e.line) + e.room(p, maxReason)
	word, rest, more := strings.Cut(o.reason, " ")
	e.content(word, end-len(e.line), p.Escaped)
	for more && len(e.line) < end-len("…") {
		word, rest, more = strings.Cut(rest, " ")
		e.line = append(e.line, '_')
		e.content(word, end-len(e.line), p.Escaped)
	}
	e.quote(p)
}

// address appends the client's.
func (e *encoder) address(p *customPiece, o *occasion) {
	client := o.Client
	switch {
	case !client.IsValid():
		e.text(p, "unix", maxClient)
	case client.Addr().Zone() != "": // the name of an interface may be anything
		if p.Op == format.RemoteAddressWithoutPort {
			e.text(p, client.Addr().String(), maxClient)
		} else {
			e.text(p, client.String(), maxClient)
		}
	default:
		var room [64]byte
		s := room[:0]
		if p.Op == format.RemoteAddressWithoutPort {
			s = client.Addr().AppendTo(s)
		} else {
			s = client.AppendTo(s)
		}
		e.quote(p)
		e.line = append(e.line, s...)
		e.quote(p)
	}
}

func milliseconds(d time.Duration) uint64 { return uint64(max(d.Milliseconds(), 0)) }
