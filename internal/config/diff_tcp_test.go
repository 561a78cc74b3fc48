package config

import (
	"slices"
	"strings"
	"testing"
)

func TestWhatDiffersOfAListenerThatRelaysIsSaidInSentences(t *testing.T) {
	t.Parallel()
	const base = `
[[listeners]]
name = "tls"
address = "0.0.0.0:443"
protocol = "tcp"
[[listeners.tcp_routes]]
name = "mail"
server_names = ["mail.example"]
cluster = "mail"
[[listeners.tcp_routes]]
server_names = ["a.example", "b.example"]
weighted_clusters = [{ cluster = "mail", weight = 1 }, { cluster = "web", weight = 9 }]

[[clusters]]
name = "mail"
endpoints = ["10.0.0.1:9000"]
[[clusters]]
name = "web"
endpoints = ["10.0.1.1:8080"]
`
	before := wantEffective(t, []byte(base))
	for name, c := range map[string]struct {
		old, new string
		want     []string
	}{
		"the default of a key":   {`protocol = "tcp"`, "protocol = \"tcp\"\nsni_timeout = \"10s\"", nil},
		"the server of a route":  {`"mail.example"`, `"smtp.example"`, []string{`listener "tls", route "mail": server_names now has "smtp.example"`, `listener "tls", route "mail": server_names no longer has "mail.example"`}},
		"the cluster of a route": {"cluster = \"mail\"\n", "cluster = \"web\"\n", []string{`listener "tls", route "mail": cluster is now "web", was "mail"`}},
		"a share":                {`weight = 9`, `weight = 4`, []string{`listener "tls", route ["a.example", "b.example"], share of cluster "web": weight is now 4, was 9`}},
		"the rest":               {`protocol = "tcp"`, "protocol = \"tcp\"\ncluster = \"web\"", []string{`listener "tls": cluster is now "web", was not set`}},
		"tunnels":                {`protocol = "tcp"`, "protocol = \"tcp\"\ntunnels = { max_age = \"1h\" }", []string{`listener "tls": tunnels.max_age is now "1h", was "off"`}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, err := Diff(before, wantEffective(t, []byte(strings.Replace(base, c.old, c.new, 1))))
			if err != nil || !slices.Equal(got, c.want) {
				t.Errorf("%v\n got %s\nwant %s", err, strings.Join(got, "\n     "), strings.Join(c.want, "\n     "))
			}
		})
	}
}
