package main

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/BurntSushi/toml"

	"holdfast/internal/config"
)

// fits is what the loader itself says of the values of a key.
type fits struct {
	value   string // what "must be" is followed by, of something that fits nowhere; "" if it says nothing
	element string // the same of an element of an array
	full    bool   // an array has at least one element
	samples []any  // what the sample has for the key
}

// misfit is a value that no key takes.
var misfit = time.Unix(0, 0).UTC()

// askLoader asks the loader about every key by giving it values that do not fit. sample is a
// configuration that has all of them.
func askLoader(sample string, sections []docSection) map[string]map[string]*fits {
	all := map[string]map[string]*fits{}
	doc := decodeTOML(sample)
	var open []question
	for _, key := range topKeys(sections) {
		open = append(open, question{entry(all, "", key), place{doc, key, key}})
	}
	for _, s := range sections {
		for _, k := range s.keys {
			f := entry(all, s.name, k.name)
			for _, at := range places(doc, "", "", s.name, k.name) {
				f.samples = append(f.samples, at.table[at.key])
				open = append(open, question{f, at})
			}
		}
	}
	// Those about plain values are asked together: that answers nearly all.
	askTogether(doc, open)
	for _, q := range open {
		q.ask(doc)
	}
	return all
}

func decodeTOML(text string) (doc map[string]any) {
	if _, err := toml.Decode(text, &doc); err != nil {
		panic(err)
	}
	return doc
}

// A question is what fits in a place.
type question struct {
	about *fits
	at    place
}

// askTogether asks those questions whose places hold neither a table nor an array, and no name.
func askTogether(doc map[string]any, open []question) {
	was := make([]any, len(open))
	for i, q := range open {
		was[i] = q.at.table[q.at.key]
		switch was[i].(type) {
		case string, bool, int64, float64:
			if q.at.key != "name" {
				q.at.table[q.at.key] = misfit
			}
		}
	}
	says := map[string]string{}
	for _, p := range problemsOf(doc) {
		says[p.Key] = mustBe(p)
	}
	for i, q := range open {
		q.about.value = cmp.Or(q.about.value, says[q.at.path])
		q.at.table[q.at.key] = was[i]
	}
}

// ask puts misfits in the place, notes what the loader says to them, and takes them out again.
// One answer about a key is enough.
func (q *question) ask(doc map[string]any) {
	f, was := q.about, q.at.table[q.at.key]
	if f.value != "" && (f.element != "" || !isArray(f.value)) {
		return
	}
	q.at.table[q.at.key] = misfit
	f.value = saysOf(doc, q.at.path)
	if isArray(f.value) {
		q.at.table[q.at.key] = []any{misfit}
		f.element = saysOf(doc, q.at.path+"[0]")
		q.at.table[q.at.key] = []any{}
		f.full = slices.ContainsFunc(problemsOf(doc), func(p *config.Problem) bool { return p.Key == q.at.path })
	}
	q.at.table[q.at.key] = was
}

// saysOf returns what the loader says that must stand at a path in place of what does.
func saysOf(doc map[string]any, path string) string {
	for _, p := range problemsOf(doc) {
		if text := mustBe(p); text != "" && p.Key == path {
			return text
		}
	}
	return ""
}

// mustBe is what a problem says that must be.
func mustBe(p *config.Problem) string {
	text, ok := strings.CutPrefix(p.Text, "must be ")
	if !ok {
		return ""
	}
	text, _, _ = strings.Cut(text, ", found ")
	text, _, _ = strings.Cut(text, ": ")
	return text
}

func entry(all map[string]map[string]*fits, section, key string) *fits {
	if all[section] == nil {
		all[section] = map[string]*fits{}
	}
	if all[section][key] == nil {
		all[section][key] = new(fits)
	}
	return all[section][key]
}

// topKeys are the sections of the file itself.
func topKeys(sections []docSection) (keys []string) {
	for _, s := range sections {
		if !strings.Contains(s.name, ".") {
			keys = append(keys, s.name)
		}
	}
	return keys
}

// A place is where a key stands in a document.
type place struct {
	table map[string]any
	key   string
	path  string // as messages name it
}

// places are those where a section has the key in the document, below a table.
func places(table map[string]any, path, done, section, key string) (all []place) {
	rest := strings.TrimPrefix(strings.TrimPrefix(section, done), ".")
	if rest == "" {
		if _, ok := table[key]; ok {
			all = append(all, place{table, key, join(path, key)})
		}
		return all
	}
	name, _, _ := strings.Cut(rest, ".")
	inner, innerPath := join(done, name), join(path, name)
	switch v := table[name].(type) {
	case map[string]any:
		return places(v, innerPath, inner, section, key)
	case []map[string]any:
		for i, e := range v {
			all = append(all, places(e, fmt.Sprintf("%s[%d]", innerPath, i), inner, section, key)...)
		}
	case []any:
		for i, e := range v {
			if e, ok := e.(map[string]any); ok {
				all = append(all, places(e, fmt.Sprintf("%s[%d]", innerPath, i), inner, section, key)...)
			}
		}
	}
	return all
}

func join(path, key string) string {
	if path == "" {
		return key
	}
	return path + "." + key
}

func isArray(value string) bool { return strings.HasPrefix(value, "an array") }

// problemsOf is what the loader finds in a document.
func problemsOf(doc map[string]any) (problems []*config.Problem) {
	data, err := toml.Marshal(doc)
	if err != nil {
		panic(err)
	}
	_, err = config.Parse("sample", data)
	joined, ok := err.(interface{ Unwrap() []error })
	if !ok {
		if p, ok := errors.AsType[*config.Problem](err); ok {
			problems = append(problems, p)
		}
		return problems
	}
	for _, e := range joined.Unwrap() {
		if p, ok := errors.AsType[*config.Problem](e); ok {
			problems = append(problems, p)
		}
	}
	return problems
}

// A schema is a JSON schema.
type schema map[string]any

const (
	unitOfTime      = `(ns|us|µs|μs|ms|s|m|h)`
	durationPattern = `^[0-9]+(\.[0-9]*)?` + unitOfTime + `(([0-9]+(\.[0-9]*)?|\.[0-9]+)` + unitOfTime + `)*$`
	sizePattern     = `^[0-9]+(B|KiB|MiB|GiB)$`
)

// shape makes a schema of what the loader says of a key. What it has no schema for is a string,
// or whatever the sample has there.
func (f *fits) shape(section *schema) schema {
	s := shapeOf(f.value, section)
	if isArray(f.value) {
		s = schema{"type": "array"}
		if items := f.items(section); items != nil {
			s["items"] = items
		}
		if f.full {
			s["minItems"] = 1
		}
		return s
	}
	if s == nil {
		s = f.bySamples()
	}
	// Beside a table there may be words.
	if s["type"] == "object" {
		words := map[string]bool{}
		for _, sample := range f.samples {
			if w, ok := sample.(string); ok {
				words[w] = true
			}
		}
		if len(words) > 0 {
			return schema{"anyOf": []schema{s, {"enum": slices.Sorted(maps.Keys(words))}}}
		}
	}
	return s
}

func (f *fits) items(section *schema) schema {
	if f.element == "" {
		for _, sample := range f.samples {
			if array, ok := sample.([]any); ok && len(array) > 0 {
				return ofType(array[0])
			}
		}
		return nil
	}
	s := shapeOf(f.element, section)
	if s == nil {
		s = schema{"type": "string"}
	}
	if section != nil && s["type"] == "string" { // the short form of a table
		return schema{"anyOf": []schema{s, *section}}
	}
	return s
}

// bySamples is what the sample has.
func (f *fits) bySamples() schema {
	for _, sample := range f.samples {
		return ofType(sample)
	}
	return schema{"type": "string"}
}

func ofType(v any) schema {
	switch v := v.(type) {
	case bool:
		return schema{"type": "boolean"}
	case int64:
		return schema{"type": "integer"}
	case float64:
		return schema{"type": "number"}
	case map[string]any:
		return schema{"type": "object"}
	case []any:
		s := schema{"type": "array"}
		if len(v) > 0 {
			s["items"] = ofType(v[0])
		}
		return s
	}
	return schema{"type": "string"}
}

// shapeOf understands what follows "must be"; nil: it does not.
func shapeOf(text string, section *schema) schema {
	if words := alternatives(text); words != nil {
		return schema{"type": "string", "enum": words}
	}
	if statuses := numbers(text); statuses != nil {
		return schema{"type": "integer", "enum": statuses}
	}
	head, rest, _ := strings.Cut(text, " ")
	switch {
	case text == "true or false":
		return schema{"type": "boolean"}
	case strings.HasPrefix(text, "true, or a table"):
		return schema{"anyOf": []schema{{"const": true}, table(section)}}
	case strings.HasPrefix(text, "a table"):
		return table(section)
	case head != "a" && head != "an":
		return nil
	case strings.HasPrefix(rest, "duration"):
		return withWords(schema{"type": "string", "pattern": durationPattern}, rest)
	case strings.HasPrefix(rest, "size"):
		return withWords(schema{"type": "string", "pattern": sizePattern}, rest)
	case strings.HasPrefix(rest, "integer"), strings.HasPrefix(rest, "status"):
		return withWords(bounded("integer", rest), rest)
	case strings.HasPrefix(rest, "percentage"), strings.HasPrefix(rest, "number"):
		return withWords(bounded("number", rest), rest)
	}
	return nil
}

// table is the section, or where it has none a table of names and texts.
func table(section *schema) schema {
	if section != nil {
		return *section
	}
	return schema{"type": "object", "additionalProperties": schema{"type": "string"}}
}

// bounded reads "… from 1 to 9".
func bounded(kind, text string) schema {
	s := schema{"type": kind}
	words := strings.Fields(strings.ReplaceAll(text, ",", " "))
	for i, w := range words[:max(0, len(words)-1)] {
		bound, err := strconv.ParseFloat(words[i+1], 64)
		switch {
		case err != nil:
		case w == "from":
			s["minimum"] = bound
		case w == "to":
			s["maximum"] = bound
		}
	}
	return s
}

// withWords lets a word pass beside: "…, or "off"".
func withWords(s schema, text string) schema {
	_, word, ok := strings.Cut(text, `, or "`)
	word, _, closed := strings.Cut(word, `"`)
	if !ok || !closed || word == "0s" || word == "0B" {
		return s
	}
	words := []string{word}
	if word == "unlimited" {
		words = append(words, "off") // of limits they mean the same
	}
	return schema{"anyOf": []schema{s, {"enum": words}}}
}

// alternatives reads `"a", "b" or "c"`, if that is all. Words with a colon are examples.
func alternatives(text string) (words []string) {
	front, last, ok := strings.Cut(text, " or ")
	if !ok {
		return nil
	}
	for w := range strings.SplitSeq(front+", "+last, ", ") {
		bare, err := strconv.Unquote(w)
		if err != nil || w[0] != '"' || strings.Contains(bare, ":") {
			return nil
		}
		words = append(words, bare)
	}
	return words
}

// numbers reads "301, 302 or 303", if that is all.
func numbers(text string) (all []int) {
	front, last, _ := strings.Cut(text, " or ")
	for w := range strings.SplitSeq(front+", "+last, ", ") {
		n, err := strconv.Atoi(w)
		if err != nil {
			return nil
		}
		all = append(all, n)
	}
	return all
}
