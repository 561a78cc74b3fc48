package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/BurntSushi/toml"
	"github.com/santhosh-tekuri/jsonschema/v6"

	"holdfast/internal/config"
)

var repository = newTree("../..")

// compiled is the schema in the repository, ready for use.
var compiled = sync.OnceValue(func() *jsonschema.Schema {
	doc, err := jsonschema.UnmarshalJSON(strings.NewReader(repository.read("deploy/holdfast.schema.json")))
	if err != nil {
		panic(err)
	}
	c := jsonschema.NewCompiler()
	c.DefaultDraft(jsonschema.Draft7)
	if err := c.AddResource("holdfast.schema.json", doc); err != nil {
		panic(err)
	}
	return c.MustCompile("holdfast.schema.json")
})

// validate says what the schema has against a document.
func validate(t *testing.T, doc map[string]any) error {
	t.Helper()
	data, err := json.Marshal(doc)
	if err != nil {
		t.Fatal(err)
	}
	asJSON, err := jsonschema.UnmarshalJSON(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	return compiled().Validate(asJSON)
}

func decode(t *testing.T, data string) map[string]any {
	t.Helper()
	var doc map[string]any
	if _, err := toml.Decode(data, &doc); err != nil {
		t.Fatal(err)
	}
	return doc
}

const testdata = "internal/config/testdata/"

func TestTheSchemaTakesWhatTheLoaderTakes(t *testing.T) {
	t.Parallel()
	documents := map[string]string{}
	for _, name := range []string{sample, testdata + "minimal.toml", testdata + "effective.toml"} {
		documents[name] = repository.read(name)
	}
	for i, m := range regexp.MustCompile("(?s)\n```toml\n(# holdfast.toml.*?)\n```\n").FindAllStringSubmatch(repository.read("docs/configuration.md"), -1) {
		documents[fmt.Sprintf("sample %d of the documentation", i)] = m[1]
	}
	for name, text := range documents {
		doc := decode(t, text)
		if problems := problemsOf(doc); len(problems) > 0 {
			t.Errorf("%s: %v", name, problems)
		}
		if err := validate(t, doc); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// mustSee says whether a mistake is one that a schema can see: an unknown key, a value of
// another kind, a number out of bounds, or a word that is none of a few. These it cannot see:
//
//   - what a text must look like, where that is more than a duration or a size: there are rules
//     for names, paths, addresses, formats and expressions, and a bound of a duration is none of
//     its characters;
//   - names that refer to what is not there, and what must not be there twice;
//   - keys that need or exclude each other, or the value of another key;
//   - what depends on an order, a sum or a number of things;
//   - an integer that is written with a fraction of nothing (1.0), which is the same in JSON.
func mustSee(p *config.Problem) bool {
	if strings.HasPrefix(p.Text, "unknown key") {
		return true
	}
	wanted, found, ok := strings.Cut(strings.TrimPrefix(p.Text, "must be "), ", found ")
	if !ok || !strings.HasPrefix(p.Text, "must be ") {
		return false
	}
	if strings.HasPrefix(found, "the string ") {
		return alternatives(wanted) != nil
	}
	return slices.ContainsFunc([]string{"the integer ", "the number ", "true", "false", "a table", "an array", "a single one"}, func(kind string) bool {
		return strings.HasPrefix(found, kind)
	})
}

func TestTheSchemaSeesMistakes(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob(repository.root + "/" + testdata + "bad/*.toml")
	if err != nil || len(files) < 100 {
		t.Fatalf("%d files, %v", len(files), err)
	}
	seen := 0
	for _, file := range files {
		var doc map[string]any
		if _, err := toml.DecodeFile(file, &doc); err != nil {
			continue // an editor needs no schema for that
		}
		if validate(t, doc) != nil {
			seen++
			continue
		}
		for _, p := range problemsOf(doc) {
			if mustSee(p) {
				t.Errorf("%s: the schema takes it, but %s: %s", filepath.Base(file), p.Key, p.Text)
			}
		}
	}
	if seen < 250 {
		t.Errorf("of %d bad files the schema refuses %d only", len(files), seen)
	}
}

// Whatever is changed in a good file: what the loader takes the schema takes, and what a schema
// can see the schema refuses as the loader does.
func FuzzTheSchemaAgreesWithTheLoader(f *testing.F) {
	for seed := range uint64(150) {
		f.Add(seed)
	}
	text := repository.read(sample)
	f.Fuzz(func(t *testing.T, seed uint64) {
		doc := decode(t, text)
		change := mutate(doc, rand.New(rand.NewPCG(seed, 0)))
		refusal, problems := validate(t, doc), problemsOf(doc)
		if refusal != nil && len(problems) == 0 {
			t.Errorf("%s: the schema refuses what the loader takes: %v", change, refusal)
		}
		if i := slices.IndexFunc(problems, mustSee); i >= 0 && refusal == nil {
			t.Errorf("%s: the schema takes it, but %v", change, problems[i])
		}
	})
}

// mutate changes one thing in a document, and says what.
func mutate(doc map[string]any, r *rand.Rand) string {
	tables := map[string]map[string]any{}
	collect(tables, "", doc)
	path := pick(r, slices.Sorted(maps.Keys(tables)))
	table := tables[path]
	if len(table) == 0 || r.IntN(8) == 0 {
		table["none_such"] = "x"
		return path + ": an unknown key"
	}
	key := pick(r, slices.Sorted(maps.Keys(table)))
	if r.IntN(8) == 0 {
		delete(table, key)
		return join(path, key) + " is left out"
	}
	value := pick(r, []any{
		true, false, int64(-1), int64(0), int64(1), int64(70_000), int64(1) << 40, 0.5, 1e6 + 0.5,
		"", "x", "off", "unlimited", "none", "30s", "1.5h", "0s", "1MiB", "0B", "10 KiB", "-1s", "1", "5",
		map[string]any{}, map[string]any{"x": "y"}, []any{}, []any{"x"}, []any{int64(7)}, []any{map[string]any{}},
	})
	if array, ok := table[key].([]any); ok && len(array) > 0 && r.IntN(2) == 0 {
		array = slices.Clone(array)
		array[r.IntN(len(array))] = value
		table[key] = array
		return fmt.Sprintf("an element of %s is %#v", join(path, key), value)
	}
	table[key] = value
	return fmt.Sprintf("%s is %#v", join(path, key), value)
}

func pick[T any](r *rand.Rand, from []T) T { return from[r.IntN(len(from))] }

// collect finds all tables.
func collect(tables map[string]map[string]any, path string, v any) {
	switch v := v.(type) {
	case map[string]any:
		tables[path] = v
		for key, inner := range v {
			collect(tables, join(path, key), inner)
		}
	case []map[string]any:
		for i, e := range v {
			collect(tables, fmt.Sprintf("%s[%d]", path, i), e)
		}
	case []any:
		for i, e := range v {
			collect(tables, fmt.Sprintf("%s[%d]", path, i), e)
		}
	}
}

// The documentation says of what kind a key is, and the loader does.
func TestDocumentedKindsAreTheKinds(t *testing.T) {
	t.Parallel()
	for _, s := range repository.sections {
		for _, k := range s.keys {
			f := repository.asked()[s.name][k.name]
			if f == nil {
				t.Errorf("%s lacks %s", sample, join(s.name, k.name))
				continue
			}
			for word, says := range map[string]string{"boolean": "true or false", "duration": "duration", "size": "size"} {
				if documented := strings.HasPrefix(k.kind, word); documented != strings.Contains(f.value, says) {
					t.Errorf("%s is documented as %s, and must be %s", join(s.name, k.name), k.kind, f.value)
				}
			}
		}
	}
}

// The tool that editors use for TOML agrees, where the machine has it.
func TestTaploTakesTheSchema(t *testing.T) {
	t.Parallel()
	taplo, err := exec.LookPath("taplo")
	if err != nil {
		t.Skip("taplo is not there")
	}
	schema, err := filepath.Abs("../../deploy/holdfast.schema.json")
	if err != nil {
		t.Fatal(err)
	}
	for text, good := range map[string]bool{repository.read(sample): true, "[drain]\nidle_grace = 5\n" + repository.read(testdata+"minimal.toml"): false} {
		file := filepath.Join(t.TempDir(), "holdfast.toml")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command(taplo, "lint", "--schema", "file://"+schema, file).CombinedOutput(); good != (err == nil) {
			t.Errorf("%v\n%s", err, out)
		}
	}
}
