package http1

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/netip"
	"strings"
	"testing"

	"holdfast/internal/exchange"
	"holdfast/internal/stream"
	"holdfast/internal/stream/streamtest"
	"holdfast/internal/task"
)

// A feeding is a way in which bytes come: the pieces of each delivery.
type feeding struct {
	name   string
	pieces []string
	at     int // of a single split
}

// feedings are the ways that are tried: at once, byte by byte, and in two at every place.
func feedings(raw string) []feeding {
	all := []feeding{{name: "whole", pieces: []string{raw}}, {name: "byte by byte"}}
	for i := range len(raw) {
		all[1].pieces = append(all[1].pieces, raw[i:i+1])
		if i > 0 {
			all = append(all, feeding{fmt.Sprintf("split at %d", i), []string{raw[:i], raw[i:]}, i})
		}
	}
	return all
}

// requestsToFeed are conversations of clients: the corpus, the valid ones, those behind
// which nothing is read, and those that are refused.
func requestsToFeed(t testing.TB) map[string]string {
	all := make(map[string]string)
	for _, c := range readCorpus(t) {
		all["corpus/"+c.ID] = string(c.Raw)
	}
	for name, raw := range conversations {
		all["valid/"+name] = raw
	}
	for name, raw := range lastRequests {
		all["last/"+name] = raw
		all["last/"+name+" with more behind it"] = raw + conversations["one request"]
	}
	for name, raw := range badRequests {
		all["bad/"+name] = raw
	}
	return all
}

// TestFeedingTheParser: what is read does not depend on how the bytes come.
func TestFeedingTheParser(t *testing.T) {
	t.Parallel()
	for name, raw := range requestsToFeed(t) {
		want := readRequests(raw).String()
		for _, f := range feedings(raw) {
			if got := readRequests(f.pieces...).String(); got != want {
				t.Errorf("%s, %s:\ngot  %s\nwant %s", name, f.name, got, want)
			}
		}
	}
	for name, raw := range allResponses() {
		for _, method := range []string{"GET", "HEAD"} {
			want := readResponses(method, raw).String()
			for _, f := range feedings(raw) {
				if got := readResponses(method, f.pieces...).String(); got != want {
					t.Errorf("%s, answer to %s, %s:\ngot  %s\nwant %s", name, method, f.name, got, want)
				}
			}
		}
	}
}

func allResponses() map[string]string {
	all := maps.Clone(responses)
	maps.Copy(all, badResponses)
	return all
}

// TestPipeliningChangesNothing: one conversation behind another reads as the two alone.
func TestPipeliningChangesNothing(t *testing.T) {
	t.Parallel()
	behind := requestsToFeed(t)
	for first, a := range conversations {
		before := readRequests(a)
		if len(before.read) == 0 || before.ended || len(before.pending) > 0 {
			t.Fatalf("%s is not valid: %s", first, before)
		}
		for second, b := range behind {
			want := strings.TrimSuffix(before.String(), "0 bytes of a head") + readRequests(b).String()
			for _, f := range feedings(a + b)[:2] {
				if got := readRequests(f.pieces...).String(); got != want {
					t.Errorf("%s behind %s, %s:\ngot  %s\nwant %s", second, first, f.name, got, want)
				}
			}
		}
	}
	for name, raw := range lastRequests {
		if c := readRequests(raw); len(c.read) != 1 || !c.ended || c.err != nil {
			t.Errorf("%s: %s", name, c)
		}
		if c := readRequests(raw + conversations["one request"]); len(c.read) != 1 {
			t.Errorf("%s: what follows is read: %s", name, c)
		}
	}
}

// TestFeedingTheServer: a connection's driver comes to what the parsers come to,
// however the bytes come.
func TestFeedingTheServer(t *testing.T) {
	t.Parallel()
	for name, raw := range requestsToFeed(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := streamtest.New(t)
			for _, f := range feedings(raw) {
				// Of the corpus only splits beside line ends, where states change: the
				// parser alone has seen the others.
				if f.at > 0 && strings.HasPrefix(name, "corpus/") && !strings.ContainsAny(raw[f.at-1:f.at+1], "\r\n") {
					continue
				}
				wantFromServer(t, l, f.name, raw, f.pieces)
			}
			for _, f := range feedings(conversations["pipelined requests"] + raw)[:2] {
				wantFromServer(t, l, f.name+" behind others", conversations["pipelined requests"]+raw, f.pieces)
			}
		})
	}
}

func wantFromServer(t *testing.T, l *stream.Loop, how, raw string, pieces []string) {
	t.Helper()
	c := readRequests(raw)
	if got, want := talkToServer(t, l, c, pieces), prediction(c); got != want {
		t.Fatalf("%s:\ngot\n%s\nwant\n%s", how, got, want) // the others would wait as long
	}
}

// prediction is what a server makes of a conversation: the requests that its handler is
// given, and the answers that the client gets.
func prediction(c *conversation) string {
	var s, answers strings.Builder
	for i := range c.read {
		fmt.Fprintln(&s, c.read[i].String())
		answers.WriteString("200 ")
	}
	if c.err != nil {
		fmt.Fprintf(&answers, "%d ", exchange.StatusOf(c.err, 0))
	}
	if c.ended {
		answers.WriteString("end")
	}
	return s.String() + answers.String()
}

// talkToServer has a server read the pieces, each taken before the next is sent, and
// says what its handler and the client have seen. Of what is expected it takes only how
// many answers there are to wait for. Both ends are on the same loop.
func talkToServer(t *testing.T, l *stream.Loop, want *conversation, pieces []string) (what string) {
	var seen strings.Builder
	ended := make(chan struct{})
	s := NewServer(ServerOptions{
		Scheme: "http", Log: quiet(), Loops: []*stream.Loop{l}, Ended: func() { close(ended) },
		Handler: handlerFunc(func(tk *task.Task, e exchange.Exchange) { answerAll(tk, &seen, e) }),
	})
	ours, theirs := socketPair(t)
	var far stream.Conn
	streamtest.Do(l, func() {
		if err := l.Adopt(&far, theirs, nil, nil); err != nil {
			t.Error(err)
		}
		far.Limit(l.Now().Add(patience))
		s.Serve(l, stream.Passed{FD: ours}, netip.AddrPort{})
	})
	sent := streamtest.Begin(l, func(tk *task.Task) { sendPieces(tk, &far, pieces) })
	streamtest.Go(l, func(tk *task.Task) { what = readAnswers(connReader{tk, &far}, want) })
	if !want.ended {
		<-sent // the server has them, and waits for more
	}
	streamtest.Do(l, far.Close)
	<-sent
	<-ended
	streamtest.Do(l, func() { what = seen.String() + what })
	return what
}

// answerAll notes a request that came whole, and answers.
func answerAll(tk *task.Task, seen *strings.Builder, e exchange.Exchange) {
	body, err := readAll(tk, e)
	switch status := exchange.StatusOf(err, 0); {
	case err == nil:
		r := &reading{request: e.Request(), body: body, trailers: e.Trailers()}
		fmt.Fprintln(seen, r)
		if e.Respond(&exchange.Response{Status: 200, ContentLength: 2}) == nil {
			e.Write(tk, []byte("ok"))
			e.Finish(tk, nil)
		}
	case status != 0:
		if e.Respond(&exchange.Response{Status: status, Close: true}) == nil {
			e.Finish(tk, nil)
		}
	}
}

// connReader is an io.Reader for a task.
type connReader struct {
	tk   *task.Task
	conn *stream.Conn
}

func (r connReader) Read(p []byte) (int, error) {
	if len(r.conn.Buffered()) == 0 {
		if err := r.conn.Fill(r.tk); err != nil {
			return 0, err
		}
	}
	n := copy(p, r.conn.Buffered())
	r.conn.Consume(n)
	return n, nil
}

// readAnswers reads as many answers as are expected, and the end if that is. A 100 may
// come before the answer to whoever waits for one.
func readAnswers(conn io.Reader, want *conversation) string {
	var s strings.Builder
	r := bufio.NewReader(conn)
	answers := len(want.read)
	if want.err != nil {
		answers++
	}
	for i := 0; i < answers; {
		method, expect := "GET", i == len(want.read)
		if !expect {
			method, expect = want.read[i].request.Method, want.read[i].expect
		}
		answer, err := http.ReadResponse(r, &http.Request{Method: method})
		if err != nil {
			return s.String() + err.Error()
		}
		io.Copy(io.Discard, answer.Body)
		if answer.StatusCode == 100 && expect {
			continue
		}
		fmt.Fprintf(&s, "%d ", answer.StatusCode)
		i++
	}
	if want.ended {
		if _, err := r.ReadByte(); err != io.EOF {
			return fmt.Sprintf("%sno end but %v", s.String(), err)
		}
		s.WriteString("end")
	}
	return s.String()
}

// TestFeedingTheClient: the same for what upstreams send.
func TestFeedingTheClient(t *testing.T) {
	t.Parallel()
	for name, raw := range allResponses() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := streamtest.New(t)
			for _, method := range []string{"GET", "HEAD"} {
				want := received(readResponses(method, raw))
				for _, f := range feedings(raw) {
					if got := talkToClient(t, l, method, f.pieces); got != want {
						t.Fatalf("answer to %s, %s:\ngot\n%s\nwant\n%s", method, f.name, got, want)
					}
				}
			}
		})
	}
}

// received is what a client makes of a conversation: the responses up to the final one,
// or an error in place of that.
func received(c *conversation) string {
	var s strings.Builder
	for i := range c.read {
		fmt.Fprintln(&s, c.read[i].String())
		if c.read[i].status() >= 200 {
			return s.String()
		}
	}
	return s.String() + "refused"
}

// talkToClient sends the pieces in answer to a request and says what was received. Both
// ends are on the same loop.
func talkToClient(t *testing.T, l *stream.Loop, method string, pieces []string) (what string) {
	ours, theirs := socketPair(t)
	c := NewClient(ClientOptions{})
	var far stream.Conn
	var err error
	streamtest.Do(l, func() {
		err = errors.Join(c.connected(l, l.Adopt(&c.conn, ours, nil, nil)), l.Adopt(&far, theirs, nil, nil))
	})
	if err != nil {
		t.Fatal(err)
	}
	answered := streamtest.Begin(l, func(t *task.Task) {
		defer far.Close()
		for !bytes.HasSuffix(far.Buffered(), []byte("\r\n\r\n")) {
			if far.Fill(t) != nil {
				return
			}
		}
		sendPieces(t, &far, pieces)
	})
	streamtest.Go(l, func(t *task.Task) {
		defer c.Close()
		what = answerTo(t, c, method)
	})
	<-answered
	return what
}

// answerTo makes a request and says what was received.
func answerTo(t *task.Task, c *Conn, method string) string {
	e, err := c.Exchange()
	if err == nil {
		err = e.Send(t, &exchange.Request{Method: method, Authority: "a.test", Target: "/"})
	}
	if err != nil {
		return err.Error()
	}
	var s strings.Builder
	for {
		r := &reading{}
		if r.response, err = e.Receive(t); err != nil {
			break
		}
		if r.status() >= 200 {
			for err == nil {
				var p []byte
				p, err = e.Read(t)
				r.body += string(p)
			}
			if err != io.EOF {
				break
			}
			r.trailers = e.Trailers()
		}
		fmt.Fprintln(&s, r)
		if r.status() >= 200 {
			return s.String()
		}
	}
	if exchange.StatusOf(err, 0) != 502 {
		return s.String() + err.Error()
	}
	return s.String() + "refused"
}
