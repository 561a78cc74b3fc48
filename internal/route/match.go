package route

import (
	"fmt"
	"iter"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"holdfast/internal/config"
	"holdfast/internal/dynamic"
)

// Query is what a request is matched by. Its strings are not kept.
type Query struct {
	Listener  string // the name of the one that the request came in on
	Authority string
	Target    string
	Method    string
	Fields    Fields        // of the request's header; nil: none
	Client    netip.Addr    // the zero value for one without an address
	Random    func() uint64 // evenly spread over all uint64, asked for each fraction on the way; nil: always 0
}

// Fields are field lines of a header, in their order.
type Fields interface {
	Len() int
	Line(i int) (name, value string)
}

// valuesOf yields the values of a field.
func valuesOf(fields Fields, name string) iter.Seq[string] {
	return func(yield func(string) bool) {
		for i := range fields.Len() {
			if n, value := fields.Line(i); strings.EqualFold(n, name) && !yield(value) {
				return
			}
		}
	}
}

// pattern is what a route asks of the path.
type pattern struct {
	kind  patternKind
	fold  bool   // ASCII letters compare without case; text is in lower case then
	text  string // of all but a regex
	regex *regexp.Regexp
}

type patternKind uint8

const (
	byPrefix patternKind = iota
	bySegments
	byPath
	byRegex
)

func newPattern(m *config.Match) pattern {
	p := pattern{fold: m.IgnoreCase, text: m.Prefix + m.Path, regex: m.Regex} // one of the two is empty
	switch {
	case m.Regex != nil:
		p.kind = byRegex
	case m.Path != "":
		p.kind = byPath
	case m.Segments:
		p.kind = bySegments
	}
	if p.fold {
		p.text = lower(p.text)
	}
	return p
}

// matches compares bytes: the prefix "/socket" matches "/sockets" too, as it does in Envoy,
// unless it ends with a segment.
func (p *pattern) matches(path string) bool {
	switch p.kind {
	case byPrefix:
		return p.begins(path)
	case bySegments:
		return p.begins(path) && (len(path) == len(p.text) || path[len(p.text)] == '/')
	case byPath:
		return len(path) == len(p.text) && p.begins(path)
	}
	return matchesRegex(p.regex, path)
}

func (p *pattern) begins(path string) bool {
	if !p.fold {
		return strings.HasPrefix(path, p.text)
	}
	return len(path) >= len(p.text) && equalFold(path[:len(p.text)], p.text)
}

// equalFold compares ASCII letters of s without case. lowered is in lower case, and as long.
func equalFold(s, lowered string) bool {
	for i := range len(s) {
		c := s[i]
		if 'A' <= c && c <= 'Z' {
			c += 'a' - 'A'
		}
		if c != lowered[i] {
			return false
		}
	}
	return true
}

// matchesRegex bounds the time that an expression of the configuration takes on a text that a
// client has chosen.
func matchesRegex(r *regexp.Regexp, text string) bool {
	return len(text) <= config.MostRegexText && r.MatchString(text)
}

// sourceOf is the expression as the configuration has it, without what makes it match the
// whole text.
func sourceOf(r *regexp.Regexp) string {
	_, s, _ := strings.Cut(r.String(), ":")
	return strings.TrimSuffix(s, ")$")
}

// name is the pattern as routes are called by it.
func (p *pattern) name() string {
	equals := "="
	if p.fold {
		equals = "~"
	}
	switch p.kind {
	case byPath:
		return "path" + equals + p.text
	case bySegments:
		return "prefix" + equals + p.text + " segments" // no path has a space in it
	case byRegex:
		const most = 100
		s := sourceOf(p.regex)
		if len(s) > most {
			s = strings.ToValidUTF8(s[:most], "") + " #" + mark(s)
		}
		return "regex" + equals + s
	}
	return "prefix" + equals + p.text
}

// miss says why the path does not match.
func (p *pattern) miss(path string) string {
	what := ""
	switch p.kind {
	case byPath:
		what = fmt.Sprintf("is not %q", p.text)
	case bySegments:
		what = fmt.Sprintf("does not begin with the segments of %q", p.text)
	case byRegex:
		if len(path) > config.MostRegexText {
			return fmt.Sprintf("the path has more than %d bytes, on which no regex is tried", config.MostRegexText)
		}
		what = fmt.Sprintf("does not match the regex %q", sourceOf(p.regex))
	default:
		what = fmt.Sprintf("does not begin with %q", p.text)
	}
	if p.fold {
		what += ", in any case"
	}
	return fmt.Sprintf("the path %q %s", path, what)
}

// condition is what a route asks for beside the path. Each kind has its place in holds, which
// decides, in miss, which says why not, and in text, which its route is called by.
type condition struct {
	kind     conditionKind
	value    *config.Condition // of a header field or a query parameter
	methods  []string
	sources  []netip.Prefix
	fraction *dynamic.Value
	key      string // the fraction's runtime key
}

type conditionKind uint8

const (
	onMethod conditionKind = iota
	onHeader
	onQuery
	onSource
	onChance // comes last: it is a fraction of what the others leave
)

func newConditions(m *config.Match, values *dynamic.Set) []condition {
	if !m.Conditional() {
		return nil
	}
	var conditions []condition
	if len(m.Methods) > 0 {
		conditions = append(conditions, condition{kind: onMethod, methods: m.Methods})
	}
	for i := range m.Headers {
		conditions = append(conditions, condition{kind: onHeader, value: &m.Headers[i]})
	}
	for i := range m.Query {
		conditions = append(conditions, condition{kind: onQuery, value: &m.Query[i]})
	}
	if len(m.Sources) > 0 {
		conditions = append(conditions, condition{kind: onSource, sources: m.Sources})
	}
	if f := m.Fraction; f != nil {
		v := values.New(f.Key, dynamic.Percent, f.Value, 0, dynamic.Whole)
		conditions = append(conditions, condition{kind: onChance, fraction: v, key: f.Key})
	}
	return conditions
}

// holds decides.
func (c *condition) holds(q *Query) bool {
	switch c.kind {
	case onMethod:
		for _, m := range c.methods {
			if m == q.Method {
				return true
			}
		}
		return false
	case onHeader:
		return holdsHeader(c.value, q.Fields)
	case onQuery:
		v, ok := parameter(q.Target, c.value.Name)
		return holdsValue(c.value, v, ok)
	case onSource:
		client := q.Client.Unmap().WithZone("")
		for _, p := range c.sources {
			if p.Contains(client) {
				return true
			}
		}
		return false
	}
	var random uint64
	if q.Random != nil {
		random = q.Random()
	}
	return c.fraction.Hits(random)
}

// miss says why the condition does not hold.
func (c *condition) miss(q *Query) string {
	switch c.kind {
	case onMethod:
		return fmt.Sprintf("the method is %s, not %s", q.Method, strings.Join(c.methods, " or "))
	case onHeader:
		v, ok := joined(q.Fields, c.value.Name)
		return missValue(c.value, "header "+c.value.Name, v, ok)
	case onQuery:
		v, ok := parameter(q.Target, c.value.Name)
		return missValue(c.value, "query parameter "+c.value.Name, v, ok)
	case onSource:
		if !q.Client.IsValid() {
			return "the client has no address, and must have one in " + c.text()
		}
		return fmt.Sprintf("the client %s is not in %s", q.Client, c.text())
	}
	return "chance decides: " + percent(c.share()) + " get it"
}

// text is the condition without its percentage: a route does not change its name because it is
// to get more.
func (c *condition) text() string {
	switch c.kind {
	case onMethod:
		return strings.Join(c.methods, " ")
	case onHeader:
		return "header " + valueText(c.value)
	case onQuery:
		return "query " + valueText(c.value)
	case onSource:
		words := make([]string, len(c.sources))
		for i, p := range c.sources {
			words[i] = p.String()
		}
		return strings.Join(words, ", ")
	}
	return "fraction"
}

// share is a fraction's part of the whole.
func (c *condition) share() float64 { return float64(c.fraction.Load()) / dynamic.Whole }

// percent writes a part of the whole.
func percent(share float64) string {
	return strconv.FormatFloat(share*100, 'g', 6, 64) + "%"
}

// valueText is a condition on a value as it is called.
func valueText(c *config.Condition) string {
	s := fmt.Sprintf("%q ", c.Name)
	if c.Invert {
		s += "not "
	}
	switch s += c.Test.String(); c.Test {
	case config.Exact, config.Prefix, config.Suffix:
		s += fmt.Sprintf(" %q", c.Text)
	case config.Regex:
		s += fmt.Sprintf(" %q", sourceOf(c.Regex))
	case config.Range:
		s += fmt.Sprintf(" [%d, %d]", c.From, c.To)
	}
	return s
}

// missValue says why a value is not what it must be.
func missValue(c *config.Condition, what, value string, there bool) string {
	if !there {
		return what + " is not there"
	}
	must := map[config.Test]string{
		config.Exact:   fmt.Sprintf("be %q", c.Text),
		config.Prefix:  fmt.Sprintf("begin with %q", c.Text),
		config.Suffix:  fmt.Sprintf("end with %q", c.Text),
		config.Present: "be there",
		config.Range:   fmt.Sprintf("be an integer from %d to below %d", c.From, c.To),
	}[c.Test]
	if c.Test == config.Regex {
		must = fmt.Sprintf("match the regex %q", sourceOf(c.Regex))
	}
	not := ""
	if c.Invert {
		not = "not "
	}
	const most = 80
	if len(value) > most {
		value = value[:most] + "…"
	}
	return fmt.Sprintf("%s is %q, and must %s%s", what, value, not, must)
}

// holdsValue decides on a value. One that is not there fulfils no test, whatever the test.
func holdsValue(c *config.Condition, value string, there bool) bool {
	if !there {
		return c.Test == config.Present && c.Invert
	}
	return test(c, value) != c.Invert
}

func test(c *config.Condition, value string) bool {
	switch c.Test {
	case config.Exact:
		return value == c.Text
	case config.Prefix:
		return strings.HasPrefix(value, c.Text)
	case config.Suffix:
		return strings.HasSuffix(value, c.Text)
	case config.Regex:
		return matchesRegex(c.Regex, value)
	case config.Range:
		n, ok := integer(value)
		return ok && c.From <= n && n < c.To
	}
	return true // it is present
}

// integer reads an int64. strconv makes an error of what is none, which takes memory.
func integer(s string) (n int64, ok bool) {
	digits, negative := strings.CutPrefix(s, "-")
	if digits == "" {
		return 0, false
	}
	if digits = strings.TrimLeft(digits, "0"); len(digits) > 19 {
		return 0, false
	}
	var u uint64
	for i := range len(digits) {
		d := digits[i] - '0'
		if d > 9 {
			return 0, false
		}
		u = 10*u + uint64(d)
	}
	switch {
	case negative && u <= 1<<63:
		return -int64(u), true
	case negative || u >= 1<<63:
		return 0, false
	}
	return int64(u), true
}

// parameter returns the first query parameter of a name, as it was sent.
func parameter(target, name string) (value string, ok bool) {
	_, query, _ := strings.Cut(target, "?")
	for query != "" {
		var p string
		p, query, _ = strings.Cut(query, "&")
		if rest, ok := strings.CutPrefix(p, name); ok && (rest == "" || rest[0] == '=') {
			return strings.TrimPrefix(rest, "="), true
		}
	}
	return "", false
}

// holdsHeader decides on the value of a field. Several lines are one value, joined with ",".
func holdsHeader(c *config.Condition, fields Fields) bool {
	if fields == nil {
		return holdsValue(c, "", false)
	}
	first, lines := "", 0
	for i := range fields.Len() {
		if name, value := fields.Line(i); isName(name, c.Name) {
			if lines == 0 {
				first = value
			}
			lines++
		}
	}
	if lines < 2 {
		return holdsValue(c, first, lines == 1)
	}
	return testLines(c, fields) != c.Invert
}

// isName compares the name of a field with one in lower case.
func isName(name, lowered string) bool { return len(name) == len(lowered) && equalFold(name, lowered) }

// testLines is test for a value of several lines. Whoever sends many takes no more memory by
// it than what is compared.
func testLines(c *config.Condition, fields Fields) bool {
	switch c.Test {
	case config.Exact, config.Prefix:
		text, next := c.Text, ""
		for i := range fields.Len() {
			name, value := fields.Line(i)
			if !isName(name, c.Name) {
				continue
			}
			for _, part := range [...]string{next, value} {
				if c.Test == config.Prefix && len(part) >= len(text) {
					return strings.HasPrefix(part, text)
				}
				var ok bool
				if text, ok = strings.CutPrefix(text, part); !ok {
					return false
				}
			}
			next = ","
		}
		return text == ""
	case config.Suffix:
		text, next := c.Text, ""
		for i := fields.Len() - 1; i >= 0; i-- {
			name, value := fields.Line(i)
			if !isName(name, c.Name) {
				continue
			}
			for _, part := range [...]string{next, value} {
				if len(part) >= len(text) {
					return strings.HasSuffix(part, text)
				}
				var ok bool
				if text, ok = strings.CutSuffix(text, part); !ok {
					return false
				}
			}
			next = ","
		}
		return text == ""
	case config.Regex:
		length := -1
		for value := range valuesOf(fields, c.Name) {
			length += 1 + len(value)
		}
		if length > config.MostRegexText {
			return false
		}
		all, _ := joined(fields, c.Name)
		return matchesRegex(c.Regex, all)
	case config.Range:
		return false // a list is no integer
	}
	return true
}

// joined returns the value of all lines of a field.
func joined(fields Fields, lowered string) (value string, ok bool) {
	if fields == nil {
		return "", false
	}
	values := slices.Collect(valuesOf(fields, lowered))
	return strings.Join(values, ","), len(values) > 0
}
