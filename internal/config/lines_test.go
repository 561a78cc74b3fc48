package config

import (
	"errors"
	"maps"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/BurntSushi/toml"
)

func TestEveryKeyHasItsLine(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		doc  string
		want map[string]int
	}{
		"keys and tables": {
			"a = 1\n\n[t] # comment\nb = 2\n[t.u]\nc = 3\n",
			map[string]int{"a": 1, "t": 3, "t.b": 4, "t.u": 5, "t.u.c": 6},
		},
		"arrays of tables and what is inside": {
			"[[a]]\nx = 1\n[[a.b]]\n[[a.b]]\ny = 2\n[a.c]\nz = 1\n[[a]]\n[[a.b]]\ny = 3\n",
			map[string]int{
				"a": 1, "a[0]": 1, "a[0].x": 2, "a[0].b": 3, "a[0].b[0]": 3, "a[0].b[1]": 4, "a[0].b[1].y": 5, "a[0].c": 6,
				"a[0].c.z": 7, "a[1]": 8, "a[1].b": 9, "a[1].b[0]": 9, "a[1].b[0].y": 10,
			},
		},
		"a table named by its header rather than by an inner one before it": {
			"[a.b]\nx = 1\n[a]\ny = 2\n",
			map[string]int{"a": 3, "a.b": 1, "a.b.x": 2, "a.y": 4},
		},
		"dotted and quoted keys": {
			"a . \"b c\" .'d.e' = 1\n\"\\u0041\\t\" = 2\n\"\" = 3\n",
			map[string]int{"a": 1, `a."b c"`: 1, `a."b c"."d.e"`: 1, `"A\t"`: 2, `""`: 3},
		},
		"inline tables and arrays": {
			"a = [ # one\n  { b = 1, c = [2,\n 3] },\n  {},\n]\nd = { e.f = 1 }\n",
			map[string]int{
				"a": 1, "a[0]": 2, "a[0].b": 2, "a[0].c": 2, "a[0].c[0]": 2, "a[0].c[1]": 3, "a[1]": 4,
				"d": 6, "d.e": 6, "d.e.f": 6,
			},
		},
		"strings that look like something else": {
			"a = \"\"\"\n[x]\nb = \\\"\"\"c\"\"\"\"\"\nd = '''\n# ''e = 1'''\nf = \"# [\\\"\"\ng = '\\'\nh = 1\n",
			map[string]int{"a": 1, "d": 4, "f": 6, "g": 7, "h": 8},
		},
		"other values": {
			"a = 1979-05-27 07:32:00 # x\nb = [ true,inf ]\r\nc = -1_0.5e3",
			map[string]int{"a": 1, "b": 2, "b[0]": 2, "b[1]": 2, "c": 3},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if _, err := toml.Decode(c.doc, new(map[string]any)); err != nil {
				t.Fatalf("the document is no TOML: %v", err)
			}
			got, err := keyLines(c.doc)
			if err != nil {
				t.Fatal(err)
			}
			if !maps.Equal(got, c.want) {
				t.Errorf("\n got %v\nwant %v", got, c.want)
			}
		})
	}
}

func TestTheScanEndsWhereADocumentIsMalformed(t *testing.T) {
	t.Parallel()
	for _, doc := range []string{
		"a", "a 1", "a =", "[a", "[[a]", "[]", "= 1", "a = 'x", "a = \"x\ny\"", "a = \"\"\"x", "a = ['' 2]", "a = [", "a = {b = 1",
		"a = {b = '' c = 2}", "a = {,}", "\"a", "\"\\q\" = 1", "a..b = 1", "a # b",
	} {
		if _, err := keyLines("ok = 1\n" + doc); err != errSyntax {
			t.Errorf("%q ends with %v", doc, err)
		}
	}
	for _, doc := range []string{
		strings.Repeat("a.", 17) + "a = 1", "a = " + strings.Repeat("[", 17), "a = " + strings.Repeat("{ a = ", 17),
		"[" + strings.Repeat("a.", 17) + "a]", "\"" + strings.Repeat(`\t`, 1000) + "\" = 1",
	} {
		_, err := keyLines("ok = 1\n" + doc)
		if p, ok := errors.AsType[*Problem](err); !ok || p.Line != 2 {
			t.Errorf("%.40q… ends with %v", doc, err)
		}
	}
}

func FuzzKeyLines(f *testing.F) {
	for _, doc := range []string{
		"a = 1\n[b]\nc.d = 2\n[[e]]\n[[e.f]]\ng = {h = [1, {i = 2}]}\n",
		"\"a\\\"b\" = '''x'''\n'c' = \"\"\"\n\\\n\"\"\"\"\"\n",
		"\xef\xbb\xbfa = [ # x\n1,\n2 ]\r\n",
		"a = \"\"\"\\\"\"\"\"\nb = \"\"\"\"\"\"\n",
		"a = {b = 1, # x\n c = 2,\n}\n",
	} {
		f.Add(doc)
	}
	f.Fuzz(func(t *testing.T, doc string) {
		lines, err := keyLines(doc)
		md, tomlErr := toml.Decode(doc, new(map[string]any))
		if tomlErr != nil {
			return
		}
		if _, tooLarge := errors.AsType[*Problem](err); tooLarge {
			return
		}
		if err != nil {
			t.Fatalf("the scanner stops at a valid document: %v", err)
		}
		// The library lists keys without the indices of arrays.
		found := map[string]bool{}
		last := 1 + strings.Count(doc, "\n")
		for path, line := range lines {
			if line < 1 || line > last {
				t.Errorf("%s is in line %d of %d", path, line, last)
			}
			found[withoutIndices(path)] = true
		}
		for _, key := range md.Keys() {
			path := ""
			for _, name := range key {
				path = keyPath(path, name)
			}
			if !found[withoutIndices(path)] {
				t.Errorf("no line for %s, only for %v", path, slices.Sorted(maps.Keys(lines)))
			}
		}
	})
}

// withoutIndices also drops what looks like an index in a quoted name.
func withoutIndices(path string) string { return indices.ReplaceAllString(path, "") }

// indices are the parts of a key path that differ between elements of an array.
var indices = regexp.MustCompile(`\[[0-9]+\]`)

func TestNearest(t *testing.T) {
	t.Parallel()
	words := []string{"cluster", "websocket", "timeout", "tls"}
	for word, want := range map[string]string{
		"clsuter":    "cluster",
		"clusters":   "cluster",
		"web_socket": "websocket",
		"timeuot":    "timeout",
		"tsl":        "tls",
		"xyz":        "",
		"":           "",
	} {
		if got := nearest(word, words); got != want {
			t.Errorf("nearest to %q is %q, want %q", word, got, want)
		}
	}
}
