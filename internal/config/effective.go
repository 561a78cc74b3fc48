package config

import (
	"bytes"
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// Effective returns what a configuration comes to, as a configuration: every key that
// applies, with its default where the file has none, and the tunnel limits of each
// route. Keys stand in the order of the documentation, the elements of arrays in that
// of the file. [Parse] makes the same of it as of data, and Effective the same bytes.
// (It may be longer than data, and so longer than what both take.)
//
// No key holds a secret: what a file of the configuration names is shown by its path,
// never by its content. So whoever may see the configuration's file may see this.
//
// Errors are as those of [Parse].
func Effective(name string, data []byte) ([]byte, error) {
	doc, root, err := open(name, data)
	if err != nil {
		return nil, err
	}
	doc.config(root)
	if err := doc.err(); err != nil {
		return nil, err
	}
	// Sections are read in another order, because some need what others declare.
	slices.SortStableFunc(root.settings, func(a, b setting) int {
		return cmp.Compare(slices.Index(sections, a.key), slices.Index(sections, b.key))
	})
	var b bytes.Buffer
	root.print(&b, 0)
	return b.Bytes(), nil
}

// sections are those of the file, in the order of the documentation.
var sections = []string{
	"process", "admin", "log", "access_logs", "runtime", "reload", "drain", "stop", "tls", "tunnels", "listeners", "virtual_hosts", "clusters",
}

// maxLine is how long a line gets before an array is written with an element a line.
const maxLine = 100

// print writes the table's settings as TOML, at its depth of nesting. Those with a
// header of their own come last: what follows a header belongs to it.
func (t *table) print(b *bytes.Buffer, depth int) {
	indent := strings.Repeat("  ", max(depth-1, 0)) // the file itself is no level
	for _, s := range t.settings {
		if t.hasHeader(s) {
			continue
		}
		line := indent + s.key + " = " + literal(s.value)
		elements, isArray := literals(s.value)
		if !isArray || len(line) <= maxLine {
			fmt.Fprintln(b, line)
			continue
		}
		fmt.Fprintf(b, "%s%s = [\n", indent, s.key)
		for _, e := range elements {
			fmt.Fprintf(b, "%s  %s,\n", indent, e)
		}
		fmt.Fprintf(b, "%s]\n", indent)
	}
	for _, s := range t.settings {
		if !t.hasHeader(s) {
			continue
		}
		switch inner := s.value.(type) {
		case *table:
			inner.printBelow("[", "]", b, depth+1)
		case []*table:
			for _, e := range inner {
				e.printBelow("[[", "]]", b, depth+1)
			}
		}
	}
}

// printBelow writes the table with its header. One without any setting is left out.
func (t *table) printBelow(opening, closing string, b *bytes.Buffer, depth int) {
	if len(t.settings) == 0 {
		return
	}
	if b.Len() > 0 {
		b.WriteByte('\n')
	}
	fmt.Fprintf(b, "%s%s%s%s\n", strings.Repeat("  ", depth-1), opening, t.section(), closing)
	t.print(b, depth)
}

// hasHeader tells whether a setting of the table is written below a header. Small
// tables are written in one line, but not sections of the file.
func (t *table) hasHeader(s setting) bool {
	switch inner := s.value.(type) {
	case *table:
		return t.up == nil || inner.isLarge()
	case []*table:
		return t.up == nil || slices.ContainsFunc(inner, (*table).isLarge)
	}
	return false
}

func (t *table) isLarge() bool {
	const most = 4
	return len(t.settings) > most || slices.ContainsFunc(t.settings, func(s setting) bool {
		_, text := s.value.(string)
		return !text
	})
}

// literal writes a setting's value in one line.
func literal(value any) string {
	if elements, ok := literals(value); ok {
		return "[" + strings.Join(elements, ", ") + "]"
	}
	t, ok := value.(*table)
	if !ok {
		return value.(string)
	}
	pairs := make([]string, len(t.settings))
	for i, s := range t.settings {
		pairs[i] = keyPath("", s.key) + " = " + literal(s.value)
	}
	return "{ " + strings.Join(pairs, ", ") + " }"
}

// literals writes the elements of an array.
func literals(value any) (elements []string, ok bool) {
	switch array := value.(type) {
	case []string:
		return array, true
	case []*table:
		for _, t := range array {
			elements = append(elements, literal(t))
		}
		return elements, true
	}
	return nil, false
}
