// Package urlpath gives the path of a request target one spelling: the one that routes are
// matched with, and the one that upstreams get.
//
// A path has many spellings for one thing: /admin, //admin, /x/../admin, /%61dmin. A route
// that is to guard it must get them all, and no upstream may make something else of what was
// matched. So each is brought into one form, and what one program would read in this way and
// another one in that way is refused:
//
//	%XX of a letter, digit, "-", ".", "_" or "~"    decoded (RFC 3986 §6.2.2.2)
//	%xx of anything else                            in upper case (RFC 3986 §6.2.2.1)
//	"//"                                            one slash
//	the segments "." and ".."                       resolved (RFC 3986 §5.2.4)
//	"%" without two hexadecimal digits              refused
//	an encoded control character, as %00            refused
//	"\", %2F and %5C                                refused, or as the policy says
//	"." or ".." before ";" or an encoded slash      refused: to some programs a dot segment
//	"/;" and "/%3B" before another slash            refused: to some programs two slashes
//
// Reserved characters stay as they came, since "@" and %40 are two things to RFC 3986. The
// query, from the first "?" on, is never looked at.
package urlpath

import (
	"bytes"
	"errors"
	"strings"
	"unsafe"
)

// Policy says how paths are spelled. The zero value is the safe one.
type Policy struct {
	Off          bool // paths stay as they came, whatever they are
	KeepSlashes  bool // "//" stays
	Encoded      Encoded
	RefuseParams bool // ";" and %3B are refused: to some programs they end a segment
}

// Encoded is what becomes of %2F and %5C, which some programs take for slashes.
type Encoded uint8

const (
	Reject Encoded = iota
	Keep           // "\" is refused all the same
	Decode         // each of them, and "\", is a slash
)

// Why a path is refused. None of these holds a part of it.
var (
	errRelative  = errors.New("a path that does not begin with a slash")
	errPercent   = errors.New(`a path with a "%" without two hexadecimal digits`)
	errControl   = errors.New("a path with an encoded control character")
	errSlash     = errors.New("a path with an encoded slash or backslash")
	errBackslash = errors.New("a path with a backslash")
	errParams    = errors.New("a path with parameters")
	errEmpty     = errors.New("a path with a segment of parameters alone before another one")
	errDots      = errors.New("a path with a dot segment that has parameters or encoded slashes")
)

// Normalise returns the target, which begins with "/" or is "*", in its one spelling. That is
// the same string where nothing changes, and never a longer one. An error says why the target
// is refused.
func (p Policy) Normalise(target string) (string, error) {
	if normal, err := p.IsNormal(target); normal || err != nil {
		return target, err
	}
	b, err := p.Append(make([]byte, 0, len(target)), target)
	if err != nil {
		return target, err
	}
	return viewOf(b), nil
}

// IsNormal says whether a target is spelled as it should be. It allocates nothing. Where the
// answer is no, [Policy.Append] may still refuse it.
func (p Policy) IsNormal(target string) (bool, error) {
	if p.Off || target == "*" {
		return true, nil
	}
	path, _ := cut(target)
	if path == "" || path[0] != '/' {
		return false, errRelative
	}
	spelled, err := p.isSpelled(path)
	if !spelled || err != nil {
		return false, err
	}
	return isResolved(path)
}

// Append appends the target in its one spelling. What it appends is not longer than the
// target.
func (p Policy) Append(b []byte, target string) ([]byte, error) {
	if p.Off || target == "*" {
		return append(b, target...), nil
	}
	path, query := cut(target)
	if path == "" || path[0] != '/' {
		return b, errRelative
	}
	begin := len(b)
	b, err := p.appendSpelled(b, path)
	if err != nil {
		return b[:begin], err
	}
	if isEmptied(viewOf(b[begin:])) {
		return b[:begin], errEmpty
	}
	n, err := resolve(b[begin:])
	if err != nil {
		return b[:begin], err
	}
	return append(b[:begin+n], query...), nil
}

// Resolved says whether a path has neither dot segments nor what could pass for one. It is
// asked of targets that were made of normal ones.
func Resolved(target string) bool {
	path, _ := cut(target)
	resolved, err := isResolved(path)
	return resolved && err == nil
}

// Permits says whether a target that was normal, and then rewritten, may be sent. What the
// normalisation has removed must not come back by the seam of a rewrite: of "/a../b", with
// "/a" rewritten to "/", there would be "/../b".
func (p Policy) Permits(normal, rewritten string) bool {
	return rewritten == normal || p.Off || Resolved(rewritten)
}

// cut returns the query with its "?".
func cut(target string) (path, query string) {
	if i := strings.IndexByte(target, '?'); i >= 0 {
		return target[:i], target[i:]
	}
	return target, ""
}

// An octetKind is what becomes of an octet of a path.
type octetKind uint8

const (
	literal octetKind = iota // stands for itself
	encoded                  // stays percent-encoded
	slash
)

// octet reads one octet at the front of a path, in n bytes.
func (p Policy) octet(path string) (c byte, kind octetKind, n int, err error) {
	switch c = path[0]; c {
	case '/':
		return c, slash, 1, nil
	case '\\':
		if p.Encoded != Decode {
			return c, literal, 1, errBackslash
		}
		return c, slash, 1, nil
	case ';':
		if p.RefuseParams {
			return c, literal, 1, errParams
		}
		return c, literal, 1, nil
	case '%':
		c, kind, err = p.percent(path)
		return c, kind, len("%XX"), err
	}
	return c, literal, 1, nil
}

// percent is octet for a percent-encoded one.
func (p Policy) percent(path string) (c byte, kind octetKind, err error) {
	if len(path) < len("%XX") || hex[path[1]] < 0 || hex[path[2]] < 0 {
		return 0, 0, errPercent
	}
	c = byte(hex[path[1]])<<4 | byte(hex[path[2]])
	switch {
	case unreserved[c]:
		return c, literal, nil
	case c < ' ' || c == 0x7f:
		return c, encoded, errControl
	case c == ';' && p.RefuseParams:
		return c, encoded, errParams
	case c != '/' && c != '\\' || p.Encoded == Keep:
		return c, encoded, nil
	case p.Encoded == Decode:
		return c, slash, nil
	}
	return c, encoded, errSlash
}

// isSpelled says whether appendSpelled would change nothing.
func (p Policy) isSpelled(path string) (bool, error) {
	spelled := true
	for i := 0; i < len(path); i++ {
		switch c := path[i]; {
		case plain[c]:
		case c == '/':
			spelled = spelled && (p.KeepSlashes || i == 0 || path[i-1] != '/')
		default:
			_, kind, n, err := p.octet(path[i:])
			if err != nil {
				return false, err
			}
			final := kind == literal && n == 1 || kind == encoded && isUpper(path[i+1]) && isUpper(path[i+2])
			spelled = spelled && final
			i += n - 1
		}
	}
	return spelled, nil
}

// appendSpelled appends a path with each of its octets in the one way.
func (p Policy) appendSpelled(b []byte, path string) ([]byte, error) {
	for begin := len(b); path != ""; {
		c, kind, n, err := p.octet(path)
		switch {
		case err != nil:
			return b, err
		case kind == encoded:
			b = append(b, '%', digits[c>>4], digits[c&15])
		case kind == literal:
			b = append(b, c)
		case p.KeepSlashes || len(b) == begin || b[len(b)-1] != '/':
			b = append(b, '/')
		}
		path = path[n:]
	}
	return b, nil
}

// A segmentKind is what a segment means.
type segmentKind uint8

const (
	ordinary segmentKind = iota
	here
	above
	doubtful // some programs take it, or a part of it, for one of those
)

// kindOf looks at a segment that is spelled in the one way.
func kindOf(segment string) segmentKind {
	switch segment {
	case ".":
		return here
	case "..":
		return above
	}
	for rest := segment; rest != ""; {
		if rest[0] == '.' {
			if end := strings.TrimPrefix(rest[1:], "."); end == "" || endsPart(end) {
				return doubtful
			}
		}
		i := strings.IndexByte(rest, '%')
		for i >= 0 && !isEncodedSlash(rest[i:]) {
			next := strings.IndexByte(rest[i+1:], '%')
			if next < 0 {
				return ordinary
			}
			i += 1 + next
		}
		if i < 0 {
			return ordinary
		}
		rest = rest[i+len("%2F"):]
	}
	return ordinary
}

// endsPart says whether a segment, or a part of one, ends here for some programs.
func endsPart(s string) bool {
	return s[0] == ';' || strings.HasPrefix(s, "%3B") || isEncodedSlash(s)
}

func isEncodedSlash(s string) bool { return strings.HasPrefix(s, "%2F") || strings.HasPrefix(s, "%5C") }

// isEmptied says whether a segment that another one follows is empty to programs that cut
// parameters off: "/;/admin" is "/admin" to them. The last one may be, as "/;session=1" is.
func isEmptied(path string) bool {
	if strings.IndexByte(path, ';') >= 0 {
		if i := strings.Index(path, "/;"); i >= 0 && strings.IndexByte(path[i+len("/;"):], '/') >= 0 {
			return true
		}
	}
	if strings.IndexByte(path, '%') >= 0 {
		if i := strings.Index(path, "/%3B"); i >= 0 && strings.IndexByte(path[i+len("/%3B"):], '/') >= 0 {
			return true
		}
	}
	return false
}

// isResolved says whether resolve would change nothing.
func isResolved(path string) (bool, error) {
	if isEmptied(path) {
		return false, errEmpty
	}
	if !strings.Contains(path, "/.") && (strings.IndexByte(path, '%') < 0 || !strings.Contains(path, "%2F.") && !strings.Contains(path, "%5C.")) {
		return true, nil // as almost all
	}
	resolved := true
	for segment := range strings.SplitSeq(path, "/") {
		switch kindOf(segment) {
		case here, above:
			resolved = false
		case doubtful:
			return false, errDots
		}
	}
	return resolved, nil
}

// resolve removes dot segments as RFC 3986 §5.2.4 does, and returns how much of path is left.
func resolve(path []byte) (n int, err error) {
	for i := 0; i < len(path); { // before n is what was resolved, at i the slash before what is to come
		end := len(path)
		if k := bytes.IndexByte(path[i+1:], '/'); k >= 0 {
			end = i + 1 + k
		}
		kind := kindOf(viewOf(path[i+1 : end]))
		switch kind {
		case doubtful:
			return 0, errDots
		case above:
			n = max(0, bytes.LastIndexByte(path[:n], '/'))
		case ordinary:
			n += copy(path[n:], path[i:end])
		}
		if kind != ordinary && end == len(path) { // "/a/.." is a folder
			path[n] = '/'
			n++
		}
		i = end
	}
	return n, nil
}

const digits = "0123456789ABCDEF"

var (
	hex        = makeHex()
	unreserved = makeUnreserved()
	plain      = makePlain()
)

// makeHex returns the values of hexadecimal digits, -1 for what is none.
func makeHex() (t [256]int8) {
	for c := range 256 {
		t[c] = int8(max(strings.IndexByte(digits, byte(c)), strings.IndexByte("0123456789abcdef", byte(c))))
	}
	return t
}

// makeUnreserved returns the set of RFC 3986 §2.3.
func makeUnreserved() (t [256]bool) {
	for c := range 256 {
		letter := 'a' <= c|0x20 && c|0x20 <= 'z' && c < 0x80
		t[c] = letter || '0' <= c && c <= '9' || c < 0x80 && strings.IndexByte("-._~", byte(c)) >= 0
	}
	return t
}

// makePlain returns the bytes that are octets which stand for themselves, whatever the policy.
func makePlain() (t [256]bool) {
	for c := range 256 {
		t[c] = strings.IndexByte(`/\;%`, byte(c)) < 0
	}
	return t
}

func isUpper(digit byte) bool { return digit < 'a' }

// viewOf returns b as a string without a copy.
func viewOf(b []byte) string { return unsafe.String(unsafe.SliceData(b), len(b)) }
