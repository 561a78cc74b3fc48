package config

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/BurntSushi/toml"
)

// The bounds of a file's shape. No key of ours comes near them; they keep a file
// that is none of ours from costing the parser a stack or a memory of any size.
const (
	maxDepth   = 16  // names and brackets above a key
	maxKeyName = 128 // bytes of one name
)

// errSyntax ends a scan of a document that is no TOML. What is wrong with it is
// for the parser to say.
var errSyntax = errors.New("not valid TOML")

// keyLines finds the line of every key and every array element in a document,
// under its key path as messages name it: "virtual_hosts[0].routes[1].cluster".
//
// The TOML library knows these lines, but keeps them to itself, one for all
// elements of an array. So this scanner follows the structure of a document and
// nothing else: values are skipped, rules are the library's to check. Of a
// document that the library accepts it misses no key.
//
// The error is a [*Problem] without a file for a shape that no configuration has,
// and errSyntax, with the lines up to there, where the document is malformed.
func keyLines(doc string) (map[string]int, error) {
	// The same marks that the library skips.
	for _, bom := range []string{"\xef\xbb\xbf", "\xff\xfe", "\xfe\xff"} {
		if rest, ok := strings.CutPrefix(doc, bom); ok {
			doc = rest
			break
		}
	}
	s := scanner{rest: doc, line: 1, lines: map[string]int{}, tables: map[string]int{}}
	return s.lines, s.document()
}

// checkShape returns the error of keyLines, and is quicker.
func checkShape(doc string) error {
	s := scanner{rest: doc, line: 1}
	return s.document()
}

// scanner walks over a document. Its methods expect to stand on the first byte
// of what they are named after, and leave it behind its last.
type scanner struct {
	rest   string
	line   int            // of rest's first byte
	lines  map[string]int // key path → line; nil: nobody asks, and paths are not made
	tables map[string]int // path of an array of tables → how many [[headers]] it has had
}

func (s *scanner) document() error {
	table := ""
	for {
		s.blank()
		if s.rest == "" {
			return nil
		}
		var err error
		if s.rest[0] == '[' {
			table, err = s.header()
		} else {
			err = s.keyValue(table, 1)
		}
		if err != nil {
			return err
		}
	}
}

// header reads "[a.b]" or "[[a.b]]" and returns the path of the table it opens.
func (s *scanner) header() (string, error) {
	line := s.line
	array := s.skip("[[")
	closing := "]]"
	if !array {
		s.skip("[")
		closing = "]"
	}
	names, err := s.key()
	if err != nil {
		return "", err
	}
	if !s.skip(closing) {
		return "", errSyntax
	}
	path := s.enter("", names, line)
	if !array || s.lines == nil {
		return path, nil
	}
	s.tables[path]++
	path = fmt.Sprintf("%s[%d]", path, s.tables[path]-1)
	s.lines[path] = line
	return path, nil
}

// keyValue reads "a.b = value" of the table at path.
func (s *scanner) keyValue(path string, depth int) error {
	line := s.line
	names, err := s.key()
	if err != nil {
		return err
	}
	if !s.skip("=") {
		return errSyntax
	}
	s.space()
	return s.value(s.enter(path, names, line), depth+len(names))
}

// enter notes the line of the key that names lead to from the table at path, and
// of the tables on the way that nothing else has named. The way leads through
// the newest element of an array of tables.
func (s *scanner) enter(path string, names []string, line int) string {
	if s.lines == nil {
		return ""
	}
	for i, name := range names {
		if n := s.tables[path]; n > 0 {
			path = fmt.Sprintf("%s[%d]", path, n-1)
		}
		path = keyPath(path, name)
		if _, known := s.lines[path]; !known || i == len(names)-1 && s.tables[path] == 0 {
			s.lines[path] = line
		}
	}
	return path
}

// key reads "a", "a.b" or `a . "b c" . 'd'`, and the space behind it.
func (s *scanner) key() ([]string, error) {
	var names []string
	for {
		s.space()
		name, err := s.name()
		if err != nil {
			return nil, err
		}
		names = append(names, name)
		if len(name) > maxKeyName || len(names) > maxDepth {
			return nil, s.tooLarge()
		}
		s.space()
		if !s.skip(".") {
			return names, nil
		}
	}
}

func (s *scanner) name() (string, error) {
	if s.rest != "" && (s.rest[0] == '"' || s.rest[0] == '\'') {
		return s.quotedName(s.rest[:1])
	}
	end := strings.IndexFunc(s.rest, func(r rune) bool { return !isBare(r) })
	if end <= 0 {
		return "", errSyntax
	}
	name := s.rest[:end]
	s.rest = s.rest[end:]
	return name, nil
}

func (s *scanner) quotedName(quote string) (string, error) {
	before := s.rest
	if err := s.shortString(quote); err != nil {
		return "", err
	}
	quoted := before[:len(before)-len(s.rest)]
	name := quoted[1 : len(quoted)-1]
	if quote == "'" || !strings.Contains(name, `\`) {
		return name, nil
	}
	// Rare enough to let the library say what the escapes mean.
	var v struct{ K string }
	if len(quoted) > 10*maxKeyName {
		return "", s.tooLarge()
	}
	if _, err := toml.Decode("K = "+quoted, &v); err != nil {
		return "", errSyntax
	}
	return v.K, nil
}

// value skips a value, noting the keys and elements inside.
func (s *scanner) value(path string, depth int) error {
	if depth > maxDepth {
		return s.tooLarge()
	}
	switch {
	case s.skip("["):
		return s.array(path, depth)
	case s.skip("{"):
		return s.inlineTable(path, depth)
	case strings.HasPrefix(s.rest, `"""`), strings.HasPrefix(s.rest, "'''"):
		return s.longString(s.rest[:3])
	case strings.HasPrefix(s.rest, `"`), strings.HasPrefix(s.rest, "'"):
		return s.shortString(s.rest[:1])
	}
	// A number, a date, true or false.
	end := strings.IndexAny(s.rest, ",]}#\n")
	if end < 0 {
		end = len(s.rest)
	}
	if end == 0 {
		return errSyntax
	}
	s.rest = s.rest[end:]
	return nil
}

// array reads the elements and the end of an array whose "[" has been read.
func (s *scanner) array(path string, depth int) error {
	for i := 0; ; i++ {
		s.blank()
		if s.skip("]") {
			return nil
		}
		element := ""
		if s.lines != nil {
			element = fmt.Sprintf("%s[%d]", path, i)
			s.lines[element] = s.line
		}
		if err := s.value(element, depth+1); err != nil {
			return err
		}
		s.blank()
		if !s.skip(",") && !strings.HasPrefix(s.rest, "]") {
			return errSyntax
		}
	}
}

// inlineTable reads the pairs and the end of a table whose "{" has been read.
func (s *scanner) inlineTable(path string, depth int) error {
	for {
		s.blank()
		if s.skip("}") {
			return nil
		}
		if err := s.keyValue(path, depth+1); err != nil {
			return err
		}
		s.blank()
		if !s.skip(",") && !strings.HasPrefix(s.rest, "}") {
			return errSyntax
		}
	}
}

// shortString skips a string that stays on its line.
func (s *scanner) shortString(quote string) error {
	for i := 1; i < len(s.rest); i++ {
		switch {
		case s.rest[i] == quote[0]:
			s.rest = s.rest[i+1:]
			return nil
		case s.rest[i] == '\n':
			return errSyntax
		case s.rest[i] == '\\' && quote == `"`:
			i++
		}
	}
	return errSyntax
}

// longString skips a string in triple quotes. Up to two more quotes before the
// closing three are part of it.
func (s *scanner) longString(quotes string) error {
	for i := 3; i < len(s.rest); i++ {
		switch {
		case strings.HasPrefix(s.rest[i:], quotes):
			end := i + 3
			for end < min(i+5, len(s.rest)) && s.rest[end] == quotes[0] {
				end++
			}
			s.line += strings.Count(s.rest[:end], "\n")
			s.rest = s.rest[end:]
			return nil
		case s.rest[i] == '\\' && quotes == `"""` && !strings.HasPrefix(s.rest[i+1:], "\n"):
			i++
		}
	}
	return errSyntax
}

// space skips to the next thing on this line.
func (s *scanner) space() { s.rest = strings.TrimLeft(s.rest, " \t") }

// blank skips spaces, line ends and comments.
func (s *scanner) blank() {
	for s.rest != "" {
		switch s.rest[0] {
		case '\n':
			s.line++
			s.rest = s.rest[1:]
		case ' ', '\t', '\r':
			s.rest = s.rest[1:]
		case '#':
			end := strings.IndexByte(s.rest, '\n')
			if end < 0 {
				end = len(s.rest)
			}
			s.rest = s.rest[end:]
		default:
			return
		}
	}
}

// skip steps over token if it is next.
func (s *scanner) skip(token string) (found bool) {
	s.rest, found = strings.CutPrefix(s.rest, token)
	return found
}

func (s *scanner) tooLarge() error {
	return &Problem{Line: s.line, Text: fmt.Sprintf(
		"a key with a name of more than %d bytes, or nested more than %d deep; is this a Holdfast configuration?", maxKeyName, maxDepth)}
}

// keyPath appends a name to a path, quoted where TOML would need quotes.
func keyPath(path, name string) string {
	if name == "" || strings.ContainsFunc(name, func(r rune) bool { return !isBare(r) }) {
		name = strconv.Quote(name)
	}
	if path == "" {
		return name
	}
	return path + "." + name
}

// isBare tells whether a key may hold r without quotes.
func isBare(r rune) bool {
	return 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || r == '_' || r == '-'
}
