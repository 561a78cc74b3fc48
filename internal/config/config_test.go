package config_test

import (
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"holdfast/internal/accesslog/flags"
	"holdfast/internal/accesslog/format"
	"holdfast/internal/config"
	"holdfast/internal/dynamic"
	"holdfast/internal/urlpath"
)

func TestASampleWithEveryKeyMeansWhatItSays(t *testing.T) {
	t.Parallel()
	got, err := config.Parse("good.toml", testdata(t, "good.toml"))
	if err != nil {
		t.Fatal(err)
	}
	tunnels := config.Tunnels{
		DrainTimeout: 24 * time.Hour, IdleTimeout: 2 * time.Hour, MaxAge: 168 * time.Hour,
		HandshakeTimeout: 30 * time.Second, Buffer: 128 << 10,
		KeepAlive:    config.KeepAlive{Idle: 2 * time.Minute, Interval: 20 * time.Second, Count: 6},
		MoveOnReload: true,
	}
	brokers := tunnels
	brokers.MoveOnReload, brokers.SurviveCrash, brokers.IdleTimeout, brokers.MaxAge = false, true, 0, 24*time.Hour
	brokers.CloseOnEndpointRemoved = true
	limits := config.ListenerLimits{
		HeadSize: 64 << 10, HeadTimeout: 10 * time.Second, BodyTimeout: time.Minute, BodyRate: 64, IdleTimeout: time.Minute, HTTP2Streams: 100,
	}
	slow := limits
	slow.BodyRate = 0
	budget := config.RetryBudget{Percent: config.Dynamic{Value: 200_000}, MinConcurrency: 3}
	want := &config.Config{
		Supervisor: config.Supervisor{
			Process: config.Process{Proxy: "/opt/holdfast/bin/holdfast-proxy"},
			Admin: config.Admin{
				HTTP: netip.MustParseAddrPort("127.0.0.1:9901"), AllowActions: true, Hosts: []string{"metrics.internal", "holdfast"},
			},
			Log:     config.Log{Level: slog.LevelDebug, Format: "json"},
			Runtime: config.Runtime{File: "/etc/holdfast/runtime.toml"},
			Reload:  config.Reload{ReadyTimeout: 40 * time.Second, Probation: 15 * time.Second, MaxGenerations: 12},
			Stop:    config.Stop{Delay: 5 * time.Second, Timeout: time.Minute},
			Tickets: config.Tickets{Off: true, Rotation: 6 * time.Hour},
			Listeners: []config.Socket{
				{Name: "public", Address: tcp("[::]:8080"), IPv6Only: true},
				{Name: "local", Address: config.Address{Network: "unix", Path: "/run/holdfast/http.sock"}, Mode: 0o600},
				{Name: "public-v4", Address: tcp("0.0.0.0:8081")},
				{Name: "broker", Address: tcp("127.0.0.1:5672")},
				{Name: "tls", Address: tcp("127.0.0.1:8443")},
				{Name: "activated", Address: config.Address{Network: "systemd", Name: "web.http"}},
			},
			AccessLogs: []config.AccessLog{
				{Path: "/var/log/holdfast/access.log"}, {Path: config.Stdout}, {Path: "/var/log/holdfast/errors.log"}, {Path: "/var/log/holdfast/tunnels.json"},
			},
		},
		Drain:   config.Drain{IdleGrace: 2 * time.Second, StreamTimeout: time.Hour, CloseSpread: 10 * time.Minute},
		Tunnels: tunnels,
		Recordings: []config.Recording{
			{Format: "text", Events: config.LogEvents, Filter: config.RecordingFilter{HealthChecks: true}},
			{Format: "json", Events: config.LogEvents, Filter: config.RecordingFilter{HealthChecks: true}},
			{
				Format: "json", Custom: made(format.Text(`[%START_TIME(%F %T.%3f)%] "%REQ(:METHOD)% %REQ(:PATH)%" %RESPONSE_CODE% %RESPONSE_FLAGS% %REQ(User-Agent):80%`)),
				Events: []string{"request"},
				Filter: config.RecordingFilter{
					Any: true, Statuses: []config.StatusRange{{From: 500, To: 599}, {From: 404, To: 404}, {From: 410, To: 420}, {}}, MinDuration: 2 * time.Second,
					Flags: flags.UpstreamTimeout | flags.NoRoute, Sample: &config.Dynamic{Value: 25_000, Key: "errors.sample"},
					Headers: []config.HeaderCondition{
						{Name: "X-Debug", How: "present"}, {Name: "User-Agent", How: "contains", Text: "probe", Invert: true},
						{Name: "X-A", How: "exact", Text: "1"}, {Name: "X-B", How: "prefix", Text: "b"}, {Name: "X-C", How: "suffix", Text: "c"},
						{Name: "X-D", How: "present", Invert: true},
					},
				},
			},
			{
				Format: "json", Custom: made(format.JSON(map[string]string{"status": "%RESPONSE_CODE%", "a b": `x "%EVENT%"`})),
				Events: []string{"tunnel_open", "tunnel_close"}, Filter: config.RecordingFilter{Flags: flags.Known, HealthChecks: true},
			},
		},
		HTTPListeners: []config.Listener{
			{
				Name: "public",
				Limits: config.ListenerLimits{
					Connections: 20_000, HeadSize: 32 << 10, HeadTimeout: 5 * time.Second,
					BodySize: 1 << 30, BodyTimeout: 30 * time.Second, BodyRate: 1 << 10, IdleTimeout: 2 * time.Minute, HTTP2Streams: 250,
				},
				HTTP2: config.ListenerHTTP2{Enabled: true, WebSockets: true},
				ReceivedProxy: config.ReceivedProxy{
					Mode: config.ProxyRequired, Trusted: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16"), netip.MustParsePrefix("::1/128")},
				},
				TLS: &config.ListenerTLS{
					Certificates: []config.KeyPair{{Certificate: "/etc/holdfast/a.pem", Key: "/etc/holdfast/a.key"}, {Certificate: "/etc/holdfast/b.pem", Key: "/etc/holdfast/b.key"}},
					MinVersion:   config.TLS13, StrictSNI: true,
					ClientCertificates: config.ClientCertificatesOptional, ClientCA: "/etc/holdfast/clients.pem",
					ClientNames: []config.ClientName{
						{Kind: "dns", Text: "app.example.com"}, {Kind: "dns", Text: "*.app.example.com"}, {Kind: "uri", Text: "spiffe://Example.com/app"},
						{Kind: "email", Text: "Ops@example.com"}, {Kind: "ip", Text: "10.0.0.1"}, {Kind: "ip", Text: "::1"},
					},
					HandshakeTimeout: 5 * time.Second, Handshakes: 200, ForwardCertificate: config.AppendCertificate, KeyLog: "/var/lib/holdfast/keys.log",
				},
				TrustedProxies: []netip.Prefix{
					netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("2001:db8::/32"), netip.MustParsePrefix("::1/128"),
				},
				Edge: config.Edge{
					InternalHeaders: []string{"X-Internal-*", "X-Auth-User"}, Forwarded: true, RequestIDInResponse: true,
					Server: config.ServerHeader{Action: config.OverwriteServer, Name: "edge/1 (own)"},
					Path:   urlpath.Policy{KeepSlashes: true, Encoded: urlpath.Keep, RefuseParams: true},
				},
			},
			{Name: "local", Limits: slow},
			{
				Name: "public-v4", Limits: limits, HTTP2: config.ListenerHTTP2{Enabled: true},
				TLS: &config.ListenerTLS{
					Certificates: []config.KeyPair{{Certificate: "/etc/holdfast/c.pem", Key: "/etc/holdfast/c.key"}},
					MinVersion:   config.TLS12, HandshakeTimeout: 10 * time.Second, Handshakes: 1000,
				},
				Edge: config.Edge{TrustedHops: 2, Server: config.ServerHeader{Action: config.AppendServer, Name: "edge"}, Path: urlpath.Policy{Off: true}},
			},
			{
				Name: "broker", Limits: config.ListenerLimits{Connections: 500, HeadTimeout: 10 * time.Second},
				Filters: &config.Filters{Allow: networks("10.0.0.0/8"), Deny: networks("10.9.0.0/16")},
				TCP: &config.TCP{
					Clusters:   []config.WeightedCluster{{Cluster: "web", Weight: config.Dynamic{Value: 90}}, {Cluster: "chat-v2", Weight: config.Dynamic{Value: 10, Key: "broker.api"}}},
					SNITimeout: 10 * time.Second, Tunnels: brokers,
				},
			},
			{
				Name: "tls", Limits: config.ListenerLimits{HeadTimeout: 3 * time.Second},
				TCP: &config.TCP{
					Clusters: []config.WeightedCluster{{Cluster: "web", Weight: config.Dynamic{Value: 1}}},
					Routes: []config.TCPRoute{
						{Name: "mail", ServerNames: []string{"mail.example.com", "*.mail.example.com"}, Clusters: []config.WeightedCluster{{Cluster: "chat-v2", Weight: config.Dynamic{Value: 1}}}},
						{ServerNames: []string{"*"}, Clusters: []config.WeightedCluster{{Cluster: "web", Weight: config.Dynamic{Value: 1, Key: "tls.rest"}}}},
					},
					SNITimeout: 3 * time.Second, Tunnels: tunnels,
				},
			},
			{
				Name: "activated", Limits: limits,
				HealthCheck: &config.HealthCheck{Path: "/healthz"},
				Filters: &config.Filters{
					Allow: networks("0.0.0.0/0", "::/0"), Deny: networks("192.0.2.0/24", "2001:db8:bad::/48", "198.51.100.7/32"),
					RateLimit: &config.RateLimit{
						Requests: config.Dynamic{Value: 10_000, Key: "activated.rate"}, Per: 2 * time.Second, Burst: 20_000, ByClient: true,
					},
					TunnelRateLimit: &config.RateLimit{
						Requests: config.Dynamic{Value: 50, Key: "activated.tunnels"}, Per: time.Minute, Burst: 60, ByClient: true,
					},
				},
			},
		},
		VirtualHosts: []config.VirtualHost{
			{
				Name: "chat", Listeners: []string{"public", "public-v4"},
				Domains: []string{"chat.example.com", "*.chat.example.com", "[2001:db8::1]"},
				Routes: []config.Route{
					{
						Match:         config.Match{Prefix: "/socket"},
						WebSocket:     true,
						PrefixRewrite: "/ws", AutoHostRewrite: true,
						Clusters: []config.WeightedCluster{{Cluster: "chat-v1", Weight: config.Dynamic{Value: 90}}, {Cluster: "chat-v2", Weight: config.Dynamic{Value: 10, Key: "chat.v2.weight"}}},
						Timeout:  30 * time.Second,
						Tunnels: config.Tunnels{
							DrainTimeout: time.Hour, MaxAge: 48 * time.Hour, HandshakeTimeout: 10 * time.Second, Buffer: 64 << 10,
							KeepAlive:    config.KeepAlive{Idle: 30 * time.Second, Interval: 10 * time.Second, Count: 3},
							SurviveCrash: true, MoveOnReload: true, CloseOnRouteRemoved: true, CloseOnEndpointRemoved: true, CloseOnEndpointUnhealthy: true,
						},
					},
					{
						Match:    config.Match{Path: "/old"},
						Redirect: &config.Redirect{Scheme: "https", Host: "chat.example.com:8443", Path: "/new?from=old", Status: 308},
						Timeout:  15 * time.Second, StreamIdleTimeout: 5 * time.Minute, Tunnels: tunnels,
					},
					{
						Match:             config.Match{Prefix: "/"},
						HostRewrite:       "web.internal:8080",
						Clusters:          []config.WeightedCluster{{Cluster: "web", Weight: config.Dynamic{Value: 1}}},
						StreamIdleTimeout: 10 * time.Minute, Tunnels: tunnels,
						RequestBuffer: 1 << 20,
						Retry: &config.Retry{
							On: config.RetryConnectFailure | config.RetryRefusedStream | config.RetryReset | config.Retry5xx |
								config.RetryGatewayError | config.Retry4xx | config.RetryStatusCodes,
							StatusCodes: []int{429, 503}, Attempts: config.Dynamic{Value: 3, Key: "web.retries"}, PerTryTimeout: 3 * time.Second,
							BackoffBase: 50 * time.Millisecond, BackoffMax: time.Second, Buffer: 128 << 10,
						},
						Mirror: &config.Mirror{Cluster: "chat-v2", Percent: config.Dynamic{Value: 125_000, Key: "web.mirror"}, Buffer: 32 << 10},
					},
				},
			},
			guarded(tunnels),
			{
				Name: "rest", Listeners: []string{"public", "local", "public-v4", "activated"}, Domains: []string{"*"},
				Routes: []config.Route{
					{
						Name: "canary",
						Match: config.Match{
							Prefix: "/API", Segments: true, IgnoreCase: true, Methods: []string{"GET", "HEAD"},
							Sources:  []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("::1/128")},
							Fraction: &config.Dynamic{Value: 2 * dynamic.Whole / 100, Key: "canary.percent"},
						},
						Clusters: []config.WeightedCluster{{Cluster: "web", Weight: config.Dynamic{Value: 1}}},
						Timeout:  15 * time.Second, StreamIdleTimeout: 5 * time.Minute, Tunnels: tunnels,
					},
					{
						Match: config.Match{
							Regex: regexp.MustCompile("^(?:/v[0-9]+/.*)$"),
							Headers: []config.Condition{
								{Name: "x-version", Test: config.Exact, Text: "2"},
								{Name: "x-shard", Test: config.Range, From: 0, To: 16},
								{Name: "x-debug", Test: config.Present, Invert: true},
							},
							Query: []config.Condition{
								{Name: "lang", Test: config.Prefix, Text: "de"},
								{Name: "lang", Test: config.Regex, Regex: regexp.MustCompile("^(?:.*-AT)$"), Invert: true},
								{Name: "size", Test: config.Suffix, Text: "px"},
								{Name: "n", Test: config.Range, From: -1, To: 10},
								{Name: "flag", Test: config.Present},
								{Name: "empty", Test: config.Exact},
							},
						},
						Clusters: []config.WeightedCluster{{Cluster: "web", Weight: config.Dynamic{Value: 1}}},
						Timeout:  15 * time.Second, StreamIdleTimeout: 5 * time.Minute, Tunnels: tunnels,
					},
					{
						Match: config.Match{
							Path: "/version",
							Headers: []config.Condition{
								{Name: "user-agent", Test: config.Prefix, Text: "curl/"},
								{Name: "accept", Test: config.Suffix, Text: "json"},
								{Name: "accept", Test: config.Regex, Regex: regexp.MustCompile("^(?:application/.*)$")},
							},
						},
						Clusters: []config.WeightedCluster{{Cluster: "web", Weight: config.Dynamic{Value: 1}}},
						Timeout:  15 * time.Second, StreamIdleTimeout: 5 * time.Minute, Tunnels: tunnels,
					},
					{
						Match:     config.Match{Path: "/echo"},
						WebSocket: true,
						Clusters:  []config.WeightedCluster{{Cluster: "chat-v2", Weight: config.Dynamic{Value: 1}}},
						Timeout:   15 * time.Second, StreamIdleTimeout: 5 * time.Minute, Tunnels: tunnels,
					},
					{
						Match:    config.Match{Prefix: "/"},
						Redirect: &config.Redirect{Host: "chat.example.com", Status: 301},
						Timeout:  15 * time.Second, StreamIdleTimeout: 5 * time.Minute, Tunnels: tunnels,
					},
				},
			},
			actionsHost(tunnels),
		},
		Clusters: []config.Cluster{
			{
				Name: "found", Endpoints: []config.Endpoint{{Address: "_chat._tcp.example.com", SRV: true, EndpointOptions: config.EndpointOptions{Weight: 1}}, {Address: "app.internal:9000", EndpointOptions: config.EndpointOptions{Weight: 1}}},
				Discovery: config.Discovery{By: config.ByStrictDNS, DNS: config.DNS{
					Resolvers: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:5353"), netip.MustParseAddrPort("[2001:db8::53]:53")}, Family: "all",
					MinTTL: 10 * time.Second, MaxTTL: time.Hour, Timeout: 2 * time.Second, RemoveEmpty: true, Local: true,
					BackoffBase: 500 * time.Millisecond, BackoffMax: time.Minute,
				}},
				Balancing: config.Balancing{PanicBelow: config.Dynamic{Value: 500_000}}, Connecting: config.Connecting{Attempts: 3},
				WarmingTimeout: 15 * time.Second, ConnectTimeout: 5 * time.Second, IdleTimeout: time.Minute, RetryBudget: budget,
			},
			{
				Name: "one-name", Endpoints: []config.Endpoint{{Address: "app.internal:9000", EndpointOptions: config.EndpointOptions{Weight: 1}}},
				Discovery: config.Discovery{By: config.ByLogicalDNS, DNS: config.DNS{
					Family: "auto", MinTTL: 5 * time.Second, MaxTTL: 5 * time.Minute, Timeout: 5 * time.Second,
					BackoffBase: time.Second, BackoffMax: 30 * time.Second,
				}},
				Balancing: config.Balancing{PanicBelow: config.Dynamic{Value: 500_000}}, Connecting: config.Connecting{Attempts: 3},
				WarmingTimeout: 15 * time.Second, ConnectTimeout: 5 * time.Second, IdleTimeout: time.Minute, RetryBudget: budget,
			},
			{
				Name: "listed", Discovery: config.Discovery{By: config.ByFile, File: "/etc/holdfast/listed.json"},
				Balancing: config.Balancing{PanicBelow: config.Dynamic{Value: 500_000}}, Connecting: config.Connecting{Attempts: 3},
				WarmingTimeout: 15 * time.Second, ConnectTimeout: 5 * time.Second, IdleTimeout: time.Minute, RetryBudget: budget,
			},
			{
				Edits: config.Edits{
					RequestHeaders: &config.Headers{Remove: []string{"Cookie"}, Set: []config.Header{{Name: "X-Cluster", Value: "%UPSTREAM_CLUSTER%"}},
						Add: []config.Header{{Name: "X-Start", Value: "%START_TIME%"}}},
					ResponseHeaders: &config.Headers{Remove: []string{"X-Powered-By"}, Set: []config.Header{{Name: "X-Served-By", Value: "%HOSTNAME%"}},
						Add: []config.Header{{Name: "X-Protocol", Value: "%PROTOCOL%"}}},
				},
				Name: "chat-v1",
				Endpoints: []config.Endpoint{
					{Address: "10.0.0.1:9000", EndpointOptions: config.EndpointOptions{Weight: 1}},
					{Address: "[2001:db8::2]:9000", EndpointOptions: config.EndpointOptions{Weight: 3, Metadata: map[string]string{"zone": "b"}}},
					{Address: "chat.internal:9000", EndpointOptions: config.EndpointOptions{Weight: 1, Priority: 1}},
				},
				Balancing:      config.Balancing{Policy: config.Maglev, TableSize: 131071, PanicBelow: config.Dynamic{Value: 500_000}},
				Connecting:     config.Connecting{Attempts: 3},
				WarmingTimeout: 15 * time.Second, ConnectTimeout: 2 * time.Second, IdleTimeout: 30 * time.Second, RetryBudget: budget,
			},
			{
				Name: "chat-v2", Endpoints: []config.Endpoint{{Address: "10.0.1.1:9000", EndpointOptions: config.EndpointOptions{Weight: 1}}},
				Balancing: config.Balancing{
					Policy: config.LeastConnections, PanicBelow: config.Dynamic{Value: 300_000, Key: "chat.v2.panic"},
					SlowStart: &config.SlowStart{Window: time.Minute, Aggression: 1.5, LeastWeight: 200_000},
				},
				Connecting: config.Connecting{Attempts: 2, Source: netip.MustParseAddr("10.0.1.100"), ProxyProtocol: 2},
				TLS: &config.ClusterTLS{
					CA: "/etc/holdfast/chat-ca.pem", SNI: "chat.internal", MinVersion: "1.3",
					Names:       []string{"chat.internal", "10.0.1.1", "10.0.1.2", "spiffe://example.org/chat"},
					Certificate: config.KeyPair{Certificate: "/etc/holdfast/client.pem", Key: "/etc/holdfast/client.key"},
				},
				WarmingTimeout: 8 * time.Second, ConnectTimeout: 5 * time.Second, IdleTimeout: time.Minute, RetryBudget: budget,
				HealthCheck: &config.EndpointCheck{
					TCP:      &config.TCPCheck{Send: []byte("PING"), Receive: [][]byte{[]byte("+PONG"), []byte("\r\n")}},
					Interval: time.Second, UnhealthyInterval: time.Second, NoTrafficInterval: time.Minute, Jitter: 100 * time.Millisecond,
					Timeout: time.Second, UnhealthyThreshold: 3, HealthyThreshold: 2,
				},
				Outliers: &config.Outliers{
					ConsecutiveGatewayFailures: 3, ConsecutiveConnectFailures: 2,
					Interval: 5 * time.Second, BaseEjectionTime: time.Minute, MaxEjectionTime: 10 * time.Minute, EjectionJitter: 2 * time.Second,
					MaxEjected:            config.Dynamic{Value: 300_000},
					SuccessRateDeviations: 2.5, SuccessRateHosts: 4, SuccessRateRequests: 50,
					Enforcing:            config.Dynamic{Value: 900_000, Key: "chat-v2.outliers"},
					EnforcingSuccessRate: config.Dynamic{Key: "chat-v2.outliers.rate"},
				},
			},
			{
				Name: "grpc", Endpoints: []config.Endpoint{{Address: "10.0.2.1:9000", EndpointOptions: config.EndpointOptions{Weight: 1}}},
				Balancing:  config.Balancing{PanicBelow: config.Dynamic{Value: 500_000}},
				Connecting: config.Connecting{Attempts: 3},
				Protocol:   config.HTTP2, HTTP2: config.ClusterHTTP2{Streams: 250, PingInterval: 30 * time.Second},
				WarmingTimeout: 15 * time.Second, ConnectTimeout: 5 * time.Second, IdleTimeout: time.Minute, RetryBudget: budget,
			},
			{
				Name: "web", Endpoints: []config.Endpoint{{Address: "unix:/run/web/http.sock", EndpointOptions: config.EndpointOptions{Weight: 1}}},
				Balancing:      config.Balancing{PanicBelow: config.Dynamic{Value: 500_000}},
				Connecting:     config.Connecting{Attempts: 3},
				WarmingTimeout: 15 * time.Second, ConnectTimeout: 5 * time.Second, IdleTimeout: time.Minute,
				RetryBudget: config.RetryBudget{Percent: config.Dynamic{Value: 100_000, Key: "web.budget"}, MinConcurrency: 5},
				HealthCheck: &config.EndpointCheck{
					HTTP: &config.HTTPCheck{
						Target: "/healthz?full=1", Method: "POST", Host: "web.internal", Headers: []config.Header{{Name: "X-Check", Value: "100% ok"}},
						Statuses: []config.StatusRange{{From: 200, To: 200}, {From: 204, To: 206}, {From: 400, To: 499}}, Body: "ready",
					},
					Port: 8081, Interval: 10 * time.Second, UnhealthyInterval: 2 * time.Second, NoTrafficInterval: 5 * time.Minute, Jitter: 3 * time.Second,
					Timeout: time.Second, UnhealthyThreshold: 5, HealthyThreshold: 1,
				},
				Breakers: config.Breakers{
					{limit("web.limits.connections", 500), limit("web.limits.tunnels", 20000), limit("web.limits.pending", 0), limit("web.limits.requests", 400), limit("web.limits.retries", 10)},
					{limit("web.limits.high.connections", 20), limit("web.limits.high.tunnels", 40), limit("web.limits.high.pending"), limit("web.limits.high.requests"), limit("web.limits.high.retries", 0)},
				},
			},
		},
	}
	wantEqual(t, got, want)
}

// limit is one of a cluster with a runtime key, of so many, or none.
func limit(key string, most ...int64) (l config.Limit) {
	l.Key = key
	if len(most) > 0 {
		l.Set, l.Value = true, most[0]
	}
	return l
}

// actionsHost is the virtual host "actions" of good.toml.
func actionsHost(tunnels config.Tunnels) config.VirtualHost {
	via := []config.Header{{Name: "Via", Value: "1.1 holdfast"}}
	route := func(match config.Match, actions config.Actions) config.Route {
		return config.Route{Match: match, Timeout: 15 * time.Second, StreamIdleTimeout: 5 * time.Minute, Tunnels: tunnels, Actions: actions}
	}
	docs := route(config.Match{Prefix: "/docs/"}, config.Actions{})
	docs.Redirect = &config.Redirect{Scheme: "https", Port: 8443, PrefixRewrite: "/manual/", StripQuery: true, Status: 302}
	item := route(config.Match{Prefix: "/item/"}, config.Actions{})
	item.Redirect = &config.Redirect{Host: "shop.example.com", Status: 301,
		RegexRewrite: &config.RegexRewrite{Pattern: "^/item/([0-9]+)$", Substitution: `/i/\1`}}
	robots := route(config.Match{Path: "/robots.txt"}, config.Actions{
		Direct: &config.DirectResponse{Status: 200, Body: "User-agent: *", ContentType: "text/plain"},
		Edits:  config.Edits{ResponseHeaders: &config.Headers{Set: []config.Header{{Name: "Cache-Control", Value: "max-age=3600"}}}},
	})
	live := route(config.Match{Prefix: "/live"}, config.Actions{
		SplitByHash: true, Upgrades: []string{"my-proto"},
		Origins: []string{"https://app.example.com", "https://*.example.com"}, RefuseWithoutOrigin: true,
		RegexRewrite: &config.RegexRewrite{Pattern: "^/live/([^/]+)", Substitution: `/\1/ws`},
		MaxBodySize:  1 << 20, MaxHeadSize: 16 << 10,
		Edits: config.Edits{
			RequestHeaders: &config.Headers{Set: []config.Header{{Name: "X-Route", Value: "%ROUTE_NAME% of 100%%"}},
				Add: []config.Header{{Name: "X-Agent", Value: "%REQ(User-Agent)%"}}},
			ResponseHeaders: &config.Headers{Remove: []string{"X-Debug"}, Add: []config.Header{{Name: "X-Upstream", Value: "%UPSTREAM_HOST%"}}},
		},
		CORS: &config.CORS{AllowOrigins: []string{"https://*.example.com"}, AllowMethods: []string{"GET", "PUT"},
			AllowHeaders: []string{"Content-Type"}, ExposeHeaders: []string{"X-Upstream"}, MaxAge: 10 * time.Minute, AllowCredentials: true},
		HashPolicy: []config.HashPolicy{{Header: "X-User", Terminal: true},
			{Cookie: &config.HashCookie{Name: "sticky", Make: true, TTL: time.Hour, Path: "/live"}}, {SourceAddress: true}},
	})
	live.WebSocket, live.Priority = true, config.PriorityHigh
	live.Clusters = []config.WeightedCluster{{Cluster: "chat-v1", Weight: config.Dynamic{Value: 90, Key: "live.v1"}}, {Cluster: "chat-v2", Weight: config.Dynamic{Value: 10}}}
	return config.VirtualHost{
		Name: "actions", Listeners: []string{"public", "local", "public-v4", "activated"}, Domains: []string{"actions.example.com"},
		Edits: config.Edits{
			RequestHeaders: &config.Headers{Remove: []string{"X-Internal"}, Add: via,
				Set: []config.Header{{Name: "X-Real-IP", Value: "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%"}}},
			ResponseHeaders: &config.Headers{Remove: []string{"Server"}, Add: via,
				Set: []config.Header{{Name: "X-Frame-Options", Value: "DENY"}, {Name: "X-Request-Id", Value: "%REQUEST_ID%"}}},
		},
		Routes: []config.Route{
			docs, item, robots,
			route(config.Match{Path: "/sorry"}, config.Actions{Direct: &config.DirectResponse{
				Status: 503, File: "/etc/holdfast/sorry.html", ContentType: "text/html; charset=utf-8"}}),
			route(config.Match{Path: "/nothing"}, config.Actions{Direct: &config.DirectResponse{Status: 204}}),
			route(config.Match{Prefix: "/by-name/"}, config.Actions{ClusterHeader: "X-Cluster", HostRewriteHeader: "X-Host",
				Edits: config.Edits{RequestHeaders: &config.Headers{Remove: []string{"X-Cluster", "X-Host"}}}}),
			live,
		},
	}
}

// guarded is the virtual host of good.toml that has filters.
func guarded(tunnels config.Tunnels) config.VirtualHost {
	web := []config.WeightedCluster{{Cluster: "web", Weight: config.Dynamic{Value: 1}}}
	return config.VirtualHost{
		Name: "guarded", Listeners: []string{"activated"}, Domains: []string{"guarded.example.com"},
		Filters: &config.Filters{Allow: networks("10.0.0.0/8", "::1/128"), Deny: networks("10.6.6.6/32")},
		Routes: []config.Route{
			{
				Match: config.Match{Prefix: "/open"}, Clusters: web,
				Timeout: 15 * time.Second, StreamIdleTimeout: 5 * time.Minute, Tunnels: tunnels,
			},
			{
				Match: config.Match{Prefix: "/"}, WebSocket: true, Clusters: web,
				Timeout: 15 * time.Second, StreamIdleTimeout: 5 * time.Minute, Tunnels: tunnels,
				Filters: &config.Filters{
					Allow: networks("10.0.0.0/16"), Deny: networks("10.0.6.6/32"),
					RateLimit: &config.RateLimit{
						Requests: config.Dynamic{Value: 100, Key: "guarded.rate"}, Per: time.Minute, Burst: 5, ByClient: true,
					},
					TunnelRateLimit: &config.RateLimit{
						Requests: config.Dynamic{Value: 5, Key: "guarded.tunnels"}, Per: 10 * time.Second, Burst: 9, ByClient: true,
					},
					Fault: &config.Fault{
						Headers:   []config.FaultHeader{{Name: "X-Fault", Value: "yes"}},
						Delay:     config.FaultDelay{Percent: config.Dynamic{Value: 125_000, Key: "guarded.delay"}, Duration: 2 * time.Second},
						Abort:     config.FaultAbort{Percent: config.Dynamic{Value: 5_000, Key: "guarded.abort"}, Status: 500},
						MaxActive: config.Dynamic{Value: 10, Key: "guarded.active"},
					},
					Authorize: &config.Authorize{
						Cluster: "web", PathPrefix: "/check", Timeout: 2 * time.Second, FailOpen: true,
						RequestHeaders: []string{"Cookie", "Authorization"}, UpstreamHeaders: []string{"X-User", "X-Groups"},
						ClientHeaders: []string{"Location", "Set-Cookie"},
					},
				},
			},
		},
	}
}

func networks(all ...string) (prefixes []netip.Prefix) {
	for _, p := range all {
		prefixes = append(prefixes, netip.MustParsePrefix(p))
	}
	return prefixes
}

func TestOneListenerIsEnoughAndTheRestHasDefaults(t *testing.T) {
	t.Parallel()
	got, err := config.Parse("minimal.toml", testdata(t, "minimal.toml"))
	if err != nil {
		t.Fatal(err)
	}
	wantEqual(t, got, &config.Config{
		Supervisor: config.Supervisor{
			Log:       config.Log{Level: slog.LevelInfo, Format: "text"},
			Reload:    config.Reload{ReadyTimeout: 30 * time.Second, Probation: 10 * time.Second},
			Stop:      config.Stop{Timeout: 30 * time.Second},
			Tickets:   config.Tickets{Rotation: 12 * time.Hour},
			Listeners: []config.Socket{{Name: "public", Address: tcp("127.0.0.1:8080")}},
		},
		Drain: config.Drain{IdleGrace: 5 * time.Second, CloseSpread: 5 * time.Minute},
		Tunnels: config.Tunnels{
			HandshakeTimeout: time.Minute, Buffer: 256 << 10,
			SurviveCrash: true,
			KeepAlive:    config.KeepAlive{Idle: time.Minute, Interval: 15 * time.Second, Count: 4},
		},
		HTTPListeners: []config.Listener{{Name: "public", Limits: config.ListenerLimits{
			HeadSize: 64 << 10, HeadTimeout: 10 * time.Second, BodyTimeout: time.Minute, BodyRate: 64, IdleTimeout: time.Minute, HTTP2Streams: 100,
		}}},
	})
}

// Each file of testdata/bad holds one mistake; expected.txt beside them holds the
// complete text of each one's error.
func TestEachMistakeIsSaidPlainly(t *testing.T) {
	t.Parallel()
	want := map[string]string{}
	for line := range strings.Lines(string(testdata(t, "bad/expected.txt"))) {
		file, _, _ := strings.Cut(line, ":")
		want[file] += strings.TrimSuffix(line, "\n")
	}
	files, err := filepath.Glob("testdata/bad/*.toml")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range files {
		file := filepath.Base(path)
		t.Run(strings.ReplaceAll(strings.TrimSuffix(file, ".toml"), "-", " "), func(t *testing.T) {
			t.Parallel()
			c, err := config.Parse(file, testdata(t, "bad/"+file))
			if err == nil {
				t.Fatal("was accepted")
			}
			if c != nil {
				t.Error("a configuration came with the error")
			}
			if err.Error() != want[file] {
				t.Errorf("error\n got %s\nwant %s", err, want[file])
			}
			if _, ok := errors.AsType[*config.Problem](err); !ok {
				t.Errorf("%T holds no *Problem", err)
			}
		})
		if want[file] == "" {
			t.Errorf("expected.txt has no line for %s", file)
		}
	}
	if len(want) != len(files) {
		t.Errorf("%d files, but %d expectations", len(files), len(want))
	}
}

func TestAllMistakesAreReportedAtOnceInTheOrderOfTheFile(t *testing.T) {
	t.Parallel()
	const file = `
[[clusters]]
name = "web"
endpoint = ["127.0.0.1:9000"]

[[virtual_hosts]]
name = "all"
domains = ["*", "b:80"]
[[virtual_hosts.routes]]
match = { prefix = "/" }
cluster = "wep"

[[listeners]]
name = "public"
address = "localhost:80"
`
	_, err := config.Parse("f.toml", []byte(file))
	var keys []string
	for _, e := range err.(interface{ Unwrap() []error }).Unwrap() {
		p, _ := errors.AsType[*config.Problem](e)
		keys = append(keys, p.Key)
	}
	wantEqual(t, keys, []string{
		"clusters[0].endpoints", "clusters[0].endpoint", "virtual_hosts[0].domains[1]",
		"virtual_hosts[0].routes[0].cluster", "listeners[0].address",
	})
}

func TestTheSupervisorReadsTheSameFromTheSameFile(t *testing.T) {
	t.Parallel()
	whole, err := config.Parse("good.toml", testdata(t, "good.toml"))
	if err != nil {
		t.Fatal(err)
	}
	own, err := config.ParseSupervisor("good.toml", testdata(t, "good.toml"))
	if err != nil {
		t.Fatal(err)
	}
	wantEqual(t, own, &whole.Supervisor)
}

func TestTheSupervisorIsBlindToWhatIsTheProxys(t *testing.T) {
	t.Parallel()
	const file = `
clusters = "to come"
[new_section]
[tunnels]
new_key = true
[drain]
idle_grace = 0
[[listeners]]
name = "public"
address = "127.0.0.1:8080"
protocol = "quic"
limits = "none"
new_key = 1
[[access_logs]]
path = "stdout"
new_key = 1
`
	if _, err := config.ParseSupervisor("f.toml", []byte(file)); err != nil {
		t.Error(err)
	}
	if _, err := config.Parse("f.toml", []byte(file)); err == nil {
		t.Error("Parse is as blind as ParseSupervisor")
	}
}

func TestTheSupervisorIsStrictAboutItsOwn(t *testing.T) {
	t.Parallel()
	own := []string{"process-", "admin-", "log-", "access-log-path", "access-log-stdout", "access-logs-is", "runtime-", "reload-", "stop-", "session-", "no-listener", "syntax", "shape-",
		"listener-name", "listener-address", "listener-overlap", "listener-mode", "listener-ipv6", "unknown-key-like"}
	files, err := filepath.Glob("testdata/bad/*.toml")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range files {
		file := filepath.Base(path)
		isOwn := false
		for _, prefix := range own {
			isOwn = isOwn || strings.HasPrefix(file, prefix)
		}
		_, whole := config.Parse(file, testdata(t, "bad/"+file))
		_, err := config.ParseSupervisor(file, testdata(t, "bad/"+file))
		switch {
		case isOwn && err == nil:
			t.Errorf("%s was accepted", file)
		case isOwn && err.Error() != whole.Error():
			t.Errorf("%s\n got %v\nwant %v", file, err, whole)
		case !isOwn && !strings.HasPrefix(file, "array-is-section") && err != nil:
			t.Errorf("%s was refused: %v", file, err)
		}
	}
}

func TestListenersThatAreFarEnoughApart(t *testing.T) {
	t.Parallel()
	for name, addresses := range map[string][2]string{
		"port 0 is another port each time":       {`"127.0.0.1:0"`, `"127.0.0.1:0"`},
		"port 0 on wildcards":                    {`"0.0.0.0:0"`, `"[::]:0"`},
		"other ports":                            {`"0.0.0.0:80"`, `"127.0.0.1:81"`},
		"other addresses":                        {`"127.0.0.1:80"`, `"127.0.0.2:80"`},
		"every IPv4 address and an IPv6 address": {`"0.0.0.0:80"`, `"[::1]:80"`},
		"every IPv4 address and IPv6 only":       {`"0.0.0.0:80"`, "\"[::]:80\"\nipv6_only = true"},
		"IPv6 only and an IPv4 address":          {"\"[::]:80\"\nipv6_only = true", `"127.0.0.1:80"`},
		"unix sockets":                           {`"unix:/a"`, `"unix:/b"`},
		"sockets of systemd":                     {`"systemd:a"`, `"systemd:b"`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			file := "[[listeners]]\nname = \"a\"\naddress = " + addresses[0] + "\n[[listeners]]\nname = \"b\"\naddress = " + addresses[1] + "\n"
			if _, err := config.Parse("f.toml", []byte(file)); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestAddressesHaveOneKeyHoweverTheyAreWritten(t *testing.T) {
	t.Parallel()
	for written, want := range map[string]string{
		"0.0.0.0:443":          "0.0.0.0:443",
		"[::]:443":             "[::]:443",
		"[0:0:0:0:0:0:0:0]:80": "[::]:80",
		"[2001:DB8::1]:80":     "[2001:db8::1]:80",
		"[::ffff:10.0.0.1]:80": "10.0.0.1:80",
		"unix:/run/app.sock":   "unix:/run/app.sock",
		"unix:/run//x/../a":    "unix:/run/a",
		"systemd:web":          "systemd:web",
		"systemd:The Web/$1!":  "systemd:The Web/$1!",
	} {
		s, err := config.ParseSupervisor("f.toml", []byte("[[listeners]]\nname = \"a\"\naddress = \""+written+"\"\n"))
		if err != nil {
			t.Error(err)
			continue
		}
		if got := s.Listeners[0].Address.Key(); got != want {
			t.Errorf("%s has the key %s, want %s", written, got, want)
		}
	}
}

func TestASocketWhosePortTheKernelChoosesIsKnownByItsNameToo(t *testing.T) {
	t.Parallel()
	for want, s := range map[string]config.Socket{
		"127.0.0.1:80":   {Name: "a", Address: tcp("127.0.0.1:80")},
		"a@127.0.0.1:0":  {Name: "a", Address: tcp("127.0.0.1:0")},
		"unix:/run/a.so": {Name: "a", Address: config.Address{Network: "unix", Path: "/run/a.so"}},
		"systemd:web":    {Name: "a", Address: config.Address{Network: "systemd", Name: "web"}},
	} {
		if got := s.Key(); got != want {
			t.Errorf("the key is %s, want %s", got, want)
		}
	}
}

func TestAFileThatWasCutShortIsRefusedOrReadWithoutHarm(t *testing.T) {
	t.Parallel()
	whole := testdata(t, "good.toml")
	last := 1 + strings.Count(string(whole), "\n")
	for end := 0; end < len(whole); end += 3 {
		_, err := config.Parse("f.toml", whole[:end])
		joined, _ := err.(interface{ Unwrap() []error })
		if joined == nil {
			continue
		}
		for _, e := range joined.Unwrap() {
			if p, ok := errors.AsType[*config.Problem](e); !ok || p.Line < 0 || p.Line > last {
				t.Fatalf("cut at %d: %v", end, e)
			}
		}
	}
}

func TestAFileIsBounded(t *testing.T) {
	t.Parallel()
	_, err := config.Parse("f.toml", make([]byte, 16<<20+1))
	if want := "f.toml: the file has 16777217 bytes; at most 16 MiB are read"; err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

func TestAByteOrderMarkIsNoMistake(t *testing.T) {
	t.Parallel()
	if _, err := config.Parse("f.toml", append([]byte("\xef\xbb\xbf"), testdata(t, "good.toml")...)); err != nil {
		t.Error(err)
	}
}

func FuzzParse(f *testing.F) {
	files, err := filepath.Glob("testdata/*.toml")
	if err != nil {
		f.Fatal(err)
	}
	bad, err := filepath.Glob("testdata/bad/*.toml")
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range append(files, bad...) {
		f.Add(testdata(f, strings.TrimPrefix(file, "testdata/")))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := config.Parse("f.toml", data)
		if err != nil {
			if strings.ContainsFunc(err.Error(), func(r rune) bool { return r < ' ' && r != '\n' }) {
				t.Errorf("an error with control characters: %q", err)
			}
			return
		}
		s, err := config.ParseSupervisor("f.toml", data)
		if err != nil {
			t.Fatalf("Parse accepts what ParseSupervisor refuses: %v", err)
		}
		wantEqual(t, s, &c.Supervisor)
	})
}

func testdata(t testing.TB, name string) []byte {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func made(f *format.Format, err error) *format.Format {
	if err != nil {
		panic(err)
	}
	return f
}

func tcp(s string) config.Address {
	return config.Address{Network: "tcp", IP: netip.MustParseAddrPort(s)}
}

func wantEqual(t *testing.T, got, want any) {
	t.Helper()
	if !reflect.DeepEqual(got, want) {
		t.Errorf("\n got %+v\nwant %+v", got, want)
	}
}
