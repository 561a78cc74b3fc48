package http1

import (
	"bufio"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"holdfast/internal/exchange"
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

// requestsToFeed are conversations of clients: the corpus, the valid ones, and those
// behind which nothing is read.
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
			for _, f := range feedings(raw) {
				// Of the corpus only splits beside line ends, where states change: the
				// parser alone has seen the others.
				if f.at > 0 && strings.HasPrefix(name, "corpus/") && !strings.ContainsAny(raw[f.at-1:f.at+1], "\r\n") {
					continue
				}
				wantFromServer(t, f.name, raw, f.pieces)
			}
			for _, f := range feedings(conversations["pipelined requests"] + raw)[:2] {
				wantFromServer(t, f.name+" behind others", conversations["pipelined requests"]+raw, f.pieces)
			}
		})
	}
}

func wantFromServer(t *testing.T, how, raw string, pieces []string) {
	t.Helper()
	c := readRequests(raw)
	if got, want := talkToServer(c, pieces), prediction(c); got != want {
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
// many answers there are to wait for.
func talkToServer(want *conversation, pieces []string) string {
	var seen strings.Builder
	s := NewServer(ServerOptions{Scheme: "http", Log: quiet(), Handler: handlerFunc(func(e exchange.Exchange) { answerAll(&seen, e) })})
	ours, theirs := net.Pipe()
	theirs.SetDeadline(time.Now().Add(patience))
	var served, sent sync.WaitGroup
	served.Go(func() { s.Serve(ours, exchange.Downstream{}) })
	sent.Go(func() { writeAll(theirs, pieces) })
	answers := readAnswers(theirs, want)
	if !want.ended {
		sent.Wait() // the server has them, and waits for more
	}
	theirs.Close()
	sent.Wait()
	served.Wait()
	return seen.String() + answers
}

// writeAll sends pieces as far as they are taken.
func writeAll(conn net.Conn, pieces []string) {
	for _, p := range pieces {
		if _, err := io.WriteString(conn, p); err != nil {
			return
		}
	}
}

// answerAll notes a request that came whole, and answers.
func answerAll(seen *strings.Builder, e exchange.Exchange) {
	body, err := io.ReadAll(struct{ io.Reader }{e})
	switch status := exchange.StatusOf(err, 0); {
	case err == nil:
		r := &reading{request: e.Request(), body: string(body), trailers: e.Trailers()}
		fmt.Fprintln(seen, r)
		if e.Respond(&exchange.Response{Status: 200, ContentLength: 2}) == nil {
			io.WriteString(e, "ok")
			e.Finish(nil)
		}
	case status != 0:
		if e.Respond(&exchange.Response{Status: status, Close: true}) == nil {
			e.Finish(nil)
		}
	}
}

// readAnswers reads as many answers as are expected, and the end if that is. A 100 may
// come before the answer to whoever waits for one.
func readAnswers(conn net.Conn, want *conversation) string {
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
			for _, method := range []string{"GET", "HEAD"} {
				want := received(readResponses(method, raw))
				for _, f := range feedings(raw) {
					if got := talkToClient(method, f.pieces); got != want {
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

// talkToClient sends the pieces in answer to a request and says what was received.
func talkToClient(method string, pieces []string) string {
	ours, theirs := net.Pipe()
	theirs.SetDeadline(time.Now().Add(patience))
	c := NewClient(ours, ClientOptions{})
	var upstream sync.WaitGroup
	upstream.Go(func() {
		defer theirs.Close()
		if _, err := http.ReadRequest(bufio.NewReader(theirs)); err == nil {
			writeAll(theirs, pieces)
		}
	})
	defer upstream.Wait()
	defer c.Close()
	e, err := c.Exchange()
	if err == nil {
		err = e.Send(&exchange.Request{Method: method, Authority: "a.test", Target: "/"})
	}
	if err != nil {
		return err.Error()
	}
	var s strings.Builder
	for {
		r := &reading{}
		if r.response, err = e.Receive(); err != nil {
			break
		}
		if r.status() >= 200 {
			var body []byte
			if body, err = io.ReadAll(struct{ io.Reader }{e}); err != nil {
				break
			}
			r.body, r.trailers = string(body), e.Trailers()
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
