package config

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/BurntSushi/toml"
)

// maxFileSize bounds what is read at all.
const maxFileSize = 16 << 20

// document is a file while it is read. Nothing stops at a problem: whoever finds
// one notes it and goes on.
type document struct {
	file     string
	text     string
	lines    map[string]int // of every key path; nil until somebody asks
	problems []*Problem

	// terse says that nobody asks for the settings of tables, nor for the vocabulary: to
	// write them down takes more time than to read the file. A key that is not there costs
	// a look into a map then, and nothing else.
	terse   bool
	unknown bool // a key is that nobody asked for, of which a terse reader cannot say more

	// vocabulary holds the keys that each section was asked for. It is what the
	// documentation has to describe, by name of the section without indices:
	// "virtual_hosts.routes.match".
	vocabulary map[string][]string

	runtimeKeys map[string][]string // the paths of the tables that each stands in

	spare [][]string // memory for what tables know
}

// open parses the file's syntax.
func open(file string, data []byte) (*document, *table, error) {
	if len(data) > maxFileSize {
		return nil, nil, &Problem{File: file, Text: fmt.Sprintf("the file has %d bytes; at most 16 MiB are read", len(data))}
	}
	return openUnbounded(file, data)
}

// openUnbounded is open for a document that may be longer than any file.
func openUnbounded(file string, data []byte) (*document, *table, error) {
	d := newDocument(file, string(data))
	var keys map[string]any
	if p := parse(d.text, &keys); p != nil {
		p.File = file
		return nil, nil, p
	}
	return d, newTable(node{doc: d, raw: keys}), nil
}

func newDocument(file, text string) *document {
	return &document{file: file, text: text, vocabulary: map[string][]string{}, runtimeKeys: map[string][]string{}}
}

func parse(text string, keys *map[string]any) *Problem {
	if p, ok := errors.AsType[*Problem](checkShape(text)); ok {
		return p
	}
	_, err := toml.Decode(text, keys)
	if err == nil {
		return nil
	}
	p := &Problem{Text: "not valid TOML: " + printable(err.Error())}
	if e, ok := errors.AsType[toml.ParseError](err); ok {
		p.Line = e.Position.Line
		if e.Position.Start+1 >= len(text) {
			// Of an error at the very end the library may name the line before.
			p.Line = 1 + strings.Count(strings.TrimSuffix(text, "\n"), "\n")
		}
		p.Text = "not valid TOML: " + printable(e.Message)
	}
	return p
}

// err returns what was noted, in the order of the file.
func (d *document) err() error {
	slices.SortStableFunc(d.problems, func(a, b *Problem) int { return cmp.Compare(a.Line, b.Line) })
	errs := make([]error, len(d.problems))
	for i, p := range d.problems {
		errs[i] = p
	}
	return errors.Join(errs...)
}

// node is a value and the place where it stands. What messages call the place is found out
// when there is one.
type node struct {
	doc   *document
	up    *node  // what it is part of; nil: it is the file
	key   string // of it there, unless it is an element
	index int    // of the element, if key is ""
	bare  bool   // key is "" although it is one
	raw   any    // what the TOML library made of it; nil for a key that is missing
}

// fail notes a problem with the value.
func (n node) fail(format string, args ...any) {
	n.doc.problems = append(n.doc.problems, &Problem{
		File: n.doc.file, Line: n.line(), Key: n.path(), Text: fmt.Sprintf(format, args...),
	})
}

// path returns what messages call the place: "virtual_hosts[0].routes[1].cluster".
func (n *node) path() string {
	switch {
	case n.up == nil:
		return ""
	case n.isElement():
		return fmt.Sprintf("%s[%d]", n.up.path(), n.index)
	}
	return keyPath(n.up.path(), n.key)
}

func (n *node) isElement() bool { return n.key == "" && !n.bare }

// line returns the place's line: of a key that is missing, that of the table.
func (n *node) line() int {
	if n.doc.lines == nil {
		n.doc.lines, _ = keyLines(n.doc.text) // of a document that the library accepts it misses none
	}
	for ; n.up != nil; n = n.up {
		if line, ok := n.doc.lines[n.path()]; ok {
			return line
		}
	}
	return 0
}

// elements returns those of an array.
func (n node) elements() (elements []node, ok bool) {
	switch array := n.raw.(type) {
	case []any:
		elements = make([]node, len(array))
		for i, raw := range array {
			elements[i] = node{doc: n.doc, up: &n, index: i, raw: raw}
		}
		return elements, true
	case []map[string]any: // written as [[key]]
		elements = make([]node, len(array))
		for i, raw := range array {
			elements[i] = node{doc: n.doc, up: &n, index: i, raw: raw}
		}
		return elements, true
	}
	return nil, false
}

// section names the part of a file that the value belongs to, without indices:
// "virtual_hosts.routes".
func (n *node) section() string {
	switch {
	case n.up == nil:
		return ""
	case n.isElement():
		return n.up.section()
	}
	return keyPath(n.up.section(), n.key)
}

// String says where the value stands, for messages about another one.
func (n node) String() string { return fmt.Sprintf("%s, line %d", n.path(), n.line()) }

// table is a node that holds keys. It remembers which ones it was asked for:
// the others are unknown.
type table struct {
	node
	keys     map[string]any
	known    []string  // of a terse document: those that are there
	settings []setting // what the known keys come to, in the order in which they were read
}

// setting is a key with its value as it applies, written or not: a string holds the
// value as a file would write it, a []string those of an array. Or it is a *table
// or a []*table.
type setting struct {
	key   string
	value any
}

// newTable returns n as a table, an empty one if it is missing or something else.
func newTable(n node) *table {
	t := new(table)
	t.init(n)
	return t
}

func (t *table) init(n node) {
	keys, _ := n.raw.(map[string]any)
	*t = table{node: n, keys: keys}
	if last := len(n.doc.spare) - 1; last >= 0 {
		t.known, n.doc.spare = n.doc.spare[last], n.doc.spare[:last]
	}
}

// at returns the value of a key, or the place where it is missing.
func (t *table) at(key string) node {
	return node{doc: t.doc, up: &t.node, key: key, bare: key == "", raw: t.keys[key]}
}

func (t *table) has(key string) bool {
	_, ok := t.keys[key]
	return ok
}

// get returns the value of a key and makes the key a known one.
func (t *table) get(key string) (n node, ok bool) {
	raw, ok := t.keys[key]
	if (ok || !t.doc.terse) && !slices.Contains(t.known, key) {
		t.known = append(t.known, key)
	}
	return node{doc: t.doc, up: &t.node, key: key, bare: key == "", raw: raw}, ok
}

// asked makes a key a known one and tells whether it is there.
func (t *table) asked(key string) bool {
	_, ok := t.get(key)
	return ok
}

// given returns those of some keys that are there.
func (t *table) given(keys ...string) []string {
	return slices.DeleteFunc(keys, func(key string) bool { return !t.has(key) })
}

// set notes what a key comes to, if anybody asks. A key without a value is not noted.
func (t *table) set(key string, value any) {
	if !t.doc.terse {
		t.settings = append(t.settings, setting{key, value})
	}
}

// inapplicable refuses a key that has no meaning beside others, and forgets what it
// would come to.
func (t *table) inapplicable(key, format string, args ...any) {
	if t.has(key) {
		t.at(key).fail(format, args...)
	}
	t.unset(key)
}

// unset forgets what a key comes to.
func (t *table) unset(key string) {
	t.settings = slices.DeleteFunc(t.settings, func(s setting) bool { return s.key == key })
}

// table returns the table under a key, an empty one if it is missing.
func (t *table) table(key string) *table {
	n, ok := t.get(key)
	if _, isTable := n.raw.(map[string]any); ok && !isTable {
		hint := ""
		if _, array := n.raw.([]map[string]any); array && t.up == nil {
			hint = fmt.Sprintf(": write [%s] in place of [[%s]]", key, key)
		}
		n.fail("must be a table, found %s%s", describe(n.raw), hint)
	}
	inner := newTable(n)
	t.set(key, inner)
	return inner
}

// tables returns the tables of the array under a key.
func (t *table) tables(key string) []*table {
	n, _ := t.get(key)
	if _, single := n.raw.(map[string]any); single {
		if t.up == nil {
			n.fail("must be an array of tables: write [[%s]] in place of [%s]", key, key)
		} else {
			n.fail("must be an array of tables, found a single one")
		}
		return nil
	}
	array := t.array(key)
	tables := make([]*table, 0, len(array))
	side := make([]table, len(array)) // by side
	for i, e := range array {
		if _, ok := e.raw.(map[string]any); ok {
			side[i].init(e)
			tables = append(tables, &side[i])
		} else {
			e.fail("must be a table, found %s", describe(e.raw))
		}
	}
	t.set(key, tables)
	return tables
}

// empty tells whether there is no array, or nothing in the one under a key.
func (t *table) empty(key string) bool {
	array, ok := t.keys[key].([]any)
	return !t.has(key) || ok && len(array) == 0
}

// array returns the elements of the array under a key.
func (t *table) array(key string) []node {
	n, ok := t.get(key)
	if !ok {
		return nil
	}
	elements, ok := n.elements()
	if !ok {
		n.fail("must be an array, found %s", describe(n.raw))
	}
	return elements
}

// strict notes every key that nobody asked for. It belongs behind the last get, and the last
// look at what is known.
func (t *table) strict() {
	if t.doc.terse {
		t.doc.unknown = t.doc.unknown || t.hasUnknown()
		t.doc.spare = append(t.doc.spare, t.known[:0])
		t.known = nil
		return
	}
	section := t.section()
	t.doc.vocabulary[section] = t.known
	for _, key := range slices.Sorted(maps.Keys(t.keys)) {
		n := t.at(key)
		switch {
		case slices.Contains(t.known, key):
		case slices.Contains(unsupported[section], key):
			n.fail("not supported by this version")
		default:
			n.fail("unknown key; %s", suggest(key, t.known))
		}
	}
}

// hasUnknown tells whether there is a key that nobody asked for.
func (t *table) hasUnknown() bool {
	if t.doc.terse {
		return len(t.known) < len(t.keys)
	}
	for key := range t.keys {
		if !slices.Contains(t.known, key) {
			return true
		}
	}
	return false
}

// suggest names the likely one of some words, or all of them.
func suggest(word string, words []string) string {
	if near := nearest(word, words); near != "" {
		return fmt.Sprintf("did you mean %q?", near)
	}
	if len(words) == 0 {
		return "none is declared"
	}
	const most = 12
	sorted := slices.Sorted(slices.Values(words))
	if len(sorted) > most {
		return fmt.Sprintf("known are %s, …", strings.Join(sorted[:most], ", "))
	}
	return "known are " + strings.Join(sorted, ", ")
}

// describe names a value of the file in a message.
func describe(raw any) string {
	switch v := raw.(type) {
	case string:
		return "the string " + quote(v)
	case int64:
		return fmt.Sprintf("the integer %d", v)
	case float64:
		return fmt.Sprintf("the number %g", v)
	case bool:
		return fmt.Sprintf("%t", v)
	case time.Time:
		return "a date or time"
	case map[string]any:
		return "a table"
	default:
		return "an array"
	}
}

// quote puts a string of the file into a message, shortened where it is long.
func quote(s string) string {
	const most = 80
	if utf8.RuneCountInString(s) > most {
		s = string([]rune(s)[:most]) + "…"
	}
	return fmt.Sprintf("%q", s)
}

// printable replaces what would disturb a terminal or a log line.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return '?'
	}, s)
}
