package config

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"holdfast/internal/accesslog/flags"
	"holdfast/internal/accesslog/format"
	"holdfast/internal/headers"
)

// Recording is what an access log has of requests and tunnels, and how.
type Recording struct {
	Format string         // "json" or "text"; without meaning beside Custom
	Custom *format.Format // nil: none
	Events []string       // at least one of LogEvents
	Filter RecordingFilter
}

// LogEvents are the events of which there are records.
var LogEvents = []string{"request", "tunnel_open", "tunnel_close"}

// RecordingFilter says which of its records an access log has. What is left at zero is no
// condition.
type RecordingFilter struct {
	Any          bool          // one condition is enough; otherwise all must hold
	Statuses     []StatusRange // one of them
	MinDuration  time.Duration
	Flags        flags.Set // one of them
	Headers      []HeaderCondition
	Sample       *Dynamic // a percentage; nil: no condition
	HealthChecks bool     // whether answers of a health-check responder are recorded
}

// StatusRange is some statuses, with both ends.
type StatusRange struct{ From, To int }

// HeaderCondition is one about a field of a request.
type HeaderCondition struct {
	Name   string
	How    string // "present", or how it is compared with Text: "exact", "prefix", "suffix" or "contains"
	Text   string
	Invert bool
}

// readAccessLogs reads what the supervisor needs to know.
func readAccessLogs(tables []*table) []AccessLog {
	var logs []AccessLog
	seen := map[string]node{}
	for _, t := range tables {
		var l AccessLog
		need(t, "path", &l.Path, accessLogPath)
		if first, twice := seen[l.Path]; twice {
			t.at("path").fail("%s is already the path of another one (%s)", quote(l.Path), first)
		}
		if l.Path != "" {
			seen[l.Path] = t.at("path")
		}
		logs = append(logs, l)
	}
	return logs
}

var accessLogPath = form[string]{`"stdout", or an absolute path like "/var/log/holdfast/access.log"`, func(s string) (string, error) {
	if s == Stdout {
		return s, nil
	}
	return parseFilePath(s, maxPath)
}, asIs}

// readRecordings reads the rest of the same tables.
func readRecordings(tables []*table) []Recording {
	var all []Recording
	for _, t := range tables {
		r := Recording{Format: "json"}
		read(t, "format", &r.Format, logFormat)
		r.Custom = readTextFormat(t)
		if object := readJSONFormat(t); t.has("json_format") {
			r.Custom = object
		}
		switch {
		case t.has("text_format") && t.has("json_format"):
			t.inapplicable("json_format", "there is a text_format; a line has one format")
		case t.has("text_format"):
			t.inapplicable("format", "there is a text_format, which says it all")
		case t.has("json_format"):
			t.inapplicable("format", "there is a json_format, which says it all")
		}
		r.Events = readEvents(t)
		r.Filter = readFilter(t.table("filter"))
		t.strict()
		all = append(all, r)
	}
	return all
}

func readTextFormat(t *table) *format.Format {
	var made *format.Format
	var written string
	read(t, "text_format", &written, form[string]{`a format like "%START_TIME% %RESPONSE_CODE%"`, func(s string) (_ string, err error) {
		made, err = format.Text(s)
		return s, inFormat(err)
	}, asIs})
	return made
}

// inFormat adds to an error in a format what its reader may have meant.
func inFormat(err error) error {
	if unknown, ok := errors.AsType[*format.UnknownError](err); ok {
		return fmt.Errorf("%w; %s", err, suggest(unknown.Name, unknown.Known))
	}
	return err
}

// readJSONFormat reads a table of which the keys are free.
func readJSONFormat(t *table) *format.Format {
	n, ok := t.get("json_format")
	if !ok {
		return nil
	}
	keys, isTable := n.raw.(map[string]any)
	if !isTable {
		n.fail("must be a table, found %s", describe(n.raw))
		return nil
	}
	values := map[string]string{}
	pairs := make([]string, 0, len(keys))
	for _, key := range slices.Sorted(maps.Keys(keys)) {
		s, isString := keys[key].(string)
		if !isString {
			newTable(n).at(key).fail("must be a string with operators, found %s", describe(keys[key]))
			continue
		}
		values[key] = s
		pairs = append(pairs, keyPath("", key)+" = "+strconv.Quote(s))
	}
	if len(values) < len(keys) {
		return nil
	}
	made, err := format.JSON(values)
	if of, ok := errors.AsType[*format.KeyError](err); ok {
		newTable(n).at(of.Key).fail("%v", inFormat(of.Err))
	} else if err != nil {
		n.fail("%v", err)
	}
	t.set("json_format", "{ "+strings.Join(pairs, ", ")+" }")
	return made
}

// readEvents reads a choice that is everything where it is not made.
func readEvents(t *table) []string {
	if !t.has("events") {
		t.get("events")
		t.set("events", quoteAll(LogEvents))
		return LogEvents
	}
	var events []string
	for _, e := range list(t, "events", oneOf(LogEvents...)) {
		if slices.Contains(events, e.value) {
			e.fail("%s is listed twice", quote(e.value))
		}
		events = append(events, e.value)
	}
	if t.empty("events") {
		t.at("events").fail("must have at least one of %s", alternatives(LogEvents))
	}
	return events
}

func readFilter(t *table) RecordingFilter {
	f := RecordingFilter{HealthChecks: true}
	read(t, "match", &f.Any, either("all", "any"))
	for _, e := range list(t, "status", statusRange) {
		f.Statuses = append(f.Statuses, e.value)
	}
	read(t, "min_duration", &f.MinDuration, durationOrZero)
	for _, e := range list(t, "flags", flagOrAny) {
		f.Flags |= e.value
	}
	if t.has("sample") {
		f.Sample = new(Dynamic)
		t.percent("sample", f.Sample)
		t.runtimeKey("runtime_key", f.Sample)
	} else {
		t.get("sample")
		t.get("runtime_key")
		t.inapplicable("runtime_key", "it is that of a sample, and there is none")
	}
	t.boolean("health_checks", &f.HealthChecks)
	declared := map[string]node{}
	if t.get("headers"); t.has("headers") {
		for _, h := range t.tables("headers") {
			f.Headers = append(f.Headers, readHeaderCondition(h, declared))
		}
	}
	t.strict()
	return f
}

// statusRange is one status, or several that follow each other.
var statusRange = form[StatusRange]{`statuses like "404", "5xx" or "400-499", or "0" for none`, func(s string) (r StatusRange, err error) {
	if len(s) == 3 && s[1:] == "xx" && '1' <= s[0] && s[0] <= '5' {
		from := 100 * int(s[0]-'0')
		return StatusRange{from, from + 99}, nil
	}
	if s == "0" {
		return r, nil
	}
	from, to, isRange := strings.Cut(s, "-")
	if !isRange {
		to = from
	}
	var ok [2]bool
	r.From, ok[0] = status(from)
	r.To, ok[1] = status(to)
	switch {
	case !ok[0] || !ok[1]:
		return r, errForm
	case r.From > r.To:
		return r, errors.New("its end comes before its beginning")
	}
	return r, nil
}, func(r StatusRange) string {
	switch {
	case r.From == r.To:
		return strconv.Itoa(r.From)
	case r.From%100 == 0 && r.To == r.From+99:
		return strconv.Itoa(r.From/100) + "xx"
	}
	return fmt.Sprintf("%d-%d", r.From, r.To)
}}

// status reads what a status may be.
func status(s string) (n int, ok bool) {
	n, err := strconv.Atoi(s)
	return n, err == nil && len(s) == 3 && n >= 100 && n <= 599
}

// flagOrAny is a response flag, or all of them.
var flagOrAny = form[flags.Set]{`a response flag like "UT", or "any"`, func(s string) (flags.Set, error) {
	if s == "any" {
		return flags.Known, nil
	}
	f, ok := flags.Parse(s)
	if !ok {
		known := make([]string, len(flags.All))
		for i, f := range flags.All {
			known[i] = f.Name
		}
		return 0, errors.New("known are " + strings.Join(known, ", "))
	}
	return f, nil
}, func(f flags.Set) string {
	if f == flags.Known {
		return "any"
	}
	return f.String()
}}

// conditions are the ways in which a field can be looked at.
var conditions = []string{"exact", "prefix", "suffix", "contains"}

func readHeaderCondition(t *table, declared map[string]node) HeaderCondition {
	var h HeaderCondition
	need(t, "name", &h.Name, loggedField)
	if n := t.at("name"); h.Name != "" {
		key := strings.ToLower(h.Name)
		if other, taken := declared[key]; taken {
			n.fail("%s is already the name of another one (%s)", quote(h.Name), other)
		}
		declared[key] = n
	}
	ways := 0
	present := true
	if t.has("present") {
		ways++
		h.How = "present"
		t.boolean("present", &present)
	}
	t.get("present")
	for _, how := range conditions {
		if t.has(how) {
			ways++
			h.How = how
			read(t, how, &h.Text, loggedText)
		}
		t.get(how)
	}
	t.boolean("invert", &h.Invert)
	switch {
	case ways != 1:
		t.fail("needs one of present, %s, has %d of them", strings.Join(conditions, ", "), ways)
	case h.How == "present" && t.has("invert"):
		t.inapplicable("invert", "present says it")
	case h.How == "present":
		t.inapplicable("invert", "")
	}
	h.Invert = h.Invert || !present
	t.strict()
	return h
}

// loggedField is the name of a field of a head (RFC 9110 §5.1).
var loggedField = form[string]{`the name of a header field like "X-Name"`, func(s string) (string, error) {
	if !isToken(s) || len(s) > 128 {
		return "", errForm
	}
	if headers.OfCodec(s) {
		return "", errOfOneHop
	}
	return s, nil
}, asIs}

// loggedText is what a field is compared with.
var loggedText = form[string]{"a text of 1 to 1024 bytes", func(s string) (string, error) {
	switch {
	case s == "" || len(s) > 1024:
		return "", errForm
	case hasControl(s):
		return "", errControl
	}
	return s, nil
}, asIs}
