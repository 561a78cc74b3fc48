package urlpath_test

import (
	"strings"
	"testing"

	"holdfast/internal/urlpath"
)

var (
	safe    = urlpath.Policy{}
	keep    = urlpath.Policy{Encoded: urlpath.Keep}
	decode  = urlpath.Policy{Encoded: urlpath.Decode}
	slashes = urlpath.Policy{KeepSlashes: true}
	params  = urlpath.Policy{RefuseParams: true}
	off     = urlpath.Policy{Off: true}
)

func TestNormalise(t *testing.T) {
	t.Parallel()
	const refused = ""
	tests := []struct {
		policy       urlpath.Policy
		target, want string
	}{
		{safe, "/", "/"},
		{safe, "*", "*"},
		{safe, "/a/b.c/d..e/..f/g../.h/...", "/a/b.c/d..e/..f/g../.h/..."},
		{safe, "/a/?", "/a/?"},
		{safe, "", refused},
		{safe, "a", refused},
		{safe, "?a", refused},

		// Dot segments.
		{safe, "/public/../admin", "/admin"},
		{safe, "/public/./admin", "/public/admin"},
		{safe, "/a/b/c/./../../g", "/a/g"},
		{safe, "/a/..", "/"},
		{safe, "/a/b/..", "/a/"},
		{safe, "/a/.", "/a/"},
		{safe, "/.", "/"},
		{safe, "/..", "/"},
		{safe, "/../../admin", "/admin"},
		{safe, "/../a/../..", "/"},
		{safe, "/a/../b/../c/..", "/"},
		{safe, "/a/../?/../x", "/?/../x"},

		// Encoded, too.
		{safe, "/public/%2e%2e/admin", "/admin"},
		{safe, "/public/.%2E/admin", "/admin"},
		{safe, "/public/%2e./admin", "/admin"},
		{safe, "/public/%2e/admin", "/public/admin"},
		{safe, "/public/%252e%252e/admin", "/public/%252e%252e/admin"}, // which is no dot segment, decoded once

		// Segments that are parameters alone.
		{safe, "/;/admin", refused},
		{safe, "/a/;x=1/admin", refused},
		{safe, "/%3b/admin", refused},
		{safe, "/a/../;/%61dmin", refused},
		{safe, "/;jsessionid=1", "/;jsessionid=1"},
		{safe, "/a/;x?/b", "/a/;x?/b"},
		{safe, "/a;x/b", "/a;x/b"},

		// Slashes.
		{safe, "//admin", "/admin"},
		{safe, "///admin//x///", "/admin/x/"},
		{safe, "/a//../b", "/b"},
		{safe, "/./", "/"},
		{safe, "//", "/"},
		{slashes, "//admin", "//admin"},
		{slashes, "/a//../b", "/a/b"},
		{slashes, "/a///..//../b", "/a//b"},
		{slashes, "/../..//x", "//x"},

		// Percent-encoding.
		{safe, "/%61dmin", "/admin"},
		{safe, "/%41%7A%30%39%2d%2E%5f%7e", "/Az09-._~"},
		{safe, "/%c3%a4%20%25%3f%23", "/%C3%A4%20%25%3F%23"},
		{safe, "/%40@%3A:%2b+", "/%40@%3A:%2B+"},
		{safe, "/%C3%A4", "/%C3%A4"},
		{safe, "/a?%61%2e%2e%2f%zz//../%00\\", "/a?%61%2e%2e%2f%zz//../%00\\"},
		{safe, "/%61?%61", "/a?%61"},
		{safe, "/%", refused},
		{safe, "/a%4", refused},
		{safe, "/%zz", refused},
		{safe, "/%4g", refused},
		{safe, "/%%41", refused},
		{safe, "/%u002e", refused},
		{safe, "/%6?1", refused},
		{safe, "/%2%35", refused},

		// What strings end at, and lines.
		{safe, "/admin%00", refused},
		{safe, "/admin%00/../x", refused},
		{safe, "/a%0d%0ab", refused},
		{safe, "/a%1f", refused},
		{safe, "/a%7f", refused},
		{safe, "/a%80", "/a%80"},

		// Encoded slashes, and backslashes.
		{safe, "/admin%2f..", refused},
		{safe, "/a%2Fb", refused},
		{safe, "/a%5cb", refused},
		{safe, `/\admin`, refused},
		{safe, `/a\..\admin`, refused},
		{safe, "/a?b%2fc%5cd", "/a?b%2fc%5cd"},
		{keep, "/a%2fb%5cc", "/a%2Fb%5Cc"},
		{keep, "/group%2fproject/../x", "/x"},
		{keep, "/a%2f../x", refused},
		{keep, "/a%2f..", refused},
		{keep, "/a/..%2fx", refused},
		{keep, "/a/.%5cx", refused},
		{keep, "/a%2f%2e%2e%2fx", refused},
		{keep, "/a%2f%41%2f.", refused},
		{keep, "/a%2f...%2f.x", "/a%2F...%2F.x"},
		{keep, `/\admin`, refused},
		{decode, "/a%2fb", "/a/b"},
		{decode, "/a%5cb", "/a/b"},
		{decode, `/a\b`, "/a/b"},
		{decode, `/a\`, "/a/"},
		{decode, "/a/%2f/b", "/a/b"},
		{decode, "/admin%2f..", "/"},
		{decode, `/public\..\admin`, "/admin"},
		{decode, "/public%5c%2e%2e%2fadmin", "/admin"},
		{decode, `/\admin`, "/admin"},
		{urlpath.Policy{Encoded: urlpath.Decode, KeepSlashes: true}, "/a/%2fb", "/a//b"},

		// Parameters.
		{safe, "/a/..;/b", refused},
		{safe, "/a/..;x=y/b", refused},
		{safe, "/a/.;/b", refused},
		{safe, "/a/..;", refused},
		{safe, "/a/%2e%2e;/b", refused},
		{safe, "/a/..%3b/b", refused},
		{safe, "/a;x=y/b;z", "/a;x=y/b;z"},
		{safe, "/a/..a;/b", "/a/..a;/b"},
		{safe, "/a%3bb", "/a%3Bb"},
		{params, "/a;x=y/b", refused},
		{params, "/a%3bx", refused},
		{params, "/a?b;c", "/a?b;c"},

		{off, "/public/../admin//%61%zz\\%00", "/public/../admin//%61%zz\\%00"},
	}
	for _, tt := range tests {
		got, err := tt.policy.Normalise(tt.target)
		switch {
		case err != nil && tt.want != refused:
			t.Errorf("%+v: %s is refused as %v, want %s", tt.policy, tt.target, err, tt.want)
		case err == nil && got != tt.want:
			t.Errorf("%+v: %s became %s, want %q", tt.policy, tt.target, got, tt.want)
		case err != nil && got != tt.target:
			t.Errorf("%+v: %s is refused as %s", tt.policy, tt.target, got)
		}
		b, err := tt.policy.Append([]byte("x"), tt.target)
		if (err != nil) != (tt.want == refused) || string(b) != "x"+tt.want {
			t.Errorf("%+v: of %s there was appended %q, %v", tt.policy, tt.target, b, err)
		}
		if normal, err := tt.policy.IsNormal(tt.want); tt.want != refused && (!normal || err != nil) {
			t.Errorf("%+v: %s is not what it should be: %v", tt.policy, tt.want, err)
		}
	}
}

func TestResolved(t *testing.T) {
	t.Parallel()
	for target, want := range map[string]bool{
		"/":           true,
		"/a//b?/../":  true,
		"/../admin":   false,
		"/a/.":        false,
		"/a/..?x":     false,
		"/a/..;/b":    false,
		"/a%2F../b":   false,
		"/a../..b/.c": true,
	} {
		if urlpath.Resolved(target) != want {
			t.Errorf("%s: %v", target, !want)
		}
	}
}

// Every octet, whether it stands for itself or is encoded, has one spelling.
func TestEveryOctetHasOneSpelling(t *testing.T) {
	t.Parallel()
	const unreserved = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~"
	for c := range 256 {
		upper := "/x%" + strings.ToUpper(string("0123456789abcdef"[c>>4])+string("0123456789abcdef"[c&15]))
		got, err := safe.Normalise(strings.ToLower(upper))
		want := upper
		if c < 0x80 && strings.ContainsRune(unreserved, rune(c)) {
			want = "/x" + string(rune(c))
		}
		bad := c < ' ' || c == 0x7f || c == '/' || c == '\\'
		if bad != (err != nil) || !bad && got != want {
			t.Errorf("%s: got %s, %v; want %s", upper, got, err, want)
		}
	}
}

func TestWhatIsNormalAllocatesNothing(t *testing.T) { // not parallel: it counts allocations
	for _, target := range []string{"/", "/api/v1/users/%C3%A4/.well-known/a.b?q=/../%2f//", "*"} {
		if n := testing.AllocsPerRun(100, func() { safe.Normalise(target) }); n != 0 {
			t.Errorf("%s: %v allocations", target, n)
		}
	}
	b := make([]byte, 0, 100)
	if n := testing.AllocsPerRun(100, func() { safe.Append(b, "/a/%2e%2e/%c3//b?c") }); n != 0 {
		t.Errorf("%v allocations in Append", n)
	}
}

func BenchmarkIsNormal(b *testing.B) {
	for b.Loop() {
		safe.IsNormal("/api/v1/users/4711/messages/latest.json?limit=100")
	}
}
