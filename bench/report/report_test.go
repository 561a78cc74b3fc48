package report

import (
	"bytes"
	"math"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

// sample is a run of few measures, with everything that can stand below a table.
func sample() *Run {
	r := &Run{
		Command:  "go run ./bench -modes idle,echo",
		Began:    time.Date(2026, 11, 22, 23, 30, 0, 0, time.FixedZone("", -3600)),
		Took:     Duration(95 * time.Second),
		Machine:  Machine{Kernel: "6.18.44", CPU: "A CPU", Cores: 2, Memory: 24 << 30, Go: "go1.26.8", Busy: 0.02, Stolen: 0.061},
		Sizes:    Sizes{Idle: 9000, Few: 1, Many: 1000, Rounds: 3, Slow: 1, Measured: Duration(2 * time.Second)},
		Proxies:  []Proxy{{Name: "holdfast", Title: "Holdfast", Version: "1"}, {Name: "nginx", Title: "nginx", Version: "2", Note: "not quite itself"}, {Name: "direct", Title: "no proxy"}},
		Missing:  []Missing{{"Caddy", "not to be had"}},
		Failures: []string{"nginx, crash: it did not come back"},
	}
	for measure, values := range map[string]map[string][]float64{
		"idle.private":   {"holdfast": {400, 500}, "nginx": {18_000}},
		"echo.few.cpu":   {"holdfast": {12, 10, 11.04}, "nginx": {16.56, 1, 100}},
		"echo.many.rate": {"holdfast": {50_000}, "nginx": {60_000}, "direct": {1_234_567}},
		"crash.dropped":  {"holdfast": {0}, "nginx": {521}},
		"crash.last":     {"holdfast": {0}, "nginx": {0.0123}},
	} {
		for proxy, all := range values {
			for _, v := range all {
				r.Add(measure, proxy, v)
			}
		}
	}
	return r
}

const rendered = "`go run ./bench -modes idle,echo`, on 2026-11-23, took 1m35s. Medians of 3 rounds of 2s (what starts a proxy anew: 1 round).\n" +
	"Linux 6.18.44, A CPU, 2 cores, 24 GiB; 2 % busy before, 6 % taken by its host meanwhile.\n" + `
| median | Holdfast | nginx | no proxy |
| --- | ---: | ---: | ---: |
| private memory per tunnel, B | 450 | 18,000 (40×) | – |
| **Round trips**, 1 tunnel: CPU each, µs | 11 | 16.6 (1.50×) | – |
| round trips, /s | 50,000 | 60,000 (1.20×) | 1,234,567 (25×) |
| **A relaying process killed**, 0 tunnels: dropped | 0 | 521 | – |
| last failure after, ms | 0 | 0.0123 | – |

In brackets: as a multiple of Holdfast's.

Versions: Holdfast 1; nginx 2.

nginx: not quite itself.

Not measured: Caddy: not to be had.

Did not work: nginx, crash: it did not come back.
`

func TestMarkdown(t *testing.T) {
	t.Parallel()
	if got := sample().Markdown(); got != rendered {
		t.Errorf("got\n%s\nwant\n%s", got, rendered)
	}
}

func TestInsert(t *testing.T) {
	t.Parallel()
	const begin, end = "<!-- bench: begin -->\n", "<!-- bench: end -->\n"
	const other = "<!-- vault: begin -->\nold\n<!-- vault: end -->\n"
	page := "# Title\n\n" + other + begin + "old\n" + end + "\nThe end.\n"
	want := "# Title\n\n" + other + begin + rendered + end + "\nThe end.\n"
	got, err := sample().Insert(page, "bench")
	if err != nil || got != want {
		t.Errorf("got %v\n%s", err, got)
	}
	if again, err := sample().Insert(got, "bench"); err != nil || again != got {
		t.Errorf("once more it is %v\n%s", err, again)
	}
	for _, bad := range []string{"", begin, end, end + begin, other} {
		if got, err := sample().Insert(bad, "bench"); err == nil {
			t.Errorf("%q became %q", bad, got)
		}
	}
}

// Another one than Holdfast may be what the others are compared with.
func TestTheReferenceOfARun(t *testing.T) {
	t.Parallel()
	r := sample()
	r.Reference = "nginx"
	got := r.Markdown()
	for _, want := range []string{
		"\n| **Round trips**, 1 tunnel: CPU each, µs | 11 (0.67×) | 16.6 | – |\n",
		"\n| round trips, /s | 50,000 (0.83×) | 60,000 | 1,234,567 (21×) |\n",
		"\nIn brackets: as a multiple of the column \"nginx\".\n",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("%q is not in\n%s", want, got)
		}
	}
}

func TestRunIsKeptAsItIs(t *testing.T) {
	t.Parallel()
	name := filepath.Join(t.TempDir(), "run.json")
	if err := sample().Write(name); err != nil {
		t.Fatal(err)
	}
	got, err := Read(name)
	if err != nil {
		t.Fatal(err)
	}
	if got.Markdown() != rendered || !reflect.DeepEqual(got.Values, sample().Values) {
		t.Errorf("read %+v", got)
	}
}

func TestMedian(t *testing.T) {
	t.Parallel()
	r := &Run{}
	if v, ok := r.Median("idle.private", "x"); ok {
		t.Errorf("the median of nothing is %v", v)
	}
	for _, step := range []struct{ add, want float64 }{{5, 5}, {1, 3}, {100, 5}, {7, 6}, {6, 6}} {
		r.Add("idle.private", "x", step.add)
		if got, ok := r.Median("idle.private", "x"); !ok || got != step.want {
			t.Errorf("with %v: %v, want %v", step.add, got, step.want)
		}
	}
}

func TestNumbers(t *testing.T) {
	t.Parallel()
	for v, want := range map[float64]string{
		0: "0", 1: "1", 0.5: "0.5", 0.1239: "0.124", 0.00999: "0.00999", 9.999: "10", 12.34: "12.3", 123.4: "123", 999.6: "1,000",
		1234: "1,234", 1_234_567.8: "1,234,568", -3.21: "-3.21", -1234: "-1,234", 2: "2", 2.5: "2.5", 100: "100",
	} {
		if got := number(v); got != want {
			t.Errorf("%v is written %s, want %s", v, got, want)
		}
	}
	for v, want := range map[float64]string{0.004: "0.00", 0.5: "0.50", 1: "1.00", 9.99: "9.99", 10: "10", 1234.5: "1,234"} {
		if got := ratio(v); got != want {
			t.Errorf("the ratio %v is written %s, want %s", v, got, want)
		}
	}
}

// Each target is about a line of the table, of Holdfast's and of those it is held against.
func TestTargets(t *testing.T) {
	t.Parallel()
	r := &Run{}
	for _, m := range measures {
		for _, proxy := range append(peers, Holdfast, "iocopy", Vault, NoVault, "holdfast-tls", "haproxy-tls", "nginx-tls") {
			r.Add(m.key, proxy, 1)
		}
	}
	var all bytes.Buffer
	r.WriteTargets(&all)
	if got := strings.Count(all.String(), "\n"); got != len(targets()) {
		t.Errorf("%d targets, of %d, were told:\n%s", got, len(targets()), all.String())
	}
	vault := &Run{}
	for proxy, rate := range map[string]float64{Vault: 1000, NoVault: 1155} {
		vault.Add("connect.rate", proxy, rate) // more is better
		vault.Add("connect.cpu", proxy, 1000/rate)
	}
	vault.Add("move.steady", Vault, 2)
	vault.Add("move.p99", Vault, 6)
	for _, want := range []string{
		"at least    1,100 (no-vault's 1,155 / 1.05): MISSED by 10 %\n",
		"at most     0.909 (1.05 × no-vault's 0.866): MISSED by 10 %\n",
		"at most         6 (3 × vault's 2): met\n",
	} {
		var verdict strings.Builder
		if vault.WriteTargets(&verdict); !strings.Contains(verdict.String(), want) {
			t.Errorf("%q is not in\n%s", want, verdict.String())
		}
	}
	rates := &Run{}
	rates.Add("connect.rate", "haproxy", 100)
	rates.Add("connect.rate", "nginx", 200)
	if v, words, ok := times(2, "connect.rate", peers...)(rates); v != 100 || words != "nginx's 200 / 2" || !ok {
		t.Errorf("half the best rate is %v (%s)", v, words)
	}
	best := &Run{}
	for proxy, v := range map[string]float64{"holdfast": 30, "haproxy": 40, "nginx": 20, "caddy": 50} {
		best.Add("paced.p99", proxy, v)
	}
	var verdict strings.Builder
	best.WriteTargets(&verdict)
	if !strings.HasSuffix(verdict.String(), "(1 × nginx's 20): MISSED by 50 %\n") {
		t.Errorf("beside the best of several: %s", verdict.String())
	}
	for _, c := range []struct {
		holdfast, nginx, ioCopy float64
		want                    []string
	}{
		{10, 10, 20, []string{": met", ": met"}},
		{15, 10, 20, []string{"10 (1 × nginx's 10): MISSED by 50 %", "14 (0.7 × iocopy's 20): MISSED by 7 %"}},
		{13, math.NaN(), 20, []string{": met"}},
	} {
		r := &Run{}
		for proxy, v := range map[string]float64{"holdfast": c.holdfast, "nginx": c.nginx, "iocopy": c.ioCopy} {
			if !math.IsNaN(v) {
				r.Add("echo.few.cpu", proxy, v)
			}
		}
		var got strings.Builder
		r.WriteTargets(&got)
		lines := strings.Split(strings.TrimSuffix(got.String(), "\n"), "\n")
		if len(lines) != len(c.want) {
			t.Errorf("of %+v: %s", c, got.String())
			continue
		}
		for i := range lines {
			if !strings.HasSuffix(lines[i], c.want[i]) {
				t.Errorf("of %+v: %s, want %s", c, lines[i], c.want[i])
			}
		}
	}
}
