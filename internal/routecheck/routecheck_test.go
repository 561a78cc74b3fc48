package routecheck_test

import (
	"encoding/json"
	"os"
	"strings"
	"testing"

	"holdfast/internal/config"
	"holdfast/internal/control"
	"holdfast/internal/routecheck"
)

const file = `
[[listeners]]
name = "relay"
address = "127.0.0.1:0"
protocol = "tcp"
cluster = "web"
[[listeners]]
name = "public"
address = "127.0.0.1:0"
[[listeners]]
name = "inner"
address = "127.0.0.1:0"

[[virtual_hosts]]
name = "site"
domains = ["*.example.com"]
[[virtual_hosts.routes]]
match = { path = "/" }
redirect = { path = "/home" }
[[virtual_hosts.routes]]
name = "canary"
match = { prefix = "/api", segments = true, headers = [{ name = "X-Version", range = [2, 4] }], fraction = { percent = 5 } }
cluster = "next"
[[virtual_hosts.routes]]
match = { prefix = "/api/" }
prefix_rewrite = "/"
host_rewrite = "api.internal"
weighted_clusters = [{ cluster = "web", weight = 3 }, { cluster = "next", weight = 1 }]
[[virtual_hosts.routes]]
name = "switch"
match = { path = "/switch" }
weighted_clusters = [{ cluster = "web", weight = 1 }, { cluster = "next", weight = 0, runtime_key = "next" }]
[[virtual_hosts.routes]]
name = "all-asked"
match = { regex = "/x+", methods = ["PUT"], query = [{ name = "q", exact = "1" }], sources = ["10.0.0.0/8"] }
cluster = "web"
[[virtual_hosts.routes]]
match = { path = "/chat", case_sensitive = false }
websocket = true
auto_host_rewrite = true
cluster = "web"

[[virtual_hosts]]
name = "rest"
domains = ["*"]
listeners = ["public"]
[[virtual_hosts.routes]]
match = { prefix = "/" }
cluster = "web"

[[virtual_hosts]]
name = "hidden"
domains = ["a.example.com"]
listeners = ["inner"]
[[virtual_hosts.routes]]
match = { prefix = "/" }
cluster = "web"

[[clusters]]
name = "web"
endpoints = ["127.0.0.1:9000"]
[[clusters]]
name = "next"
endpoints = ["127.0.0.1:9000"]
`

func ask(t *testing.T, q *control.RouteQuestion) *control.RouteAnswer {
	t.Helper()
	cfg, err := config.Parse("f.toml", []byte(file))
	if err != nil {
		t.Fatal(err)
	}
	return routecheck.Answer(cfg, q)
}

func TestWhatBecomesOfARequestIsExplained(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name     string
		question control.RouteQuestion
		want     string
	}{
		{
			"chance decides", control.RouteQuestion{Method: "GET", URL: "http://b.example.com/api/x?q", Headers: []string{"x-version: 3"}},
			`GET http://b.example.com/api/x?q on listener public
  virtual host: site, which has "*.example.com"
  route: site:canary, by chance: 5%
    cluster: next
    target: /api/x?q
    host: b.example.com
  route: site:prefix=/api/, by chance: 95%
    cluster: web 75%, next 25%
    target: /x?q
    host: api.internal
routes that come before and were not taken:
  site:path=/: the path "/api/x" is not "/"
virtual hosts that were not taken:
  rest: has "*"; that of site is more exact
`,
		}, {
			"the first reason counts", control.RouteQuestion{Method: "PUT", URL: "https://a.example.com/xx?q=2", Client: "10.0.0.1"},
			`PUT https://a.example.com/xx?q=2 on listener public
  virtual host: site, which has "*.example.com"
  route: none
    answer: 404, no route
routes that come before and were not taken:
  site:path=/: the path "/xx" is not "/"
  site:canary: the path "/xx" does not begin with the segments of "/api"
  site:prefix=/api/: the path "/xx" does not begin with "/api/"
  site:switch: the path "/xx" is not "/switch"
  site:all-asked: query parameter q is "2", and must be "1"
  site:path~/chat: the path "/xx" is not "/chat", in any case
virtual hosts that were not taken:
  rest: has "*"; that of site is more exact
  hidden: has "a.example.com", but is on listener inner and not on public
`,
		}, {
			"a tunnel", control.RouteQuestion{Method: "GET", URL: "http://b.example.com/Chat", Upgrade: "websocket", Listener: "inner"},
			`GET http://b.example.com/Chat on listener inner
  virtual host: site, which has "*.example.com"
  route: site:path~/chat
    cluster: web
    target: /Chat
    host: that of the endpoint
    a tunnel, if the upstream agrees
routes that come before and were not taken:
  site:path=/: the path "/Chat" is not "/"
  site:canary: the path "/Chat" does not begin with the segments of "/api"
  site:prefix=/api/: the path "/Chat" does not begin with "/api/"
  site:switch: the path "/Chat" is not "/switch"
  site:all-asked: the path "/Chat" does not match the regex "/x+"
virtual hosts that were not taken:
  rest: has "*", but is on listener public and not on inner
`,
		}, {
			"no tunnel", control.RouteQuestion{Method: "GET", URL: "/", Upgrade: "websocket"},
			`GET / on listener public
  virtual host: rest, which has "*"
  route: rest:prefix=/
    answer: 403, the route is not for WebSocket
`,
		}, {
			"a redirect", control.RouteQuestion{Method: "GET", URL: "https://b.example.com:8443", Listener: "inner"},
			`GET https://b.example.com:8443 on listener inner
  virtual host: site, which has "*.example.com"
  route: site:path=/
    answer: 301 to https://b.example.com:8443/home
virtual hosts that were not taken:
  rest: has "*", but is on listener public and not on inner
`,
		}, {
			"no virtual host", control.RouteQuestion{Method: "OPTIONS", URL: "http://elsewhere.org", Listener: "inner"},
			`OPTIONS http://elsewhere.org on listener inner
  virtual host: none has its host
  route: none
    answer: 404, no virtual host
virtual hosts that were not taken:
  rest: has "*", but is on listener public and not on inner
`,
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			if a := ask(t, &tt.question); a.Text != tt.want || a.Wrong != nil || a.Unmet != 0 {
				t.Errorf("got %+v\n%s\nwant\n%s", a.Wrong, a.Text, tt.want)
			}
			tt.question.JSON = true
			var f struct {
				Outcomes []struct{ Share float64 }
			}
			a := ask(t, &tt.question)
			if err := json.Unmarshal([]byte(a.Text), &f); err != nil || len(f.Outcomes) == 0 {
				t.Errorf("%v: %s", err, a.Text)
			}
		})
	}
}

func TestAQuestionThatCannotBeAnswered(t *testing.T) {
	t.Parallel()
	for want, q := range map[string]control.RouteQuestion{
		`"ftp://x/" is no URL like http://example.com/path`:                                                           {URL: "ftp://x/"},
		`"http:///x" has no host that a request could have`:                                                           {URL: "http:///x"},
		`"http://u@x/" has no host that a request could have`:                                                         {URL: "http://u@x/"},
		`"/a b" is not as clients send it: #, spaces, control characters and letters beyond ASCII are written as %XX`: {URL: "/a b"},
		`header "x": a name, a colon and a value are needed`:                                                          {URL: "/", Headers: []string{"x"}},
		`header "Host: x": the host stands in the URL`:                                                                {URL: "/", Headers: []string{"Host: x"}},
		`the client "x" is no address`:                                                                                {URL: "/", Client: "x"},
		`there is no listener "x"; there are public, inner`:                                                           {URL: "/", Listener: "x"},
		`the listener "relay" relays connections as they are: no request has a route there`:                           {URL: "/", Listener: "relay"},
		`"h2c" is no protocol that a route could have in its upgrades`:                                                {URL: "/", Upgrade: "h2c"},
	} {
		q.Method = "GET"
		if a := ask(t, &q); len(a.Wrong) != 1 || a.Wrong[0] != want || a.Text != "" {
			t.Errorf("got %+v, want %s", a, want)
		}
	}
}

func TestExpectationsAreTried(t *testing.T) {
	t.Parallel()
	data, err := os.ReadFile("testdata/tests.toml")
	if err != nil {
		t.Fatal(err)
	}
	a := ask(t, &control.RouteQuestion{Path: "tests.toml", Tests: data})
	const want = `what is not so is said
  virtual host: site, expected rest
  route: site:canary, expected a or b
  cluster: next, expected web
  target: /api, expected /x
  host: a.example.com, expected y
  redirect: none, expected z
  status: none, expected 404
  route: none, expected a or b
  cluster: none, expected web
  target: none, expected /x
  host: none, expected y
one of several that chance may choose is not enough
  cluster: next, expected web
9 of 11 requests get what is expected
`
	if a.Unmet != 2 || a.Text != want {
		t.Errorf("got %+v\n%s", a, a.Text)
	}
}

func TestAFileOfExpectationsIsReadStrictly(t *testing.T) {
	t.Parallel()
	for data, want := range map[string]string{
		"": "f: tests: missing; at least one [[tests]] is needed",
		"[[tests]]\nname = \"a\"\nurl = \"x:/\"\nexpect = { status = 404 }":                                                                  `f: tests[0]: "x:/" is no URL like http://example.com/path`,
		"[[tests]]\nname = \"a\"\nurl = \"/\"":                                                                                               `f:1: tests[0].expect: missing; must be a table like { route = "site:prefix=/" }`,
		"[[tests]]\nname = \"a\"\nurl = \"/\"\nexpect = { rout = \"x\" }":                                                                    `f:4: tests[0].expect.rout: unknown key; did you mean "route"?`,
		"[[tests]]\nname = \"a\"\nurl = \"/\"\nexpect = { status = 99 }":                                                                     `f:4: tests[0].expect.status: must be an integer from 100 to 599, found the integer 99`,
		"[[tests]]\nname = \"a\"\nurl = \"/\"\nclient = \"x\"\nexpect = { status = 404 }":                                                    `f:4: tests[0].client: must be an address like "10.0.0.1", found the string "x"`,
		"[[tests]]\nname = \"a\"\nurl = \"/\"\nheaders = [\"x\"]\nexpect = { status = 404 }":                                                 `f:4: tests[0].headers[0]: must be a header like "Name: value", found the string "x": a name, a colon and a value are needed`,
		"[[tests]]\nname = \"a\"\nurl = \"/\"\nexpect = { route = 1 }":                                                                       `f:4: tests[0].expect.route: must be a text, found the integer 1`,
		"[[tests]]\nurl = \"/\"\nexpect = { route = \"x\" }":                                                                                 `f:1: tests[0].name: missing; must be a text`,
		"[[tests]]\nname = \"a\"\nurl = \"/\"\nexpect = { route = \"x\" }\n[[tests]]\nname = \"a\"\nurl = \"/\"\nexpect = { route = \"x\" }": `f:6: tests[1].name: "a" is already the name of another one (tests[0].name, line 2)`,
	} {
		a := ask(t, &control.RouteQuestion{Path: "f", Tests: []byte(data)})
		if got := strings.Join(a.Wrong, "\n"); got != want || a.Text != "" {
			t.Errorf("%s\n got %s\nwant %s", data, got, want)
		}
	}
}

func TestTheSampleOfTheDocumentationIsAFileOfExpectations(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	_, sample, ok := strings.Cut(string(page), "```toml\n# routes.toml\n")
	sample, _, closed := strings.Cut(sample, "```")
	if !ok || !closed {
		t.Fatal("there is none")
	}
	if tests, err := config.ParseRouteTests("sample", []byte(sample)); err != nil || len(tests) != 2 {
		t.Errorf("%d tests, %v", len(tests), err)
	}
}
