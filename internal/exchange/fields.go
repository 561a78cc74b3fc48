package exchange

import (
	"iter"
	"slices"
	"strings"
)

// Field is one header or trailer field line. Names keep the case in which they
// came; comparing them ignores it (RFC 9110 §5.1).
type Field struct{ Name, Value string }

// Fields are field lines in the order in which they came. The zero value is empty.
type Fields []Field

// Get returns the first value of name.
func (f Fields) Get(name string) (value string, ok bool) {
	for _, l := range f {
		if strings.EqualFold(l.Name, name) {
			return l.Value, true
		}
	}
	return "", false
}

// Len returns how many lines there are.
func (f Fields) Len() int { return len(f) }

// Line returns one of them.
func (f Fields) Line(i int) (name, value string) { return f[i].Name, f[i].Value }

// Has says whether a field of that name is there.
func (f Fields) Has(name string) bool {
	_, ok := f.Get(name)
	return ok
}

// Values yields all values of name, line by line.
func (f Fields) Values(name string) iter.Seq[string] {
	return func(yield func(string) bool) {
		for _, l := range f {
			if strings.EqualFold(l.Name, name) && !yield(l.Value) {
				return
			}
		}
	}
}

// HasToken says whether one of name's values is a comma-separated list with
// token in it; tokens compare without case.
func (f Fields) HasToken(name, token string) bool {
	for v := range f.Values(name) {
		for t := range strings.SplitSeq(v, ",") {
			if strings.EqualFold(strings.Trim(t, " \t"), token) {
				return true
			}
		}
	}
	return false
}

// Add appends a line.
func (f *Fields) Add(name, value string) { *f = append(*f, Field{name, value}) }

// Set replaces all lines of name by one, in the place of the first.
func (f *Fields) Set(name, value string) {
	for i, l := range *f {
		if strings.EqualFold(l.Name, name) {
			(*f)[i].Value = value
			rest := Fields((*f)[i+1:])
			rest.Del(name)
			*f = (*f)[:i+1+len(rest)]
			return
		}
	}
	f.Add(name, value)
}

// Del removes all lines of name.
func (f *Fields) Del(name string) {
	*f = slices.DeleteFunc(*f, func(l Field) bool { return strings.EqualFold(l.Name, name) })
}
