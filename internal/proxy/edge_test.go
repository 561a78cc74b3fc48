package proxy_test

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"holdfast/internal/config"
	"holdfast/internal/exchange"
	"holdfast/internal/urlpath"
)

// The route of what is guarded comes first; whatever the client writes, the upstream of the
// other one gets no such path.
func TestNoSpellingOfAPathPassesByARoute(t *testing.T) {
	t.Parallel()
	var (
		keep   = urlpath.Policy{Encoded: urlpath.Keep}
		decode = urlpath.Policy{Encoded: urlpath.Decode}
		off    = urlpath.Policy{Off: true}
	)
	tests := []struct {
		name    string
		path    urlpath.Policy
		target  string
		cluster string // "": 400
		sent    string
	}{
		{"as it is", urlpath.Policy{}, "/admin?x=/../y//%61", "guarded", "/admin?x=/../y//%61"},
		{"another one", urlpath.Policy{}, "/public//a%20b/./c/../%7Ed", "web", "/public/a%20b/~d"},
		{"dot segments", urlpath.Policy{}, "/public/../admin", "guarded", "/admin"},
		{"encoded dot segments", urlpath.Policy{}, "/public/%2e%2e/admin?q", "guarded", "/admin?q"},
		{"above the root", urlpath.Policy{}, "/../admin", "guarded", "/admin"},
		{"slashes", urlpath.Policy{}, "//admin", "guarded", "/admin"},
		{"an encoded letter", urlpath.Policy{}, "/%61dmin", "guarded", "/admin"},
		{"both", urlpath.Policy{}, "/.%2F/admin", "", ""},
		{"an encoded slash", urlpath.Policy{}, "/admin%2f..", "", ""},
		{"parameters", urlpath.Policy{}, "/public/..;/admin", "", ""},
		{"a backslash", urlpath.Policy{}, `/\admin`, "", ""},
		{"an end of a string", urlpath.Policy{}, "/admin%00", "", ""},
		{"a broken encoding", urlpath.Policy{}, "/%zzadmin", "", ""},
		{"an encoded slash that is kept", keep, "/public/a%2fb", "web", "/public/a%2Fb"},
		{"an encoded slash and dots", keep, "/public/..%2fadmin", "", ""},
		{"an encoded slash that is one", decode, "/public/..%2fadmin", "guarded", "/admin"},
		{"a backslash that is a slash", decode, `/public\..\admin`, "guarded", "/admin"},
		{"nothing is normalised", off, "/public/../admin%2f%zz//\\", "web", "/public/../admin%2f%zz//\\"},
	}
	for _, tt := range tests {
		for kind, client := range map[string]func(*testing.T, string, string) *client{"request": get, "upgrade": upgrade} {
			t.Run(tt.name+", "+kind, func(t *testing.T) {
				t.Parallel()
				inBubble(t, func(t *testing.T) {
					f, c := newFarm(t), client(t, "a.example", tt.target)
					f.edge.Path = tt.path
					f.cluster["guarded"] = []string{"10.0.0.2:80"}
					f.routes = []config.Route{webSocket("/admin", "guarded"), webSocket("/", "web")}
					if kind == "upgrade" {
						f.behave["10.0.0.1:80"], f.behave["10.0.0.2:80"] = agrees, agrees
					}
					c.start(f.manager()).wait()
					if tt.cluster == "" {
						c.wantStatus(400)
						c.wantClose(kind == "upgrade")
						if len(f.origins()) > 0 {
							t.Error("an endpoint was asked")
						}
						return
					}
					o := f.origin()
					if want := f.cluster[tt.cluster][0]; o.conn.address != want || o.head.Target != tt.sent {
						t.Errorf("%s got %s, want %s to get %s", o.conn.address, o.head.Target, want, tt.sent)
					}
					told, _ := o.head.Fields.Get("X-Envoy-Original-Path")
					if changed := tt.sent != tt.target; changed != (told == tt.target) || !changed && told != "" {
						t.Errorf("the upstream is told of %q", told)
					}
				})
			})
		}
	}
}

func TestARewriteBringsNoDotSegmentBack(t *testing.T) {
	t.Parallel()
	for target, want := range map[string]string{
		"/a../admin":  "",
		"/a./b":       "",
		"/a..":        "",
		"/a..;/admin": "",
		"/a.../b":     "/.../b",
		"/ab?/../":    "/b?/../",
	} {
		for off := range 2 {
			t.Run(target, func(t *testing.T) {
				t.Parallel()
				inBubble(t, func(t *testing.T) {
					f, c := newFarm(t), get(t, "a.example", target)
					f.edge.Path.Off = off == 1
					rewriting := to("/a", "web")
					rewriting.PrefixRewrite = "/"
					f.routes = []config.Route{rewriting}
					c.start(f.manager()).wait()
					switch {
					case want == "" && off == 0:
						c.wantStatus(400)
						if len(f.origins()) > 0 {
							t.Error("an endpoint was asked")
						}
					case want != "" && f.origin().head.Target != want:
						t.Errorf("the upstream got %s, want %s", f.origin().head.Target, want)
					case want == "" && f.origin().head.Target != "/"+strings.TrimPrefix(target, "/a"):
						t.Errorf("the upstream got %s", f.origin().head.Target)
					}
				})
			})
		}
	}
}

func TestARedirectHasTheNormalPath(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f, c := newFarm(t), get(t, "a.example", "/a//../%62?q=/../")
		f.routes = []config.Route{{Match: config.Match{Prefix: "/"}, Redirect: &config.Redirect{Scheme: "https", Status: 301}}}
		c.request.Fields = fields("traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
		c.start(f.manager()).wait().wantStatus(301)
		if got := lines(c.answer.Fields); !slices.Equal(got, []string{"Location: https://a.example/b?q=/../", "Content-Type: text/plain; charset=utf-8"}) {
			t.Errorf("the answer has %q", got)
		}
	})
}

func TestTracesPassAsTheyAre(t *testing.T) {
	t.Parallel()
	trace := []string{"traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "tracestate: a=1,b=2", "tracestate: c=3"}
	for _, client := range []func(*testing.T, string, string) *client{get, upgrade} {
		inBubble(t, func(t *testing.T) {
			f, c := newFarm(t), client(t, "a.example", "/")
			f.routes = []config.Route{webSocket("/", "web")}
			f.behave[first] = answering(200)
			c.request.Fields = fields(trace...)
			c.start(f.manager()).wait()
			if got := lines(f.origin().head.Fields); !slices.Equal(got[:len(trace)], trace) {
				t.Errorf("the upstream got %q", got)
			}
		})
	}
}

func TestInternalHeadersAreTheirs(t *testing.T) {
	t.Parallel()
	sent := []string{"X-Internal-User: a", "x-INTERNAL-: b", "X_Internal-User: c", "X-Auth: d", "x_auth: e", "X-Authority: f", "X-Team_One: g", "X-Team-One: h", "X-Intern: i"}
	for name, tt := range map[string]struct {
		peer string
		want []string
	}{
		"a stranger's go":           {"192.0.2.1:1", []string{"X-Authority: f", "X-Intern: i"}},
		"a trusted proxy's stay":    {"10.1.1.1:1", []string{"X-Internal-User: a", "x-INTERNAL-: b", "X-Auth: d", "X-Authority: f", "X-Team_One: g", "X-Intern: i"}},
		"whatever the port is":      {"10.1.1.1:4711", []string{"X-Internal-User: a", "x-INTERNAL-: b", "X-Auth: d", "X-Authority: f", "X-Team_One: g", "X-Intern: i"}},
		"a peer without an address": {"", []string{"X-Authority: f", "X-Intern: i"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T) {
				f, c := newFarm(t), get(t, "a.example", "/")
				f.trusted = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}
				f.edge.InternalHeaders = []string{"X-Internal-*", "X-Auth", "X-Team_One"}
				c.request.Fields = fields(sent...)
				c.down.Remote = netip.AddrPort{}
				if tt.peer != "" {
					c.down.Remote = netip.MustParseAddrPort(tt.peer)
				}
				c.start(f.manager()).wait()
				got := lines(f.origin().head.Fields)
				if got = slices.DeleteFunc(got, isOurs); !slices.Equal(got, tt.want) {
					t.Errorf("the upstream got %q, want %q", got, tt.want)
				}
			})
		})
	}
}

func isOurs(line string) bool {
	return strings.HasPrefix(line, "X-Forwarded-") || strings.HasPrefix(line, "X-Request-Id")
}

func TestCountedProxiesAreTrusted(t *testing.T) {
	t.Parallel()
	for _, peer := range []string{"192.0.2.1:1", ""} {
		inBubble(t, func(t *testing.T) {
			f, c := newFarm(t), get(t, "a.example", "/")
			f.edge.TrustedHops = 1
			c.request.Fields = fields("X-Forwarded-For: 203.0.113.5", "X-Forwarded-Proto: https", "X-Forwarded-Host: outer.example:8443", "X-Request-Id: mine")
			c.down.Remote = netip.AddrPort{}
			want := []string{"X-Forwarded-For: 203.0.113.5", "X-Forwarded-Proto: https", "X-Forwarded-Host: outer.example:8443", "X-Request-Id: mine", "X-Forwarded-Port: 8443"}
			if peer != "" {
				c.down.Remote = netip.MustParseAddrPort(peer)
				want[0] += ", 192.0.2.1"
			}
			c.start(f.manager()).wait()
			if got := lines(f.origin().head.Fields); !slices.Equal(got, want) {
				t.Errorf("the upstream got %q, want %q", got, want)
			}
		})
	}
}

func TestForwardedPort(t *testing.T) {
	t.Parallel()
	trusted := []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}
	for _, tt := range []struct {
		name      string
		trusted   []netip.Prefix
		authority string
		sent      []string
		want      string
	}{
		{"the host's", nil, "a.example:8080", nil, "8080"},
		{"the scheme's", nil, "a.example", nil, "80"},
		{"of an IPv6 address", nil, "[::1]", nil, "80"},
		{"of an IPv6 address with a port", nil, "[::1]:81", nil, "81"},
		{"not a stranger's", nil, "a.example", []string{"X-Forwarded-Port: 1", "X-Forwarded-Proto: https"}, "80"},
		{"a trusted proxy's", trusted, "a.example", []string{"X-Forwarded-Port: 444"}, "444"},
		{"of the scheme that a trusted proxy names", trusted, "a.example", []string{"X-Forwarded-Proto: https"}, "443"},
		{"of the host that a trusted proxy names", trusted, "a.example:1", []string{"X-Forwarded-Host: b.example:2"}, "2"},
		{"of a host that has none", trusted, "a.example:1", []string{"X-Forwarded-Host: b.example"}, "80"},
		{"of a host that is none", trusted, "a.example:1", []string{"X-Forwarded-Host: b:x"}, "80"},
		{"of hosts", trusted, "a.example:1", []string{"X-Forwarded-Host: b:123456"}, "80"},
	} {
		inBubble(t, func(t *testing.T) {
			f, c := newFarm(t), get(t, tt.authority, "/")
			f.trusted = tt.trusted
			c.request.Fields = fields(tt.sent...)
			c.start(f.manager()).wait()
			if got := slices.Collect(f.origin().head.Fields.Values("X-Forwarded-Port")); !slices.Equal(got, []string{tt.want}) {
				t.Errorf("%s: got %q, want %s", tt.name, got, tt.want)
			}
		})
	}
}

func TestForwarded(t *testing.T) {
	t.Parallel()
	trusted := []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("::/0")}
	sent := []string{"Forwarded: for=1.2.3.4;proto=https", "A: b", "forwarded: for=_x"}
	for _, tt := range []struct {
		name      string
		append    bool
		trusted   []netip.Prefix
		peer      string
		authority string
		sent      []string
		want      []string
	}{
		{"off, a stranger's", false, nil, "192.0.2.1:1", "a.example", sent, nil},
		{"off, a trusted proxy's", false, trusted, "192.0.2.1:1", "a.example", sent, []string{"for=1.2.3.4;proto=https", "for=_x"}},
		{"IPv4", true, nil, "192.0.2.1:1", "a.example:8080", sent, []string{`for=192.0.2.1;host="a.example:8080";proto=http`}},
		{"IPv4 on a dual-stack socket", true, nil, "[::ffff:192.0.2.1]:1", "a.example", nil, []string{`for=192.0.2.1;host="a.example";proto=http`}},
		{"IPv6", true, nil, "[2001:db8::1%eth0]:1", "[::1]:80", sent, []string{`for="[2001:db8::1]";host="[::1]:80";proto=http`}},
		{"a unix socket", true, nil, "", "a.example", sent, []string{`for=unknown;host="a.example";proto=http`}},
		{"a trusted proxy's", true, trusted, "192.0.2.1:1", "a.example", sent, []string{`for=1.2.3.4;proto=https, for=_x, for=192.0.2.1;host="a.example";proto=http`}},
		{"a trusted unix socket's", true, trusted, "", "a.example", sent[:1], []string{`for=1.2.3.4;proto=https, for=unknown;host="a.example";proto=http`}},
	} {
		inBubble(t, func(t *testing.T) {
			f, c := newFarm(t), get(t, tt.authority, "/")
			f.trusted, f.edge.Forwarded = tt.trusted, tt.append
			c.request.Fields = fields(tt.sent...)
			c.down.Remote = netip.AddrPort{}
			if tt.peer != "" {
				c.down.Remote = netip.MustParseAddrPort(tt.peer)
			}
			c.start(f.manager()).wait()
			if got := slices.Collect(f.origin().head.Fields.Values("Forwarded")); !slices.Equal(got, tt.want) {
				t.Errorf("%s: got %q, want %q", tt.name, got, tt.want)
			}
		})
	}
}

func TestRequestIDsOfTrustedProxiesAreLookedAt(t *testing.T) {
	t.Parallel()
	const made = "4a4b4c4d-0000-4000-8000-000000000007"
	longest := strings.Repeat("x", 128)
	for _, tt := range []struct {
		name string
		sent []string
		want string
	}{
		{"one that is good", []string{"X-Request-Id: a!~0"}, "a!~0"},
		{"the longest", []string{"X-Request-Id: " + longest}, longest},
		{"one that is too long", []string{"X-Request-Id: " + longest + "x"}, made},
		{"a space", []string{"X-Request-Id: a b"}, made},
		{"a tab", []string{"X-Request-Id: a\tb"}, made},
		{"not ASCII", []string{"X-Request-Id: ä"}, made},
		{"nothing", []string{"X-Request-Id: "}, made},
		{"two of them", []string{"X-Request-Id: a", "X-Request-Id: b"}, made},
	} {
		inBubble(t, func(t *testing.T) {
			f, c := newFarm(t), get(t, "a.example", "/")
			f.trusted = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}
			f.options = numbered(0x4a4b4c4d_00000000, 7)
			f.edge.RequestIDInResponse = true
			c.request.Fields = fields(tt.sent...)
			c.start(f.manager()).wait()
			for side, f := range map[string]exchange.Fields{"upstream": f.origin().head.Fields, "client": c.answer.Fields} {
				if got := slices.Collect(f.Values("X-Request-Id")); !slices.Equal(got, []string{tt.want}) {
					t.Errorf("%s: the %s got %q, want %q", tt.name, side, got, tt.want)
				}
			}
		})
	}
}

func TestWhatAResponseSaysAboutUs(t *testing.T) {
	t.Parallel()
	sends := func(status int, lines ...string) func(*origin) {
		return func(o *origin) {
			o.answers(status, fields(lines...)...)
			o.ends()
		}
	}
	answers := []struct {
		name   string
		client func(*testing.T, string, string) *client
		target string
		behave func(*origin)
		had    []string // of Server
	}{
		{"an upstream's", get, "/", sends(200, "Server: theirs", "server: twice", "X-Request-Id: theirs"), []string{"theirs", "twice"}},
		{"an upstream's that has none", get, "/", sends(500, "A: b"), nil},
		{"a refused upgrade", upgrade, "/", sends(403, "Server: theirs"), []string{"theirs"}},
		{"a tunnel", upgrade, "/", agrees, nil},
		{"our own", get, "/none", ok, nil},
		{"a refused path", get, "/%00", ok, nil},
	}
	servers := []struct {
		server config.ServerHeader
		want   func(had []string) []string
	}{
		{config.ServerHeader{}, func(had []string) []string { return had }},
		{config.ServerHeader{Action: config.DropServer}, func([]string) []string { return nil }},
		{config.ServerHeader{Action: config.OverwriteServer, Name: "edge"}, func([]string) []string { return []string{"edge"} }},
		{config.ServerHeader{Action: config.AppendServer, Name: "edge"}, func(had []string) []string {
			if had != nil {
				return had
			}
			return []string{"edge"}
		}},
	}
	for _, a := range answers {
		for _, s := range servers {
			for _, withID := range []bool{false, true} {
				inBubble(t, func(t *testing.T) {
					f, c := newFarm(t), a.client(t, "a.example", a.target)
					f.routes = []config.Route{{Match: config.Match{Path: "/none"}, Redirect: &config.Redirect{Path: "/x", Status: 302}}, webSocket("/", "web")}
					f.behave[first] = a.behave
					f.edge.Server, f.edge.RequestIDInResponse = s.server, withID
					f.options = numbered(0x4a4b4c4d_00000000, 7)
					c.start(f.manager()).wait()
					if got, want := slices.Collect(c.answer.Fields.Values("Server")), s.want(a.had); !slices.Equal(got, want) {
						t.Errorf("%s, %+v: Server is %q, want %q", a.name, s.server, got, want)
					}
					got, _ := c.answer.Fields.Get("X-Request-Id")
					if ours := got == "4a4b4c4d-0000-4000-8000-000000000007"; ours != withID {
						t.Errorf("%s: X-Request-Id is %q", a.name, got)
					}
				})
			}
		}
	}
}
