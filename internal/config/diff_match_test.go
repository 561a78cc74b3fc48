package config

import (
	"fmt"
	"testing"
)

func TestWhatDiffersInAMatchIsSaid(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		before, after string
		want          []string
	}{
		"the default of case": {`{ prefix = "/a" }`, `{ prefix = "/a", case_sensitive = true, segments = false }`, nil},
		"a condition of a route without a name makes it another one": {
			`{ prefix = "/a" }`, `{ prefix = "/a", methods = ["GET"] }`,
			[]string{`virtual host "vh": route prefix "/a" and methods ["GET"] is new`, `virtual host "vh": route prefix "/a" is gone`},
		},
		"its percentage does not": {
			`{ prefix = "/a", fraction = { percent = 5 } }`, `{ prefix = "/a", fraction = { percent = 10, runtime_key = "k" } }`,
			[]string{
				`virtual host "vh", route prefix "/a" and a fraction: match.fraction.percent is now 10, was 5`,
				`virtual host "vh", route prefix "/a" and a fraction: match.fraction.runtime_key is now "k", was not set`,
			},
		},
		"of a route with a name each condition is told": {
			"{ prefix = \"/a\", methods = [\"GET\"], headers = [{ name = \"x\", exact = \"1\" }] }\nname = \"n\"",
			"{ prefix = \"/b\", methods = [\"GET\", \"PUT\"], headers = [{ name = \"X\", exact = \"2\" }] }\nname = \"n\"",
			[]string{
				`virtual host "vh", route "n": match.prefix is now "/b", was "/a"`,
				`virtual host "vh", route "n": match.methods now has "PUT"`,
				`virtual host "vh", route "n", header "x": exact is now "2", was "1"`,
			},
		},
		"where several are about one header, all of them": {
			"{ prefix = \"/a\", headers = [{ name = \"x\", prefix = \"1\" }, { name = \"x\", suffix = \"2\" }] }\nname = \"n\"",
			"{ prefix = \"/a\", headers = [{ name = \"x\", prefix = \"1\" }, { name = \"x\", suffix = \"3\" }] }\nname = \"n\"",
			[]string{`virtual host "vh", route "n": match.headers is now [{ name = "x", prefix = "1" }, { name = "x", suffix = "3" }], was [{ name = "x", prefix = "1" }, { name = "x", suffix = "2" }]`},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			document := func(match string) []byte {
				text, err := Effective("f", fmt.Appendf(nil, `
[[listeners]]
name = "l"
address = "127.0.0.1:0"
[[clusters]]
name = "c"
endpoints = ["127.0.0.1:1"]
[[virtual_hosts]]
name = "vh"
domains = ["*"]
[[virtual_hosts.routes]]
cluster = "c"
match = %s
`, match))
				if err != nil {
					t.Fatal(err)
				}
				return text
			}
			wantDiff(t, document(tt.before), document(tt.after), tt.want...)
		})
	}
}
