// Package headers has the edits that a configuration makes to header fields: fields to
// remove, to set and to add, whose values may have variables.
//
// It is about texts alone. [Parse] takes a value apart when a configuration is loaded, and
// [Value.Append] puts it together for a request, of which a [Source] knows the variables.
// Neither allocates anything for a request.
//
// A variable stands between two percent signs, as in "%PROTOCOL%" or "%REQ(User-Agent)%",
// and "%%" is one percent sign. The names are those of Envoy.
package headers

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Variable is something that is known of a request.
type Variable uint8

const (
	literal       Variable = iota
	RemoteAddress          // of the client, without its port
	RequestField           // the first one of a name
	Protocol               // that the client speaks: HTTP/1.1
	Hostname               // of this machine
	StartTime              // when the request has come
	UpstreamCluster
	UpstreamHost // the endpoint's address
	RouteName
	RequestID
)

// names has the variables by their names.
var names = map[string]Variable{
	"DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT": RemoteAddress,
	"REQ":                                    RequestField,
	"PROTOCOL":                               Protocol,
	"HOSTNAME":                               Hostname,
	"START_TIME":                             StartTime,
	"UPSTREAM_CLUSTER":                       UpstreamCluster,
	"UPSTREAM_HOST":                          UpstreamHost,
	"ROUTE_NAME":                             RouteName,
	"REQUEST_ID":                             RequestID,
}

// Names returns the names of all variables, sorted.
func Names() []string {
	var all []string
	for name := range names {
		all = append(all, name)
	}
	slices.Sort(all)
	return all
}

// pseudo are what REQ takes besides names of fields.
var pseudo = []string{":authority", ":method", ":path", ":scheme"}

const (
	// MostParts is how many texts a value may consist of.
	MostParts = 16

	// MostBytes is how long a value may become: clients choose what is in some variables.
	MostBytes = 8 << 10

	mostLiteral = 4 << 10 // bytes of a value as it is written
)

// Value is a field's value with its variables. The zero value is empty.
type Value struct{ parts []part }

// part is a text, or a variable.
type part struct {
	variable Variable
	text     string // of a literal; of RequestField the name, in lower case where it is a pseudo one
}

// A Source knows what variables are of a request. name is that of a RequestField, and ""
// otherwise. What it does not know is "".
type Source interface {
	Variable(v Variable, name string) string
}

// Parse takes a value apart. It refuses what could not stand in a field's value.
func Parse(s string) (Value, error) {
	var v Value
	switch {
	case len(s) > mostLiteral:
		return v, fmt.Errorf("it is longer than %d bytes", mostLiteral)
	case strings.ContainsFunc(s, func(r rune) bool { return r < ' ' && r != '\t' || r == 0x7f }):
		return v, errors.New("it holds a control character")
	case s != strings.Trim(s, " \t"):
		return v, errors.New("it begins or ends with white space, which is no part of a field")
	}
	for s != "" {
		text, rest, variable := strings.Cut(s, "%")
		v.add(text)
		if !variable {
			break
		}
		name, rest, closed := strings.Cut(rest, "%")
		switch {
		case !closed:
			return Value{}, errors.New(`a "%" has no partner; write "%%" for the sign itself`)
		case name == "":
			v.add("%")
		default:
			p, err := parseVariable(name)
			if err != nil {
				return Value{}, err
			}
			v.parts = append(v.parts, p)
		}
		s = rest
	}
	if len(v.parts) > MostParts {
		return Value{}, fmt.Errorf("it has more than %d parts", MostParts)
	}
	return v, nil
}

// add appends a text.
func (v *Value) add(text string) {
	if last := len(v.parts) - 1; last >= 0 && v.parts[last].variable == literal {
		v.parts[last].text += text
	} else if text != "" {
		v.parts = append(v.parts, part{text: text})
	}
}

// parseVariable reads what stands between two percent signs.
func parseVariable(s string) (part, error) {
	name, argument, has := strings.Cut(s, "(")
	v, ok := names[name]
	switch {
	case !ok:
		return part{}, fmt.Errorf("there is no variable %%%s%%; known are %s", printable(name), strings.Join(Names(), ", "))
	case v != RequestField && has:
		return part{}, fmt.Errorf("%%%s%% takes nothing in parentheses", name)
	case v != RequestField:
		return part{variable: v}, nil
	}
	argument, closed := strings.CutSuffix(argument, ")")
	lowered := strings.ToLower(argument)
	switch {
	case closed && slices.Contains(pseudo, lowered):
		argument = lowered
	case !closed || !IsName(argument):
		return part{}, fmt.Errorf(`%%REQ%% takes the name of a field, as in "%%REQ(User-Agent)%%", or one of %s`, strings.Join(pseudo, ", "))
	}
	return part{v, argument}, nil
}

// printable is what a message may show of a name that is none.
func printable(s string) string {
	const most = 40
	if len(s) > most {
		s = s[:most] + "…"
	}
	return strings.ToValidUTF8(s, "?")
}

// IsName says whether s may be the name of a field (RFC 9110 §5.1).
func IsName(s string) bool {
	for i := range len(s) {
		c := s[i]
		if letter := c|0x20 >= 'a' && c|0x20 <= 'z'; !letter && (c < '0' || c > '9') && strings.IndexByte("!#$%&'*+-.^_`|~", c) < 0 {
			return false
		}
	}
	return s != ""
}

// Append appends the texts that the value consists of for a request. Of a variable whose
// text could not stand in a field's value there is nothing, and of a value that would be
// longer than MostBytes there is nothing at all.
func (v *Value) Append(texts []string, of Source) []string {
	before, n := len(texts), 0
	for _, p := range v.parts {
		text := p.text
		if p.variable != literal {
			if text = of.Variable(p.variable, p.text); !fits(text) {
				continue
			}
		}
		n += len(text)
		texts = append(texts, text)
	}
	if n > MostBytes {
		return texts[:before]
	}
	return texts
}

// Text returns a value without variables.
func (v *Value) Text() (text string, fixed bool) {
	switch {
	case len(v.parts) == 0:
		return "", true
	case len(v.parts) == 1 && v.parts[0].variable == literal:
		return v.parts[0].text, true
	}
	return "", false
}

// fits says whether a text may stand in a field's value: whoever has made it has seen to
// that already, but a line that ends here would begin another one.
func fits(s string) bool {
	for i := range len(s) {
		if c := s[i]; c < ' ' && c != '\t' || c == 0x7f {
			return false
		}
	}
	return true
}
