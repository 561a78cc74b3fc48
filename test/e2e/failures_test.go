package e2e

import (
	"bufio"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// A failure is something that goes wrong, and what it looks like: to the client by the
// status, and in the access log. The operations page has all of them, in the same words.
type failure struct {
	name   string
	status int    // 0: no response is begun
	flags  string // with a comma between two
	reason string // … stands for anything

	// Each time limit has a route or a listener of its own, so that a machine that is slow for a
	// moment makes no other failure of one.
	route    string // "": "plain"; "none" leads nowhere
	listener string // "": "public"

	up     func(*peer) // what the upstream does when it has got the head of a request
	client func(*peer) // what the client does; nil: it sends a GET and reads all that comes
	event  string      // of the record; "": request
}

// A peer is one end of a connection in a failure. Nothing that it does fails a test: its
// other end may be gone.
type peer struct {
	net.Conn
	r      *bufio.Reader
	target string
	over   chan struct{} // closed when the upstream has done its part
	got    []byte        // by stall
}

func newPeer(conn net.Conn) *peer {
	conn.SetDeadline(time.Now().Add(patience))
	return &peer{Conn: conn, r: bufio.NewReader(conn)}
}

func (p *peer) say(s string) { io.WriteString(p, s) }

// request sends a request's first line with its fields and an empty line.
func (p *peer) request(method string, fields ...string) {
	p.say(request(method+" "+p.target+" HTTP/1.1", append([]string{"Host: a.test"}, fields...)...))
}

// head reads a head, and returns its first line.
func (p *peer) head() (start string) {
	for {
		line, err := p.r.ReadString('\n')
		if start == "" {
			start = strings.TrimSpace(line)
		}
		if err != nil || line == "\r\n" {
			return start
		}
	}
}

// stall waits until the other end has gone.
func (p *peer) stall() { p.got, _ = io.ReadAll(p.r) }

// ignore reads nothing until the upstream has done its part.
func (p *peer) ignore() {
	select {
	case <-p.over:
	case <-time.After(patience):
	}
}

// reset ends the connection by a RST.
func (p *peer) reset() {
	p.Conn.(*net.TCPConn).SetLinger(0)
	p.Close()
}

// says is an upstream that answers with this and does then something else.
func says(s string, then func(*peer)) func(*peer) {
	return func(p *peer) { p.say(s); then(p) }
}

func closes(p *peer) { p.Close() }

// pours is an upstream whose answer never ends.
func pours(p *peer) {
	p.say("HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n")
	for some := make([]byte, 64<<10); ; {
		if _, err := p.Write(some); err != nil {
			return
		}
	}
}

// reachesUpstream is a client that does something when its request is there, of which the
// upstream tells by an interim response.
func reachesUpstream(method string, then func(*peer), fields ...string) func(*peer) {
	return func(p *peer) {
		p.request(method, fields...)
		p.head()
		then(p)
	}
}

const (
	here   = "HTTP/1.1 103 Early Hints\r\n\r\n"
	half   = "HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nhalf"
	noByte = "no byte moved within the route's stream_idle_timeout"
)

var upgradeFields = []string{"Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="}

// upgrades is a client that asks for a tunnel and then does something.
func upgrades(then func(*peer)) func(*peer) {
	return func(p *peer) {
		p.request("GET", upgradeFields...)
		then(p)
	}
}

var badEnds = []failure{
	{name: "the upstream refuses connections", status: 503, flags: "UF", reason: "connect to …: connection refused", route: "refusing"},
	{name: "the upstream does not answer to connections", status: 504, flags: "UF", reason: "connect to …: no answer within 300ms", route: "silent"},
	{name: "the upstream closes before its head", status: 503, flags: "UC", reason: "connection ended before the upstream answered: EOF", up: closes},
	{name: "the upstream resets before its head", status: 503, flags: "UR", reason: "connection ended before the upstream answered: recv: connection reset by peer", up: (*peer).reset},
	{name: "the upstream closes within its head", status: 502, flags: "UC", reason: "upstream: the connection ended within a response", up: says("HTTP/1.1 200 OK\r\nX: ", closes)},
	{name: "the upstream resets within its head", status: 502, flags: "UR", reason: "upstream: recv: connection reset by peer", up: says("HTTP/1.1 200 OK\r\nX: ", (*peer).reset)},
	{name: "the upstream closes within its body", status: 200, flags: "UC", reason: "upstream: the connection ended within a response", up: says(half, closes)},
	{name: "the upstream resets within its body", status: 200, flags: "UR", reason: "upstream: recv: connection reset by peer", up: says(half, (*peer).reset)},
	{name: "the upstream closes within chunks", status: 200, flags: "UC", reason: "upstream: the connection ended within a response", up: says("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n", closes)},
	{name: "the upstream says nothing", status: 504, flags: "UT", reason: "no response within the route's timeout", route: "hurried", up: (*peer).stall},
	{name: "the upstream stalls within its head", status: 504, flags: "UT", reason: "no response within the route's timeout", route: "hurried", up: says("HTTP/1.1 200 OK\r\nX: ", (*peer).stall)},
	{name: "the upstream stalls within its body", status: 200, flags: "SI", reason: noByte, route: "idle", up: says(half, (*peer).stall)},
	{name: "the upstream sends a head without end", status: 502, flags: "UPE", reason: "upstream: a head of more than 65536 bytes", up: func(p *peer) {
		p.say("HTTP/1.1 200 OK\r\n")
		for line := "X: " + strings.Repeat("x", 1000) + "\r\n"; ; {
			if _, err := io.WriteString(p, line); err != nil {
				return
			}
		}
	}},
	{name: "the upstream sends more fields than anybody needs", status: 502, flags: "UPE", reason: "upstream: more than 200 fields",
		up: says("HTTP/1.1 200 OK\r\n"+strings.Repeat("X: y\r\n", 1000)+"\r\n", (*peer).stall)},
	{name: "the upstream speaks HTTP/0.9", status: 502, flags: "UPE", reason: "upstream: a malformed status line", up: says("<html>hello</html>\r\n", (*peer).stall)},
	{name: "the upstream sends a malformed chunk", status: 200, flags: "UPE", reason: "upstream: no chunk-size",
		up: says("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\nxyz\r\n", (*peer).stall)},
	{name: "the upstream sends two lengths", status: 502, flags: "UPE", reason: "upstream: more than one Content-Length", up: says("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok!", closes)},
	{name: "the upstream sends a length and chunks", status: 502, flags: "UPE", reason: "upstream: Transfer-Encoding and Content-Length",
		up: says("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", closes)},
	{name: "the upstream sends more than its length", status: 200, flags: "", reason: "", up: says(answer(200, "ok")+"and more", (*peer).stall)},
	{name: "the upstream sends two responses", status: 200, flags: "", reason: "", up: says(answer(200, "one")+answer(200, "two"), (*peer).stall)},
	{name: "the upstream sends a 101 that nobody asked for", status: 502, flags: "UPE", reason: "upstream: a 101 that nobody asked for", up: says(agreement, (*peer).stall)},
	{name: "the upstream agrees to another protocol", status: 502, flags: "UPE", reason: "a 101 that does not agree to what was asked for", route: "upgrade", client: upgrades((*peer).stall),
		up: says("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n", (*peer).stall)},
	{name: "the upstream does not answer an upgrade", status: 504, flags: "UT", reason: "no answer to the upgrade within its handshake_timeout", route: "impatient", client: upgrades((*peer).stall), up: (*peer).stall},
	{name: "the upstream resets an upgrade", status: 503, flags: "UR", reason: "connection ended before the upstream answered: recv: connection reset by peer", route: "upgrade", client: upgrades((*peer).stall), up: (*peer).reset},
	{name: "the upstream resets a tunnel", status: 101, flags: "UR", reason: "upstream reset", route: "upgrade", event: "tunnel_close",
		client: upgrades((*peer).stall), up: says(agreement, (*peer).reset)},

	{name: "no route matches", status: 404, flags: "NR", reason: "no route", route: "none"},
	{name: "the client sends no valid head", status: 400, flags: "DPE", reason: "a field line without a valid name", client: func(p *peer) { p.request("GET", "X Y: z"); p.stall() }},
	{name: "the client sends a head that is too large", status: 431, flags: "DPE", reason: "a head of more than 65536 bytes",
		client: func(p *peer) { p.request("GET", "X: "+strings.Repeat("x", 70<<10)); p.stall() }},
	{name: "the client sends a body that is too large", status: 413, flags: "DPE", reason: "a Content-Length beyond the limit",
		client: func(p *peer) { p.request("POST", "Content-Length: 99999999"); p.stall() }},
	{name: "the client stalls within its head", status: 408, flags: "SI", reason: "a head that came too slowly", listener: "slow-heads", client: func(p *peer) { p.say("GET " + p.target + " HTTP/1.1\r\nHost: "); p.stall() }},
	{name: "the client stalls within its body", status: 408, flags: "SI", reason: "a body that came too slowly", listener: "slow-bodies",
		client: func(p *peer) { p.request("POST", "Content-Length: 8"); p.say("half"); p.stall() }, up: (*peer).stall},
	{name: "the client sends its body too slowly", status: 408, flags: "SI", reason: "a body that came too slowly", listener: "slow-bodies", client: func(p *peer) {
		p.request("POST", "Content-Length: 99999")
		for {
			if _, err := io.WriteString(p, "x"); err != nil {
				return
			}
			p.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
			if _, err := p.r.ReadByte(); err == nil || !os.IsTimeout(err) {
				return
			}
		}
	}, up: (*peer).stall},
	{name: "the client sends a malformed chunk", status: 400, flags: "DPE", reason: "no chunk-size",
		client: func(p *peer) {
			p.request("POST", "Transfer-Encoding: chunked")
			p.say("4\r\nhalf\r\nxyz\r\n")
			p.stall()
		}, up: (*peer).stall},
	{name: "the client vanishes before the answer", status: 0, flags: "DC", reason: "the client has gone", client: reachesUpstream("GET", closes), up: says(here, (*peer).stall)},
	{name: "the client resets before the answer", status: 0, flags: "DC", reason: "the client has gone", client: reachesUpstream("GET", (*peer).reset), up: says(here, (*peer).stall)},
	{name: "the client vanishes within its body", status: 0, flags: "DC", reason: "the client has gone",
		client: reachesUpstream("POST", closes, "Content-Length: 8"), up: says(here, (*peer).stall)},
	{name: "the client vanishes within the response", status: 200, flags: "DC", reason: "the client has gone", client: reachesUpstream("GET", closes), up: says(half, (*peer).stall)},
	{name: "the client never reads", status: 200, flags: "SI", reason: "no byte moved within the route's stream_idle_timeout, the client takes no more", route: "idle",
		client: func(p *peer) { p.Conn.(*net.TCPConn).SetReadBuffer(4 << 10); p.request("GET"); p.ignore() }, up: pours},
	{name: "the client vanishes during an upgrade", status: 0, flags: "DC", reason: "the client has gone", route: "upgrade",
		client: reachesUpstream("GET", closes, upgradeFields...), up: says(here, (*peer).stall)},
	{name: "the client resets a tunnel", status: 101, flags: "DC", reason: "downstream reset", route: "upgrade", event: "tunnel_close",
		client: reachesUpstream("GET", (*peer).reset, upgradeFields...), up: says(agreement, (*peer).stall)},
	{name: "the client vanishes within its head", event: "none", client: func(p *peer) { p.say("GET " + p.target + " HTTP/1.1\r\nHost: ") }},
	{name: "a tunnel is as old as it may be", status: 101, flags: "DT", reason: "max age", route: "aged", event: "tunnel_close",
		client: upgrades((*peer).stall), up: says(agreement, (*peer).stall)},
	{name: "nothing moves in a tunnel", status: 101, flags: "SI", reason: "idle timeout", route: "unmoved", event: "tunnel_close",
		client: upgrades((*peer).stall), up: says(agreement, (*peer).stall)},
}

// TestTheAccessLogTellsWhatWentWrong has all of it go wrong at the same time, in one
// instance.
func TestTheAccessLogTellsWhatWentWrong(t *testing.T) {
	t.Parallel()
	up := newBadUpstream(t)
	i := newInstance(t, "")
	i.write(fmt.Sprintf(`
[[access_logs]]
path = %q
[[access_logs]]
path = %q
text_format = '%%EVENT%% %%REQ(:PATH)%% %%RESPONSE_CODE%% %%RESPONSE_FLAGS%% %%RESPONSE_CODE_DETAILS%%'
filter = { flags = ["any"] }
[[listeners]]
name = "public"
address = "127.0.0.1:0"
limits = { body_size = "1MiB" }
[[listeners]]
name = "slow-heads"
address = "127.0.0.1:0"
limits = { head_timeout = "500ms" }
[[listeners]]
name = "slow-bodies"
address = "127.0.0.1:0"
limits = { body_timeout = "1s" }
[[virtual_hosts]]
name = "all"
domains = ["*"]
routes = [
  { match = { prefix = "/plain/" }, cluster = "up" },
  { match = { prefix = "/hurried/" }, cluster = "up", timeout = "500ms" },
  { match = { prefix = "/idle/" }, cluster = "up", stream_idle_timeout = "2s" },
  { match = { prefix = "/upgrade/" }, cluster = "up", websocket = true },
  { match = { prefix = "/impatient/" }, cluster = "up", websocket = true, tunnels = { handshake_timeout = "500ms" } },
  { match = { prefix = "/unmoved/" }, cluster = "up", websocket = true, tunnels = { idle_timeout = "500ms" } },
  { match = { prefix = "/aged/" }, cluster = "up", websocket = true, tunnels = { max_age = "500ms" } },
  { match = { prefix = "/refusing/" }, cluster = "refusing" },
  { match = { prefix = "/silent/" }, cluster = "silent" },
]
[[clusters]]
name = "up"
endpoints = [%q]
[[clusters]]
name = "refusing"
endpoints = [%q]
[[clusters]]
name = "silent"
endpoints = [%q]
connect_timeout = "300ms"
`, filepath.Join(i.dir, "access.log"), filepath.Join(i.dir, "flags.log"), up.addr, refusing(t), silent(t)))
	i.start(nil)
	addresses := i.addresses()

	var running sync.WaitGroup
	got := make([][]byte, len(badEnds))
	for n := range badEnds {
		running.Go(func() { got[n] = badEnds[n].play(addresses[cmp.Or(badEnds[n].listener, "public")], up) })
	}
	running.Wait()

	want := 0 // lines with flags
	seen := make([]badRecord, len(badEnds))
	for n, f := range badEnds {
		if f.event == "none" {
			continue
		}
		if f.flags != "" {
			want++
		}
		eventually(t, func() bool {
			var ok bool
			seen[n], ok = f.find(badRecords(t, filepath.Join(i.dir, "access.log")))
			return ok
		}, func() string { return "a record of: " + f.name })
		r := seen[n]
		if r.Status != f.status || r.Flags != f.flags || !f.matches(r.Reason) {
			t.Errorf("%s:\n got %d %q %q\nwant %d %q %q", f.name, r.Status, r.Flags, r.Reason, f.status, f.flags, f.reason)
		}
		start, _, _ := strings.Cut(string(got[n]), "\r\n")
		if start != "" && !strings.HasPrefix(start, fmt.Sprintf("HTTP/1.1 %d ", f.status)) {
			t.Errorf("%s: the client got %q", f.name, start)
		}
	}
	for _, r := range badRecords(t, filepath.Join(i.dir, "access.log")) {
		if strings.Contains(r.Target, slug("the client vanishes within its head")) {
			t.Errorf("what is no request has a record: %+v", r)
		}
	}
	for name, body := range map[string]string{"the upstream sends more than its length": "ok", "the upstream sends two responses": "one"} {
		n := slices.IndexFunc(badEnds, func(f failure) bool { return f.name == name })
		if _, got, _ := strings.Cut(string(got[n]), "\r\n\r\n"); got != body {
			t.Errorf("%s: the client got %q", name, got)
		}
	}

	// The log that has nothing but what went wrong has all of that, and nothing else.
	lines := i.wantLines("flags.log", want)
	for n, f := range badEnds {
		if f.event == "none" || f.flags == "" {
			continue
		}
		r := seen[n]
		event, target, details := cmp.Or(f.event, "request"), cmp.Or(r.Target, "-"), strings.ReplaceAll(r.Reason, " ", "_")
		line := fmt.Sprintf("%s %s %d %s %s", event, target, r.Status, r.Flags, details)
		if !slices.Contains(lines, line) {
			t.Errorf("%s: there is no line %q", f.name, line)
		}
	}
	if t.Failed() {
		t.Log(strings.Join(lines, "\n"))
	}
}

// The operations page has the same table.
func TestWhatGoesWrongIsDocumented(t *testing.T) {
	t.Parallel()
	var table strings.Builder
	for _, f := range badEnds {
		if f.event == "none" {
			fmt.Fprintf(&table, "| %s | | | no request has come: there is no record |\n", f.name)
			continue
		}
		flags, reason := "", "none"
		if f.flags != "" {
			flags = "`" + f.flags + "`"
		}
		if f.reason != "" {
			reason = "`" + f.reason + "`"
		}
		fmt.Fprintf(&table, "| %s | %d | %s | %s |\n", f.name, f.status, flags, reason)
	}
	if _, page, _ := strings.Cut(docPage(t, "operations.md"), "\n### Bad upstreams and clients\n"); !strings.Contains(page, "| --- |\n"+table.String()+"\n") {
		t.Errorf("the operations page should have\n%s", &table)
	}
}

func slug(name string) string { return strings.ReplaceAll(name, " ", "-") }

func (f *failure) target() string { return "/" + cmp.Or(f.route, "plain") + "/" + slug(f.name) }

// matches says whether a reason is the one that is expected.
func (f *failure) matches(reason string) bool {
	parts := strings.Split(f.reason, "…")
	for n, p := range parts {
		parts[n] = regexp.QuoteMeta(p)
	}
	ok, err := regexp.MatchString("^"+strings.Join(parts, ".*")+"$", reason)
	return ok && err == nil
}

// play has it happen, and returns what the client has read.
func (f *failure) play(address string, up *badUpstream) []byte {
	conn, err := net.Dial("tcp", address)
	if err != nil {
		return []byte(err.Error())
	}
	defer conn.Close()
	p := newPeer(conn)
	p.target, p.over = f.target(), up.over[f.target()]
	if f.client == nil {
		p.request("GET", "Connection: close")
		p.stall()
	} else {
		f.client(p)
	}
	return p.got
}

// find returns the record of a failure.
func (f *failure) find(records []badRecord) (badRecord, bool) {
	for _, r := range records {
		// Of what was not read to the end of its first line nothing is known.
		if r.Event == cmp.Or(f.event, "request") && (r.Target == f.target() || r.Target == "" && r.Status == f.status && f.matches(r.Reason)) {
			return r, true
		}
	}
	return badRecord{}, false
}

// badRecord is a record, as far as failures look.
type badRecord struct {
	Event, Target, Flags, Reason string
	Status                       int
}

func badRecords(t *testing.T, path string) (all []badRecord) {
	t.Helper()
	data, _ := os.ReadFile(path)
	for line := range strings.Lines(string(data)) {
		var r badRecord
		if strings.HasSuffix(line, "\n") {
			if err := json.Unmarshal([]byte(line), &r); err != nil {
				t.Fatalf("%v: %q", err, line)
			}
			all = append(all, r)
		}
	}
	return all
}

// wantLines waits until a log has so many lines.
func (i *instance) wantLines(name string, n int) (lines []string) {
	i.t.Helper()
	eventually(i.t, func() bool {
		data, _ := os.ReadFile(filepath.Join(i.dir, name))
		lines = strings.Split(strings.TrimSuffix(string(data), "\n"), "\n")
		return len(lines) >= n
	}, func() string { return fmt.Sprintf("%d lines in %s; it has %q", n, name, lines) })
	if len(lines) > n {
		i.t.Errorf("%d lines in %s, want %d", len(lines), name, n)
	}
	return lines
}

// badUpstream does with each request what its failure says.
type badUpstream struct {
	addr string
	does map[string]func(*peer)
	over map[string]chan struct{} // by the target
}

func newBadUpstream(t *testing.T) *badUpstream {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	up := &badUpstream{l.Addr().String(), map[string]func(*peer){}, map[string]chan struct{}{}}
	for _, f := range badEnds {
		up.does[f.target()], up.over[f.target()] = f.up, make(chan struct{})
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() {
				defer conn.Close()
				p := newPeer(conn)
				_, target, _ := strings.Cut(p.head(), " ")
				target, _, _ = strings.Cut(target, " ")
				if does := up.does[target]; does != nil {
					defer close(up.over[target]) // once: nothing is sent again
					does(p)
				}
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		serving.Wait() // the service has stopped, so that all are closed
	})
	return up
}
