package report

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"
)

// Holdfast is the proxy of which something is asked, and with which the others are
// compared where a run says nothing else.
const Holdfast = "holdfast"

// Vault and NoVault are Holdfast with its tunnels deposited and without.
const (
	Vault   = "vault"
	NoVault = "no-vault"
)

// A line is one of the table.
type line struct {
	key   string
	label func(Sizes) string
	unit  string
}

func text(s string) func(Sizes) string { return func(Sizes) string { return s } }

// count writes a number with a thing: "1 tunnel", "1,000 tunnels".
func count(n int, thing string) string {
	if n != 1 {
		thing += "s"
	}
	return grouped(fmt.Sprint(n)) + " " + thing
}

func of(format string, n func(Sizes) int) func(Sizes) string { return ofThe("tunnel", format, n) }

func ofThe(thing, format string, n func(Sizes) int) func(Sizes) string {
	return func(s Sizes) string { return fmt.Sprintf(format, count(n(s), thing)) }
}

func few(s Sizes) int  { return s.Few }
func many(s Sizes) int { return s.Many }
func idle(s Sizes) int { return s.Idle }

// measures are the lines, in order. Less is better in each whose unit is not "/s" or
// "GB/s".
var measures = []line{
	{"idle.tunnels", text("**Idle:** tunnels open"), ""},
	{"idle.private", text("private memory per tunnel"), "B"},
	{"idle.descriptors", text("descriptors per tunnel"), ""},
	{"idle.start", text("private memory before"), "MB"},
	{"idle.left", text("more than before, after all were closed"), "MB"},
	{"idle.above.private", text("in the process above: private memory per tunnel"), "B"},
	{"idle.above.descriptors", text("there: descriptors per tunnel"), ""},
	{"idle.above.left", text("there: more than before, after all were closed"), "MB"},
	{"echo.few.cpu", of("**Round trips**, %s: CPU each", few), "µs"},
	{"echo.few.rate", text("round trips"), "/s"},
	{"echo.many.cpu", of("%s: CPU each", many), "µs"},
	{"echo.many.rate", text("round trips"), "/s"},
	{"paced.p50", func(s Sizes) string {
		return fmt.Sprintf("**Paced**, %s, %s messages/s: p50", count(s.Many, "tunnel"), grouped(fmt.Sprint(s.Rate)))
	}, "µs"},
	{"paced.p99", text("p99"), "µs"},
	{"paced.p999", text("p99.9"), "µs"},
	{"paced.cpu", text("CPU each"), "µs"},
	{"bulk.one.cpu", text("**Bulk**, 1 tunnel: CPU per GB"), "s"},
	{"bulk.one.rate", text("throughput"), "GB/s"},
	{"bulk.few.cpu", of("%s: CPU per GB", few), "s"},
	{"bulk.few.rate", text("throughput"), "GB/s"},
	{"http.small.few.cpu", ofThe("connection", "**Small answers**, %s: CPU each", few), "µs"},
	{"http.small.few.rate", text("requests"), "/s"},
	{"http.small.many.cpu", ofThe("connection", "%s: CPU each", many), "µs"},
	{"http.small.many.rate", text("requests"), "/s"},
	{"http.16k.few.cpu", ofThe("connection", "**16 KiB**, %s: CPU each", few), "µs"},
	{"http.16k.few.rate", text("requests"), "/s"},
	{"http.16k.many.cpu", ofThe("connection", "%s: CPU each", many), "µs"},
	{"http.16k.many.rate", text("requests"), "/s"},
	{"http.1m.few.cpu", ofThe("connection", "**1 MiB**, %s: CPU each", few), "µs"},
	{"http.1m.few.rate", text("requests"), "/s"},
	{"http.1m.many.cpu", ofThe("connection", "%s: CPU each", many), "µs"},
	{"http.1m.many.rate", text("requests"), "/s"},
	{"http.paced.p50", func(s Sizes) string {
		return fmt.Sprintf("**Paced**, %s, %s small requests/s: p50", count(s.Few, "connection"), grouped(fmt.Sprint(s.Rate)))
	}, "µs"},
	{"http.paced.p99", text("p99"), "µs"},
	{"http.paced.p999", text("p99.9"), "µs"},
	{"http.paced.cpu", text("CPU each"), "µs"},
	{"http.conns.cpu", text("**A connection for each request:** CPU each"), "µs"},
	{"http.conns.rate", text("requests"), "/s"},
	{"http.idle.pss", ofThe("connection", "**Idle**, %s, each used once: memory for one (Pss)", idle), "B"},
	{"tls.full.cpu", text("**Handshakes** with a certificate: CPU each"), "µs"},
	{"tls.full.rate", text("handshakes per second of CPU"), "/s"},
	{"tls.resumed.cpu", text("with a ticket: CPU each"), "µs"},
	{"tls.resumed.rate", text("handshakes per second of CPU"), "/s"},
	{"tls.connect.cpu", text("**New tunnels over TLS** (handshake, upgrade, close): CPU each"), "µs"},
	{"tls.connect.rate", text("new tunnels per second of CPU"), "/s"},
	{"tls.echo.few.cpu", of("**Round trips over TLS**, %s: CPU each", few), "µs"},
	{"tls.echo.many.cpu", of("%s: CPU each", many), "µs"},
	{"tls.idle.private", of("**Idle over TLS**, %s: private memory per tunnel", idle), "B"},
	{"connect.cpu", text("**New tunnels** (connect, upgrade, close): CPU each"), "µs"},
	{"connect.rate", text("new tunnels"), "/s"},
	{"reload.dropped", func(s Sizes) string {
		return fmt.Sprintf("**%d reloads**, %s: dropped", s.Reloads, count(s.Held, "tunnel"))
	}, ""},
	{"reload.failed", text("failed requests and new tunnels"), ""},
	{"reload.live", text("new configuration in service after"), "ms"},
	{"reload.processes", text("processes more"), ""},
	{"reload.memory", text("memory more (Pss)"), "MB"},
	{"crash.dropped", of("**A relaying process killed**, %s: dropped", func(s Sizes) int { return s.Held }), ""},
	{"crash.failed", text("failed requests and new tunnels"), ""},
	{"crash.last", text("last failure after"), "ms"},
	{"resume.last", of("**The serving generation killed**, %s: the last one echoes after", idle), "ms"},
	{"resume.steady", text("the same echoes, with nobody killed, take"), "ms"},
	{"move.rate", of("**Moved to the next generation**, %s", idle), "/s"},
	{"move.over", text("the old process has ended after"), "ms"},
	{"move.steady", func(s Sizes) string {
		return fmt.Sprintf("%s messages/s before: p99", grouped(fmt.Sprint(s.Rate)))
	}, "µs"},
	{"move.p99", text("meanwhile: p99"), "µs"},
	{"move.max", text("meanwhile: the longest"), "µs"},
}

// more says whether more of something is better.
func more(key string) bool {
	return slices.ContainsFunc(measures, func(m line) bool { return m.key == key && strings.HasSuffix(m.unit, "/s") })
}

// Markdown returns what stands on the page: the table, and what is to be known about it.
func (r *Run) Markdown() string {
	var b strings.Builder
	r.heading(&b)
	b.WriteString("\n| median |")
	for _, p := range r.Proxies {
		fmt.Fprintf(&b, " %s |", p.Title)
	}
	b.WriteString("\n| --- |" + strings.Repeat(" ---: |", len(r.Proxies)) + "\n")
	for _, m := range measures {
		if len(r.Values[m.key]) > 0 {
			r.row(&b, m)
		}
	}
	r.footing(&b)
	return b.String()
}

func (r *Run) row(b *strings.Builder, m line) {
	label := m.label(r.Sizes)
	if m.unit != "" {
		label += ", " + m.unit
	}
	fmt.Fprintf(b, "| %s |", label)
	reference, compared := r.Median(m.key, r.reference())
	for _, p := range r.Proxies {
		value, ok := r.Median(m.key, p.Name)
		switch {
		case !ok:
			b.WriteString(" – |")
		case p.Name == r.reference() || !compared || reference <= 0 || m.unit == "":
			fmt.Fprintf(b, " %s |", number(value))
		default:
			fmt.Fprintf(b, " %s (%s×) |", number(value), ratio(value/reference))
		}
	}
	b.WriteString("\n")
}

func (r *Run) reference() string { return cmp.Or(r.Reference, Holdfast) }

// referred is whose multiples stand in brackets, in words.
func (r *Run) referred() string {
	for _, p := range r.Proxies {
		if p.Name == r.Reference {
			return fmt.Sprintf("the column %q", p.Title)
		}
	}
	return "Holdfast's"
}

func (r *Run) heading(b *strings.Builder) {
	s := r.Sizes
	fmt.Fprintf(b, "`%s`, on %s, took %s. Medians of %s of %s (what starts a proxy anew: %s).\n",
		r.Command, r.Began.UTC().Format(time.DateOnly), time.Duration(r.Took),
		count(s.Rounds, "round"), time.Duration(s.Measured), count(s.Slow, "round"))
	m := r.Machine
	fmt.Fprintf(b, "Linux %s, %s, %s, %.0f GiB; %.0f %% busy before, %.0f %% taken by its host meanwhile.\n",
		m.Kernel, cmp.Or(m.CPU, "unknown CPU"), count(m.Cores, "core"), float64(m.Memory)/(1<<30), 100*m.Busy, 100*m.Stolen)
}

func (r *Run) footing(b *strings.Builder) {
	fmt.Fprintf(b, "\nIn brackets: as a multiple of %s.\n\nVersions: ", r.referred())
	var versions []string
	for _, p := range r.Proxies {
		if p.Version != "" {
			versions = append(versions, p.Title+" "+p.Version)
		}
	}
	b.WriteString(strings.Join(versions, "; ") + ".\n")
	for _, p := range r.Proxies {
		if p.Note != "" {
			fmt.Fprintf(b, "\n%s: %s.\n", p.Title, p.Note)
		}
	}
	for _, m := range r.Missing {
		fmt.Fprintf(b, "\nNot measured: %s: %s.\n", m.Title, m.Why)
	}
	for _, f := range r.Failures {
		fmt.Fprintf(b, "\nDid not work: %s.\n", f)
	}
}

// ratio writes how many times as much something is, to the hundredth, or coarser where
// that says nothing.
func ratio(v float64) string {
	if v >= 10 {
		return grouped(fmt.Sprintf("%.0f", v))
	}
	return fmt.Sprintf("%.2f", v)
}

// number writes a value with three digits, or all where it has more before the point.
func number(v float64) string {
	if v == 0 {
		return "0"
	}
	digits := int(math.Floor(math.Log10(math.Abs(v)))) + 1
	s := fmt.Sprintf("%.*f", max(0, 3-digits), v)
	if strings.Contains(s, ".") {
		s = strings.TrimRight(strings.TrimRight(s, "0"), ".")
	}
	return grouped(s)
}

// grouped puts commas between the thousands of a number.
func grouped(s string) string {
	whole, rest := s, ""
	if at := strings.IndexByte(s, '.'); at >= 0 {
		whole, rest = s[:at], s[at:]
	}
	sign := ""
	if strings.HasPrefix(whole, "-") {
		sign, whole = "-", whole[1:]
	}
	for at := len(whole) - 3; at > 0; at -= 3 {
		whole = whole[:at] + "," + whole[at:]
	}
	return sign + whole + rest
}

// A block of the page stands between these.
const (
	beginOf = "<!-- %s: begin -->\n"
	endOf   = "<!-- %s: end -->\n"
)

// Insert returns a page with what is in a block replaced by the run's table.
func (r *Run) Insert(page, block string) (string, error) {
	begin, end := fmt.Sprintf(beginOf, block), fmt.Sprintf(endOf, block)
	before, rest, ok := strings.Cut(page, begin)
	_, after, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		return "", fmt.Errorf("the page lacks %q or, after it, %q", begin, end)
	}
	return before + begin + r.Markdown() + end + after, nil
}
