package http1

import (
	"encoding/base64"
	"errors"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/stream/streamtest"
)

// TestCorpus runs every case through both codecs, whole, byte by byte, and behind an
// honest request on the same connection, each followed by a fresh request on both routes
// that must get its own answer.
func TestCorpus(t *testing.T) {
	t.Parallel()
	for _, c := range readCorpus(t) {
		for _, feed := range []string{"whole", "bytewise", "pipelined"} {
			t.Run(c.ID+"/"+feed, func(t *testing.T) {
				t.Parallel()
				runCorpusCase(t, &c, feed)
			})
		}
	}
}

func runCorpusCase(t *testing.T, c *corpusCase, how string) {
	answer := func(r *http.Request) string {
		if strings.Contains(r.URL.Path, "after") || r.URL.Path == "/before" {
			return answers["200"]
		}
		return answers[c.Up]
	}
	r := &relay{t: t, app: startRecorder(t, answer), ws: startRecorder(t, answer), idle: make(map[*recorder][]*Conn)}
	s := serve(t, config.ListenerLimits{HeadTimeout: patience, BodyTimeout: patience}, r)
	t.Cleanup(func() { streamtest.Do(s.loop, r.close) })
	p := s.dial()
	feed(p, c.Raw, how)
	if how == "pipelined" {
		p.want(200, "ok", false)
	}
	replies, closed := readReplies(p, c)
	seen := map[string][]record{"app": r.app.take(), "ws": r.ws.take()}
	if how == "pipelined" {
		if len(seen["app"]) == 0 || seen["app"][0].Request == nil || seen["app"][0].RequestURI != "/before" {
			t.Fatal("the request in front did not arrive")
		}
		seen["app"] = seen["app"][1:]
	}
	c.judge(t, p, replies, closed, seen)
	for _, path := range []string{"/after", "/ws/after"} {
		q := s.dial()
		q.get(path)
		q.want(200, "ok", false)
	}
	for route, rec := range map[string]*recorder{"app": r.app, "ws": r.ws} {
		for _, got := range rec.take() {
			if got.Request != nil && strings.Contains(got.URL.Path, "after") {
				continue
			}
			if c.Checks.Tunnel && got.raw != "" {
				continue
			}
			t.Errorf("%s: later arrived %q %v", route, got.raw, got.Request)
		}
	}
}

// feed writes raw as far as the proxy takes it.
func feed(p *peer, raw []byte, how string) {
	switch how {
	case "whole":
		p.conn.Write(raw)
	case "pipelined":
		p.conn.Write(append([]byte("GET /before HTTP/1.1\r\nHost: a.test\r\n\r\n"), raw...))
	default:
		for i := range raw {
			if _, err := p.conn.Write(raw[i : i+1]); err != nil {
				return
			}
		}
	}
}

// readReplies reads final responses, sends c.Then behind the first, and says
// whether the proxy ended the connection. A case that leaves the proxy waiting for
// more gets an end of file instead.
func readReplies(p *peer, c *corpusCase) (statuses []int, closed bool) {
	want := max(c.Checks.Replies, 1)
	for len(statuses) < want {
		if len(statuses) == 0 && c.Expect == "must-not-desync" {
			p.conn.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
		}
		r, err := http.ReadResponse(p.r, nil)
		if err != nil {
			ne, ok := errors.AsType[net.Error](err)
			return statuses, !ok || !ne.Timeout()
		}
		p.conn.SetReadDeadline(time.Now().Add(patience))
		if r.StatusCode < 200 && r.StatusCode != 101 {
			continue
		}
		statuses = append(statuses, r.StatusCode)
		if r.StatusCode == 101 {
			return statuses, false
		}
		io.Copy(io.Discard, r.Body)
		if len(statuses) == 1 && c.Then != nil {
			p.conn.Write(c.Then)
		}
		if r.Close {
			p.closeWrite()
			_, err := io.Copy(io.Discard, p.r)
			return statuses, err == nil
		}
	}
	return statuses, false
}

func (c *corpusCase) judge(t *testing.T, p *peer, statuses []int, closed bool, seen map[string][]record) {
	status := 0
	if len(statuses) > 0 {
		status = statuses[0]
	}
	requests := 0
	for route, records := range seen {
		for _, r := range records {
			if r.Request == nil {
				t.Errorf("%s: bytes that are no request arrived: %q", route, r.raw)
				continue
			}
			requests++
			if route != c.Route {
				t.Errorf("a request arrived at %s", route)
			}
			if strings.Contains(r.RequestURI, "/smug/") && !c.Checks.MaySmug {
				t.Errorf("a smuggled request arrived: %s", r.RequestURI)
			}
		}
	}
	if requests > c.MaxUp {
		t.Errorf("%d requests arrived, at most %d may", requests, c.MaxUp)
	}
	switch c.Expect {
	case "ok":
		want := 200
		if c.Up == "101" {
			if want = 101; overTLS { // which the test does not have after the switch
				return
			}
		}
		if len(statuses) != max(c.Checks.Replies, 1) || slices.ContainsFunc(statuses, func(s int) bool { return s != want }) {
			t.Errorf("replies %v", statuses)
		}
	case "must-reject":
		if status < 400 || requests > 0 || !closed && c.Close {
			t.Errorf("status %d, %d requests arrived, closed %v", status, requests, closed)
		}
	case "no-tunnel":
		if status == 101 || status == 0 {
			t.Errorf("status %d", status)
		}
	case "must-not-desync":
	default:
		t.Errorf("unknown expectation %q", c.Expect)
	}
	if len(seen[c.Route]) > 0 && seen[c.Route][0].Request != nil {
		c.check(t, &seen[c.Route][0])
	}
	if c.Checks.Tunnel && !overTLS {
		p.conn.Write(c.Then)
		p.wantBytes(string(c.Then))
	}
}

// check looks at the request that arrived.
func (c *corpusCase) check(t *testing.T, r *record) {
	if c.Checks.Body != nil {
		if want, _ := base64.StdEncoding.DecodeString(*c.Checks.Body); r.body != string(want) {
			t.Errorf("body %q, want %q", r.body, want)
		}
	}
	if want := strings.ReplaceAll(c.Checks.Target, "@ID@", c.ID); want != "" && r.RequestURI != want {
		t.Errorf("target %q, want %q", r.RequestURI, want)
	}
	if c.Checks.Host != "" && r.Host != c.Checks.Host {
		t.Errorf("host %q, want %q", r.Host, c.Checks.Host)
	}
	for _, name := range c.Checks.Absent {
		if v := r.Header.Values(name); v != nil {
			t.Errorf("%s: %q", name, v)
		}
	}
	for _, name := range c.Checks.Present {
		if r.Header.Values(name) == nil {
			t.Errorf("no %s", name)
		}
	}
	if av := c.Checks.AbsentValue; len(av) == 2 && strings.Contains(strings.ToLower(r.Header.Get(av[0])), av[1]) {
		t.Errorf("%s: %q", av[0], r.Header.Get(av[0]))
	}
}
