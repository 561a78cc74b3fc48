package config

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"regexp"
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
	lines    map[string]int // of every key path
	problems []*Problem

	// vocabulary holds the keys that each section was asked for. It is what the
	// documentation has to describe, by name of the section without indices:
	// "virtual_hosts.routes.match".
	vocabulary map[string][]string
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
	d := &document{file: file, vocabulary: map[string][]string{}}
	var keys map[string]any
	if p := d.parse(string(data), &keys); p != nil {
		p.File = file
		return nil, nil, p
	}
	return d, newTable(node{doc: d, raw: keys}), nil
}

func (d *document) parse(text string, keys *map[string]any) *Problem {
	var err error
	if d.lines, err = keyLines(text); err != nil {
		if p, ok := errors.AsType[*Problem](err); ok {
			return p
		}
	}
	if _, err = toml.Decode(text, keys); err == nil {
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

// node is a value and the place where it stands.
type node struct {
	doc  *document
	path string
	line int
	raw  any // what the TOML library made of it; nil for a key that is missing
}

// at returns the value under path, which is part of this one.
func (n node) at(path string, raw any) node {
	line, ok := n.doc.lines[path]
	if !ok {
		line = n.line
	}
	return node{n.doc, path, line, raw}
}

// fail notes a problem with the value.
func (n node) fail(format string, args ...any) {
	n.doc.problems = append(n.doc.problems, &Problem{
		File: n.doc.file, Line: n.line, Key: n.path, Text: fmt.Sprintf(format, args...),
	})
}

// elements returns those of an array.
func (n node) elements() (elements []node, ok bool) {
	add := func(i int, raw any) { elements = append(elements, n.at(fmt.Sprintf("%s[%d]", n.path, i), raw)) }
	switch array := n.raw.(type) {
	case []any:
		for i, raw := range array {
			add(i, raw)
		}
		return elements, true
	case []map[string]any: // written as [[key]]
		for i, raw := range array {
			add(i, raw)
		}
		return elements, true
	}
	return nil, false
}

// section names the part of a file that the value belongs to, without indices:
// "virtual_hosts.routes".
func (n node) section() string { return indices.ReplaceAllString(n.path, "") }

// String says where the value stands, for messages about another one.
func (n node) String() string { return fmt.Sprintf("%s, line %d", n.path, n.line) }

// table is a node that holds keys. It remembers which ones it was asked for:
// the others are unknown.
type table struct {
	node
	keys     map[string]any
	known    []string
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
	keys, _ := n.raw.(map[string]any)
	return &table{node: n, keys: keys}
}

// at returns the value of a key, or the place where it is missing.
func (t *table) at(key string) node { return t.node.at(keyPath(t.path, key), t.keys[key]) }

func (t *table) has(key string) bool {
	_, ok := t.keys[key]
	return ok
}

// get returns the value of a key and makes the key a known one.
func (t *table) get(key string) (n node, ok bool) {
	if !slices.Contains(t.known, key) {
		t.known = append(t.known, key)
	}
	return t.at(key), t.has(key)
}

// set notes what a key comes to. A key without a value is not noted.
func (t *table) set(key string, value any) { t.settings = append(t.settings, setting{key, value}) }

// inapplicable refuses a key that has no meaning beside others, and forgets what it
// would come to.
func (t *table) inapplicable(key, format string, args ...any) {
	if t.has(key) {
		t.at(key).fail(format, args...)
	}
	t.settings = slices.DeleteFunc(t.settings, func(s setting) bool { return s.key == key })
}

// table returns the table under a key, an empty one if it is missing.
func (t *table) table(key string) *table {
	n, ok := t.get(key)
	if _, isTable := n.raw.(map[string]any); ok && !isTable {
		hint := ""
		if _, array := n.raw.([]map[string]any); array && t.path == "" {
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
		if t.path == "" {
			n.fail("must be an array of tables: write [[%s]] in place of [%s]", key, key)
		} else {
			n.fail("must be an array of tables, found a single one")
		}
		return nil
	}
	var tables []*table
	for _, e := range t.array(key) {
		if _, ok := e.raw.(map[string]any); ok {
			tables = append(tables, newTable(e))
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

// strict notes every key that nobody asked for. It belongs behind the last get.
func (t *table) strict() {
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

// indices are the parts of a key path that differ between elements of an array.
var indices = regexp.MustCompile(`\[[0-9]+\]`)

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
