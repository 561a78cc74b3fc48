package config

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// Diff says in sentences what differs between two effective configurations (see
// [Effective]), that of what is running and that of the file, as in
//
//	log.level is now "debug", was "info"
//	listener "public": address is now "0.0.0.0:8080", was "0.0.0.0:80"
//	virtual host "chat", route prefix "/socket": websocket is now true, was false
//	cluster "web" is new
//
// in the order of the file, and nothing where they are the same. Of the order of
// elements only that of routes means something, and is compared.
//
// The documents may be those of other versions, with keys that this one does not
// know: only their syntax is checked. Neither they nor the answer are bounded.
// Sentences hold printable characters only.
func Diff(running, file []byte) ([]string, error) {
	before, err := openSettled("the running configuration", running)
	if err != nil {
		return nil, err
	}
	after, err := openSettled("the file", file)
	if err != nil {
		return nil, err
	}
	var d difference
	d.tables(place{}, before, after)
	return d.sentences, nil
}

// openSettled reads a document as it stands: each of its keys is a setting.
func openSettled(name string, data []byte) (*table, error) {
	_, t, err := openUnbounded(name, data)
	if err == nil {
		t.settle()
	}
	return t, err
}

// settle makes a setting of each key, in the order of the document's lines.
func (t *table) settle() {
	byLine := func(a, b string) int {
		first, second := t.at(a), t.at(b)
		return cmp.Or(cmp.Compare(first.line(), second.line()), cmp.Compare(a, b))
	}
	for _, key := range slices.SortedFunc(maps.Keys(t.keys), byLine) {
		t.set(key, t.at(key).settled())
	}
}

// settled returns the value as that of a setting.
func (n node) settled() any {
	if s, ok := n.raw.(string); ok {
		return strconv.Quote(s)
	}
	if _, ok := n.raw.(map[string]any); ok {
		t := newTable(n)
		t.settle()
		return t
	}
	elements, ok := n.elements()
	if !ok {
		return fmt.Sprint(n.raw) // a number, a date, true or false
	}
	var tables []*table
	var texts []string
	for _, e := range elements {
		v := e.settled()
		if t, ok := v.(*table); ok {
			tables = append(tables, t)
		}
		texts = append(texts, literal(v))
	}
	if len(tables) > 0 && len(tables) == len(elements) {
		return tables
	}
	return texts
}

// A kind is what the elements of an array of tables are called and told apart by: a key, or
// "" where it takes all of them.
type kind struct {
	name, key string
	ordered   bool // whether their order means something
	several   bool // whether several may be called the same, so that nothing tells what has become of which
}

// kinds has every array of tables, by section.
var kinds = map[string]kind{
	"access_logs":                            {"access log", "path", false, false},
	"access_logs.filter.headers":             {"condition", "name", false, false},
	"listeners":                              {"listener", "name", false, false},
	"listeners.tls.certificates":             {"certificate", "cert", true, false},
	"listeners.weighted_clusters":            {"share of cluster", "cluster", false, false},
	"listeners.tcp_routes":                   {"route", "server_names", false, false},
	"listeners.tcp_routes.weighted_clusters": {"share of cluster", "cluster", false, false},
	"virtual_hosts":                          {"virtual host", "name", false, false},
	"virtual_hosts.routes":                   {"route", "match", true, false},
	"virtual_hosts.routes.match.headers":     {"header", "name", false, true},
	"virtual_hosts.routes.match.query":       {"query parameter", "name", false, true},
	"virtual_hosts.routes.fault.headers":     {"fault header", "name", false, false},
	"virtual_hosts.routes.weighted_clusters": {"share of cluster", "cluster", false, false},
	"virtual_hosts.routes.hash_policy":       {"hash policy", "", true, false},
	"clusters":                               {"cluster", "name", false, false},
	"clusters.endpoints":                     {"endpoint", "address", false, false},
}

// call returns what sentences call an element: `listener "public"`, `route prefix "/"`. What
// has a name although its kind needs none goes by that.
func (k kind) call(t *table) string {
	key := k.key
	switch {
	case key == "":
		return k.name + " " + literal(t)
	case t.has("name"):
		key = "name"
	case !t.has(key) && t.has("srv"):
		key = "srv"
	}
	switch id := t.at(key).settled().(type) {
	case *table:
		conditions := make([]string, len(id.settings))
		for i, s := range id.settings {
			if conditions[i] = keyPath("", s.key) + " " + literal(s.value); s.key == "fraction" {
				conditions[i] = "a fraction" // which may change, and it is the same route
			}
		}
		return k.name + " " + strings.Join(conditions, " and ")
	default:
		return k.name + " " + literal(id) // of one that has none, "<nil>"
	}
}

// place is where a value stands, as sentences say it.
type place struct {
	element string // of which arrays' elements it is part, from the outside in: `virtual host "chat", route prefix "/"`
	key     string // from there
}

func (p place) String() string {
	if p.element == "" || p.key == "" {
		return p.element + p.key
	}
	return p.element + ": " + p.key
}

// difference collects sentences.
type difference struct{ sentences []string }

func (d *difference) say(format string, args ...any) {
	d.sentences = append(d.sentences, fmt.Sprintf(format, args...))
}

// tables compares two tables of one place, key by key.
func (d *difference) tables(p place, before, after *table) {
	was := map[string]any{}
	for _, s := range before.settings {
		was[s.key] = s.value
	}
	for _, s := range after.settings {
		d.values(place{p.element, keyPath(p.key, s.key)}, was[s.key], s.value)
		delete(was, s.key)
	}
	for _, s := range before.settings {
		if gone, ok := was[s.key]; ok {
			d.values(place{p.element, keyPath(p.key, s.key)}, gone, nil)
		}
	}
}

// values compares what a key has, nil where it is missing.
func (d *difference) values(p place, before, after any) {
	if k, ok := kindOf(before, after); ok {
		d.elements(p, k, before, after)
		return
	}
	switch was := before.(type) {
	case *table:
		if is, ok := after.(*table); ok {
			d.tables(p, was, is)
			return
		}
	case []string:
		if is, ok := after.([]string); ok {
			d.words(p, was, is)
			return
		}
	case nil:
		d.say("%s is now %s, was not set", p, literal(after))
		return
	}
	switch {
	case after == nil:
		d.say("%s is no longer set, was %s", p, literal(before))
	case literal(before) != literal(after):
		d.say("%s is now %s, was %s", p, literal(after), literal(before))
	}
}

// words compares arrays of which the order means nothing.
func (d *difference) words(p place, before, after []string) {
	for _, w := range missing(before, after) {
		d.say("%s now has %s", p, w)
	}
	for _, w := range missing(after, before) {
		d.say("%s no longer has %s", p, w)
	}
}

// missing returns the words that are not among others.
func missing(others, words []string) []string {
	known := map[string]bool{}
	for _, w := range others {
		known[w] = true
	}
	return slices.DeleteFunc(slices.Clone(words), func(w string) bool { return known[w] })
}

// kindOf returns the kind of the elements of an array, of which one may be empty or
// missing.
func kindOf(before, after any) (kind, bool) {
	var k kind
	for _, v := range []any{before, after} {
		array, ok := v.([]*table)
		if !ok {
			continue
		}
		if k, ok = kinds[array[0].section()]; !ok {
			return kind{}, false
		}
		if names, _ := k.byName(v); k.several && len(names) < len(array) {
			return kind{}, false
		}
	}
	return k, k.name != ""
}

// elements compares arrays of tables, each element with the one that is called the
// same.
func (d *difference) elements(p place, k kind, before, after any) {
	names, was := k.byName(before)
	namesNow, is := k.byName(after)
	for _, name := range namesNow {
		switch {
		case was[name] == nil:
			d.say("%s is new", place{p.element, name})
		case p.element == "":
			d.tables(place{element: name}, was[name], is[name])
		default:
			d.tables(place{element: p.element + ", " + name}, was[name], is[name])
		}
	}
	gone := missing(namesNow, names)
	for _, name := range gone {
		d.say("%s is gone", place{p.element, name})
	}
	if !k.ordered {
		return
	}
	stayed, stayedNow := missing(gone, names), missing(missing(names, namesNow), namesNow)
	for i, name := range stayedNow {
		if name != stayed[i] {
			d.say("%s, %s comes before %s now", place{p.element, "the order of its " + k.name + "s has changed"}, name, stayed[i])
			return // one is enough to find the others
		}
	}
}

// byName returns the elements of an array, if it is one, and what they are called, in
// order. Of several that are called the same it knows the first.
func (k kind) byName(array any) (names []string, elements map[string]*table) {
	elements = map[string]*table{}
	tables, _ := array.([]*table)
	for _, t := range tables {
		name := k.call(t)
		if elements[name] == nil {
			names = append(names, name)
			elements[name] = t
		}
	}
	return names, elements
}
