package urlpath_test

import (
	"fmt"
	"strconv"
	"strings"
	"testing"

	"holdfast/internal/urlpath"
)

// FuzzNormalise compares with the rules said the slow way, and checks what everybody else
// relies on: what comes out is a target, in its final spelling, without dot segments.
func FuzzNormalise(f *testing.F) {
	for _, seed := range []string{
		"/", "*", "", "/public/../admin", "/public/%2e%2e/admin", "//admin", "/%61dmin", "/admin%2f..", "/a/..;/b",
		`/\admin`, "/a%00", "/%zz", "/a/./b//c/.?/../x", "/%2%35", "/a%2F.%5c..;", "/..%3b", "/../../..", "/a/..%2f..%5c", "/;/admin", "/a/%3b/../b", "/;x",
	} {
		for policy := range uint8(16) {
			f.Add(policy, seed)
		}
	}
	f.Fuzz(func(t *testing.T, bits uint8, target string) {
		p := urlpath.Policy{
			KeepSlashes: bits&1 > 0, RefuseParams: bits&2 > 0, Encoded: urlpath.Encoded(bits >> 2 % 3),
		}
		got, err := p.Normalise(target)
		want, ok := slowly(p, target)
		if ok != (err == nil) || ok && got != want {
			t.Fatalf("%+v: %q became %q, %v; want %q, %v", p, target, got, err, want, ok)
		}
		normal, errNormal := p.IsNormal(target)
		if normal != (ok && got == target) || errNormal != nil && ok {
			t.Fatalf("%+v: %q is normal: %v, %v", p, target, normal, errNormal)
		}
		if err != nil || target == "*" {
			return
		}
		if again, err := p.Normalise(got); again != got || err != nil {
			t.Fatalf("%+v: %q became %q, and then %q, %v", p, target, got, again, err)
		}
		path, query, _ := strings.Cut(got, "?")
		if _, had, _ := strings.Cut(target, "?"); query != had {
			t.Fatalf("the query %q became %q", had, query)
		}
		if path[0] != '/' || len(got) > len(target) || !urlpath.Resolved(got) {
			t.Fatalf("%+v: %q became %q", p, target, got)
		}
		for segment := range strings.SplitSeq(path, "/") {
			if segment == "." || segment == ".." {
				t.Fatalf("%+v: %q became %q", p, target, got)
			}
		}
		if !p.KeepSlashes && strings.Contains(path, "//") {
			t.Fatalf("%+v: %q became %q", p, target, got)
		}
	})
}

// slowly is Normalise by lists of octets and segments.
func slowly(p urlpath.Policy, target string) (string, bool) {
	if target == "*" {
		return target, true
	}
	path, query, asks := strings.Cut(target, "?")
	if !strings.HasPrefix(path, "/") {
		return "", false
	}
	var spelled []string // an octet each
	for rest := path; rest != ""; {
		size, octet := 1, rest[:1]
		if octet == "%" {
			if len(rest) < 3 {
				return "", false
			}
			n, err := strconv.ParseUint(rest[1:3], 16, 8)
			if err != nil {
				return "", false
			}
			size, octet = 3, fmt.Sprintf("%%%02X", n)
			c := byte(n)
			switch {
			case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '-', c == '.', c == '_', c == '~':
				octet = string(rune(c))
			case c < 0x20, c == 0x7f:
				return "", false
			}
		}
		switch octet {
		case ";", "%3B":
			if p.RefuseParams {
				return "", false
			}
		case `\`, "%2F", "%5C":
			switch {
			case p.Encoded == urlpath.Decode:
				octet = "/"
			case p.Encoded == urlpath.Reject, octet == `\`:
				return "", false
			}
		}
		spelled = append(spelled, octet)
		rest = rest[size:]
	}
	path = strings.Join(spelled, "")
	for !p.KeepSlashes && strings.Contains(path, "//") {
		path = strings.ReplaceAll(path, "//", "/")
	}
	segments := strings.Split(path[1:], "/")
	for i, s := range segments {
		if i < len(segments)-1 && (strings.HasPrefix(s, ";") || strings.HasPrefix(s, "%3B")) {
			return "", false
		}
		parts := strings.Split(strings.ReplaceAll(s, "%5C", "%2F"), "%2F")
		for _, part := range parts {
			name, _, params := strings.Cut(strings.ReplaceAll(part, "%3B", ";"), ";")
			if (name == "." || name == "..") && (params || len(parts) > 1) {
				return "", false
			}
		}
	}
	// RFC 3986 §5.2.4, by its own words.
	in, out := path, ""
	for in != "" {
		switch {
		case strings.HasPrefix(in, "/./"):
			in = in[2:]
		case in == "/.":
			in = "/"
		case strings.HasPrefix(in, "/../"):
			in, out = in[3:], out[:max(0, strings.LastIndex(out, "/"))]
		case in == "/..":
			in, out = "/", out[:max(0, strings.LastIndex(out, "/"))]
		default:
			end := strings.Index(in[1:], "/") + 1
			if end == 0 {
				end = len(in)
			}
			in, out = in[end:], out+in[:end]
		}
	}
	if asks {
		out += "?" + query
	}
	return out, true
}
