package config

import (
	"maps"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/BurntSushi/toml"
)

const docs = "../../docs/configuration.md"

// row is a documented key.
type row struct{ key, kind, fallback string }

var (
	heading = regexp.MustCompile("^#+ `\\[+([a-z_.]+)\\]+`$")
	keyRow  = regexp.MustCompile("^\\| `([a-z0-9_]+)` \\| (.*?) \\| (.*?) \\| .*\\S \\|$")
)

// documented returns the rows of the tables below each section's heading.
func documented(t *testing.T) map[string][]row {
	t.Helper()
	rows := map[string][]row{}
	section := ""
	for line := range strings.Lines(string(readFile(t, docs))) {
		line = strings.TrimSuffix(line, "\n")
		if strings.HasPrefix(line, "#") {
			section = ""
		}
		if m := heading.FindStringSubmatch(line); m != nil {
			section = m[1]
		}
		if m := keyRow.FindStringSubmatch(line); m != nil {
			rows[section] = append(rows[section], row{m[1], m[2], m[3]})
		}
	}
	return rows
}

func TestEveryKeyIsDocumentedAndNoOtherIs(t *testing.T) {
	t.Parallel()
	got := map[string][]string{}
	for section, rows := range documented(t) {
		for _, r := range rows {
			got[section] = append(got[section], r.key)
		}
		slices.Sort(got[section])
	}
	want := vocabulary(t)
	for _, section := range want[""] {
		if want[section] == nil {
			t.Errorf("section %s is not read from good.toml", section)
		}
	}
	delete(want, "") // its keys are the sections
	for section := range maps.Keys(want) {
		if !slices.Equal(got[section], want[section]) {
			t.Errorf("section %s\n documented %v\n      known %v", section, got[section], want[section])
		}
		delete(got, section)
	}
	for section, keys := range got {
		t.Errorf("documented, but unknown: section %q with %v", section, keys)
	}
}

// A key that is left out means the same as one set to its documented default.
// Whether it does is tried in a file in which every key has a place.
func TestDocumentedDefaultsAreTheDefaults(t *testing.T) {
	t.Parallel()
	tried := 0
	for section, rows := range documented(t) {
		for _, r := range rows {
			literal, ok := strings.CutPrefix(r.fallback, "`")
			if !ok {
				continue // described in words
			}
			var v map[string]any
			if _, err := toml.Decode("v = "+strings.TrimSuffix(literal, "`"), &v); err != nil {
				t.Fatalf("%s.%s: %v", section, r.key, err)
			}
			tried++
			without, effective := goodWithout(t, section, r.key, nil)
			with, stated := goodWithout(t, section, r.key, v["v"])
			if without == nil || !reflect.DeepEqual(with, without) {
				t.Errorf("%s.%s: the default is not %s", section, r.key, r.fallback)
			}
			if effective != stated {
				t.Errorf("%s.%s: the effective configuration lacks the default %s", section, r.key, r.fallback)
			}
		}
	}
	if tried < 35 {
		t.Errorf("only %d defaults were found", tried)
	}
}

// goodWithout parses good.toml with another value for a key, or with none, in
// the last table that has the key, and returns the effective configuration as well.
func goodWithout(t *testing.T, section, key string, value any) (c *Config, effective string) {
	t.Helper()
	doc := decode(t, readFile(t, "testdata/good.toml"))
	for _, table := range slices.Backward(instances(doc, section)) {
		if _, ok := table[key]; !ok {
			continue
		}
		if delete(table, key); value != nil {
			table[key] = value
		}
		data := encode(t, doc)
		c, err := Parse("good.toml", data)
		if err != nil {
			t.Errorf("%s.%s: %v", section, key, err)
			return nil, ""
		}
		shown, err := Effective("good.toml", data)
		if err != nil {
			t.Error(err)
		}
		return c, string(shown)
	}
	return nil, ""
}

// The effective configuration has the sections and keys in this order.
func TestKeysAreDocumentedInTheOrderInWhichTheyAreShown(t *testing.T) {
	t.Parallel()
	var headings []string
	for line := range strings.Lines(string(readFile(t, docs))) {
		if m := heading.FindStringSubmatch(strings.TrimSuffix(line, "\n")); m != nil && !strings.Contains(m[1], ".") {
			headings = append(headings, m[1])
		}
	}
	if !slices.Equal(headings, sections) {
		t.Errorf("sections\ndocumented %v\n     shown %v", headings, sections)
	}
	doc, root, err := open("good.toml", readFile(t, "testdata/good.toml"))
	if err != nil {
		t.Fatal(err)
	}
	doc.config(root)
	rows := documented(t)
	seen := map[string]bool{}
	eachTable(root, func(table *table) {
		section, last := table.section(), -1
		if seen[section] = true; section == "" {
			return
		}
		for _, s := range table.settings {
			i := slices.IndexFunc(rows[section], func(r row) bool { return r.key == s.key })
			if i <= last {
				t.Errorf("%s: %s is documented before what is shown before it", table.path(), s.key)
			}
			last = i
		}
	})
	for section := range rows {
		if !seen[section] {
			t.Errorf("section %q is not shown", section)
		}
	}
}

// eachTable calls f for a table and all that it holds.
func eachTable(t *table, f func(*table)) {
	f(t)
	for _, s := range t.settings {
		switch v := s.value.(type) {
		case *table:
			eachTable(v, f)
		case []*table:
			for _, e := range v {
				eachTable(e, f)
			}
		}
	}
}

// A sample that begins with a comment with a file's name is complete. The others
// may refer to what stands elsewhere, but make no other mistake.
func TestSamplesInTheDocumentationLoad(t *testing.T) {
	t.Parallel()
	samples := regexp.MustCompile("(?s)\n```toml\n(.*?)\n```\n").FindAllStringSubmatch(string(readFile(t, docs))+string(readFile(t, "../../docs/filters.md")), -1)
	complete := 0
	for _, m := range samples {
		sample := m[1]
		if strings.HasPrefix(sample, "# holdfast.toml") {
			complete++
			if _, err := Parse("sample", []byte(sample)); err != nil {
				t.Errorf("%v\nin\n%s", err, sample)
				continue
			}
			wantEffective(t, []byte(sample))
			continue
		}
		for _, p := range problems(t, "sample", []byte(sample)) {
			if p != "sample: listeners: missing; at least one [[listeners]] is needed, with name and address" &&
				!strings.HasSuffix(p, "none is declared") {
				t.Errorf("%s\nin\n%s", p, sample)
			}
		}
	}
	if complete < 2 || len(samples) < 5 {
		t.Errorf("found %d samples, %d of them complete", len(samples), complete)
	}
}

func TestKeysToComeAreNotCalledUnknown(t *testing.T) {
	t.Parallel()
	for section, keys := range unsupported {
		for _, key := range keys {
			doc := decode(t, readFile(t, "testdata/good.toml"))
			table := instances(doc, section)[0]
			table[key] = "x"
			got := problems(t, "f", encode(t, doc))
			if len(got) != 1 || !strings.HasSuffix(got[0], key+": not supported by this version") {
				t.Errorf("%s.%s is refused with %q", section, key, got)
			}
		}
	}
}

func TestTheSampleUsesEveryKey(t *testing.T) {
	t.Parallel()
	doc := decode(t, readFile(t, "testdata/good.toml"))
	for section, keys := range vocabulary(t) {
		for _, key := range keys {
			used := slices.ContainsFunc(instances(doc, section), func(table map[string]any) bool { return table[key] != nil })
			if !used {
				t.Errorf("good.toml lacks %s.%s", section, key)
			}
		}
	}
}
