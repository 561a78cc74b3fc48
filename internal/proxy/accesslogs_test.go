package proxy_test

import (
	"net/netip"
	"testing"

	"holdfast/internal/config"
	"holdfast/internal/proxy"
)

// Who has connected and who the client is are two things behind a trusted proxy.
func TestRecordsNameTheClientBehindTrustedProxies(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		trusted []netip.Prefix
		want    string
	}{
		"a stranger":      {nil, "192.0.2.1"},
		"a trusted proxy": {[]netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}, "203.0.113.9"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T) {
				f := newFarm(t)
				f.routes, f.trusted = []config.Route{to("/", "web")}, tt.trusted
				var access records
				f.options = func(o *proxy.ManagerOptions) { o.AccessLog = access.open(t, nil) }
				c := get(t, "a.example", "/")
				c.request.Fields.Add("X-Forwarded-For", "203.0.113.9")
				c.start(f.manager()).wait()
				got := access.read(t)
				if len(got) != 1 {
					t.Fatalf("%d records: %v", len(got), got)
				}
				wantRecord(t, got[0], map[string]any{"client": "192.0.2.1:4711", "client_address": tt.want})
			})
		})
	}
}
