package e2e

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// named starts an upstream that says its name, in answers and in tunnels.
func named(t *testing.T, name string) (address string) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	serve := func(c net.Conn) {
		defer c.Close()
		for r := bufio.NewReader(c); ; {
			req, err := http.ReadRequest(r)
			if err != nil {
				return
			}
			if req.Header.Get("Upgrade") == "" {
				fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(name), name)
				continue
			}
			fmt.Fprintf(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n%s", name)
			io.Copy(io.Discard, r)
			return
		}
	}
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go serve(c)
		}
	}()
	return ln.Addr().String()
}

// A site is a service with a blue and a green upstream, of which the configuration gives
// everything to blue.
type site struct {
	*instance
	public string // address
}

const siteFile = `
[admin]
http = "127.0.0.1:0"
[runtime]
file = "{dir}/runtime.toml"
[reload]
probation = "1h"
[drain]
idle_grace = "1h"
[[listeners]]
name = "public"
address = "127.0.0.1:0"
[[virtual_hosts]]
name = "site"
domains = ["*"]
[[virtual_hosts.routes]]
match = { prefix = "/" }
websocket = true
weighted_clusters = [
  { cluster = "blue", weight = 1, runtime_key = "site.blue" },
  { cluster = "green", weight = 0, runtime_key = "site.green" },
]
[[clusters]]
name = "blue"
endpoints = ["{blue}"]
[[clusters]]
name = "green"
endpoints = ["{green}"]
`

func (s *site) dial() net.Conn { return dial(s.t, s.public) }

// asks sends a request over a connection and returns who has answered it.
func (s *site) asks(c net.Conn) string {
	s.t.Helper()
	fmt.Fprint(c, "GET / HTTP/1.1\r\nHost: site\r\n\r\n")
	answer, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		s.t.Fatal(err)
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	if err != nil || answer.StatusCode != 200 {
		s.t.Fatalf("%d %q %v", answer.StatusCode, body, err)
	}
	return string(body)
}

// opens opens a tunnel and returns to whom.
func (s *site) opens() string {
	s.t.Helper()
	c := s.dial()
	defer c.Close()
	fmt.Fprint(c, "GET / HTTP/1.1\r\nHost: site\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
	r := bufio.NewReader(c)
	answer, err := http.ReadResponse(r, nil)
	if err != nil || answer.StatusCode != 101 {
		s.t.Fatalf("%+v, %v", answer, err)
	}
	name := make([]byte, 4)
	if _, err := io.ReadFull(r, name); err != nil {
		s.t.Fatal(err)
	}
	return strings.TrimSuffix(string(name), "n") // "gree" for green is enough
}

// wantAll expects every request and every upgrade to go to one upstream.
func (s *site) wantAll(when, upstream string) {
	s.t.Helper()
	for range 3 {
		c := s.dial()
		if got := s.asks(c); got != upstream {
			s.t.Errorf("%s: a request went to %s, want %s", when, got, upstream)
		}
		c.Close()
		if got := s.opens(); !strings.HasPrefix(upstream, got) {
			s.t.Errorf("%s: an upgrade went to %s, want %s", when, got, upstream)
		}
	}
}

// run runs a command that must succeed and returns what it says.
func (s *site) run(args ...string) string {
	s.t.Helper()
	code, out, errs := s.holdfast(args...)
	if code != 0 {
		s.t.Fatalf("holdfast %q: exit code %d\n%s%s", args, code, out, errs)
	}
	return out + errs
}

func (s *site) toGreen() {
	s.t.Helper()
	if said := s.run("runtime", "set", "site.blue", "0", "site.green", "1"); !strings.Contains(said, "site.green is 1 until `holdfast runtime reset site.green`") {
		s.t.Errorf("it said %q", said)
	}
}

// values is what `holdfast runtime --json` says of each key.
func (s *site) values() (all string) {
	s.t.Helper()
	var shown struct {
		Values []struct {
			Key                   string
			Configured, Effective []float64
			File, Command         *float64
		}
	}
	if err := json.Unmarshal([]byte(s.run("runtime", "--json")), &shown); err != nil {
		s.t.Fatal(err)
	}
	for _, v := range shown.Values {
		all += fmt.Sprintf("%s %v", v.Key, v.Configured)
		if v.File != nil {
			all += fmt.Sprint(" file ", *v.File)
		}
		if v.Command != nil {
			all += fmt.Sprint(" set ", *v.Command)
		}
		all += fmt.Sprint(" now ", v.Effective, "; ")
	}
	return all
}

func TestTrafficIsShiftedAtRunTime(t *testing.T) {
	t.Parallel()
	blue, green := named(t, "blue"), named(t, "green")
	i := newInstance(t, "")
	config := strings.NewReplacer("{dir}", i.dir, "{blue}", blue, "{green}", green).Replace(siteFile)
	i.write(config)
	i.start(nil)
	s := &site{i, i.address("public")}
	s.wantAll("as configured", "blue")

	s.toGreen()
	s.wantAll("after `runtime set`", "green")
	if got := s.values(); got != "site.blue [1] set 0 now [0]; site.green [0] set 1 now [1]; " {
		t.Errorf("shown is %s", got)
	}
	if said := s.run("status"); !strings.Contains(said, "2 keys overridden (2 by command); `holdfast runtime` shows them") {
		t.Errorf("the status says\n%s", said)
	}

	var kept []net.Conn // to the generation that drains in a moment
	for range 2 {
		c := s.dial()
		if got := s.asks(c); got != "green" {
			t.Errorf("a request went to %s", got)
		}
		kept = append(kept, c)
	}
	s.reload(config + "# 2\n")
	s.wantStates("2 serving, 1 draining")
	s.wantAll("after a reload", "green")
	if got := s.asks(kept[0]); got != "green" {
		t.Errorf("a request to the old generation went to %s", got)
	}
	s.run("runtime", "reset")
	s.wantAll("after `runtime reset`", "blue")
	if got := s.asks(kept[1]); got != "blue" {
		t.Errorf("after `runtime reset` a request to the old generation went to %s", got)
	}

	s.toGreen()
	before := s.crash()
	s.wantAll("without a supervisor", "green")
	s.succeed(before)
	s.wantAll("after the death of the supervisor", "green")
	s.upgrade()
	s.wantAll("after an upgrade", "green")
	if got := s.values(); got != "site.blue [1] set 0 now [0]; site.green [0] set 1 now [1]; " {
		t.Errorf("shown is %s", got)
	}
	s.run("runtime", "reset", "site.blue")
	s.run("runtime", "reset", "site.green")
	s.wantAll("after both were reset", "blue")
	s.wantFile()
	s.wantRefusals()
}

// wantFile shifts traffic by the file.
func (s *site) wantFile() {
	s.t.Helper()
	path := filepath.Join(s.dir, "runtime.toml")
	write := func(text string) {
		s.t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			s.t.Fatal(err)
		}
	}
	becomes := func(upstream string) {
		s.t.Helper()
		got := ""
		eventually(s.t, func() bool {
			c := s.dial()
			defer c.Close()
			got = s.asks(c)
			return got == upstream
		}, func() string { return "requests to " + upstream + "; they go to " + got })
	}
	write("[site]\nblue = 0\ngreen = 1\n")
	becomes("green")
	s.wantAll("by the file", "green")
	if got := s.values(); got != "site.blue [1] file 0 now [0]; site.green [0] file 1 now [1]; " {
		s.t.Errorf("shown is %s", got)
	}

	write("[site]\nblue = 1") // half of 10
	eventually(s.t, func() bool { return strings.Contains(s.run("status"), "what the file says is of no use: ") }, func() string { return "the complaint about the file" })
	s.wantAll("by what the file said before", "green")

	s.run("runtime", "set", "site.blue", "1", "site.green", "0")
	s.wantAll("by command, above the file", "blue")
	if said := s.run("runtime", "reset"); !strings.Contains(said, "site.green is 1 now, as "+path+" says") {
		s.t.Errorf("the reset says %q", said)
	}
	s.wantAll("by the file again", "green")

	write("site.green = 0\n")
	if err := os.Rename(path, path+".old"); err != nil { // a file that comes and goes
		s.t.Fatal(err)
	}
	becomes("blue")
	write("site.blue = 0\n\"site.green\" = 5\n")
	becomes("green")
	if err := os.Remove(path); err != nil {
		s.t.Fatal(err)
	}
	becomes("blue")
	s.wantAll("without the file", "blue")
}

// wantRefusals tries what must not work, and changes nothing.
func (s *site) wantRefusals() {
	s.t.Helper()
	for _, c := range []struct {
		args string
		code int
		want string
	}{
		{"set site.blue 1000001", 1, "site.blue: 1000001 is out of range: from 0 to 1000000"},
		{"set site.blue 0.5 site.green 1", 1, "site.blue: 0.5 is no whole number"},
		{"set site.blue", 2, "a key and a value belong together"},
		{"set site.blue ten", 2, `"ten" is no number that site.blue could be`},
		{"set site.blue NaN", 2, "is no number"},
		{"set site/blue 1", 2, "a runtime key is a name"},
		{"set site.blue 1 site.blue 2", 2, "site.blue is there twice"},
		{"reset site.blue", 1, `"site.blue" is not set by command`},
		{"reset a b", 2, "accepts at most 1 arg"},
		{"sett a 1", 2, "unknown command"},
	} {
		code, out, errs := s.holdfast(append([]string{"runtime"}, strings.Fields(c.args)...)...)
		if code != c.code || !strings.Contains(errs, c.want) || out != "" {
			s.t.Errorf("holdfast runtime %s: exit code %d, want %d; %q must be in\n%s%s", c.args, code, c.code, c.want, out, errs)
		}
	}
	if said := s.run("runtime", "set", "sites.blue", "1"); !strings.Contains(said, "no generation knows sites.blue: it holds for those to come") {
		s.t.Errorf("it said %q", said)
	}
	shown := s.run("runtime")
	for _, want := range []string{
		"KEY         CONFIGURED  FILE  SET  EFFECTIVE  UNIT   WHERE\n",
		"site.blue   1           -     -    1          count  virtual_hosts[0].routes[0].weighted_clusters[0]\n",
		"sites.blue  -           -     1    -          -      no generation knows it\n",
		"\nno generation knows sites.blue: it holds for those to come\n",
	} {
		if !strings.Contains(shown, want) {
			s.t.Errorf("%q is not in\n%s", want, shown)
		}
	}
	s.wantAll("after all that was refused", "blue")
}
