package http1

import (
	"bytes"
	"fmt"
	"strings"

	"holdfast/internal/exchange"
)

// A reading is one message as a reader of the bytes understands it.
type reading struct {
	request  *exchange.Request  // or
	response *exchange.Response // not both
	close    bool               // nothing may follow it
	expect   bool               // of a request
	body     string
	trailers exchange.Fields
	end      int // how many bytes of the conversation were read up to its end
}

func (r *reading) status() int {
	if r.response == nil {
		return 0
	}
	return r.response.Status
}

// String is what whoever is handed the message sees of it.
func (r *reading) String() string {
	var s string
	if q := r.request; q != nil {
		s = fmt.Sprintf("%s %s %d.%d host %q length %d fields %q", q.Method, q.Target, q.Major, q.Minor, q.Authority, q.ContentLength, q.Fields)
		if q.Upgrade != "" {
			s += fmt.Sprintf(" upgrade to %s, body %v, tail %q", q.Upgrade, q.UpgradeBody, q.HeadTail)
		}
		if q.Offer != "" {
			s += " offers " + q.Offer
		}
		if q.Trailers {
			s += " announces trailers"
		}
		if q.TakesTrailers {
			s += " takes trailers"
		}
	} else {
		s = fmt.Sprintf("%d %s length %d fields %q upgrade %q", r.response.Status, r.response.Reason, r.response.ContentLength, r.response.Fields, r.response.Upgrade)
	}
	return fmt.Sprintf("%s body %q trailers %q", s, r.body, r.trailers)
}

// conversation reads what one side says on a connection, with nothing but the parsers
// and the decoder, and so says what every way of driving a connection must come to. It
// takes the bytes in pieces of any size. When it has ended, further bytes are no
// message's.
type conversation struct {
	responses bool   // the bytes are an upstream's
	method    string // of the requests that responses answer

	pending []byte
	taken   int // bytes before pending
	scan    headScanner
	skipped bool // the empty line before a request
	in      *reading
	tail    bool // a draft-76 tail is to come
	body    bodyDecoder

	read  []reading // whole messages
	ended bool      // none can follow
	err   error     // what was wrong with the one behind them
}

func readRequests(pieces ...string) *conversation {
	c := &conversation{scan: headScanner{limit: defaultHeadSize, request: true}}
	for _, p := range pieces {
		c.feed(p)
	}
	return c
}

// readResponses reads answers to requests of one method, up to the end of the connection.
func readResponses(method string, pieces ...string) *conversation {
	c := &conversation{responses: true, method: method, scan: headScanner{limit: defaultHeadSize}}
	for _, p := range pieces {
		c.feed(p)
	}
	if c.in != nil && c.body.kind == untilClose {
		c.whole()
	}
	return c
}

func (c *conversation) feed(p string) {
	c.pending = append(c.pending, p...)
	for !c.ended && c.step() {
	}
}

// step says whether it is worth another try.
func (c *conversation) step() bool {
	switch {
	case c.in == nil:
		return c.head()
	case c.tail:
		if len(c.pending) < draft76Tail {
			return false
		}
		c.in.request.HeadTail = bytes.Clone(c.pending[:draft76Tail])
		c.take(draft76Tail)
		c.tail = false
		return true
	}
	content, n, err := c.body.next(c.pending, len(c.pending))
	c.in.body += string(content)
	c.take(n)
	switch {
	case err != nil:
		c.refuse(err)
	case c.body.done():
		c.whole()
		return true
	}
	return n > 0
}

func (c *conversation) take(n int) {
	c.pending = c.pending[n:]
	c.taken += n
}

func (c *conversation) refuse(err error) { c.ended, c.err = true, err }

func (c *conversation) head() bool {
	end, err := c.scan.scan(c.pending)
	switch {
	case err == nil && end == 0:
		return false
	case err == nil && end == 2 && c.skipped:
		err = malformed("empty lines before a request")
	case err == nil && end == 2 && !c.responses:
		c.skipped = true
	case err == nil:
		err = c.parse(string(c.pending[:end]))
	}
	if err != nil {
		c.refuse(err)
		return false
	}
	c.take(end)
	c.scan = headScanner{limit: c.scan.limit, request: c.scan.request}
	return true
}

func (c *conversation) parse(head string) error {
	if c.responses {
		var h responseHead
		err := h.parse(head, c.method)
		if err == nil {
			c.in, c.body = &reading{response: &h.Response, close: h.close || h.Status == 101}, h.body
		}
		return err
	}
	var h requestHead
	err := h.parse(head, "http")
	if err == nil {
		// Behind an upgrade nobody knows whose bytes they are.
		c.in = &reading{request: &h.Request, close: h.close || h.Upgrade != "", expect: h.expect}
		c.body, c.tail = decoderFor(h.ContentLength), h.hasTail
	}
	return err
}

func (c *conversation) whole() {
	c.in.trailers, c.in.end = c.body.trailers, c.taken
	c.read = append(c.read, *c.in)
	c.ended = c.in.close
	c.in, c.skipped = nil, false
}

// String is all that must not depend on how the bytes came.
func (c *conversation) String() string {
	var s strings.Builder
	for i := range c.read {
		fmt.Fprintln(&s, c.read[i].String())
	}
	switch {
	case c.err != nil:
		fmt.Fprintf(&s, "refused with %d: %v", exchange.StatusOf(c.err, 0), c.err)
	case c.ended:
		s.WriteString("ended")
	case c.in != nil:
		fmt.Fprintf(&s, "within %s", c.in)
	default:
		fmt.Fprintf(&s, "%d bytes of a head", len(c.pending))
	}
	return s.String()
}

// conversations are valid, and such that each leaves the connection open.
var conversations = map[string]string{
	"one request":          "GET / HTTP/1.1\r\nHost: a.test\r\nA: b\r\n\r\n",
	"an empty line before": "\r\nGET / HTTP/1.1\r\nHost: a.test\r\n\r\n",
	"pipelined requests": "GET /1 HTTP/1.1\r\nHost: a.test\r\n\r\nHEAD /2 HTTP/1.1\r\nHost: b.test:8080\r\n\r\n" +
		"OPTIONS * HTTP/1.1\r\nHost: [::1]\r\n\r\nDELETE http://c.test/4?x HTTP/1.1\r\nHost: c.test\r\n\r\n",
	"bodies by length": "POST /1 HTTP/1.1\r\nHost: a.test\r\nContent-Length: 5\r\n\r\nhelloPUT /2 HTTP/1.1\r\nHost: a.test\r\nContent-Length: 0\r\n\r\n" +
		"POST /3 HTTP/1.1\r\nHost: a.test\r\nContent-Length: 20\r\n\r\nGET / HTTP/1.1\r\n\r\n\r\n",
	"chunked bodies with trailers": "POST /1 HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\nTrailer: ETag\r\n\r\n" +
		"5\r\nhello\r\nA;x=\"y\"\r\n0\r\n\r\nabcde\r\n000\r\nETag: v\r\nX-Dropped: v\r\nDigest: w\r\n\r\n" +
		"POST /2 HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: CHUNKED\r\n\r\n0\r\n\r\nGET /3 HTTP/1.1\r\nHost: a.test\r\n\r\n",
	"an expectation": "POST /1 HTTP/1.1\r\nHost: a.test\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\nhello" +
		"POST /2 HTTP/1.1\r\nHost: a.test\r\nExpect: 100-Continue\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\nGET /3 HTTP/1.1\r\nHost: a.test\r\n\r\n",
	"fields of one hop":  "GET / HTTP/1.1\r\nHost: a.test\r\nConnection: keep-alive, x-hop\r\nKeep-Alive: 5\r\nX-Hop: 1\r\nTE: trailers\r\nA:\tb \r\nA:\r\n\r\n",
	"trailers are taken": "GET / HTTP/1.1\r\nHost: a.test\r\nConnection: TE\r\nTE: trailers\r\n\r\n",
}

// lastRequests are valid, and such that nothing may follow them.
var lastRequests = map[string]string{
	"HTTP/1.0":                "POST / HTTP/1.0\r\nHost: a.test\r\nConnection: keep-alive\r\nContent-Length: 5\r\n\r\nhello",
	"HTTP/1.0 and an upgrade": "GET / HTTP/1.0\r\nHost: a.test\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
	"close":                   "GET / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n",
	"an upgrade":              "GET /ws HTTP/1.1\r\nHost: a.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n\r\n",
	"an upgrade of draft 76":  "GET /ws HTTP/1.1\r\nHost: a.test\r\nConnection: Upgrade\r\nUpgrade: WebSocket\r\nSec-WebSocket-Key1: 1\r\nSec-WebSocket-Key2: 2\r\n\r\n\r\n\r\nGET ",
	"an upgrade with a body":  "GET /ws HTTP/1.1\r\nHost: a.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 5\r\n\r\nhello",
}

// badRequests are what no client may send. What follows them must not be waited for.
var badRequests = map[string]string{
	"HTTP/0.9":            "GET /\r\n",
	"another protocol":    "HELP\r\n",
	"HTTP/2":              "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
	"a version to come":   "GET / HTTP/1.2\r\nHost: a.test\r\n\r\n",
	"no Host":             "GET / HTTP/1.1\r\n\r\n",
	"two Hosts":           "GET / HTTP/1.1\r\nHost: a.test\r\nHost: a.test\r\n\r\n",
	"another host":        "GET http://b.test/ HTTP/1.1\r\nHost: a.test\r\n\r\n",
	"both lengths":        "POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
	"an unknown coding":   "POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
	"chunked in HTTP/1.0": "POST / HTTP/1.0\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
	"a bad chunk":         "POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello!\r\n0\r\n\r\n",
	"a bad trailer":       "POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nHost: b.test\r\n\r\n",
	"CONNECT":             "CONNECT a.test:443 HTTP/1.1\r\nHost: a.test:443\r\n\r\n",
	"an expectation":      "POST / HTTP/1.1\r\nHost: a.test\r\nExpect: more\r\nContent-Length: 1\r\n\r\nx",
}

// responses are what upstreams answer to a GET, each with one final response.
var responses = map[string]string{
	"a length":              "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nA: b\r\n\r\nhello",
	"chunked with trailers": "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;x\r\nhello\r\n7\r\n\r\n0\r\n\r\n\r\n0\r\nETag: v\r\nX-Dropped: v\r\n\r\n",
	"until close":           "HTTP/1.1 200 OK\r\nA: b\r\n\r\nhello\r\n0\r\n\r\n",
	"HTTP/1.0":              "HTTP/1.0 200 OK\r\n\r\nhello",
	"HTTP/1.0 of a length":  "HTTP/1.0 200\r\nConnection: keep-alive\r\nContent-Length: 5\r\n\r\nhello",
	"interim ones":          "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 102 \r\n\r\nHTTP/1.1 204 No Content\r\n\r\n",
	"304":                   "HTTP/1.1 304 Not Modified\r\nETag: x\r\nContent-Length: 5\r\n\r\n",
	"close":                 "HTTP/1.1 404 Not Found\r\nConnection: close, x-hop\r\nX-Hop: 1\r\nContent-Length: 2\r\n\r\nno",
}

// badResponses are what no upstream may answer.
var badResponses = map[string]string{
	"two lengths":            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
	"a bare LF":              "HTTP/1.1 200 OK\r\nA: b\nContent-Length: 5\r\n\r\nhello",
	"a bad chunk":            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello!\r\n0\r\n\r\n",
	"a trailer of framing":   "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nContent-Length: 5\r\n\r\n",
	"an interim with a body": "HTTP/1.1 103 Early Hints\r\nContent-Length: 1\r\n\r\nxHTTP/1.1 200 OK\r\n\r\n",
	"a 101 in HTTP/1.0":      "HTTP/1.0 101 Switching\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
	"a 204 with a body":      "HTTP/1.1 204 No Content\r\nContent-Length: 1\r\n\r\nx",
	"another protocol":       "SSH-2.0-x\r\n\r\n",
}
