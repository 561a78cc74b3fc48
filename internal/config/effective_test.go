package config

import (
	"bytes"
	"fmt"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

// wantEffective returns the effective configuration of a good document, and fails
// where it is not what [Effective] promises.
func wantEffective(t *testing.T, data []byte) []byte {
	t.Helper()
	effective, err := Effective("f.toml", data)
	if err != nil {
		t.Fatalf("what Parse accepts is refused: %v", err)
	}
	want, err := Parse("f.toml", data)
	if err != nil {
		t.Fatalf("Effective accepts what Parse refuses: %v", err)
	}
	if len(effective) > maxFileSize {
		return effective // as good as any, but no file
	}
	got, err := Parse("effective", effective)
	if err != nil {
		t.Fatalf("%v\nin\n%s", err, effective)
	}
	if !reflect.DeepEqual(got, want) {
		t.Fatalf("\n got %+v\nwant %+v\nfrom\n%s", got, want, effective)
	}
	if again, err := Effective("effective", effective); err != nil || !bytes.Equal(again, effective) {
		t.Fatalf("of\n%s\nthe effective configuration is\n%s%v", effective, again, err)
	}
	for _, lost := range lostKeys("", decode(t, data), decode(t, effective)) {
		t.Errorf("%s is lost in\n%s", lost, effective)
	}
	return effective
}

// lostKeys lists the keys of a document that its effective configuration has not,
// apart from tables and arrays without anything in them.
func lostKeys(path string, written, effective any) (lost []string) {
	if elements := reflect.ValueOf(written); elements.Kind() == reflect.Slice {
		others := reflect.ValueOf(effective)
		if others.Kind() != reflect.Slice || others.Len() != elements.Len() {
			return []string{path}
		}
		for i := range elements.Len() {
			lost = append(lost, lostKeys(fmt.Sprintf("%s[%d]", path, i), elements.Index(i).Interface(), others.Index(i).Interface())...)
		}
		return lost
	}
	table, ok := written.(map[string]any)
	if !ok {
		return nil
	}
	for key, value := range table {
		other, ok := effective.(map[string]any)[key]
		if v := reflect.ValueOf(value); !ok && (v.Kind() == reflect.Map || v.Kind() == reflect.Slice) && v.Len() == 0 {
			continue
		}
		if !ok {
			lost = append(lost, keyPath(path, key))
		} else {
			lost = append(lost, lostKeys(keyPath(path, key), value, other)...)
		}
	}
	return lost
}

func TestTheEffectiveConfigurationOfTheSample(t *testing.T) {
	t.Parallel()
	got := wantEffective(t, readFile(t, "testdata/good.toml"))
	if want := readFile(t, "testdata/effective.toml"); !bytes.Equal(got, want) {
		t.Errorf("\n got\n%s\nwant\n%s", got, want)
	}
}

func TestTheEffectiveConfigurationHasEveryKeyThatApplies(t *testing.T) {
	t.Parallel()
	const file = `
[[listeners]]
name = "a"
address = "unix:/a"
[[listeners]]
name = "b"
address = "[::1]:80"
[[listeners]]
name = "c"
address = "systemd:c"
[[clusters]]
name = "web"
endpoints = ["10.0.0.1:80"]
[[virtual_hosts]]
name = "all"
domains = ["*"]
[[virtual_hosts.routes]]
match = { path = "/a" }
cluster = "web"
[[virtual_hosts.routes]]
match = { path = "/b" }
redirect = { path = "/a" }
[[virtual_hosts.routes]]
match = { path = "/c" }
cluster = "web"
websocket = true
`
	effective := string(wantEffective(t, []byte(file)))
	for line, want := range map[string]int{
		`mode = "0660"`:                  1, // only of the unix socket
		"ipv6_only = false":              1, // only of the IPv6 address
		`protocol = "http"`:              3,
		`listeners = ["a", "b", "c"]`:    1,
		"websocket = false":              2,
		`timeout = "15s"`:                2, // not of the redirect
		"[virtual_hosts.routes.tunnels]": 1, // only of the route that can have some
		`discovery = "static"`:           1,
		`http = "off"`:                   1,
	} {
		got := 0
		for l := range strings.Lines(effective) {
			if strings.TrimSpace(l) == line {
				got++
			}
		}
		if got != want {
			t.Errorf("%s stands there %d times, want %d, in\n%s", line, got, want, effective)
		}
	}
}

func TestTheEffectiveConfigurationQuotesWhatATerminalShouldNotGet(t *testing.T) {
	t.Parallel()
	const file = "[process]\nproxy = \"/opt/\\\"q\\\"/\\\\/\u0085/\u202e/é/\U000e0001\"\n" +
		"[[listeners]]\nname = \"a\"\naddress = 'systemd:\"\\'\n"
	got := string(wantEffective(t, []byte(file)))
	if want := `proxy = "/opt/\"q\"/\\/\u0085/\u202e/é/\U000e0001"`; !strings.Contains(got, want) {
		t.Errorf("%s is not in\n%s", want, got)
	}
}

func TestABadFileHasNoEffectiveConfiguration(t *testing.T) {
	t.Parallel()
	bad, err := filepath.Glob("testdata/bad/*.toml")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range bad {
		_, want := Parse(file, readFile(t, file))
		if got, err := Effective(file, readFile(t, file)); got != nil || err == nil || err.Error() != want.Error() {
			t.Errorf("got %s and %v, want %v", got, err, want)
		}
	}
}

func TestValuesAreWrittenAsPeopleWriteThem(t *testing.T) {
	t.Parallel()
	for d, want := range map[time.Duration]string{
		0: "0s", 250 * time.Millisecond: "250ms", 1500 * time.Millisecond: "1.5s", 20 * time.Second: "20s", time.Minute: "1m",
		10 * time.Minute: "10m", 90 * time.Second: "1m30s", 24 * time.Hour: "24h", 20 * time.Hour: "20h",
		time.Hour + 30*time.Minute: "1h30m", time.Hour + time.Second: "1h0m1s", time.Hour + 10*time.Second: "1h0m10s", longest: "87600h",
	} {
		got := writeDuration(d)
		if back, err := parseDuration(got); got != want || err != nil || back != d {
			t.Errorf("%v is written %s and read %v (%v), want %s", d, got, back, err, want)
		}
	}
	for n, want := range map[int64]string{
		0: "0B", 1: "1B", 1000: "1000B", 1 << 10: "1KiB", 1<<10 + 1: "1025B", 64 << 10: "64KiB", 1536 << 10: "1536KiB", 1 << 20: "1MiB", 3 << 30: "3GiB",
	} {
		got := writeSize(n)
		if back, err := parseSize(got); got != want || err != nil || back != n {
			t.Errorf("%d is written %s and read %d (%v), want %s", n, got, back, err, want)
		}
	}
}

func FuzzEffective(f *testing.F) {
	for _, data := range seeds(f) {
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if _, err := Parse("f.toml", data); err != nil {
			return
		}
		effective := wantEffective(t, data)
		if strings.ContainsFunc(string(effective), func(r rune) bool { return r != '\n' && printable(string(r)) != string(r) }) {
			t.Errorf("not everything in it is printable: %q", effective)
		}
	})
}

// seeds are the documents of testdata.
func seeds(f *testing.F) (seeds [][]byte) {
	for _, pattern := range []string{"testdata/*.toml", "testdata/bad/*.toml"} {
		files, err := filepath.Glob(pattern)
		if err != nil {
			f.Fatal(err)
		}
		for _, file := range files {
			seeds = append(seeds, readFile(f, file))
		}
	}
	return seeds
}
