package http2

import (
	"strconv"
	"strings"
	"time"

	"golang.org/x/net/http2/hpack"

	"holdfast/internal/exchange"
	"holdfast/internal/http1"
)

// serverHead is a request as it came. It is made by the goroutine that reads the connection,
// before the library knows of the request.
type serverHead struct {
	exchange.Request
	protocol string // of an extended CONNECT (RFC 8441); "": it is none
	key      string // the one of the upgrade that it becomes; "": it does not
	expect   bool   // the client waits for a 100 before it sends the body
	open     bool   // DATA or trailers may follow. Who reads the connection owns it
	refusal  error  // an *exchange.StatusError: what answers it. nil: a handler does
	began    time.Time

	started  bool  // a handler has it
	dropped  bool  // none gets it
	resetAs  bool  // its reset says another code, and is still to come
	declared int64 // length of the body; -1: none was
	received int64 // bytes of that

	// Owned by who reads the connection. The trailers are there before anybody knows of the end.
	ended    bool // the client has said that nothing follows
	trailers exchange.Fields
}

// A malformedError is why a request is none. Nobody answers it: its stream is reset (RFC 9113
// §8.1.1).
type malformedError string

func (e malformedError) Error() string { return string(e) }

// headParser reads the fields of one request.
type headParser struct {
	head                            *serverHead
	method, scheme, path, authority string
	pseudo                          uint8 // which of them were there
	regular                         bool  // a field was that is none of these
	host                            string
	hosts, lengths, expects         int
	length, expectation             string
	cookie                          int    // where the first one is in the fields, plus one
	cookies                         []byte // all of them; nil: there is but one
}

const (
	pseudoMethod uint8 = 1 << iota
	pseudoScheme
	pseudoPath
	pseudoAuthority
	pseudoProtocol
)

// parseHead reads a request from the fields of a header block, in the order in which they came.
// ended says that nothing follows. The error is a [malformedError]; what is valid and cannot be
// served is in the head's refusal.
func parseHead(fields []hpack.HeaderField, ended bool, scheme string) (*serverHead, error) {
	h := &serverHead{open: !ended, declared: -1}
	h.Scheme, h.Major = scheme, 2
	p := headParser{head: h}
	h.Fields = make(exchange.Fields, 0, len(fields))
	for _, f := range fields {
		if err := p.field(f.Name, f.Value); err != nil {
			return h, err
		}
	}
	return h, p.finish(ended)
}

func (p *headParser) field(name, value string) error {
	if strings.HasPrefix(name, ":") {
		return p.pseudoField(name, value)
	}
	p.regular = true
	if err := checkField(name, value); err != nil {
		return err
	}
	h := p.head
	switch {
	case http1.IsPlain(name):
		if name == "cookie" && !p.firstCookie(value) {
			return nil
		}
		h.Fields = append(h.Fields, exchange.Field{Name: name, Value: value})
	case name == "host":
		p.host = value
		p.hosts++
	case name == "content-length":
		p.length = value
		p.lengths++
	case name == "expect":
		p.expectation = value
		p.expects++
	case name == "te":
		if value != "" && !http1.IsWord(value, "trailers") {
			return malformedError("a TE field other than trailers")
		}
		h.TakesTrailers = h.TakesTrailers || value != ""
	case name == "trailer":
		h.Trailers = true
	}
	return nil
}

// checkField says why a field may not be there, in a head or in trailers.
func checkField(name, value string) error {
	switch {
	case !isLowerName(name):
		return malformedError("a field without a valid name")
	case isConnectionField(name):
		return malformedError("a field about a connection: " + name)
	case http1.IsLookalike(name):
		return malformedError("the field " + name)
	case !http1.IsFieldValue(value):
		return malformedError("a control character in a field")
	case value != "" && (isBlank(value[0]) || isBlank(value[len(value)-1])):
		return malformedError("white space around the value of a field") // RFC 9113 §8.2.1
	}
	return nil
}

func isBlank(c byte) bool { return c == ' ' || c == '\t' }

// isLowerName says whether a field can have this name, which is in lower case (RFC 9113 §8.2).
func isLowerName(name string) bool {
	for i := range len(name) {
		if 'A' <= name[i] && name[i] <= 'Z' {
			return false
		}
	}
	return http1.IsToken(name)
}

// firstCookie keeps others to be joined to the first one, since HTTP/1 knows but one (RFC 9113
// §8.2.3). They are joined at once: a client sends hundreds of the same in a byte each.
func (p *headParser) firstCookie(value string) bool {
	fields := p.head.Fields
	if p.cookie == 0 {
		p.cookie = len(fields) + 1
		return true
	}
	if p.cookies == nil {
		p.cookies = append(p.cookies, fields[p.cookie-1].Value...)
	}
	p.cookies = append(append(p.cookies, "; "...), value...)
	return false
}

func (p *headParser) pseudoField(name, value string) error {
	var which uint8
	switch name {
	case ":method":
		which, p.method = pseudoMethod, value
	case ":scheme":
		which, p.scheme = pseudoScheme, value
	case ":path":
		which, p.path = pseudoPath, value
	case ":authority":
		which, p.authority = pseudoAuthority, value
	case ":protocol":
		which, p.head.protocol = pseudoProtocol, value
	}
	switch {
	case p.regular:
		return malformedError("a pseudo-header field behind others")
	case which == 0:
		return malformedError("an unknown pseudo-header field")
	case p.pseudo&which != 0:
		return malformedError("a pseudo-header field that is there twice")
	}
	p.pseudo |= which
	return nil
}

// finish looks at what belongs together (RFC 9113 §8.3.1).
func (p *headParser) finish(ended bool) error {
	h := p.head
	if p.cookies != nil {
		h.Fields[p.cookie-1].Value = string(p.cookies)
	}
	connect := p.method == "CONNECT" && p.pseudo&pseudoProtocol == 0
	switch {
	case !http1.IsToken(p.method):
		return malformedError("no method, or none that is valid")
	case connect && p.pseudo != pseudoMethod|pseudoAuthority:
		return malformedError("CONNECT with other pseudo-header fields than an authority")
	case p.pseudo&pseudoProtocol != 0 && (p.method != "CONNECT" || !http1.IsToken(h.protocol)):
		return malformedError("a protocol without CONNECT, or none that is valid")
	case !connect && p.scheme != "http" && p.scheme != "https":
		return malformedError("no scheme, or none that is served")
	case !connect && p.path == "":
		return malformedError("no path")
	}
	if err := p.readAuthority(); err != nil {
		return err
	}
	h.Method, h.Target = p.method, p.path
	if err := p.readLength(ended); err != nil {
		return err
	}
	var err error
	switch {
	case connect:
		h.Target = "/" // of which nothing is made
		err = http1.Refuse(501, "CONNECT")
	case h.Authority == "":
		err = http1.Refuse(400, "no authority")
	default:
		err = http1.CheckTarget(p.method, p.path)
	}
	if exchange.StatusOf(err, 0) == 400 && h.Authority != "" {
		return malformedError(err.Error())
	}
	if err == nil && p.expects > 0 {
		h.expect = p.expects == 1 && http1.IsWord(p.expectation, "100-continue")
		if !h.expect {
			err = http1.Refuse(417, "an unknown expectation")
		}
	}
	h.refusal = err
	return nil
}

// readAuthority finds out for which host the request is. Host may repeat it.
func (p *headParser) readAuthority() error {
	h, has := p.head, p.pseudo&pseudoAuthority != 0
	switch {
	case p.hosts > 1:
		return malformedError("more than one Host")
	case has && p.hosts > 0 && !strings.EqualFold(p.host, p.authority):
		return malformedError("Host and authority disagree")
	case p.hosts > 0:
		has, h.Authority = true, p.host
	default:
		h.Authority = p.authority
	}
	if has && !http1.IsAuthority(h.Authority) {
		return malformedError("an invalid authority")
	}
	return nil
}

func (p *headParser) readLength(ended bool) error {
	h := p.head
	if p.lengths > 1 {
		return malformedError("more than one Content-Length")
	}
	if p.lengths == 1 {
		n, err := http1.ParseLength(p.length)
		if err != nil {
			return malformedError(err.Error())
		}
		h.declared = n
	}
	switch {
	case !ended:
		h.ContentLength = h.declared
	case h.declared > 0:
		return malformedError("a Content-Length without content")
	}
	return nil
}

// parseTrailers reads trailers; of those the ones are left out that may not be there.
func parseTrailers(fields []hpack.HeaderField) (exchange.Fields, error) {
	var trailers exchange.Fields
	for _, f := range fields {
		if strings.HasPrefix(f.Name, ":") {
			return nil, malformedError("a pseudo-header field in trailers")
		}
		if err := checkField(f.Name, f.Value); err != nil {
			return nil, err
		}
		if http1.MayTrail(f.Name) {
			trailers.Add(f.Name, f.Value)
		}
	}
	return trailers, nil
}

// Fields of the static table (RFC 7541, appendix A), literals that are not indexed.
const (
	hpackGet         = 0x80 | 2
	hpackPost        = 0x80 | 3
	hpackSchemeHTTP  = 0x80 | 6
	hpackPath        = 4
	hpackLongIndex   = 0x0f
	hpackLength      = 28 - hpackLongIndex
	hpackExpectation = 35 - hpackLongIndex
	hpackMethodName  = 2
	hpackInvalid     = 0x80 // the index 0
)

// standIn appends the header block that the library gets in place of the request's: what it needs
// to know, and by which path its handler finds the head.
func (h *serverHead) standIn(b []byte, id uint32) []byte {
	switch {
	case h.Method == "HEAD":
		b = appendText(append(b, hpackMethodName), "HEAD")
	case h.open:
		b = append(b, hpackPost)
	default:
		b = append(b, hpackGet)
	}
	b = append(b, hpackSchemeHTTP, hpackPath)
	b = appendText(b, "/"+strconv.FormatUint(uint64(id), 10))
	if h.declared >= 0 {
		b = appendText(append(b, hpackLongIndex, hpackLength), strconv.FormatInt(h.declared, 10))
	}
	if h.expect {
		b = appendText(append(b, hpackLongIndex, hpackExpectation), "100-continue")
	}
	return b
}

// appendText appends a string of less than 127 bytes.
func appendText(b []byte, s string) []byte { return append(append(b, byte(len(s))), s...) }
