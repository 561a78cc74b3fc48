package config_test

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"holdfast/internal/config"
)

func TestOverridesAreNumbersUnderDottedKeys(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, file string
		want       map[string]float64
	}{
		{"flat", "weight = 10\nshare = 0.5\n", map[string]float64{"weight": 10, "share": 0.5}},
		{"nested, dotted and quoted mean the same", "\"a.b\" = 1\na.c = 2\n[d]\ne = 3\n[d.f]\ng = -4\n", map[string]float64{"a.b": 1, "a.c": 2, "d.e": 3, "d.f.g": -4}},
		{"nothing", "", map[string]float64{}},
		{"remarks", "# nothing\n", map[string]float64{}},
		{"tables without anything", "[a]\n[b.c]\n", map[string]float64{}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			got, err := config.ParseOverrides("r.toml", []byte(c.file))
			if err != nil || !maps.Equal(got, c.want) {
				t.Errorf("got %v, %v; want %v", got, err, c.want)
			}
		})
	}
}

func TestAFileWithAMistakeOverridesNothing(t *testing.T) {
	t.Parallel()
	many := new(strings.Builder)
	for i := range config.MaxOverrides + 1 {
		fmt.Fprintf(many, "k%d = 1\n", i)
	}
	for _, c := range []struct{ name, file, want string }{
		{"the last line is half there", "weight = 1", "r.toml: the last line has no end: it may be half written"},
		{"no TOML", "weight = \n", "r.toml:1: not valid TOML"},
		{"a string", "good = 1\nweight = \"10\"\n", `r.toml:2: weight: must be a number from -1e+12 to 1e+12, found the string "10"`},
		{"an array", "a = [1]\n", "r.toml:1: a: must be a number"},
		{"an array of tables", "[[a]]\nb = 1\n", "r.toml:1: a: must be a number"},
		{"a truth", "a.b = true\n", "r.toml:1: a.b: must be a number"},
		{"no number", "a = nan\n", "r.toml:1: a: must be a number"},
		{"infinity", "a = -inf\n", "r.toml:1: a: must be a number"},
		{"too large", "a = 1e13\n", "r.toml:1: a: must be a number"},
		{"a key that nothing can have", "\"a b\" = 1\n", `r.toml:1: "a b": is no runtime key: it must be a name of 1 to 128 letters`},
		{"a key that is too long by its table", "[" + strings.Repeat("a", 100) + "]\n" + strings.Repeat("b", 100) + " = 1\n", "is no runtime key"},
		{"twice", "a.b = 1\n\"a.b\" = 2\n", `"a.b" is there twice`},
		{"too many", many.String(), "has 1001 numbers; at most 1000 can be overridden"},
		{"more mistakes than are of use", strings.ReplaceAll(many.String(), "= 1", "= true"), "and 981 mistakes more"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			got, err := config.ParseOverrides("r.toml", []byte(c.file))
			if got != nil || err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, %v; want %q", got, err, c.want)
			}
		})
	}
}

func TestOnlyAFileOfABoundedSizeIsReadForOverrides(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	if err := os.WriteFile(path("good"), []byte("a = 1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path("large"), []byte("#"+strings.Repeat("x", 256<<10)), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(path("fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	if data, err := config.ReadOverrides(path("good")); err != nil || string(data) != "a = 1\n" {
		t.Errorf("got %q, %v", data, err)
	}
	for name, want := range map[string]string{"large": "more than 256 KiB", "fifo": "not a regular file", ".": "not a regular file", "missing": "no such file"} {
		if _, err := config.ReadOverrides(path(name)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %q", name, err, want)
		}
	}
}

func TestPlacesOfRuntimeKeysAreKnown(t *testing.T) {
	t.Parallel()
	_, keys, err := config.ParseWithKeys("good.toml", testdata(t, "good.toml"))
	if err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(keys["chat.v2.weight"]); got != "[virtual_hosts[0].routes[0].weighted_clusters[1]]" {
		t.Errorf("got %s", got)
	}
}

// Whatever is in the file, it is refused or is a bounded number of numbers that can be told
// to a generation.
func FuzzParseOverrides(f *testing.F) {
	for _, seed := range []string{"", "a = 1\n", "[a]\nb.c = 0.5\n\"d.e\" = -1e3\n", "a = 1", "a = nan\n", "[[a]]\n", "a.b = 1\n\"a.b\" = 2\n", "\xef\xbb\xbfa = 1\n", "a = 0x10\n"} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		values, err := config.ParseOverrides("r.toml", data)
		if (values == nil) == (err == nil) || len(values) > config.MaxOverrides {
			t.Fatalf("%v, %v", values, err)
		}
		for key, v := range values {
			if config.CheckRuntimeKey(key) != nil || config.CheckOverride(v) != nil {
				t.Errorf("%q = %v", key, v)
			}
		}
	})
}
