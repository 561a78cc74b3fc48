package config

import (
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
)

// mostPattern bounds a regular expression, and what takes a match's place.
const mostPattern = 1024

// readRegexRewrite reads the table under a key, if it is there.
func readRegexRewrite(outer *table, key string) *RegexRewrite {
	if !outer.asked(key) {
		return nil
	}
	t := outer.table(key)
	var r RegexRewrite
	need(t, "pattern", &r.Pattern, pathPattern)
	need(t, "substitution", &r.Substitution, substitution)
	t.strict()
	if re, err := regexp.Compile(r.Pattern); err == nil && r.Pattern != "" {
		if _, groups, err := Expansion(r.Substitution); err == nil && groups > re.NumSubexp() {
			t.at("substitution").fail(`names group \%d, the pattern has %d`, groups, re.NumSubexp())
		}
	}
	return &r
}

var pathPattern = form[string]{`a regular expression (RE2) like "^/v([0-9]+)/"`, func(s string) (string, error) {
	switch {
	case s == "":
		return "", errors.New("an empty one matches everywhere")
	case len(s) > mostPattern:
		return "", fmt.Errorf("it is longer than %d bytes", mostPattern)
	case hasControl(s):
		return "", errControl
	}
	return s, checkRegex(s)
}, asIs}

var substitution = form[string]{`what takes a match's place, like "/\\1/"`, func(s string) (string, error) {
	switch {
	case len(s) > mostPattern:
		return "", fmt.Errorf("it is longer than %d bytes", mostPattern)
	case strings.ContainsAny(s, "?#"):
		return "", errors.New(`only the path is rewritten: it has neither "?" nor "#"`)
	case strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r >= 0x7f }):
		return "", errors.New("spaces, control characters and letters beyond ASCII are written as %XX")
	}
	if most := 32; strings.Count(s, `\`) > most {
		return "", fmt.Errorf("it has more than %d backslashes", most)
	}
	_, _, err := Expansion(s)
	return s, err
}, asIs}

// Expansion makes a template of package regexp of a substitution, in which \0 is the whole
// match, \1 to \9 are groups and \\ is a backslash. groups is the highest one that it names.
func Expansion(s string) (template string, groups int, err error) {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case c == '$':
			b.WriteString("$$")
		case c != '\\':
			b.WriteByte(c)
		case i+1 < len(s) && s[i+1] == '\\':
			b.WriteByte('\\')
			i++
		case i+1 < len(s) && '0' <= s[i+1] && s[i+1] <= '9':
			i++
			fmt.Fprintf(&b, "${%c}", s[i])
			groups = max(groups, int(s[i]-'0'))
		default:
			return "", 0, errors.New(`behind a backslash stands a digit, for a group, or another backslash`)
		}
	}
	return b.String(), groups, nil
}

// readHostRewrites reads what the upstream's host is: one of three keys.
func readHostRewrites(t *table, r *Route) {
	read(t, "host_rewrite", &r.HostRewrite, authority)
	read(t, "host_rewrite_header", &r.HostRewriteHeader, askedField)
	if t.has("host_rewrite") && t.has("host_rewrite_header") {
		t.at("host_rewrite_header").fail("excludes host_rewrite: both say what the upstream's host is; drop one of the two")
	}
}

// readRedirect reads a redirect of a route that matches as m says.
func readRedirect(t *table, m Match) *Redirect {
	r := Redirect{Status: 301}
	read(t, "scheme", &r.Scheme, oneOf("http", "https"))
	read(t, "host", &r.Host, authority)
	if t.asked("port") {
		port := int64(0)
		t.integer("port", &port, 1, 65535)
		r.Port = int(port)
	}
	read(t, "path", &r.Path, redirectPath)
	read(t, "prefix_rewrite", &r.PrefixRewrite, matchPath)
	r.RegexRewrite = readRegexRewrite(t, "regex_rewrite")
	t.boolean("strip_query", &r.StripQuery)
	if n, ok := t.get("status"); ok {
		if status, ok := n.raw.(int64); !ok || !isRedirect(status) {
			n.fail("must be 301, 302, 303, 307 or 308, found %s", describe(n.raw))
		} else {
			r.Status = int(status)
		}
	}
	t.set("status", strconv.Itoa(r.Status))
	t.strict()
	checkRedirectParts(t, &r, m)
	return &r
}

func isRedirect(status int64) bool {
	switch status {
	case 301, 302, 303, 307, 308:
		return true
	}
	return false
}

// checkRedirectParts refuses parts that contradict each other.
func checkRedirectParts(t *table, r *Redirect, m Match) {
	given := t.given("path", "prefix_rewrite", "regex_rewrite")
	if len(given) > 1 {
		t.fail("has %s; only one of them can be the new path", strings.Join(given, " and "))
	}
	if t.has("prefix_rewrite") && m.Prefix == "" {
		t.at("prefix_rewrite").fail("goes with match.prefix only")
	}
	same := r.PrefixRewrite != "" && r.PrefixRewrite == m.Prefix || r.Path != "" && r.Path == m.Path
	if same && !t.has("scheme") && !t.has("host") && !t.has("port") && !r.StripQuery {
		t.fail("leads back to where it came from: the new path is the one that the route matches")
	}
	if _, port, err := splitAuthority(r.Host); t.has("port") && r.Host != "" && err == nil && port != "" {
		t.at("port").fail("excludes the port that host has; drop one of the two")
	}
	if r.StripQuery && t.has("path") {
		t.at("strip_query").fail("has no meaning beside path, which takes the place of the query, too; drop it")
	}
	if t.keys != nil && len(given) == 0 && !t.has("scheme") && !t.has("host") && !t.has("port") && !r.StripQuery {
		t.fail("leads back to where it came from; at least one of scheme, host, port, path, prefix_rewrite, regex_rewrite and strip_query is needed")
	}
}

// checkOwnAnswer refuses keys that have no meaning where we answer ourselves.
func checkOwnAnswer(t *table, r *Route, by string) {
	if r.MakesTunnels() {
		key := "websocket"
		if !r.WebSocket {
			key = "upgrades"
		}
		t.at(key).fail("beside %s every request is answered at once, so no tunnel can open; drop one of the two", by)
	}
	for _, key := range []string{
		"split_by_hash", "prefix_rewrite", "regex_rewrite", "host_rewrite", "host_rewrite_header", "auto_host_rewrite",
		"timeout", "stream_idle_timeout", "request_buffer", "retry", "mirror", "max_body_size", "priority", "request_headers", "hash_policy", "tunnels",
	} {
		t.inapplicable(key, "has no meaning beside %s, which sends no request to a cluster; drop one of the two", by)
	}
}

// isAddress says whether a host is an IP address, and so no name.
func isAddress(host string) bool {
	_, err := netip.ParseAddr(strings.Trim(host, "[]"))
	return err == nil
}
