package config_test

import (
	"strings"
	"testing"

	"holdfast/internal/config"
)

func TestAFileListsEndpointsInEitherSyntax(t *testing.T) {
	t.Parallel()
	for name, text := range map[string]string{
		"web.json": `{"endpoints": ["10.0.0.1:80", {"address": "[2001:db8::1]:81"}, "unix:/run/a.sock"]}`,
		"web.toml": "endpoints = [\"10.0.0.1:80\", { address = \"[2001:db8::1]:81\" }, \"unix:/run/a.sock\"]\n",
	} {
		got, err := config.ParseEndpoints(name, []byte(text))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		one := config.EndpointOptions{Weight: 1}
		wantEqual(t, got, []config.Endpoint{{Address: "10.0.0.1:80", EndpointOptions: one}, {Address: "[2001:db8::1]:81", EndpointOptions: one}, {Address: "unix:/run/a.sock", EndpointOptions: one}})
	}
	for name, text := range map[string]string{"none.json": `{"endpoints": []}`, "none.toml": "endpoints = []\n"} {
		if got, err := config.ParseEndpoints(name, []byte(text)); err != nil || len(got) != 0 {
			t.Errorf("%s: %v, %v, want none", name, got, err)
		}
	}
}

func TestAMistakeInAFileWithEndpointsIsSaidPlainly(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct{ name, text, want string }{
		{"e.toml", "[[endpoints]]\naddress = \"10.0.0.1\"\n", `e.toml:2: endpoints[0].address: must be "host:port" or "unix:/path", found the string "10.0.0.1": the port is missing`},
		{"e.toml", "endpoints = [\"a.example:80\"]\n", `e.toml:1: endpoints: "a.example:80": a file lists IP addresses and unix sockets, no names; for those there is strict_dns`},
		{"e.toml", "endpoints = [", `e.toml:1: not valid TOML: `},
		{"e.toml", "", `e.toml: endpoints: missing; must be an array, which may be empty`},
		{"e.json", `{"endpoints": [80]}`, `e.json: endpoints[0]: must be "host:port" or "unix:/path", found the integer 80`},
		{"e.json", `{"endpoints": "a"}`, `e.json: endpoints: must be an array, found the string "a"`},
		{"e.json", `{"endpoints": [{}]}`, `e.json: endpoints[0].address: missing; must be "host:port" or "unix:/path"`},
		{"e.json", `{"endpoints": [], "x": 1}`, `e.json: x: unknown key; known is endpoints`},
		{"e.json", "\xff", `e.json: not valid JSON: `},
	} {
		got, err := config.ParseEndpoints(tc.name, []byte(tc.text))
		if err == nil || !strings.HasPrefix(err.Error(), tc.want) || got != nil {
			t.Errorf("%s\n got %v, %v\nwant %s", tc.text, got, err, tc.want)
		}
	}
}

func FuzzParseEndpoints(f *testing.F) {
	f.Add(true, []byte(`{"endpoints": ["10.0.0.1:80", {"address": "unix:/a"}, {"srv": "_a._b.c"}, null, 1e400]}`))
	f.Add(true, []byte(`{"endpoints": [], "endpoints": null}`))
	f.Add(false, []byte("endpoints = [\"10.0.0.1:80\"]\n[[endpoints]]\naddress = \"[::1]:80\"\n"))
	f.Add(false, []byte("[[endpoints]]\naddress = \"[::1]:80\"\n"))
	f.Fuzz(func(t *testing.T, json bool, data []byte) {
		name := "e.toml"
		if json {
			name = "e.json"
		}
		endpoints, err := config.ParseEndpoints(name, data)
		if err != nil && len(err.Error()) > 100_000 {
			t.Errorf("an error of %d bytes", len(err.Error()))
		}
		if len(endpoints) > config.MostDiscovered || err != nil && endpoints != nil {
			t.Errorf("%d endpoints and %v", len(endpoints), err)
		}
		for _, e := range endpoints {
			if e.SRV || strings.ContainsAny(e.Address, "\r\n\x00") {
				t.Errorf("%+v", e)
			}
		}
	})
}
