package config

import (
	"errors"
	"log/slog"
	"net/netip"
	"path"
	"strings"
	"time"
)

func readProcess(t *table) Process {
	var p Process
	read(t, "proxy", &p.Proxy, absolutePath)
	t.strict()
	return p
}

var absolutePath = form[string]{`an absolute path like "/usr/lib/holdfast/holdfast-proxy"`, func(s string) (string, error) {
	if !path.IsAbs(s) {
		return "", errForm
	}
	if hasControl(s) {
		return "", errControl
	}
	return path.Clean(s), nil
}, asIs}

func readAdmin(t *table) Admin {
	var a Admin
	read(t, "http", &a.HTTP, httpAddress)
	t.boolean("allow_actions", &a.AllowActions)
	seen := map[string]node{}
	for _, e := range list(t, "hosts", hostName) {
		if first, twice := seen[e.value]; twice {
			e.fail("%s is listed twice (%s)", quote(e.value), first)
		}
		seen[e.value] = e.node
		a.Hosts = append(a.Hosts, e.value)
	}
	t.strict()
	return a
}

var httpAddress = form[netip.AddrPort]{
	`"off", or an address like "127.0.0.1:9901"`,
	func(s string) (netip.AddrPort, error) {
		if s == "off" {
			return netip.AddrPort{}, nil
		}
		return parseAddrPort(s)
	},
	func(a netip.AddrPort) string {
		if !a.IsValid() {
			return "off"
		}
		return a.String()
	},
}

// hostName is a name that a Host field may have, compared without the port.
var hostName = form[string]{`a host name like "metrics.internal"`, func(s string) (string, error) {
	host, port, err := splitAuthority(s)
	switch {
	case strings.Contains(s, "*"):
		return "", errors.New("each name is written out, without a star")
	case err != nil:
		return "", err
	case port != "":
		return "", errors.New("the port is not compared, so none is written")
	}
	if _, err := netip.ParseAddr(strings.Trim(host, "[]")); err == nil {
		return "", errors.New("an IP address needs no permission")
	}
	return host, nil
}, asIs}

func readLog(t *table) Log {
	l := Log{Level: slog.LevelInfo, Format: "text"}
	read(t, "level", &l.Level, logLevel)
	read(t, "format", &l.Format, logFormat)
	t.strict()
	return l
}

var (
	levels   = oneOf("debug", "info", "warn", "error")
	logLevel = form[slog.Level]{levels.is, func(s string) (level slog.Level, err error) {
		if s, err = levels.parse(s); err != nil {
			return level, err
		}
		return level, level.UnmarshalText([]byte(s))
	}, func(l slog.Level) string { return strings.ToLower(l.String()) }}

	logFormat = oneOf("text", "json")
)

func readRuntime(t *table) Runtime {
	var r Runtime
	read(t, "file", &r.File, overridesPath)
	t.strict()
	return r
}

var overridesPath = form[string]{`an absolute path like "/etc/holdfast/runtime.toml"`, func(s string) (string, error) { return parseFilePath(s, maxPath) }, asIs}

func readReload(t *table) Reload {
	r := Reload{ReadyTimeout: 30 * time.Second, Probation: 10 * time.Second}
	read(t, "ready_timeout", &r.ReadyTimeout, duration)
	read(t, "probation", &r.Probation, durationOrZero)
	// A reload needs the old generation and the new one.
	t.limit("max_generations", &r.MaxGenerations, 2)
	t.strict()
	return r
}

func readDrain(t *table) Drain {
	d := Drain{IdleGrace: 5 * time.Second, CloseSpread: 5 * time.Minute}
	read(t, "idle_grace", &d.IdleGrace, durationOrZero)
	read(t, "stream_timeout", &d.StreamTimeout, durationOrOff)
	read(t, "close_spread", &d.CloseSpread, durationOrZero)
	t.strict()
	return d
}

func readStop(t *table) Stop {
	s := Stop{Timeout: 30 * time.Second}
	read(t, "delay", &s.Delay, durationOrZero)
	read(t, "timeout", &s.Timeout, durationOrZero)
	t.strict()
	return s
}

var errControl = errors.New("it holds a control character")

// hasControl finds what neither a path, a host nor a log line should hold.
func hasControl(s string) bool {
	for _, r := range s {
		if r < 0x20 || r == 0x7f {
			return true
		}
	}
	return false
}
