package http1

import (
	"encoding/binary"
	"math/bits"
	"net/netip"
	"strconv"
	"strings"
	"unsafe"
)

// A charClass is a set of bytes that the grammar allows somewhere.
type charClass uint8

const (
	tokenChar  charClass = 1 << iota // RFC 9110 §5.6.2
	valueChar                        // RFC 9110 §5.5: HTAB, SP, VCHAR, obs-text
	targetChar                       // VCHAR without "#": what clients really send, not only RFC 3986
	hostChar                         // RFC 3986 §2.3, unreserved
	digitChar
)

var charClasses = makeCharClasses()

func makeCharClasses() (t [256]charClass) {
	for c := range 256 {
		letter := 'a' <= c|0x20 && c|0x20 <= 'z'
		digit := '0' <= c && c <= '9'
		visible := 0x21 <= c && c <= 0x7e
		if letter || digit || visible && strings.IndexByte("!#$%&'*+-.^_`|~", byte(c)) >= 0 {
			t[c] |= tokenChar
		}
		if letter || digit || visible && strings.IndexByte("-._~", byte(c)) >= 0 {
			t[c] |= hostChar
		}
		if visible || c == ' ' || c == '\t' || c >= 0x80 {
			t[c] |= valueChar
		}
		if visible && c != '#' {
			t[c] |= targetChar
		}
		if digit {
			t[c] |= digitChar
		}
	}
	return t
}

// consistsOf says whether every byte of s is of the class; true of "".
func consistsOf(s string, class charClass) bool {
	for i := range len(s) {
		if charClasses[s[i]]&class == 0 {
			return false
		}
	}
	return true
}

// isValue says whether s may be the value of a field.
func isValue(s string) bool {
	return valueLength(unsafe.Slice(unsafe.StringData(s), len(s))) == len(s) // which reads only
}

func isToken(s string) bool { return s != "" && consistsOf(s, tokenChar) }

// isProtocol says whether s is one protocol as an Upgrade field names it, and none that
// changes how the connection itself works (RFC 9110 §7.8).
func isProtocol(s string) bool {
	name, version, versioned := strings.Cut(s, "/")
	return isToken(name) && (!versioned || isToken(version)) && !isWord(name, "h2c") && !isWord(name, "http") && !isWord(name, "tls")
}

// isWord says whether s is the word, of ASCII letters and in lower case, in whatever
// case. strings.EqualFold alone would take the Kelvin sign for a k.
func isWord(s, word string) bool { return len(s) == len(word) && strings.EqualFold(s, word) }

// IsAuthority says whether s is a host with or without a port, as a request may name it.
func IsAuthority(s string) bool { return isAuthority(s) }

// isAuthority says whether s is host or host:port. User information and an empty
// port are refused (RFC 9110 §4.2.4).
func isAuthority(s string) bool {
	if strings.HasPrefix(s, "[") {
		host, port, ok := strings.Cut(s[1:], "]")
		addr, err := netip.ParseAddr(host)
		return ok && err == nil && addr.Is6() && addr.Zone() == "" && (port == "" || port[0] == ':' && isPort(port[1:]))
	}
	host, port, hasPort := strings.Cut(s, ":")
	return host != "" && consistsOf(host, hostChar) && (!hasPort || isPort(port))
}

func isPort(s string) bool {
	if s == "" || len(s) > 5 || !consistsOf(s, digitChar) {
		return false
	}
	n, err := strconv.Atoi(s)
	return err == nil && n <= 65535
}

// trimSpace removes optional white space (RFC 9110 §5.6.3).
func trimSpace(s string) string {
	for s != "" && isSpace(s[0]) {
		s = s[1:]
	}
	for s != "" && isSpace(s[len(s)-1]) {
		s = s[:len(s)-1]
	}
	return s
}

func isSpace(c byte) bool { return c == ' ' || c == '\t' }

// valueLength returns how many bytes at the front of b may stand in a line: those of
// valueChar. It looks at eight at once, since it sees each byte of each head.
func valueLength(b []byte) int {
	const ones, highs = 0x0101010101010101, 0x8080808080808080
	n := 0
	for len(b)-n >= 8 {
		word := binary.LittleEndian.Uint64(b[n:])
		flipped := word ^ 0x7f*ones
		// The high bit of each byte that is below 0x20, or is 0x7f; the lowest one for
		// certain, a borrow may have set others above it.
		found := ((word-0x20*ones)&^word | (flipped-ones)&^flipped) & highs
		if found == 0 {
			n += 8
			continue
		}
		n += bits.TrailingZeros64(found) / 8
		if b[n] != '\t' {
			return n
		}
		n++
	}
	for n < len(b) && charClasses[b[n]]&valueChar != 0 {
		n++
	}
	return n
}

// viewOf returns b as a string without a copy. Nobody may write to b while the string, or
// a part of it, is used.
func viewOf(b []byte) string { return unsafe.String(unsafe.SliceData(b), len(b)) }
