package config

import (
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"regexp/syntax"
	"slices"
	"strconv"
	"strings"

	"holdfast/internal/headers"
)

// Match says which requests a route takes: those of which all of it is true. Exactly one
// of Prefix, Path and Regex is set.
type Match struct {
	Prefix     string         // of the path
	Path       string         // the whole path, without the query
	Regex      *regexp.Regexp // of the whole path
	Segments   bool           // whether Prefix ends where a segment of the path ends
	IgnoreCase bool           // whether ASCII letters of Prefix and Path compare without case; a Regex knows it itself

	Methods  []string       // one of these; empty: any
	Headers  []Condition    // all of these
	Query    []Condition    // all of these
	Sources  []netip.Prefix // the client is in one of these; empty: anywhere
	Fraction *Dynamic       // of the requests, in millionths; nil: all
}

// Conditional says whether more than the path is asked for.
func (m *Match) Conditional() bool {
	return len(m.Methods)+len(m.Headers)+len(m.Query)+len(m.Sources) > 0 || m.Fraction != nil
}

// rest is all that the match asks for, but for the fraction, as a text that is the same for no
// two that ask for something else.
func (m *Match) rest() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%q %q %v %t %t %q %v", m.Prefix, m.Path, m.Regex, m.Segments, m.IgnoreCase, m.Methods, m.Sources)
	for _, conditions := range [][]Condition{m.Headers, m.Query} {
		for _, c := range conditions {
			fmt.Fprintf(&b, " %q %v %q %q %d %d %t", c.Name, c.Test, c.Text, fmt.Sprint(c.Regex), c.From, c.To, c.Invert)
		}
		b.WriteString(" and")
	}
	return b.String()
}

// Condition is what the value of a header field or of a query parameter must be. One that
// is not there fulfils none but an inverted Present.
type Condition struct {
	Name   string // of a header field in lower case
	Test   Test
	Text   string         // of Exact, Prefix and Suffix
	Regex  *regexp.Regexp // of Regex: the whole value
	From   int64          // of Range: an integer from here
	To     int64          // and below this one
	Invert bool           // the value must be another one
}

// Test is how a value is compared.
type Test uint8

const (
	Exact Test = iota
	Prefix
	Suffix
	Regex
	Present
	Range
)

var tests = [...]string{
	Exact:   "exact",
	Prefix:  "prefix",
	Suffix:  "suffix",
	Regex:   "regex",
	Present: "present",
	Range:   "range",
}

func (t Test) String() string { return tests[t] }

// readRouteName reads the name of one of a virtual host's routes.
func readRouteName(t *table, dst *string, names *places) {
	if !t.asked("name") {
		return
	}
	n := t.at("name")
	read(t, "name", dst, identifier)
	if other, taken := (*names)[*dst]; taken && *dst != "" {
		n.fail("%s is already the name of another route of this virtual host (%s)", quote(*dst), other)
	}
	names.note(*dst, &n)
}

func readMatch(route *table, earlier *taken) Match {
	t := route.table("match")
	var m Match
	read(t, "prefix", &m.Prefix, matchPath)
	read(t, "path", &m.Path, matchPath)
	readRegex(t, &m.Regex)
	t.unusual("segments", &m.Segments)
	sensitive := true
	t.unusual("case_sensitive", &sensitive)
	m.IgnoreCase = !sensitive
	m.Methods = readMethods(t)
	m.Headers = readConditions(t, "headers", headerText)
	m.Query = readConditions(t, "query", queryText)
	m.Sources = readSources(t)
	m.Fraction = readFraction(t)
	t.strict()

	given := t.given("prefix", "path", "regex")
	switch {
	case len(given) > 1:
		t.fail("has both %s; one is needed", strings.Join(given, " and "))
		return Match{}
	case !route.has("match"):
		t.fail(`missing; must be a table like { prefix = "/" } or { path = "/exact" }`)
	case t.keys != nil && len(given) == 0:
		t.fail(`must have prefix, path or regex, as in { prefix = "/" }`)
	case m.Segments && !t.has("prefix"):
		t.at("segments").fail("goes with prefix only")
	case m.Segments && strings.HasSuffix(m.Prefix, "/"):
		t.at("segments").fail("changes nothing: the prefix %s ends with a segment as it is", quote(m.Prefix))
	}
	earlier.add(&m, t, route.has("name"))
	return m
}

// unusual reads a key that an effective configuration shows only where it is not the default:
// it would stand in each of many thousand matches.
func (t *table) unusual(key string, dst *bool) {
	usual := *dst
	t.boolean(key, dst)
	if *dst == usual {
		t.unset(key)
	}
}

// The bounds of a regular expression. Matching takes time in proportion to the product of its
// program's length and that of the text, for each request, and whoever sends requests chooses
// the text: see [MostRegexText].
const (
	mostRegex        = 1024 // bytes
	mostRegexProgram = 500  // instructions
)

// MostRegexText is the length of the longest text that a regular expression is tried on. A
// longer one does not match. No target that a client may send is longer: nobody gets past a
// route that guards something because of the length of a path.
const MostRegexText = 8 << 10

// readRegex reads an expression that is to match the whole text, without case if the table
// says so.
func readRegex(t *table, dst **regexp.Regexp) {
	n, ok := t.get("regex")
	if !ok {
		return
	}
	s, ok := understand(n, regexText)
	if !ok {
		return
	}
	t.set("regex", strconv.Quote(s))
	flags := ""
	if sensitive, ok := t.keys["case_sensitive"].(bool); ok && !sensitive {
		flags = "i"
	}
	// Written by itself the expression is known to be one that parentheses keep together.
	*dst = regexp.MustCompile("^(?" + flags + ":" + s + ")$")
}

// regexText is a regular expression as RE2 has them.
var regexText = form[string]{`a regular expression (RE2) like "/v[0-9]+/.*"`, func(s string) (string, error) {
	if len(s) > mostRegex {
		return "", fmt.Errorf("it is longer than %d bytes", mostRegex)
	}
	if s == "" {
		return "", errors.New("an empty one matches nothing that a client sends")
	}
	return s, checkRegex(s)
}, asIs}

// checkRegex refuses what is no regular expression, and one whose program is too long.
func checkRegex(s string) error {
	tree, err := syntax.Parse(s, syntax.Perl)
	if err != nil {
		return errors.New(printable(err.Error()))
	}
	program, err := syntax.Compile(tree.Simplify())
	if err != nil {
		return errors.New(printable(err.Error()))
	}
	if n := len(program.Inst); n > mostRegexProgram {
		return fmt.Errorf("it becomes a program of %d instructions, more than %d; mind numbers of repetitions", n, mostRegexProgram)
	}
	return nil
}

func readMethods(t *table) []string {
	if !t.asked("methods") {
		return nil
	}
	var methods []string
	for _, e := range list(t, "methods", method) {
		if slices.Contains(methods, e.value) {
			e.fail("%s is listed twice", quote(e.value))
		}
		methods = append(methods, e.value)
	}
	t.notEmpty("methods", "any method")
	return methods
}

// method is a request method. RFC 9110 §9.1 has them compare with case, and all that there
// are in capitals.
var method = form[string]{`a method in capitals like "GET"`, func(s string) (string, error) {
	fits := func(r rune) bool { return 'A' <= r && r <= 'Z' || r == '-' || r == '_' }
	if s == "" || len(s) > 32 || strings.ContainsFunc(s, func(r rune) bool { return !fits(r) }) {
		return "", errForm
	}
	return s, nil
}, asIs}

func readSources(t *table) []netip.Prefix {
	if !t.asked("sources") {
		return nil
	}
	var sources []netip.Prefix
	for _, e := range list(t, "sources", network) {
		sources = append(sources, e.value)
	}
	t.notEmpty("sources", "clients anywhere")
	return sources
}

func readFraction(match *table) *Dynamic {
	if !match.asked("fraction") {
		return nil
	}
	t := match.table("fraction")
	d := new(Dynamic)
	t.percent("percent", d)
	if t.keys != nil && !t.has("percent") {
		t.at("percent").fail("missing; must be a percentage from 0 to 100")
	}
	t.runtimeKey("runtime_key", d)
	t.strict()
	return d
}

func readConditions(match *table, key string, text func(string) error) []Condition {
	if !match.asked(key) {
		return nil
	}
	var conditions []Condition
	for _, t := range match.tables(key) {
		conditions = append(conditions, readCondition(t, key == "headers", text))
	}
	match.notEmpty(key, "any")
	return conditions
}

func readCondition(t *table, header bool, text func(string) error) Condition {
	var c Condition
	name := parameterName
	if header {
		name = headerName
	}
	need(t, "name", &c.Name, name)
	var given []string
	for test, key := range tests {
		if !t.asked(key) {
			continue
		}
		given = append(given, key)
		switch c.Test = Test(test); c.Test {
		case Exact, Prefix, Suffix:
			read(t, key, &c.Text, form[string]{"the text of a value", func(s string) (string, error) {
				if s == "" && c.Test != Exact {
					return "", errors.New("every value has it; write present = true")
				}
				if len(s) > mostRegex {
					return "", fmt.Errorf("it is longer than %d bytes", mostRegex)
				}
				return s, text(s)
			}, asIs})
			if c.Text == "" {
				t.set(key, `""`)
			}
		case Regex:
			readRegex(t, &c.Regex)
		case Present:
			c.readPresent(t)
		case Range:
			c.readRange(t)
		}
	}
	t.unusual("invert", &c.Invert)
	switch {
	case len(given) > 1:
		t.fail("has %s; one is needed", strings.Join(given, " and "))
	case len(given) == 0 && !t.hasUnknown(): // which was to be the test, and is refused
		t.fail("asks for nothing; one of %s is needed", strings.Join(tests[:], ", "))
	}
	t.strict()
	return c
}

func (c *Condition) readPresent(t *table) {
	present := true
	if t.boolean("present", &present); !present {
		t.at("present").fail("must be true; for one that is not there, write present = true, invert = true")
	}
}

func (c *Condition) readRange(t *table) {
	n := t.at("range")
	var bounds []int64
	elements, _ := n.elements()
	for _, e := range elements {
		if v, ok := e.raw.(int64); ok {
			bounds = append(bounds, v)
		}
	}
	if len(bounds) != 2 || len(elements) != 2 || bounds[0] >= bounds[1] {
		n.fail("must be two integers, the lower one first, as in [100, 200]: from the first to below the second")
		return
	}
	c.From, c.To = bounds[0], bounds[1]
	t.set("range", []string{strconv.FormatInt(c.From, 10), strconv.FormatInt(c.To, 10)})
}

// headerName is the name of a field of which a route can know. The others are about a single
// connection, or about how a message is framed, and no part of a request here.
var headerName = form[string]{`the name of a header field like "X-Version"`, func(s string) (string, error) {
	s = strings.ToLower(s)
	if s == "" || len(s) > 256 || !isToken(s) {
		return "", errForm
	}
	switch {
	case s == "host":
		return "", errors.New("the host is matched by the domains of the virtual host")
	case headers.OfCodec(s):
		return "", errors.New("this one is about the connection and not seen by routes")
	}
	return s, nil
}, asIs}

// headerText refuses what no field value is.
func headerText(s string) error {
	switch {
	case strings.Trim(s, " \t") != s:
		return errors.New("space around a value is no part of it")
	case strings.ContainsFunc(s, func(r rune) bool { return r < ' ' && r != '\t' || r == 0x7f }):
		return errors.New("a value has no control characters")
	}
	return nil
}

// parameterName is the name of a query parameter as clients send it.
var parameterName = form[string]{`the name of a query parameter like "version"`, func(s string) (string, error) {
	if s == "" || len(s) > 256 || strings.Contains(s, "=") {
		return "", errForm
	}
	return s, queryText(s)
}, asIs}

// queryText refuses what no parameter has.
func queryText(s string) error {
	if strings.ContainsAny(s, "&#") || strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r >= 0x7f }) {
		return errors.New("it is compared as clients send it: &, #, spaces, control characters and letters beyond ASCII are written as %XX")
	}
	return nil
}

// notEmpty refuses an empty array under a key that is there.
func (t *table) notEmpty(key, without string) {
	if t.empty(key) {
		t.at(key).fail("is empty, so nothing would match; leave the key out for %s", without)
	}
}

// fold lowers ASCII letters, and no others.
func fold(s string) string {
	return strings.Map(func(r rune) rune {
		if 'A' <= r && r <= 'Z' {
			return r + 'a' - 'A'
		}
		return r
	}, s)
}

// hasLetters tells whether a text differs in case from another one.
func hasLetters(s string) bool {
	return strings.ContainsFunc(s, func(r rune) bool { return 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' })
}

// taken knows the matches of a virtual host's routes so far, in maps that are made when they
// are needed.
type taken struct {
	written layer  // matches that compare with case
	folded  layer  // without case, in lower case
	others  places // matches with conditions, and regular expressions: all of it, as [Match.rest] has it
}

// layer is what of matches without conditions can hide later ones.
type layer struct {
	prefixes places
	segments places // prefixes that end with a segment
	paths    places
}

// places are where texts stand.
type places map[string]*node

func (p *places) note(text string, n *node) {
	if *p == nil {
		*p = places{}
	}
	(*p)[text] = n
}

// add notes a route's match, or the problem that an earlier one leaves nothing to it: the
// first route that matches wins. A match with conditions leaves something to all that are not
// the same.
func (k *taken) add(m *Match, t *table, named bool) {
	if what, first, ok := k.hides(m); ok {
		t.fail("can never match: the route with %s (%s) comes first; put this one before it or drop it", what, first)
		return
	}
	if m.Regex != nil || m.Conditional() {
		k.addOther(m, t, named)
		return
	}
	l, text := &k.written, m.Prefix+m.Path // one of them is empty
	if m.IgnoreCase {
		l, text = &k.folded, fold(text)
	}
	switch {
	case m.Path != "":
		l.paths.note(text, &t.node)
	case m.Segments:
		l.segments.note(text, &t.node)
	case m.Prefix != "":
		l.prefixes.note(text, &t.node)
	}
}

// addOther is add for a match with conditions, or a regex, that is not hidden.
func (k *taken) addOther(m *Match, t *table, named bool) {
	rest := m.rest()
	if first, ok := k.others[rest]; ok {
		t.fail("can never match: a route with the same match (%s) comes first; drop one of them", first)
		return
	}
	if m.Fraction != nil && !named {
		// Names are made of all but the percentage.
		rest += " fraction"
		if first, ok := k.others[rest]; ok {
			t.fail("is that of an earlier route (%s) but for the fraction, so both would have one name; give one of them a name", first)
		}
	}
	if m.Fraction == nil || !named {
		k.others.note(rest, &t.node)
	}
	if m.Regex != nil && !m.Conditional() {
		k.others.note(m.Regex.String(), &t.node)
	}
}

// hides finds an earlier match without conditions that takes all that m does: what it is, and
// where it stands.
func (k *taken) hides(m *Match) (what string, first *node, ok bool) {
	if m.Regex != nil {
		if first, ok = k.others[m.Regex.String()]; ok {
			return "the same regex", first, true
		}
		for _, l := range []*layer{&k.written, &k.folded} {
			if first, ok = l.prefixes["/"]; ok { // as every path begins
				return `prefix "/"`, first, true
			}
		}
		return "", nil, false
	}
	text := m.Prefix + m.Path
	if kind, n, first, ok := k.written.hides(text, m); ok && !(m.IgnoreCase && hasLetters(text[:n])) {
		// With letters the later one would take those in the other case.
		return fmt.Sprintf("%s %q", kind, text[:n]), first, true
	}
	if k.folded.prefixes == nil && k.folded.segments == nil && k.folded.paths == nil {
		return "", nil, false
	}
	text = fold(text)
	if kind, n, first, ok := k.folded.hides(text, m); ok {
		return fmt.Sprintf("%s %q", kind, text[:n]), first, true
	}
	return "", nil, false
}

// hides finds the match that takes all that m does: its kind, and how many bytes of m's text
// it has.
func (l *layer) hides(text string, m *Match) (kind string, n int, first *node, ok bool) {
	for n := 1; n <= len(text) && (l.prefixes != nil || l.segments != nil); n++ {
		if first, ok := l.prefixes[text[:n]]; ok {
			return "prefix", n, first, true
		}
		first, ok := l.segments[text[:n]]
		switch {
		case !ok:
		case n < len(text) && text[n] == '/', n == len(text) && (m.Path != "" || m.Segments):
			return "prefix", n, first, true
		}
	}
	if m.Path == "" {
		return "", 0, nil, false
	}
	first, ok = l.paths[text]
	return "path", len(text), first, ok
}
