package config

import (
	"bytes"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"testing"
)

func TestWhatDiffersIsSaidInSentences(t *testing.T) {
	t.Parallel()
	const base = `
[[listeners]]
name = "public"
address = "0.0.0.0:80"
trusted_proxies = ["10.0.0.0/8", "::1"]

[[virtual_hosts]]
name = "chat"
domains = ["chat.example.com", "chat.example.org"]
[[virtual_hosts.routes]]
match = { prefix = "/socket" }
websocket = true
cluster = "chat"
[[virtual_hosts.routes]]
match = { path = "/old" }
redirect = { path = "/new" }
[[virtual_hosts.routes]]
match = { path = "/split" }
weighted_clusters = [{ cluster = "chat", weight = 9 }, { cluster = "web", weight = 1 }]

[[clusters]]
name = "chat"
endpoints = ["10.0.0.1:9000", "10.0.0.2:9000"]
[[clusters]]
name = "web"
endpoints = ["10.0.1.1:8080"]
`
	before := wantEffective(t, []byte(base))
	for name, c := range map[string]struct {
		edits []string // what is replaced, and by what
		want  []string
	}{
		"a default that is written out": {
			[]string{"[[listeners]]", "[log]\nlevel = \"info\"\n[[listeners]]"}, nil,
		},
		"the same, written in another way": {
			[]string{"0.0.0.0:80", "[::ffff:0.0.0.0]:80", "chat.example.org", "Chat.Example.ORG", `"10.0.0.1:9000"`, `{ address = "10.0.0.1:9000" }`}, nil,
		},
		"the order of what has no order": {
			[]string{`["10.0.0.0/8", "::1"]`, `["::1", "10.0.0.0/8"]`, `"10.0.0.1:9000", "10.0.0.2:9000"`, `"10.0.0.2:9000", "10.0.0.1:9000"`}, nil,
		},
		"a section": {
			[]string{"[[listeners]]", "[log]\nlevel = \"debug\"\n[reload]\nmax_generations = 3\n[process]\nproxy = \"/x\"\n[[listeners]]"},
			[]string{
				`process is now { proxy = "/x" }, was not set`, `log.level is now "debug", was "info"`,
				`reload.max_generations is now 3, was "unlimited"`,
			},
		},
		"a listener": {
			[]string{"0.0.0.0:80", "0.0.0.0:8080"},
			[]string{`listener "public": address is now "0.0.0.0:8080", was "0.0.0.0:80"`},
		},
		"limits of a listener": {
			[]string{"[[virtual_hosts]]", "limits = { connections = 5 }\n[[virtual_hosts]]"},
			[]string{`listener "public": limits.connections is now 5, was "unlimited"`},
		},
		"a listener that is named in another way": {
			[]string{`"public"`, `"web"`},
			[]string{
				`listener "web" is new`, `listener "public" is gone`,
				`virtual host "chat": listeners now has "web"`, `virtual host "chat": listeners no longer has "public"`,
			},
		},
		"access logs": {
			[]string{"[[listeners]]", "[[access_logs]]\npath = \"stdout\"\n[[listeners]]"},
			[]string{`access log "stdout" is new`},
		},
		"domains": {
			[]string{`"chat.example.org"`, `"*.chat.example.org"`},
			[]string{
				`virtual host "chat": domains now has "*.chat.example.org"`,
				`virtual host "chat": domains no longer has "chat.example.org"`,
			},
		},
		"a route": {
			[]string{"websocket = true", "websocket = false\ntimeout = \"off\""},
			[]string{
				`virtual host "chat", route prefix "/socket": websocket is now false, was true`,
				`virtual host "chat", route prefix "/socket": timeout is now "off", was "15s"`,
				`virtual host "chat", route prefix "/socket": tunnels is no longer set, was ` +
					`{ drain_timeout = "off", idle_timeout = "off", max_age = "off", handshake_timeout = "1m", buffer = "256KiB", keepalive = { count = 4, idle = "1m", interval = "15s" }, on_reload = "keep", on_route_removed = "keep", on_endpoint_removed = "keep", on_endpoint_unhealthy = "keep", survive_crash = true }`,
			},
		},
		"limits of tunnels in general": {
			[]string{"[[listeners]]", "[tunnels]\nidle_timeout = \"1h\"\n[[listeners]]"},
			[]string{
				`tunnels.idle_timeout is now "1h", was "off"`,
				`virtual host "chat", route prefix "/socket": tunnels.idle_timeout is now "1h", was "off"`,
			},
		},
		"the keepalive of tunnels": {
			[]string{"[[listeners]]", "[tunnels]\nkeepalive = { count = 9 }\n[[listeners]]"},
			[]string{
				`tunnels.keepalive.count is now 9, was 4`,
				`virtual host "chat", route prefix "/socket": tunnels.keepalive.count is now 9, was 4`,
			},
		},
		"the match of a route": {
			[]string{`{ path = "/old" }`, `{ prefix = "/old" }`},
			[]string{`virtual host "chat": route prefix "/old" is new`, `virtual host "chat": route path "/old" is gone`},
		},
		"the target of a route": {
			[]string{`redirect = { path = "/new" }`, `cluster = "web"`},
			[]string{
				`virtual host "chat", route path "/old": cluster is now "web", was not set`,
				`virtual host "chat", route path "/old": auto_host_rewrite is now false, was not set`,
				`virtual host "chat", route path "/old": timeout is now "15s", was not set`,
				`virtual host "chat", route path "/old": stream_idle_timeout is now "5m", was not set`,
				`virtual host "chat", route path "/old": request_buffer is now "off", was not set`,
				`virtual host "chat", route path "/old": max_body_size is now "unlimited", was not set`,
				`virtual host "chat", route path "/old": priority is now "default", was not set`,
				`virtual host "chat", route path "/old": redirect is no longer set, was { path = "/new", status = 301, strip_query = false }`,
			},
		},
		"weights": {
			[]string{`weight = 9 }, { cluster = "web", weight = 1 }`, "weight = 5 }"},
			[]string{
				`virtual host "chat", route path "/split", share of cluster "chat": weight is now 5, was 9`,
				`virtual host "chat", route path "/split": share of cluster "web" is gone`,
			},
		},
		"endpoints": {
			[]string{"10.0.0.2:9000", "10.0.0.3:9000"},
			[]string{`cluster "chat": endpoint "10.0.0.3:9000" is new`, `cluster "chat": endpoint "10.0.0.2:9000" is gone`},
		},
		"what an endpoint has": {
			[]string{`"10.0.0.2:9000"`, `{ address = "10.0.0.2:9000", weight = 3, metadata = { zone = "b" } }`},
			[]string{`cluster "chat", endpoint "10.0.0.2:9000": metadata is now { zone = "b" }, was not set`, `cluster "chat", endpoint "10.0.0.2:9000": weight is now 3, was 1`},
		},
		"how endpoints are chosen": {
			[]string{"[[clusters]]\nname = \"web\"", "[[clusters]]\nname = \"web\"\nload_balancing = \"maglev\"\npanic_threshold = \"off\""},
			[]string{
				`cluster "web": load_balancing is now "maglev", was "round_robin"`, `cluster "web": maglev_table_size is now 65537, was not set`,
				`cluster "web": panic_threshold is now "off", was 50`,
			},
		},
		"a cluster": {
			[]string{"[[clusters]]\nname = \"web\"", "[[clusters]]\nname = \"new\"\nendpoints = [\"[::1]:1\"]\n[[clusters]]\nname = \"web\""},
			[]string{`cluster "new" is new`},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			after := base
			for pair := range slices.Chunk(c.edits, 2) {
				if !strings.Contains(after, pair[0]) {
					t.Fatalf("%s is not in the file", pair[0])
				}
				after = strings.Replace(after, pair[0], pair[1], 1)
			}
			wantDiff(t, before, wantEffective(t, []byte(after)), c.want...)
		})
	}
}

func TestAMoveOfARouteIsAChange(t *testing.T) {
	t.Parallel()
	file := func(paths ...string) []byte {
		var b bytes.Buffer
		b.WriteString("[[listeners]]\nname = \"a\"\naddress = \"[::1]:1\"\n[[virtual_hosts]]\nname = \"h\"\ndomains = [\"*\"]\n")
		for _, p := range paths {
			fmt.Fprintf(&b, "[[virtual_hosts.routes]]\nmatch = { path = %q }\nredirect = { path = \"/\" }\n", p)
		}
		return wantEffective(t, b.Bytes())
	}
	before := file("/a", "/b", "/c", "/d")
	const moved = `virtual host "h": the order of its routes has changed, `
	wantDiff(t, before, file("/a", "/c", "/b", "/d"), moved+`route path "/c" comes before route path "/b" now`)
	wantDiff(t, before, file("/d", "/a", "/b", "/c"), moved+`route path "/d" comes before route path "/a" now`)
	wantDiff(t, before, file("/x", "/a", "/b", "/d"), `virtual host "h": route path "/x" is new`, `virtual host "h": route path "/c" is gone`)
}

func TestADifferenceOfAnotherVersionIsSaidToo(t *testing.T) {
	t.Parallel()
	before := []byte(`
weather = "fine"
numbers = [1, [2, 3]]
mixed = [1, "x", { a = 1 }]
[new_section.inner]
factor = 1.5
"a \n key" = true
[[new_array]]
name = "x"
[[clusters]]
name = "a"
[[clusters.nodes]]
id = 1
[[clusters]]
weight = 1
[[clusters]]
weight = 2
`)
	after := []byte(`
weather = "r\u202e\n"
numbers = [1, [2, 4]]
mixed = 1
[new_section.inner]
factor = true
[[new_array]]
name = "y"
[[clusters]]
name = "a"
[[clusters.nodes]]
id = 2
[[listeners]]
name = 1
`)
	wantDiff(t, before, before)
	wantDiff(t, before, after,
		`weather is now "r\u202e\n", was "fine"`,
		`numbers now has [2, 4]`,
		`numbers no longer has [2, 3]`,
		`mixed is now 1, was [1, "x", { a = 1 }]`,
		`new_section.inner.factor is now true, was 1.5`,
		`new_section.inner."a \n key" is no longer set, was true`,
		`new_array is now [{ name = "y" }], was [{ name = "x" }]`,
		`cluster "a": nodes is now [{ id = 2 }], was [{ id = 1 }]`,
		`cluster <nil> is gone`,
		`listener 1 is new`,
	)
}

func TestWhatIsNoDocumentCannotBeCompared(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ running, file, want string }{
		{"a = ", "", "the running configuration:1: not valid TOML: "},
		{"", "a = ", "the file:1: not valid TOML: "},
	} {
		if got, err := Diff([]byte(c.running), []byte(c.file)); got != nil || err == nil || !strings.HasPrefix(err.Error(), c.want) {
			t.Errorf("got %q and %v, want %s", got, err, c.want)
		}
	}
}

// Whatever is changed in a configuration, and whatever is left out, there is a
// sentence about it.
func TestNoDifferenceIsPassedOver(t *testing.T) {
	t.Parallel()
	whole := decode(t, readFile(t, "testdata/effective.toml"))
	changes := 0
	for section, keys := range vocabulary(t) {
		for _, key := range keys {
			part, i := leastWith(whole, section, key)
			if i < 0 {
				t.Errorf("there is no %s.%s", section, key)
				continue
			}
			before := encode(t, part)
			for _, leaveOut := range []bool{true, false} {
				doc := decode(t, before)
				table := instances(doc, section)[i]
				if leaveOut {
					delete(table, key)
				} else {
					table[key] = other(table[key])
				}
				changes++
				if got, err := Diff(before, encode(t, doc)); err != nil || len(got) == 0 {
					t.Errorf("%s.%s = %v: %q, %v", section, key, table[key], got, err)
				}
			}
		}
	}
	if changes < 150 {
		t.Errorf("only %d changes were tried", changes)
	}
}

// leastWith returns a small part of a document that has a key in a section, and in which
// instance of that; -1: there is none.
func leastWith(whole map[string]any, section, key string) (part map[string]any, i int) {
	has := func(t map[string]any) bool { return t[key] != nil }
	top, _, _ := strings.Cut(section, ".")
	switch all := whole[top].(type) {
	case map[string]any:
		part = map[string]any{top: all}
	case []map[string]any:
		for _, one := range all {
			part = map[string]any{top: []map[string]any{one}}
			if i = slices.IndexFunc(instances(part, section), has); i >= 0 {
				return part, i
			}
		}
	default:
		part = whole
	}
	return part, slices.IndexFunc(instances(part, section), has)
}

// other returns another value of the same type.
func other(value any) any {
	switch v := value.(type) {
	case string:
		return v + "x"
	case float64:
		return v + 1
	case int64:
		return v + 1
	case bool:
		return !v
	case map[string]any:
		v = maps.Clone(v)
		v["x"] = true
		return v
	case []any:
		if len(v) == 0 {
			return []any{"x"}
		}
		return v[:len(v)/2]
	case []map[string]any:
		return v[:len(v)/2]
	}
	panic(fmt.Sprintf("%T", value))
}

func TestEveryArrayOfTablesHasAKind(t *testing.T) {
	t.Parallel()
	doc, root, err := open("good.toml", readFile(t, "testdata/good.toml"))
	if err != nil {
		t.Fatal(err)
	}
	doc.config(root)
	found := map[string]bool{}
	eachTable(root, func(inner *table) {
		for _, s := range inner.settings {
			array, ok := s.value.([]*table)
			if !ok {
				continue
			}
			section := array[0].section()
			found[section] = true
			if k, ok := kinds[section]; !ok || k.key != "" && !slices.Contains(doc.vocabulary[section], k.key) {
				t.Errorf("elements of %s are told apart by %q, which they do not have", section, k.key)
			}
		}
	})
	for section := range kinds {
		if !found[section] {
			t.Errorf("there is no array %s", section)
		}
	}
}

func wantDiff(t *testing.T, before, after []byte, want ...string) {
	t.Helper()
	got, err := Diff(before, after)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(got, want) {
		t.Errorf("\n got %s\nwant %s", strings.Join(got, "\n     "), strings.Join(want, "\n     "))
	}
}

func FuzzDiff(f *testing.F) {
	documents := seeds(f)
	for i, data := range documents {
		f.Add(data, documents[(i+1)%len(documents)])
	}
	f.Fuzz(func(t *testing.T, a, b []byte) {
		there, err := Diff(a, b)
		if err != nil {
			return
		}
		back, err := Diff(b, a)
		if err != nil || (len(there) == 0) != (len(back) == 0) {
			t.Errorf("there %q, back %q, %v", there, back, err)
		}
		for _, s := range append(there, back...) {
			if strings.ContainsFunc(s, func(r rune) bool { return !strconv.IsPrint(r) }) {
				t.Errorf("not printable: %q", s)
			}
		}
		if same, err := Diff(a, a); len(same) > 0 || err != nil {
			t.Errorf("a document differs from itself: %q, %v", same, err)
		}
	})
}
