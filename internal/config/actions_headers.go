package config

import (
	"errors"
	"maps"
	"slices"
	"strconv"
	"strings"

	"holdfast/internal/headers"
)

// readEdits reads the header fields that a table changes.
func readEdits(t *table) Edits {
	return Edits{readHeaders(t, "request_headers", true), readHeaders(t, "response_headers", false)}
}

func readHeaders(outer *table, key string, request bool) *Headers {
	if !outer.asked(key) {
		return nil
	}
	h := new(Headers)
	t := outer.table(key)
	removed := map[string]node{}
	for _, e := range optional(t, "remove", fieldName) {
		folded := strings.ToLower(e.value)
		if first, twice := removed[folded]; twice {
			e.fail("%s is listed twice (%s)", quote(e.value), first)
		}
		removed[folded] = e.node
		editable(e.node, e.value, request, true)
		h.Remove = append(h.Remove, e.value)
	}
	h.Set = readLines(t, "set", request)
	h.Add = readLines(t, "add", request)
	for _, l := range h.Set {
		if first, both := removed[strings.ToLower(l.Name)]; both {
			first.fail("%s is set as well, which replaces what is there; drop it here", quote(l.Name))
		}
	}
	if n := max(len(h.Remove), len(h.Set)+len(h.Add)); n > headers.MostLines {
		t.fail("has %d fields; at most %d are removed, and as many set and added", n, headers.MostLines)
	}
	if t.keys != nil && len(h.Remove)+len(h.Set)+len(h.Add) == 0 && len(t.keys) == 0 {
		t.fail(`changes nothing; it needs remove, set or add, as in { set = { X-Frame-Options = "DENY" } }`)
	}
	t.strict()
	return h
}

// optional is list for a key without a default.
func optional[T any](t *table, key string, f form[T]) []entry[T] {
	if !t.asked(key) {
		return nil
	}
	return list(t, key, f)
}

// readLines reads a table of names and values.
func readLines(outer *table, key string, request bool) []Header {
	n, ok := outer.get(key)
	if !ok {
		return nil
	}
	values, isTable := n.raw.(map[string]any)
	if !isTable {
		n.fail(`must be a table like { X-Name = "value" }, found %s`, describe(n.raw))
		return nil
	}
	t := newTable(n)
	var lines []Header
	var written []string
	seen := map[string]node{}
	for _, name := range slices.Sorted(maps.Keys(values)) {
		place := t.at(name)
		if _, err := fieldName.parse(name); err != nil {
			place.fail("must be %s, found %s", fieldName.is, quote(name))
			continue
		}
		folded := strings.ToLower(name)
		if first, twice := seen[folded]; twice {
			place.fail("is the same field as %s", first)
			continue
		}
		seen[folded] = place
		editable(place, name, request, false)
		if value, ok := understand(place, fieldValue); ok {
			lines = append(lines, Header{name, value})
			written = append(written, keyPath("", name)+" = "+strconv.Quote(value))
		}
	}
	outer.set(key, "{ "+strings.Join(written, ", ")+" }")
	return lines
}

// editable notes that a field is not for a configuration to change.
func editable(n node, name string, request, remove bool) {
	if why := headers.Check(name, request, remove); why != "" {
		n.fail("%s %s", quote(name), why)
	}
}

// fieldName is the name of a header field.
var fieldName = form[string]{`the name of a header field like "X-Name"`, func(s string) (string, error) {
	const most = 128
	switch {
	case !headers.IsName(s):
		return "", errors.New("a name has letters, digits and a few signs like the dash, and nothing else")
	case len(s) > most:
		return "", errors.New("it is longer than 128 bytes")
	}
	return s, nil
}, asIs}

// askedField is the name of a field by which something is decided, so one that may be there.
var askedField = form[string]{fieldName.is, func(s string) (string, error) {
	name, err := fieldName.parse(s)
	if err == nil && headers.OfCodec(s) {
		err = errOfOneHop
	}
	return name, err
}, asIs}

// fieldValue is what a header field is set to.
var fieldValue = form[string]{`a value like "DENY" or "%REQ(User-Agent)%"`, func(s string) (string, error) {
	if s == "" {
		return "", errors.New("it is empty; remove is for fields that are not to be there")
	}
	_, err := headers.Parse(s)
	return s, err
}, asIs}
