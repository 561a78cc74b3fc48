package e2e

import (
	"bufio"
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// corpusCase is a case of internal/http1/testdata/corpus.jsonl; the README beside it
// describes the fields.
type corpusCase struct {
	ID     string
	Raw    []byte
	Then   []byte
	Route  string
	Up     string
	Expect string
	Close  bool
	MaxUp  int `json:"max_up"`
	Checks struct {
		Body        *string
		Target      string
		Host        string
		Absent      []string
		Present     []string
		AbsentValue []string `json:"absent_value"`
		Replies     int
		Tunnel      bool
		MaySmug     bool `json:"may_smug"`
	}
}

func readCorpus(t *testing.T) (cases []*corpusCase) {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(os.Getenv(binEnv), "corpus.jsonl"))
	if err != nil {
		t.Fatal(err)
	}
	for d := json.NewDecoder(bytes.NewReader(data)); d.More(); {
		c := new(corpusCase)
		if err := d.Decode(c); err != nil {
			t.Fatal(err)
		}
		cases = append(cases, c)
	}
	if len(cases) < 100 {
		t.Fatalf("only %d cases", len(cases))
	}
	return cases
}

// TestCorpus sends every request of the corpus through a service with a plain and a
// WebSocket route, all at once, so that what one leaves behind on a pooled connection
// would hit another; and those that leave their connection open behind each other on one.
// A reload changes nothing of what comes of any: neither the answers, nor what arrives.
func TestCorpus(t *testing.T) {
	t.Parallel()
	cases := readCorpus(t)
	ups := map[string]*recorder{"app": newRecorder(t, cases), "ws": newRecorder(t, cases)}
	config := publicListener + fmt.Sprintf(`
[reload]
probation = "0s"
[drain]
idle_grace = "0s"
[[virtual_hosts]]
name = "all"
domains = ["*"]
[[virtual_hosts.routes]]
match = { prefix = "/ws" }
websocket = true
cluster = "ws"
[[virtual_hosts.routes]]
match = { prefix = "/" }
cluster = "app"
[[clusters]]
name = "app"
endpoints = [%q]
[[clusters]]
name = "ws"
endpoints = [%q]
`, ups["app"].addr, ups["ws"].addr)
	service := serve(t, config)
	address := service.address("public")
	var first map[string]outcome
	for reloads := range 4 {
		if reloads > 0 {
			service.reload(fmt.Sprintf("%s# changed %d times\n", config, reloads))
		}
		fault := func(id, format string, args ...any) {
			t.Errorf("after %d reloads: %s: %s", reloads, id, fmt.Sprintf(format, args...))
		}
		outcomes := playCorpus(cases, address, ups, fault)
		playKept(cases, address, ups, outcomes, fault)
		for route, up := range ups {
			for _, r := range up.takeAll() {
				fault(route, "got bytes that belong to no case: %v", r)
			}
		}
		if first == nil {
			first = outcomes
		}
		for id, was := range first {
			if !reflect.DeepEqual(outcomes[id], was) {
				fault(id, "%s, and it was %s before", outcomes[id], was)
			}
		}
	}
}

// An outcome is what has come of a case.
type outcome struct {
	statuses []int // of the replies
	closed   bool  // and then the proxy has ended the connection
	arrived  []string
}

func (o outcome) String() string {
	return fmt.Sprintf("replies %v, closed: %v, arrived: %q", o.statuses, o.closed, o.arrived)
}

// unanswered are cases that leave the proxy waiting for more, or may: a head in which a
// bare CR ends no line, and a chunk of 4 GiB.
var unanswered = []string{"083-cr-only-lines", "231-ck-size-overflow32"}

// playCorpus plays all cases at the same time, each on a connection of its own.
func playCorpus(cases []*corpusCase, address string, ups map[string]*recorder, fault func(id, format string, args ...any)) map[string]outcome {
	outcomes := make(map[string]outcome)
	var mu sync.Mutex
	var running sync.WaitGroup
	for _, c := range cases {
		running.Go(func() {
			o, faults := c.run(address, ups)
			mu.Lock()
			defer mu.Unlock()
			outcomes[c.ID] = o
			for _, f := range faults {
				fault(c.ID, "%s", f)
			}
		})
	}
	running.Wait()
	return outcomes
}

// playKept sends what was served, and has left its connection open, at once on one
// connection. All of it is answered, in order, and arrives as it did on its own.
func playKept(cases []*corpusCase, address string, ups map[string]*recorder, alone map[string]outcome, fault func(id, format string, args ...any)) {
	var kept []*corpusCase
	var sent []byte
	for _, c := range cases {
		o := alone[c.ID]
		if c.Then == nil && !o.closed && len(o.statuses) == max(c.Checks.Replies, 1) && len(o.arrived) == len(o.statuses) &&
			!slices.ContainsFunc(o.statuses, func(s int) bool { return s != 200 }) {
			kept = append(kept, c)
			sent = append(sent, c.Raw...)
		}
	}
	if len(kept) < 10 {
		fault("kept", "only %d cases have left their connection open", len(kept))
	}
	const last = "/after/kept"
	sent = append(sent, request("GET "+last+" HTTP/1.1", "Host: a.test", "Connection: close")...)
	conn, err := net.DialTimeout("tcp", address, patience)
	if err != nil {
		fault("kept", "%v", err)
		return
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	conn.Write(sent)
	r := bufio.NewReader(conn)
	for _, c := range kept {
		for range alone[c.ID].statuses {
			if reply, err := readFinal(r); err != nil || reply.StatusCode != 200 || reply.Close || reply.body != "ok" {
				fault(c.ID, "behind others on a connection it is answered with %+v, %v", reply, err)
				return
			}
		}
		if got, want := summaries(c.take(ups)), alone[c.ID].arrived; !slices.Equal(got, want) {
			fault(c.ID, "behind others on a connection it arrives as %q, and alone as %q", got, want)
		}
	}
	if reply, err := readFinal(r); err != nil || reply.body != last {
		fault("kept", "a last request is answered with %+v, %v", reply, err)
	}
	if n, err := io.Copy(io.Discard, r); n > 0 || err != nil {
		fault("kept", "%d bytes are behind the last answer, %v", n, err)
	}
}

// A finalReply is a final response that was read to its end.
type finalReply struct {
	*http.Response
	body string
}

// readFinal reads a final response, and those before it.
func readFinal(r *bufio.Reader) (finalReply, error) {
	for {
		resp, err := http.ReadResponse(r, nil)
		if err != nil {
			return finalReply{}, err
		}
		if resp.StatusCode < 200 && resp.StatusCode != 101 {
			continue
		}
		if resp.StatusCode == 101 {
			return finalReply{Response: resp}, nil
		}
		body, err := io.ReadAll(resp.Body)
		return finalReply{resp, string(body)}, err
	}
}

// run plays a case on a connection of its own, and says what has come of it and what was
// wrong.
func (c *corpusCase) run(address string, ups map[string]*recorder) (o outcome, faults []string) {
	fault := func(format string, args ...any) { faults = append(faults, fmt.Sprintf(format, args...)) }
	conn, err := net.DialTimeout("tcp", address, patience)
	if err != nil {
		return o, []string{err.Error()}
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	r := bufio.NewReader(conn)
	conn.Write(c.Raw)
	o.statuses, o.closed = c.replies(conn, r)
	arrivals := c.take(ups)
	o.arrived = summaries(arrivals)
	c.judge(o, arrivals, fault)
	if c.Checks.Tunnel {
		conn.Write(c.Then)
		got := make([]byte, len(c.Then))
		if n, err := io.ReadFull(r, got); err != nil || !bytes.Equal(got, c.Then) {
			fault("%q came back through the tunnel, %v", got[:n], err)
		}
	}
	for _, path := range []string{"/after/", "/ws/after/"} {
		if got, err := ask(address, path+c.ID); got != path+c.ID {
			fault("a fresh request gets the answer %q, %v", got, err)
		}
	}
	for _, got := range c.take(ups) {
		if c.Checks.Tunnel && got.Request == nil {
			continue
		}
		fault("%s has got later: %v", got.route, got.record)
	}
	return o, faults
}

// An arrival is what an upstream has got.
type arrival struct {
	route string
	record
}

// take returns what has arrived of a case.
func (c *corpusCase) take(ups map[string]*recorder) (arrivals []arrival) {
	for _, route := range slices.Sorted(maps.Keys(ups)) {
		for _, r := range ups[route].take(c.ID) {
			arrivals = append(arrivals, arrival{route, r})
		}
	}
	return arrivals
}

// summaries say all of arrivals but for the request's id, which is another each time.
func summaries(arrivals []arrival) (all []string) {
	for _, a := range arrivals {
		if a.Request == nil {
			all = append(all, fmt.Sprintf("%s: %q", a.route, a.raw))
			continue
		}
		fields := a.Header.Clone()
		if fields.Get("X-Request-Id") != "" {
			fields.Set("X-Request-Id", "its own")
		}
		all = append(all, fmt.Sprintf("%s: %s %s %s to %q with %v, %d bytes %v, trailers %v: %q",
			a.route, a.Method, a.RequestURI, a.Proto, a.Host, fields, a.ContentLength, a.TransferEncoding, a.Trailer, a.body))
	}
	return all
}

// replies reads responses, sends c.Then behind the first, and says whether the proxy
// has ended the connection.
func (c *corpusCase) replies(conn net.Conn, r *bufio.Reader) (statuses []int, closed bool) {
	for len(statuses) < max(c.Checks.Replies, 1) {
		if slices.Contains(unanswered, c.ID) {
			conn.SetReadDeadline(time.Now().Add(10 * moment))
		}
		resp, err := readFinal(r)
		conn.SetReadDeadline(time.Now().Add(patience))
		if resp.Response == nil {
			return statuses, !errors.Is(err, os.ErrDeadlineExceeded)
		}
		statuses = append(statuses, resp.StatusCode)
		if resp.StatusCode == 101 {
			return statuses, false
		}
		if len(statuses) == 1 && c.Then != nil {
			conn.Write(c.Then)
		}
		if resp.Close {
			conn.(*net.TCPConn).CloseWrite()
			_, err := io.Copy(io.Discard, r)
			// What is sent behind a last reply may be answered by a reset.
			return statuses, err == nil || c.Then != nil && errors.Is(err, syscall.ECONNRESET)
		}
	}
	return statuses, false
}

// judge says what of an outcome is not as the case expects.
func (c *corpusCase) judge(o outcome, arrivals []arrival, fault func(string, ...any)) {
	requests := 0
	for _, got := range arrivals {
		switch {
		case got.Request == nil:
			fault("%s has got what is no request: %q", got.route, got.raw)
			continue
		case got.route != c.Route:
			fault("%s has got a request", got.route)
		case strings.HasPrefix(got.RequestURI, "/smug/") && !c.Checks.MaySmug:
			fault("a smuggled request has arrived: %s", got.RequestURI)
		}
		if requests++; requests == 1 {
			c.check(&got.record, fault)
		}
	}
	if requests > c.MaxUp {
		fault("%d requests have arrived, at most %d may", requests, c.MaxUp)
	}
	status := 0
	if len(o.statuses) > 0 {
		status = o.statuses[0]
	}
	switch c.Expect {
	case "ok":
		want := 200
		if c.Up == "101" {
			want = 101
		}
		if len(o.statuses) != max(c.Checks.Replies, 1) || slices.ContainsFunc(o.statuses, func(s int) bool { return s != want }) {
			fault("got the replies %v", o.statuses)
		}
	case "must-reject":
		if status < 400 || requests > 0 || !o.closed && c.Close {
			fault("got %d, %d requests have arrived, closed: %v", status, requests, o.closed)
		}
	case "no-tunnel":
		if status == 101 || status == 0 {
			fault("got %d", status)
		}
	case "must-not-desync":
	default:
		fault("unknown expectation %q", c.Expect)
	}
}

// check looks at the request that has arrived.
func (c *corpusCase) check(got *record, fault func(string, ...any)) {
	if c.Checks.Body != nil {
		if want, _ := base64.StdEncoding.DecodeString(*c.Checks.Body); got.body != string(want) {
			fault("the body %q has arrived, want %q", got.body, want)
		}
	}
	if want := strings.ReplaceAll(c.Checks.Target, "@ID@", c.ID); want != "" && got.RequestURI != want {
		fault("the target %q has arrived, want %q", got.RequestURI, want)
	}
	if c.Checks.Host != "" && got.Host != c.Checks.Host {
		fault("the host %q has arrived, want %q", got.Host, c.Checks.Host)
	}
	for _, name := range c.Checks.Absent {
		if v := got.Header.Values(name); v != nil {
			fault("%s: %q has arrived", name, v)
		}
	}
	for _, name := range c.Checks.Present {
		if got.Header.Values(name) == nil {
			fault("no %s has arrived", name)
		}
	}
	if av := c.Checks.AbsentValue; len(av) == 2 && strings.Contains(strings.ToLower(got.Header.Get(av[0])), av[1]) {
		fault("%s: %q has arrived", av[0], got.Header.Get(av[0]))
	}
}
