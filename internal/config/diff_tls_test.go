package config

import (
	"slices"
	"strings"
	"testing"
)

func TestWhatDiffersInAListenersTLSIsSaidInSentences(t *testing.T) {
	t.Parallel()
	const base = `
[[listeners]]
name = "public"
address = "0.0.0.0:443"
[listeners.tls]
certificates = [
  { cert = "/a.pem", key = "/a.key" },
  { cert = "/b.pem", key = "/b.key" },
]
[[virtual_hosts]]
name = "a"
domains = ["*"]
routes = [{ match = { prefix = "/" }, cluster = "web" }]
[[clusters]]
name = "web"
endpoints = ["10.0.1.1:8080"]
`
	before := wantEffective(t, []byte(base))
	for name, c := range map[string]struct {
		old, new string
		want     []string
	}{
		"the default of a key":      {"[listeners.tls]\n", "[listeners.tls]\nmin_version = \"1.2\"\n", nil},
		"the oldest version":        {"[listeners.tls]\n", "[listeners.tls]\nmin_version = \"1.3\"\n", []string{`listener "public": tls.min_version is now "1.3", was "1.2"`}},
		"a key":                     {`"/a.key"`, `"/new.key"`, []string{`listener "public", certificate "/a.pem": key is now "/new.key", was "/a.key"`}},
		"a certificate":             {`{ cert = "/b.pem", key = "/b.key" },`, ``, []string{`listener "public": certificate "/b.pem" is gone`}},
		"the order of certificates": {`{ cert = "/a.pem", key = "/a.key" },`, `{ cert = "/z.pem", key = "/z.key" }, { cert = "/a.pem", key = "/a.key" },`, []string{`listener "public": certificate "/z.pem" is new`}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, err := Diff(before, wantEffective(t, []byte(strings.Replace(base, c.old, c.new, 1))))
			if err != nil || !slices.Equal(got, c.want) {
				t.Errorf("got %q, %v\nwant %q", got, err, c.want)
			}
		})
	}
}
