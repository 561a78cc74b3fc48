// Package format has the formats of access logs: strings with operators, as Envoy has them.
//
//	[%START_TIME%] "%REQ(:METHOD)% %REQ(:PATH)% %PROTOCOL%" %RESPONSE_CODE% %RESPONSE_FLAGS%
//
// It reads them into pieces and knows nothing of records; the configuration checks them with
// it, and the access log writes what they say.
package format

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"holdfast/internal/headers"
)

// The most that a format may be.
const (
	mostBytes  = 2048 // as it is written; of a table the keys and values together
	mostNeeded = 3072 // of a line in which no string has more room than it must have
	mostLimit  = 1024 // of a MAX
)

// Leasts are what the values of operators need.
const (
	leastString = 5  // quotes and the mark of one that was cut, or null
	mostNumber  = 20 // digits
	mostAddress = len("[ffff:ffff:ffff:ffff:ffff:ffff:255.255.255.255]:65535")
	mostFlags   = 96
)

// Format is how a record becomes a line. It never changes.
type Format struct {
	Pieces []Piece
}

// Piece is a part of a line.
type Piece struct {
	Op   Op
	Text string // of a literal

	// Name and Other are fields; Other is asked for where Name is not there, and "" if none
	// is. Name may begin with a colon.
	Name, Other string
	Max         int    // bytes of the value; 0: as many as usual
	Time        []Time // of StartTime; nil: the usual

	// Whole says that the piece is a JSON value, with quotes and null where it is absent.
	Whole bool

	// Number says that the value is a number.
	Number bool

	Escaped *Escaped

	// Rest is how many bytes of the line the pieces behind this one need at least.
	Rest int
}

// Escaped are the characters that may not stand for themselves in a value: they would end it
// for whoever reads the line.
type Escaped struct {
	ASCII [128]bool
	Wide  bool // all others
}

// UnknownError is a name that there is not.
type UnknownError struct {
	What  string // "operator" or "name"
	Name  string
	Known []string // those that there are
}

func (e *UnknownError) Error() string { return "unknown " + e.What + " " + printable(e.Name) }

// Text reads a line of text. Its end needs not be written.
func Text(s string) (*Format, error) {
	s = strings.TrimSuffix(s, "\n")
	if s == "" {
		return nil, errors.New("there is nothing in it")
	}
	pieces, err := parse(s)
	if err != nil {
		return nil, err
	}
	quoted := false
	for i := range pieces {
		p := &pieces[i]
		if p.Op == Literal {
			if strings.Count(p.Text, `"`)%2 == 1 {
				quoted = !quoted
			}
			continue
		}
		p.escape(quoted, around(pieces, i))
	}
	return complete(s, pieces)
}

// A KeyError is a problem with one key of a table.
type KeyError struct {
	Key string
	Err error
}

func (e *KeyError) Error() string { return e.Key + ": " + e.Err.Error() }
func (e *KeyError) Unwrap() error { return e.Err }

// JSON reads what the keys of an object are to have. They stand in the order of the alphabet.
// An error is of type [*KeyError], or about the whole.
func JSON(table map[string]string) (*Format, error) {
	if len(table) == 0 {
		return nil, errors.New("there is no key in it")
	}
	var all []Piece
	var written strings.Builder
	literal := func(text string) {
		if last := len(all) - 1; last >= 0 && all[last].Op == Literal {
			all[last].Text += text
			return
		}
		all = append(all, Piece{Text: text})
	}
	for i, key := range slices.Sorted(maps.Keys(table)) {
		value := table[key]
		written.WriteString(key)
		written.WriteString(value)
		if err := checkText(key); err != nil {
			return nil, &KeyError{key, err}
		}
		pieces, err := parse(value)
		if err != nil {
			return nil, &KeyError{key, err}
		}
		opening := ","
		if i == 0 {
			opening = "{"
		}
		literal(opening + `"` + escapeJSON(key) + `":`)
		if len(pieces) == 1 && pieces[0].Op != Literal {
			p := &pieces[0]
			p.Whole = true
			p.escape(true, "")
			all = append(all, *p)
			continue
		}
		literal(`"`)
		for i := range pieces {
			p := &pieces[i]
			if p.Op == Literal {
				literal(escapeJSON(p.Text))
				continue
			}
			p.escape(true, around(pieces, i))
			all = append(all, *p)
		}
		literal(`"`)
	}
	literal("}")
	return complete(written.String(), all)
}

// complete bounds a format that was written like this.
func complete(s string, pieces []Piece) (*Format, error) {
	if len(s) > mostBytes {
		return nil, fmt.Errorf("it has %d bytes, %d are the most", len(s), mostBytes)
	}
	rest := 0
	for i := len(pieces) - 1; i >= 0; i-- {
		p := &pieces[i]
		p.Rest = rest
		rest += p.least()
	}
	if rest > mostNeeded {
		return nil, errors.New("a line would be too long, whatever is in it")
	}
	return &Format{pieces}, nil
}

// least is how many bytes the piece needs.
func (p *Piece) least() int {
	switch {
	case p.Op == Literal:
		return len(p.Text)
	case p.Op == StartTime:
		return 2 + lengthOf(p.Time)
	case p.Number:
		return mostNumber
	case p.Op == RemoteAddress, p.Op == RemoteAddressWithoutPort, p.Op == ClientAddress:
		return 2 + mostAddress
	case p.Op == ResponseFlags:
		return 2 + mostFlags
	}
	return leastString
}

// around returns the text that stands at both sides of a piece.
func around(pieces []Piece, i int) string {
	s := ""
	if i > 0 && pieces[i-1].Op == Literal {
		_, size := utf8.DecodeLastRuneInString(pieces[i-1].Text)
		s += pieces[i-1].Text[len(pieces[i-1].Text)-size:]
	}
	if i+1 < len(pieces) && pieces[i+1].Op == Literal {
		_, size := utf8.DecodeRuneInString(pieces[i+1].Text)
		s += pieces[i+1].Text[:size]
	}
	return s
}

// escape has escaped in the value what else could be taken for its end: what stands beside
// it, and without quotes a space.
func (p *Piece) escape(quoted bool, beside string) {
	p.Escaped = Escaping(beside)
	p.Escaped.ASCII[' '] = p.Escaped.ASCII[' '] || !quoted
}

// Escaping returns what is escaped in every string, and beside that these characters.
func Escaping(characters string) *Escaped {
	e := new(Escaped)
	for c := range e.ASCII {
		e.ASCII[c] = c < ' ' || c == 0x7f || c == '"' || c == '\\'
	}
	for _, c := range characters {
		switch {
		case c >= utf8.RuneSelf:
			e.Wide = true
		case !alphanumeric(byte(c)): // those are part of any value
			e.ASCII[c] = true
		}
	}
	return e
}

func alphanumeric(c byte) bool {
	return '0' <= c && c <= '9' || 'A' <= c && c <= 'Z' || 'a' <= c && c <= 'z'
}

// escapeJSON makes text that checkText allows a part of a JSON string.
func escapeJSON(s string) string { return jsonEscapes.Replace(s) }

var jsonEscapes = strings.NewReplacer(`"`, `\"`, `\`, `\\`, "\t", `\t`)

// checkText refuses what no line should hold.
func checkText(s string) error {
	if s == "" {
		return errors.New("it is empty")
	}
	for _, r := range s {
		if r != '\t' && !strconv.IsPrint(r) || r == utf8.RuneError {
			return fmt.Errorf("it holds the character %U, which cannot be printed", r)
		}
	}
	return nil
}

func printable(s string) string {
	const most = 60
	if len(s) > most {
		s = s[:most] + "…"
	}
	q := strconv.Quote(s)
	return q[1 : len(q)-1]
}

// parse divides a string into text and operators.
func parse(s string) ([]Piece, error) {
	if s != "" {
		if err := checkText(s); err != nil {
			return nil, err
		}
	}
	if len(s) > mostBytes {
		return nil, fmt.Errorf("it has %d bytes, %d are the most", len(s), mostBytes)
	}
	var pieces []Piece
	text := ""
	flush := func() {
		if text != "" {
			pieces = append(pieces, Piece{Text: text})
			text = ""
		}
	}
	for s != "" {
		before, rest, found := strings.Cut(s, "%")
		text += before
		switch {
		case !found:
			s = ""
		case strings.HasPrefix(rest, "%"):
			text += "%"
			s = rest[1:]
		default:
			p, behind, err := operator(rest)
			if err != nil {
				return nil, err
			}
			flush()
			pieces = append(pieces, p)
			s = behind
		}
	}
	flush()
	return pieces, nil
}

// operator reads one behind its percent sign, up to the second one.
func operator(s string) (p Piece, rest string, err error) {
	n := 0
	for n < len(s) && (s[n] == '_' || alphanumeric(s[n])) {
		n++
	}
	name := s[:n]
	rest = s[n:]
	arguments, hasArguments := "", false
	if strings.HasPrefix(rest, "(") {
		arguments, rest, hasArguments = strings.Cut(rest[1:], ")")
		if !hasArguments {
			return p, "", fmt.Errorf("the parenthesis of %%%s( is not closed", printable(name))
		}
	}
	limit, hasLimit := "", strings.HasPrefix(rest, ":")
	if hasLimit {
		rest = rest[1:]
		n := 0
		for n < len(rest) && '0' <= rest[n] && rest[n] <= '9' {
			n++
		}
		limit, rest = rest[:n], rest[n:]
	}
	if !strings.HasPrefix(rest, "%") {
		return p, "", fmt.Errorf("the operator %%%s has no percent sign at its end; write %%%% for a percent sign", printable(name))
	}
	rest = rest[1:]

	o, known := named(name)
	if !known {
		return p, "", &UnknownError{"operator", name, Names()}
	}
	p.Op, p.Number = o.Op, o.Number
	switch {
	case hasArguments && o.Takes == "":
		return p, "", fmt.Errorf("%%%s%% takes nothing in parentheses", name)
	case hasLimit && !o.takesField():
		return p, "", fmt.Errorf("%%%s%% takes no :MAX", name)
	case o.takesField():
		if err := p.fields(name, arguments); err != nil {
			return p, "", err
		}
	case hasArguments:
		if p.Time, err = parseTime(arguments); err != nil {
			return p, "", fmt.Errorf("%%%s(%s)%%: %w", name, printable(arguments), err)
		}
	}
	if hasLimit {
		if p.Max, err = strconv.Atoi(limit); err != nil || p.Max < 1 || p.Max > mostLimit {
			return p, "", fmt.Errorf("the :MAX of %%%s%% must be a number from 1 to %d", name, mostLimit)
		}
	}
	return p, rest, nil
}

// takesField says whether the operator is about a field.
func (o Operator) takesField() bool {
	return o.Op == Request || o.Op == RequestWithoutQuery || o.Op == Response
}

// pseudo are the names that are no field's.
var pseudo = []string{":METHOD", ":PATH", ":AUTHORITY", ":SCHEME"}

// fields reads NAME?OTHER.
func (p *Piece) fields(operator, s string) error {
	names := strings.SplitN(s, "?", 2)
	for _, n := range names {
		switch {
		case strings.HasPrefix(n, ":") && p.Op != Response:
			if !slices.Contains(pseudo, strings.ToUpper(n)) {
				return &UnknownError{"name", n, pseudo}
			}
		case !headers.IsName(n):
			return fmt.Errorf("%%%s(%s)%% names no field, as %%%s(X-Name)%% and %%%s(X-Name?Other)%% do", operator, printable(s), operator, operator)
		}
	}
	p.Name = canonical(names[0])
	if len(names) == 2 {
		p.Other = canonical(names[1])
	}
	return nil
}

// canonical is the one way in which a name is written, which is compared without case. Of the
// host there is one statement.
func canonical(name string) string {
	if name = strings.ToLower(name); name == "host" {
		return ":authority"
	}
	return name
}
