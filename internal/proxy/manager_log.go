package proxy

import (
	"context"
	"log/slog"
)

// notable is the level of lines about a request that an operator looks for. Beside a
// dead upstream each request is one, and journald drops what a service writes beyond
// a rate (journald.conf(5), RateLimitBurst=), also the lines that matter more. So where
// there is an access log, whose records have the same facts, the level is debug.
func (r *request) notable() slog.Level {
	if r.m.options.AccessLog != nil {
		return slog.LevelDebug
	}
	return slog.LevelInfo
}

// logs says whether log writes lines of a level: what they are made of takes memory.
func (r *request) logs(level slog.Level) bool {
	return r.m.options.Log.Enabled(context.Background(), level)
}

// log writes a line about the request. What the client chose is in attributes only.
func (r *request) log(level slog.Level, message string, attrs ...slog.Attr) {
	client := "unix"
	if remote := r.x.Downstream().Remote; remote.IsValid() {
		client = remote.String()
	}
	attrs = append(attrs,
		slog.String("request_id", r.id),
		slog.String("listener", r.listener),
		slog.String("client", client),
		slog.String("method", r.head.Method),
		slog.String("authority", r.authority),
		slog.String("target", r.original))
	if r.head.Upgrade != "" {
		attrs = append(attrs, slog.String("upgrade", r.head.Upgrade))
	}
	if r.route != nil {
		attrs = append(attrs, slog.String("route", r.route.Name))
	}
	if r.cluster != "" {
		attrs = append(attrs, slog.String("cluster", r.cluster))
	}
	if r.endpoint != nil {
		attrs = append(attrs, slog.String("endpoint", r.endpoint.String()))
	}
	r.m.options.Log.LogAttrs(context.Background(), level, message, attrs...)
}
