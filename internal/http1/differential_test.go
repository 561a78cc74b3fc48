package http1

import (
	"bufio"
	"errors"
	"io"
	"net/http"
	"net/textproto"
	"slices"
	"strconv"
	"strings"
	"testing"

	"holdfast/internal/exchange"
)

// A difference is a class of messages that we and net/http do not read alike, with one
// that shows it, and why we read it as we do. The class begins with "we refuse: ", "they
// refuse: " or "read differently: " and goes on with the beginning of what is said by who
// refuses, or with what it is that is read differently. A difference that is not listed
// here fails the tests, and so does one that its example does not show any more.
type difference struct{ class, example, why string }

const (
	getA   = "GET / HTTP/1.1\r\nHost: a\r\n"
	postA  = "POST / HTTP/1.1\r\nHost: a\r\n"
	chunkA = postA + "Transfer-Encoding: chunked\r\n\r\n"
	ok     = "HTTP/1.1 200 OK\r\n"
	chunks = ok + "Transfer-Encoding: chunked\r\n\r\n"
)

var requestDifferences = []difference{
	{"we refuse: CONNECT", "CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n",
		"RFC 9110 §9.3.6: a reverse proxy opens no tunnels to other places"},
	{"we refuse: Connection names ", getA + "Connection: content-length\r\n\r\n",
		"RFC 9110 §7.6.1: a field for all recipients must not be named; without it the message would be another one"},
	{"we refuse: Host and target disagree", "GET http://b/ HTTP/1.1\r\nHost: a\r\n\r\n",
		"safe choice: by RFC 9112 §3.2.2 the target wins, but many read only Host"},
	{"we refuse: Transfer-Encoding and Content-Length", postA + "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
		"RFC 9112 §6.1 and §6.3: may be refused, and is what request smuggling is made of"},
	{"we refuse: Transfer-Encoding in HTTP/1.0", "POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
		"RFC 9112 §6.1: the framing is faulty; who knows only HTTP/1.0 reads no chunks"},
	{"we refuse: more than one Content-Length", postA + "Content-Length: 0\r\nContent-Length: 0\r\n\r\n",
		"RFC 9110 §8.6 leaves the choice where they agree; nobody sends that in good faith"},
	{"we refuse: a Connection option that is no token", getA + "Connection: a b\r\n\r\n",
		"RFC 9110 §7.6.1: nobody can tell which fields are meant"},
	{"we refuse: more than 64 Connection options", getA + "Connection: " + strings.Repeat("a,", 65) + "\r\n\r\n",
		"each option is compared with each field: a limit on work"},
	{"we refuse: more than 200 fields", getA + strings.Repeat("A: b\r\n", 200) + "\r\n",
		"RFC 6585 §5: net/http limits heads in its server, not in this function"},
	{"we refuse: a head of more than 65536 bytes", getA + "A: " + strings.Repeat("b", 64<<10) + "\r\n\r\n",
		"RFC 6585 §5: net/http limits heads in its server, not in this function"},
	{"we refuse: a target that is too long", "GET /" + strings.Repeat("a", maxTarget) + " HTTP/1.1\r\nHost: a\r\n\r\n",
		"RFC 9110 §15.5.15"},
	{"we refuse: a field line without a valid name", getA + "A b: c\r\n\r\n",
		"RFC 9110 §5.1; folded lines fail here too, which RFC 9112 §5.2 wants refused"},
	{"we refuse: a line ends in LF without CR", "GET / HTTP/1.1\nHost: a\r\n\r\n",
		"safe choice: RFC 9112 §2.2 allows it to be read, but not all do"},
	{"we refuse: the field ", getA + "Content_Length: 5\r\n\r\n",
		"safe choice: an upstream that folds _ and - into one would take it for framing"},
	{"we refuse: the version ", "GET / HTTP/1.2\r\nHost: a\r\n\r\n",
		"RFC 9110 §15.6.6: only 1.0 and 1.1 are spoken; the preface of HTTP/2 is one of these"},
	{"we refuse: a target in no known form", "GET * HTTP/1.1\r\nHost: a\r\n\r\n",
		"RFC 9112 §3.2"},
	{"we refuse: a target with a forbidden character", "GET /a#b HTTP/1.1\r\nHost: a\r\n\r\n",
		"RFC 9112 §3.2 and RFC 3986 §3: visible ASCII and no fragment"},
	{"we refuse: a target with an invalid host", "GET http://u@a/ HTTP/1.1\r\nHost: a\r\n\r\n",
		"RFC 9110 §4.2.4: user information is not to be trusted; an empty host is none (§4.2.1)"},
	{"we refuse: an invalid Host", "GET / HTTP/1.1\r\nHost: a/b\r\n\r\n",
		"RFC 9112 §3.2: 400"},
	{"we refuse: no Host", "GET / HTTP/1.1\r\n\r\n",
		"RFC 9112 §3.2: 400; in HTTP/1.0 too, because routes need one"},
	{"we refuse: an unknown expectation", getA + "Expect: x\r\n\r\n",
		"RFC 9110 §10.1.1: 417"},
	{"we refuse: a malformed chunk-size", chunkA + "0 \r\n\r\n",
		"RFC 9112 §7.1: white space behind a size is no part of the grammar, and was used to smuggle"},
	{"we refuse: a control character in a chunk extension", chunkA + "0;\x01\r\n\r\n",
		"RFC 9112 §7.1.1: tokens and quoted strings have none"},
	{"we refuse: more than 16384 bytes of chunk extensions", chunkA + "0;" + strings.Repeat("a", maxExtension+1) + "\r\n\r\n",
		"RFC 9112 §7.1.1: the total length of extensions is to be limited"},
	{"we refuse: a trailer ", chunkA + "0\r\nContent-Length: 5\r\n\r\n",
		"RFC 9110 §6.5.1: framing and routing must not come behind the body"},
	{"we refuse: to end here", getA + "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key1: 1\r\nSec-WebSocket-Key2: 2\r\n\r\n",
		"draft 76 of WebSocket, §1.3: eight bytes behind the head belong to the handshake"},

	{"they refuse: malformed HTTP request \"\"", "\r\n" + getA + "\r\n",
		"RFC 9112 §2.2: one empty line before a request is to be ignored; net/http's server does so behind a POST"},
	{"they refuse: parse ", "GET /%zz HTTP/1.1\r\nHost: a\r\n\r\n",
		"RFC 9112 §3.2.1: to us a path is opaque but for its characters; what an escape means its endpoint knows"},
	{"they refuse: bad trailer key ", postA + "Trailer: Content-Length\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
		"RFC 9110 §6.6.2: Trailer is a hint, which we neither believe nor pass on; the trailers themselves are judged"},
	{"they refuse: http: suspiciously long trailer", chunkA + "0\r\nETag: " + strings.Repeat("a", 5000) + "\r\n\r\n",
		"their limit is the size of their buffer, ours is 16 KiB"},

	{"read differently: fields of one hop", getA + "Keep-Alive: 5\r\n\r\n",
		"RFC 9110 §7.6.1: they end here; net/http leaves that to its proxy"},
	{"read differently: fields that Connection names", getA + "Connection: x\r\nX: y\r\n\r\n",
		"RFC 9110 §7.6.1: they end here; net/http leaves that to its proxy"},
	{"read differently: trailers that are not on the list", chunkA + "0\r\nX: y\r\n\r\n",
		"RFC 9110 §6.5.1: see trailerNames"},
	{"read differently: Pragma", getA + "Pragma: no-cache\r\n\r\n",
		"RFC 9111 §5.4: they add the Cache-Control that it stands for; we add nothing"},
	{"read differently: HTTP/1.0 that would be kept", "GET / HTTP/1.0\r\nHost: a\r\nConnection: keep-alive\r\n\r\n",
		"RFC 9112 §9.3: keep-alive of HTTP/1.0 need not be honoured, and was never specified well (appendix C.2.2)"},
	{"read differently: what follows an upgrade", getA + "Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
		"RFC 9110 §7.8: the bytes behind it may be of either protocol"},
	{"read differently: the tail of draft 76", getA + "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key1: 1\r\nSec-WebSocket-Key2: 2\r\n\r\n12345678",
		"draft 76 of WebSocket, §1.3: eight bytes behind the head belong to the handshake"},
	{"read differently: absolute-form", "GET http://a/x HTTP/1.1\r\nHost: a\r\n\r\n",
		"RFC 9112 §3.2.1: to an origin server origin-form is sent; the host must be the same"},
	{"read differently: the case of the host", "GET http://A/x HTTP/1.1\r\nHost: a\r\n\r\n",
		"RFC 9110 §4.2.3: hosts compare without case; we keep Host, they take the target's"},
}

var responseDifferences = []difference{
	{"we refuse: Connection names ", ok + "Connection: content-length\r\nContent-Length: 0\r\n\r\n",
		"RFC 9110 §7.6.1: a field for all recipients must not be named; without it the message would be another one"},
	{"we refuse: Transfer-Encoding and Content-Length", ok + "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
		"RFC 9112 §6.3: ought to be handled as an error: response splitting is made of it"},
	{"we refuse: Transfer-Encoding in HTTP/1.0", "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
		"RFC 9112 §6.1: the framing is faulty"},
	{"we refuse: more than one Content-Length", ok + "Content-Length: 0\r\nContent-Length: 0\r\n\r\n",
		"RFC 9110 §8.6 leaves the choice where they agree"},
	{"we refuse: a Content-Length beyond all bounds", "HEAD: " + ok + "Content-Length: 9000000000000000000\r\n\r\n",
		"above 2^62 sums could overflow; no content is that long"},
	{"we refuse: a Connection option that is no token", ok + "Connection: a b\r\nContent-Length: 0\r\n\r\n",
		"RFC 9110 §7.6.1: nobody can tell which fields are meant"},
	{"we refuse: more than 200 fields", ok + strings.Repeat("A: b\r\n", 201) + "\r\n",
		"safe choice: an upstream may not fill our memory; net/http limits heads in its transport"},
	{"we refuse: a head of more than 65536 bytes", ok + "A: " + strings.Repeat("b", 64<<10) + "\r\n\r\n",
		"safe choice: an upstream may not fill our memory; net/http limits heads in its transport"},
	{"we refuse: a field line without a valid name", ok + "A b: c\r\n\r\n",
		"RFC 9110 §5.1; folded lines fail here too, for which RFC 9112 §5.2 wants a 502 or a repair"},
	{"we refuse: a line ends in LF without CR", ok + "A: b\nC: d\r\n\r\n",
		"safe choice: RFC 9112 §2.2 allows it to be read, but not all do"},
	{"we refuse: a CR without LF", "HTTP/1.1 200 O\rK\r\n\r\n",
		"RFC 9112 §2.2: a bare CR is invalid, in a reason phrase too"},
	{"we refuse: a control character", "HTTP/1.1 200 O\x01K\r\n\r\n",
		"RFC 9112 §4: a reason phrase has none"},
	{"we refuse: a malformed status line", "HTTP/1.1 999 x\r\n\r\n",
		"RFC 9110 §15: other statuses than 100 to 599 are invalid, and a gateway sends 502"},
	{"we refuse: the field ", ok + "Content_Length: 5\r\n\r\n",
		"safe choice: a client that folds _ and - into one would take it for framing"},
	{"we refuse: the version ", "HTTP/1.2 200 OK\r\n\r\n",
		"RFC 9110 §2.5: only 1.0 and 1.1 are spoken"},
	{"we refuse: a 101 with a body", "HTTP/1.1 101 Switching Protocols\r\nContent-Length: 1\r\n\r\nx",
		"RFC 9110 §8.6: must not be; whether the byte is content nobody knows"},
	{"we refuse: a 103 with a body", "HTTP/1.1 103 Early Hints\r\nContent-Length: 1\r\n\r\nx",
		"RFC 9110 §8.6: must not be; whether the byte is content nobody knows"},
	{"we refuse: a 100 with a body", "HTTP/1.1 100 Continue\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
		"RFC 9112 §6.1: must not be; whether the bytes are content nobody knows"},
	{"we refuse: a 1xx in HTTP/1.0", "HTTP/1.0 101 Switching Protocols\r\n\r\n",
		"RFC 9110 §15.2: HTTP/1.0 has none, and no other protocol to change to"},
	{"we refuse: a 204 with a body", "HTTP/1.1 204 No Content\r\nContent-Length: 1\r\n\r\nx",
		"RFC 9110 §8.6: must not be; whether the byte is content nobody knows"},
	{"we refuse: a malformed chunk-size", chunks + "0 \r\n\r\n",
		"RFC 9112 §7.1: white space behind a size is no part of the grammar"},
	{"we refuse: a control character in a chunk extension", chunks + "0;\x01\r\n\r\n",
		"RFC 9112 §7.1.1: tokens and quoted strings have none"},
	{"we refuse: more than 16384 bytes of chunk extensions", chunks + "0;" + strings.Repeat("a", maxExtension+1) + "\r\n\r\n",
		"RFC 9112 §7.1.1: the total length of extensions is to be limited"},
	{"we refuse: a trailer ", chunks + "0\r\nContent-Length: 5\r\n\r\n",
		"RFC 9110 §6.5.1: framing and routing must not come behind the body"},

	{"they refuse: bad trailer key ", ok + "Trailer: Content-Length\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
		"RFC 9110 §6.6.2: Trailer is a hint, which we neither believe nor pass on; the trailers themselves are judged"},
	{"they refuse: http: suspiciously long trailer", chunks + "0\r\nETag: " + strings.Repeat("a", 5000) + "\r\n\r\n",
		"their limit is the size of their buffer, ours is 16 KiB"},

	{"read differently: fields of one hop", ok + "Keep-Alive: 5\r\n\r\n",
		"RFC 9110 §7.6.1: they end here; net/http leaves that to its proxy"},
	{"read differently: fields that Connection names", ok + "Connection: x\r\nX: y\r\n\r\n",
		"RFC 9110 §7.6.1: they end here; net/http leaves that to its proxy, and beside close loses the names"},
	{"read differently: trailers that are not on the list", chunks + "0\r\nX: y\r\n\r\n",
		"RFC 9110 §6.5.1: see trailerNames"},
	{"read differently: Pragma", ok + "Pragma: no-cache\r\n\r\n",
		"RFC 9111 §5.4: it means nothing in a response; they add a Cache-Control, we add nothing"},
	{"read differently: HTTP/1.0 that would be kept", "HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 0\r\n\r\n",
		"RFC 9112 §9.3: keep-alive of HTTP/1.0 need not be honoured, and was never specified well (appendix C.2.2)"},
	{"read differently: what follows a 101", "HTTP/1.1 101 Switching Protocols\r\n\r\n",
		"RFC 9110 §15.2.2: it is no response's, whatever protocol it is of"},
	{"read differently: the length of a message without content", "HEAD: HTTP/1.1 204 No Content\r\n\r\n",
		"RFC 9110 §6.4.1: 1xx and 204 never have any, which is 0 to us and unknown to them after HEAD"},
	{"read differently: the length of a 304", "HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n",
		"RFC 9110 §8.6: it is what a 200 would have had, or unknown if not stated; they say 0"},
}

// theirs is what net/http makes of the same bytes: whole messages, and the error behind
// them. io.EOF and io.ErrUnexpectedEOF mean that it waits for more.
type theirs struct {
	read []reading
	err  error
}

// counted knows how far its user has read.
type counted struct {
	r *strings.Reader
	b *bufio.Reader
}

func newCounted(raw string) *counted {
	r := strings.NewReader(raw)
	return &counted{r, bufio.NewReader(r)}
}

func (c *counted) at() int { return int(c.r.Size()) - c.r.Len() - c.b.Buffered() }

// theirRequests reads no more messages than we have, and one: what comes behind a message
// that only one of us takes says nothing.
func theirRequests(raw string, ours int) (got theirs) {
	in := newCounted(raw)
	for got.err == nil && len(got.read) <= ours {
		r, err := http.ReadRequest(in.b)
		if got.err = err; err != nil {
			break
		}
		m := reading{request: &exchange.Request{Method: r.Method, Target: r.RequestURI, Authority: r.Host, Major: r.ProtoMajor, Minor: r.ProtoMinor,
			ContentLength: r.ContentLength, Fields: listed(r.Header)}, close: r.Close}
		got.finish(&m, r.Body, &r.Trailer, in)
	}
	return got
}

func theirResponses(raw, method string, ours int) (got theirs) {
	in := newCounted(raw)
	for got.err == nil && len(got.read) <= ours {
		r, err := http.ReadResponse(in.b, &http.Request{Method: method})
		if got.err = err; err != nil {
			break
		}
		reason := strings.TrimPrefix(strings.TrimPrefix(r.Status, strconv.Itoa(r.StatusCode)), " ")
		m := reading{response: &exchange.Response{Status: r.StatusCode, Reason: reason, ContentLength: r.ContentLength, Fields: listed(r.Header)}, close: r.Close}
		got.finish(&m, r.Body, &r.Trailer, in)
	}
	return got
}

func (got *theirs) finish(m *reading, body io.Reader, trailers *http.Header, in *counted) {
	content, err := io.ReadAll(body)
	if got.err = err; err != nil {
		return
	}
	m.body, m.trailers, m.end = string(content), listed(*trailers), in.at()
	got.read = append(got.read, *m)
}

// listed is a header as fields, in an order that does not depend on how it is stored.
func listed(h http.Header) (fields exchange.Fields) {
	for name, values := range h {
		for _, v := range values {
			fields.Add(name, v)
		}
	}
	slices.SortStableFunc(fields, func(a, b exchange.Field) int { return strings.Compare(a.Name, b.Name) })
	return fields
}

// canonical writes our fields as net/http does.
func canonical(f exchange.Fields) exchange.Fields {
	h := make(http.Header)
	for _, l := range f {
		name := textproto.CanonicalMIMEHeaderKey(l.Name)
		h[name] = append(h[name], l.Value)
	}
	return listed(h)
}

// compare returns the classes of the differences, up to a message of which the two do not
// see the same end.
func compare(raw string, ours *conversation, got theirs) (classes []string) {
	for i, from := 0, 0; ; i++ {
		switch {
		case i < len(ours.read) && i < len(got.read):
			classes = append(classes, compareMessages(raw[from:], &ours.read[i], &got.read[i])...)
			if from = ours.read[i].end; from != got.read[i].end || ours.read[i].close {
				return classes
			}
		case i < len(ours.read):
			return append(classes, "they refuse: "+refusalOf(got.err))
		case i < len(got.read) && ours.err != nil:
			return append(classes, "we refuse: "+ours.err.Error())
		case i < len(got.read):
			return append(classes, "we refuse: to end here")
		default:
			return classes // neither takes what follows
		}
	}
}

func refusalOf(err error) string {
	if err == nil || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return "to end here"
	}
	return err.Error()
}

// compareMessages compares the messages at the beginning of raw.
func compareMessages(raw string, ours, got *reading) (classes []string) {
	add := func(what string) { classes = append(classes, "read differently: "+what) }
	if ours.request != nil {
		compareRequests(ours.request, got.request, add)
		compareFields(raw, ours.request.Fields, got.request.Fields, add)
	} else {
		compareResponses(ours.response, got.response, add)
		compareFields(raw, ours.response.Fields, got.response.Fields, add)
	}
	if ours.close != got.close {
		add(whyClosed(raw, ours))
	}
	if ours.body != got.body {
		add("the body")
	}
	if ours.end != got.end {
		if ours.request != nil && len(ours.request.HeadTail) == draft76Tail && ours.end == got.end+draft76Tail {
			add("the tail of draft 76")
		} else {
			add("the end")
		}
	}
	compareTrailers(ours.trailers, got.trailers, add)
	return classes
}

// whyClosed is why nothing may follow a message to us alone.
func whyClosed(raw string, ours *reading) string {
	line, _, _ := strings.Cut(strings.TrimPrefix(raw, "\r\n"), "\r\n")
	switch {
	case !ours.close:
	case ours.request != nil && strings.HasSuffix(line, " HTTP/1.0"), ours.response != nil && strings.HasPrefix(line, "HTTP/1.0 "):
		return "HTTP/1.0 that would be kept"
	case ours.request != nil && ours.request.Upgrade != "":
		return "what follows an upgrade"
	case ours.status() == 101:
		return "what follows a 101"
	}
	return "whether another message may follow"
}

func compareRequests(ours, got *exchange.Request, add func(string)) {
	if ours.Method != got.Method {
		add("the method")
	}
	if ours.Minor != got.Minor || ours.Major != got.Major {
		add("the version")
	}
	if ours.ContentLength != got.ContentLength {
		add("the length")
	}
	absolute := got.Target != "" && got.Target[0] != '/' && got.Target != "*"
	switch {
	case ours.Target == got.Target:
	case absolute:
		add("absolute-form")
	default:
		add("the target")
	}
	switch {
	case ours.Authority == got.Authority:
	case absolute && strings.EqualFold(ours.Authority, got.Authority):
		add("the case of the host")
	default:
		add("the host")
	}
}

func compareResponses(ours, got *exchange.Response, add func(string)) {
	if ours.Status != got.Status {
		add("the status")
	}
	if ours.Reason != got.Reason {
		add("the reason phrase")
	}
	switch {
	case ours.ContentLength == got.ContentLength:
	case (ours.Status < 200 || ours.Status == 204) && ours.ContentLength == 0 && got.ContentLength == -1:
		add("the length of a message without content")
	case ours.Status == 304 && got.ContentLength == 0:
		add("the length of a 304")
	default:
		add("the length")
	}
}

// compareFields takes away from theirs what is no field of the message to us, and tells
// what that was. What is then left must be the same.
func compareFields(raw string, ours, got exchange.Fields, add func(string)) {
	ours = canonical(ours)
	drop := func(what string, which func(exchange.Field) bool) {
		before := len(got)
		if got = slices.DeleteFunc(got, which); len(got) < before && what != "" {
			add(what)
		}
	}
	drop("", func(f exchange.Field) bool { return kindOf(f.Name) == lengthField }) // compared as what it means
	drop("fields of one hop", func(f exchange.Field) bool { return kindOf(f.Name) != plainField })
	named := connectionOptions(raw)
	drop("fields that Connection names", func(f exchange.Field) bool { return slices.Contains(named, strings.ToLower(f.Name)) })
	if pragma, _ := got.Get("Pragma"); pragma == "no-cache" && !ours.Has("Cache-Control") {
		drop("Pragma", func(f exchange.Field) bool { return f == exchange.Field{Name: "Cache-Control", Value: "no-cache"} })
	}
	if !slices.Equal(ours, got) {
		add("the fields")
	}
}

// connectionOptions are those of the head at the beginning of raw: of a response that
// says close, net/http does not keep them.
func connectionOptions(raw string) (options []string) {
	head, _, _ := strings.Cut(strings.TrimPrefix(raw, "\r\n"), "\r\n\r\n")
	for line := range strings.SplitSeq(head, "\r\n") {
		if name, value, _ := strings.Cut(line, ":"); strings.EqualFold(name, "Connection") {
			for option := range strings.SplitSeq(value, ",") {
				options = append(options, strings.ToLower(trimSpace(option)))
			}
		}
	}
	return options
}

func compareTrailers(ours, got exchange.Fields, add func(string)) {
	ours = canonical(ours)
	if slices.Equal(ours, got) {
		return
	}
	got = slices.DeleteFunc(slices.Clone(got), func(f exchange.Field) bool { return !mayTrail(f.Name) })
	if slices.Equal(ours, got) {
		add("trailers that are not on the list")
		return
	}
	add("the trailers")
}

// listedAs returns the entry of a difference: the longest that fits.
func listedAs(table []difference, class string) (entry string) {
	for _, d := range table {
		if strings.HasPrefix(class, d.class) && len(d.class) > len(entry) {
			entry = d.class
		}
	}
	return entry
}

func requestClasses(raw string) []string {
	ours := readRequests(raw)
	return compare(raw, ours, theirRequests(raw, len(ours.read)))
}

func responseClasses(raw, method string) []string {
	ours := readResponses(method, raw)
	return compare(raw, ours, theirResponses(raw, method, len(ours.read)))
}

func wantListed(t *testing.T, table []difference, raw string, classes []string) {
	t.Helper()
	for _, class := range classes {
		if listedAs(table, class) == "" {
			t.Fatalf("%s, and nobody has said why:\n%q", class, raw)
		}
	}
}

// TestListedDifferences: each entry is one that its example shows, and has a reason.
func TestListedDifferences(t *testing.T) {
	t.Parallel()
	wantShown := func(table []difference, d difference, classes []string) {
		wantListed(t, table, d.example, classes)
		shown := slices.ContainsFunc(classes, func(class string) bool { return listedAs(table, class) == d.class })
		if !shown || d.why == "" {
			t.Errorf("%s: the example %.100q shows %q", d.class, d.example, classes)
		}
	}
	for _, d := range requestDifferences {
		wantShown(requestDifferences, d, requestClasses(d.example))
	}
	for _, d := range responseDifferences {
		raw, method := d.example, "GET"
		if rest, ok := strings.CutPrefix(raw, "HEAD: "); ok {
			raw, method = rest, "HEAD"
		}
		wantShown(responseDifferences, d, responseClasses(raw, method))
	}
}

// TestNoOtherDifference compares over the corpus and over messages that are made up, the
// same ones each time.
func TestNoOtherDifference(t *testing.T) {
	t.Parallel()
	for name, raw := range requestsToFeed(t) {
		g := newGenerator(name)
		for range 20 {
			wantListed(t, requestDifferences, raw, requestClasses(raw))
			raw = g.damage(raw)
		}
	}
	for name, raw := range allResponses() {
		g := newGenerator(name)
		for range 20 {
			wantListed(t, responseDifferences, raw, responseClasses(raw, "GET"))
			wantListed(t, responseDifferences, raw, responseClasses(raw, "HEAD"))
			raw = g.damage(raw)
		}
	}
	g := newGenerator("messages")
	for range 4000 {
		raw := g.request() + g.damage(g.request())
		wantListed(t, requestDifferences, raw, requestClasses(raw))
		raw = g.response() + g.damage(g.response())
		wantListed(t, responseDifferences, raw, responseClasses(raw, g.one([]string{"GET", "HEAD"})))
	}
}

// FuzzDifferences looks for differences that are not listed.
func FuzzDifferences(f *testing.F) {
	for _, d := range slices.Concat(requestDifferences, responseDifferences) {
		if len(d.example) < 1000 { // fuzzing grows them by itself, and takes long over large ones
			f.Add(strings.TrimPrefix(d.example, "HEAD: "))
		}
	}
	for _, c := range readCorpus(f) {
		f.Add(string(c.Raw))
	}
	f.Fuzz(func(t *testing.T, raw string) {
		wantListed(t, requestDifferences, raw, requestClasses(raw))
		wantListed(t, responseDifferences, raw, responseClasses(raw, "GET"))
		wantListed(t, responseDifferences, raw, responseClasses(raw, "HEAD"))
	})
}
