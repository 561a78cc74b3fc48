package routecheck_test

import (
	"strings"
	"testing"

	"holdfast/internal/config"
	"holdfast/internal/control"
	"holdfast/internal/routecheck"
)

const actions = `
[[listeners]]
name = "public"
address = "127.0.0.1:0"
health_check = { path = "/healthz" }
deny = ["10.6.6.0/24"]
tunnel_rate_limit = { tunnels = 3 }
[[listeners]]
name = "raw"
address = "127.0.0.1:0"
path = { normalize = false }

[[virtual_hosts]]
name = "site"
domains = ["*"]
allow = ["0.0.0.0/0"]
authorize = { cluster = "auth" }

[[virtual_hosts.routes]]
name = "hello"
match = { path = "/hello" }
authorize = "off"
rate_limit = { requests = 5, per = "1m", key = "client" }
direct_response = { status = 202, body = "hello" }
[[virtual_hosts.routes]]
name = "moved"
match = { prefix = "/old/" }
authorize = "off"
redirect = { scheme = "https", port = 8443, prefix_rewrite = "/new/", status = 308, strip_query = true }
[[virtual_hosts.routes]]
name = "moved-regex"
match = { prefix = "/odd/" }
authorize = "off"
redirect = { regex_rewrite = { pattern = "^/odd/(.*)$", substitution = "\\1" } }
[[virtual_hosts.routes]]
name = "seam"
match = { prefix = "/a" }
prefix_rewrite = "/"
authorize = "off"
cluster = "web"
[[virtual_hosts.routes]]
name = "regex"
match = { prefix = "/r/" }
regex_rewrite = { pattern = "^/r(/.*)$", substitution = "\\1" }
authorize = "off"
cluster = "web"
[[virtual_hosts.routes]]
name = "regex-none"
match = { prefix = "/q/" }
regex_rewrite = { pattern = "^/q/", substitution = "" }
authorize = "off"
cluster = "web"
[[virtual_hosts.routes]]
name = "named"
match = { prefix = "/named" }
cluster_header = "X-Cluster"
host_rewrite_header = "X-Host"
authorize = "off"
[[virtual_hosts.routes]]
name = "hashed"
match = { prefix = "/hashed" }
weighted_clusters = [{ cluster = "web", weight = 1 }, { cluster = "auth", weight = 1 }]
hash_policy = [{ header = "X-User" }]
split_by_hash = true
authorize = "off"
[[virtual_hosts.routes]]
name = "sticky"
match = { prefix = "/sticky" }
cluster = "web"
hash_policy = [{ cookie = { name = "s", ttl = "1h" } }]
authorize = "off"
[[virtual_hosts.routes]]
name = "tunnels"
match = { prefix = "/t" }
websocket = true
upgrades = ["my-proto"]
origins = ["https://*.example.com"]
cors = { allow_origins = ["https://app.example.com"], allow_methods = ["GET"] }
cluster = "web"
[[virtual_hosts.routes]]
name = "all"
match = { prefix = "/" }
cluster = "web"
rate_limit = { requests = 5 }
fault = { delay = { percent = 10, duration = "1s" }, abort = { percent = 5 }, headers = [{ name = "X-Fault" }] }
retry = { on = ["connect-failure", "5xx"], attempts = 2 }
mirror = { cluster = "auth", percent = 12.5 }

[[clusters]]
name = "web"
endpoints = ["127.0.0.1:9000"]
[[clusters]]
name = "auth"
endpoints = ["127.0.0.1:9000"]
`

func askActions(t *testing.T, q *control.RouteQuestion) *control.RouteAnswer {
	t.Helper()
	cfg, err := config.Parse("f.toml", []byte(actions))
	if err != nil {
		t.Fatal(err)
	}
	return routecheck.Answer(cfg, q)
}

func TestWhatARouteDoesIsSaid(t *testing.T) {
	t.Parallel()
	passed := "    filter: deny of listener public\n    filter: allow of virtual host site\n"
	for name, tt := range map[string]struct {
		url     string
		q       control.RouteQuestion
		want    string // from the route's name on, or all behind the first line
		without string
	}{
		"a path is normalised":      {"/x/../hello", control.RouteQuestion{Client: "1.1.1.1"}, "  normalised: /hello\n  virtual host: site, which has \"*\"\n  route: site:hello\n" + passed + "    filter: rate_limit of the route: 5 per 1m0s for each client\n    answer: 202, the route's direct_response\n", ""},
		"or it is not":              {"/x/../hello", control.RouteQuestion{Listener: "raw", Client: "1.1.1.1"}, "  virtual host: site, which has \"*\"\n  route: site:all\n", "normalised"},
		"or refused":                {"/x%2Fy", control.RouteQuestion{}, "  answer: 400, a path with an encoded slash or backslash; no route is looked for\n", "virtual host"},
		"a health check":            {"/%68ealthz?x", control.RouteQuestion{}, "  normalised: /healthz?x\n  answer: 200, the listener's health_check, or 503 while no traffic is wanted; no route is looked for\n", "virtual host"},
		"one of a method":           {"/healthz", control.RouteQuestion{Method: "POST"}, "route: site:all\n", "health_check"},
		"an upgrade is none":        {"/healthz", control.RouteQuestion{Upgrade: "websocket"}, "route: site:all\n    answer: 403", "health_check"},
		"a client denied":           {"/x", control.RouteQuestion{Client: "::ffff:10.6.6.6"}, "    filter: deny of listener public\n    answer: 403, the client's address is not allowed on listener public\n", "cluster"},
		"a client not allowed":      {"/x", control.RouteQuestion{Client: "2001:db8::1"}, passed + "    answer: 403, the client's address is not allowed on virtual host site\n", "cluster"},
		"a redirect":                {"http://h:80/old/x?y", control.RouteQuestion{}, "route: site:moved\n" + passed + "    answer: 308 to https://h:8443/new/x\n", ""},
		"a redirect to no path":     {"http://h/odd/x", control.RouteQuestion{}, passed + "    answer: 400, the redirect's regex_rewrite makes no path of the request's\n", ""},
		"a rewrite":                 {"/r/x?y", control.RouteQuestion{}, "    target: /x?y\n", ""},
		"a rewrite to no path":      {"/q/x", control.RouteQuestion{}, "    answer: 400, the route's regex_rewrite makes no path of the request's\n", "target"},
		"a dot segment comes back":  {"/a../b", control.RouteQuestion{}, "    answer: 400, the path has a dot segment once it is rewritten, to \"/../b\"\n", "target"},
		"where that is passed on":   {"/a../b", control.RouteQuestion{Listener: "raw"}, "    target: /../b\n", "400"},
		"a cluster by its name":     {"http://h/named", control.RouteQuestion{Headers: []string{"X-Cluster: auth", "X-Host: other:1"}}, "    cluster: auth\n    target: /named\n    host: other:1\n", ""},
		"no cluster":                {"http://h/named", control.RouteQuestion{}, "    answer: 404, the request has no X-Cluster, the route's cluster_header\n", "target"},
		"no such cluster":           {"http://h/named", control.RouteQuestion{Headers: []string{"X-Cluster: x"}}, "    answer: 404, X-Cluster, the route's cluster_header, names no cluster\n", "target"},
		"no host":                   {"http://h/named", control.RouteQuestion{Headers: []string{"X-Cluster: auth", "X-Host: a b"}}, "    answer: 400, X-Host, the route's host_rewrite_header, holds no host\n", "target"},
		"a hash":                    {"/hashed", control.RouteQuestion{Headers: []string{"X-User: 1"}}, "    cluster: auth\n    hash: 7c3832dde020d3d6\n", "%"},
		"another hash":              {"/hashed", control.RouteQuestion{Headers: []string{"X-User: 5"}}, "    cluster: web\n    hash: ", "%"},
		"no hash":                   {"/hashed", control.RouteQuestion{}, "    cluster: web 50%, auth 50%\n    hash: none\n", ""},
		"a hash to come":            {"/sticky", control.RouteQuestion{}, "    hash: by chance\n", ""},
		"an upgrade to an answer":   {"/hello", control.RouteQuestion{Client: "1.1.1.1", Upgrade: "websocket"}, passed + "    filter: rate_limit of the route: 5 per 1m0s for each client\n    answer: 202, the route's direct_response\n", "tunnel_rate_limit"},
		"a tunnel":                  {"/t", control.RouteQuestion{Upgrade: "My-Proto", Headers: []string{"Origin: https://app.example.com"}}, "    filter: tunnel_rate_limit of listener public: 3 per 1s\n    filter: authorize of the route or its virtual host: asks cluster auth\n    cluster: web\n    target: /t\n    host: that of the endpoint\n    a tunnel, if the upstream agrees\n", "normalised"},
		"a tunnel of nobody":        {"/t", control.RouteQuestion{Upgrade: "websocket", Headers: []string{"Origin: https://elsewhere.org"}}, "    answer: 403, the route's origins do not have the request's\n", "filter"},
		"no tunnel to that":         {"/t", control.RouteQuestion{Upgrade: "other"}, "    upgrade: the route has none to \"other\": an ordinary request\n", "tunnel, if"},
		"a browser asks":            {"/t", control.RouteQuestion{Method: "OPTIONS", Headers: []string{"Origin: https://app.example.com", "Access-Control-Request-Method: GET"}}, "    answer: 200, which tells a browser what pages of https://app.example.com may do (cors)\n", "filter"},
		"all that is on the way":    {"/x", control.RouteQuestion{Client: "1.1.1.1"}, passed + "    filter: rate_limit of the route: 5 per 1s\n    filter: fault of the route: delays 10% by 1s, answers 5% with 503, of those with X-Fault\n    filter: authorize of the route or its virtual host: asks cluster auth\n    cluster: web\n    target: /x\n    host: that of the endpoint\n    retry: connect-failure, 5xx, at most 2 times\n    mirror: auth 12.5%\n", "upgrade"},
		"an upgrade has no retries": {"/t", control.RouteQuestion{Upgrade: "websocket", Client: "1.1.1.1", Headers: []string{"Origin: https://a.example.com"}}, "a tunnel", "retry"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			q := tt.q
			if q.URL = tt.url; q.Method == "" {
				q.Method = "GET"
			}
			if q.Client == "" {
				q.Client = "1.2.3.4"
			}
			a := askActions(t, &q)
			if !strings.Contains(a.Text, tt.want) || a.Wrong != nil || tt.without != "" && strings.Contains(a.Text, tt.without) {
				t.Errorf("got %q\n%s\nwant\n%s\nwithout %q", a.Wrong, a.Text, tt.want, tt.without)
			}
		})
	}
}

func TestExpectationsOfWhatARouteDoes(t *testing.T) {
	t.Parallel()
	a := askActions(t, &control.RouteQuestion{Path: "f", Tests: []byte(`
[[tests]]
name = "met"
url = "/x"
client = "1.1.1.1"
expect = { filters = ["authorize", "rate_limit"], mirror = "auth", cluster = "web" }
[[tests]]
name = "also met"
url = "/x%2Fy"
expect = { status = 400, route = "none", mirror = "none", virtual_host = "none" }
[[tests]]
name = "not met"
url = "/hashed"
client = "1.1.1.1"
upgrade = "my-proto"
headers = ["X-User: 1"]
expect = { filters = "authorize", mirror = "auth", hash = "00" }
`)})
	const want = `not met
  filters: deny, allow, expected also authorize
  hash: 7c3832dde020d3d6, expected 00
  mirror: none, expected auth
2 of 3 requests get what is expected
`
	if a.Text != want || a.Unmet != 1 || a.Wrong != nil {
		t.Errorf("got %+v\n%s", a.Wrong, a.Text)
	}
}
