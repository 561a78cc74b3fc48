package config

import (
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/BurntSushi/toml"
)

func readFile(t testing.TB, name string) []byte {
	t.Helper()
	data, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// decode is for tests that change a document before they parse it.
func decode(t *testing.T, data []byte) map[string]any {
	t.Helper()
	var doc map[string]any
	if _, err := toml.Decode(string(data), &doc); err != nil {
		t.Fatal(err)
	}
	return doc
}

func encode(t *testing.T, doc map[string]any) []byte {
	t.Helper()
	data, err := toml.Marshal(doc)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// instances returns every table of a section, such as "virtual_hosts.routes.match".
func instances(doc map[string]any, section string) []map[string]any {
	tables := []map[string]any{doc}
	for name := range strings.FieldsFuncSeq(section, func(r rune) bool { return r == '.' }) {
		var inner []map[string]any
		for _, t := range tables {
			switch v := t[name].(type) {
			case map[string]any:
				inner = append(inner, v)
			case []map[string]any:
				inner = append(inner, v...)
			case []any:
				for _, e := range v {
					if m, ok := e.(map[string]any); ok {
						inner = append(inner, m)
					}
				}
			}
		}
		tables = inner
	}
	return tables
}

// problems parses as Parse does and returns the errors' texts.
func problems(t *testing.T, name string, data []byte) []string {
	t.Helper()
	_, err := Parse(name, data)
	if err == nil {
		return nil
	}
	return strings.Split(err.Error(), "\n")
}

// vocabulary returns every key that the loader knows, by section.
func vocabulary(t *testing.T) map[string][]string {
	t.Helper()
	doc, root, err := open("good.toml", readFile(t, filepath.Join("testdata", "good.toml")))
	if err != nil {
		t.Fatal(err)
	}
	doc.config(root)
	keys := maps.Clone(doc.vocabulary)
	for section := range keys {
		keys[section] = slices.Sorted(slices.Values(keys[section]))
	}
	return keys
}
