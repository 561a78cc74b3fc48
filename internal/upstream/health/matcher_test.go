package health_test

import (
	"bytes"
	"testing"

	"holdfast/internal/upstream/health"
)

// matches is what a Matcher is to say, in the plainest way.
func matches(stream []byte, texts [][]byte) bool {
	for _, t := range texts {
		i := bytes.Index(stream, t)
		if i < 0 {
			return false
		}
		stream = stream[i+len(t):]
	}
	return true
}

func TestTextsAreFoundOneBehindTheOther(t *testing.T) {
	t.Parallel()
	texts := func(s ...string) (b [][]byte) {
		for _, t := range s {
			b = append(b, []byte(t))
		}
		return b
	}
	for name, test := range map[string]struct {
		stream string
		texts  [][]byte
		want   bool
	}{
		"nothing is found in nothing":         {"", nil, true},
		"a text":                              {"+PONG\r\n", texts("PONG"), true},
		"not there":                           {"-ERR\r\n", texts("PONG"), false},
		"with something between":              {"220 mail ESMTP ready", texts("220", "ESMTP"), true},
		"in another order":                    {"ESMTP 220", texts("220", "ESMTP"), false},
		"they do not overlap":                 {"aba", texts("ab", "ba"), false},
		"the same one twice":                  {"abab", texts("ab", "ab"), true},
		"one that begins like itself":         {"aaab", texts("aab"), true},
		"one that begins like itself, longer": {"abababac", texts("ababac"), true},
		"cut off":                             {"PON", texts("PONG"), false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for step := 1; step <= len(test.stream)+1; step++ {
				m := health.Match{Of: health.NewMatcher(test.texts...)}
				for rest := []byte(test.stream); len(rest) > 0; {
					n := min(step, len(rest))
					m.Feed(rest[:n])
					rest = rest[n:]
				}
				if m.Done() != test.want {
					t.Errorf("in pieces of %d bytes: %t", step, m.Done())
				}
			}
		})
	}
}

func FuzzMatcher(f *testing.F) {
	f.Add([]byte("220 mail ESMTP"), []byte("220"), []byte("ESMTP"), uint8(3))
	f.Add([]byte("aaab"), []byte("aab"), []byte("b"), uint8(1))
	f.Add([]byte("abababacabab"), []byte("ababac"), []byte("abab"), uint8(2))
	f.Add([]byte{0, 0, 1, 0, 0, 0, 1}, []byte{0, 0, 0, 1}, []byte{0}, uint8(7))
	f.Fuzz(func(t *testing.T, stream, one, two []byte, step uint8) {
		var texts [][]byte
		for _, b := range [][]byte{one, two} {
			if len(b) > 0 {
				texts = append(texts, b)
			}
		}
		m := health.Match{Of: health.NewMatcher(texts...)}
		n := int(step) + 1
		for rest := stream; len(rest) > 0; {
			n := min(n, len(rest))
			if m.Feed(rest[:n]) != m.Done() {
				t.Fatal("Feed and Done disagree")
			}
			rest = rest[n:]
		}
		if want := matches(stream, texts); m.Done() != want {
			t.Errorf("%q in %q in steps of %d: %t, want %t", texts, stream, n, m.Done(), want)
		}
	})
}
