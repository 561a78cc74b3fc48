package http1

import (
	"strconv"
	"strings"

	"holdfast/internal/exchange"
)

const (
	maxFields  = 200     // field lines of a head or of a trailer section
	maxAdded   = 32      // fields that we may add to those
	maxTarget  = 8 << 10 // bytes
	maxOptions = 64      // of Connection; each is compared with each field
	maxLength  = 1 << 62 // bytes of a body or of a chunk: leaves room for arithmetic
)

// refusal is an error in the words of a request's receiver. What is read from an
// upstream goes through badGateway.
func refusal(status int, text string) error {
	return &exchange.StatusError{Status: status, Text: text}
}

func malformed(text string) error { return refusal(400, text) }

// badGateway makes a parser's error one of a response.
func badGateway(err error) error {
	return &exchange.StatusError{Status: 502, Text: "upstream: " + err.Error()}
}

// headScanner finds the end of a head that arrives in pieces of any size. It looks
// at each byte once and refuses at once what no continuation can mend, so that a
// client with wrong line ends is told so instead of being waited for.
type headScanner struct {
	limit int // most bytes of a head, with the empty line at its end
	pos   int // the first byte not looked at
	line  int // where the line of pos begins
	lines int // complete lines before it; begins with 1 where there is no start line
}

// scan looks at b, which begins with what the last call was given. It returns the
// length of the head with the empty line that ends it, or 0 if there is no end yet.
func (s *headScanner) scan(b []byte) (end int, err error) {
	for ; s.pos < len(b); s.pos++ {
		c := b[s.pos]
		afterCR := s.pos > s.line && b[s.pos-1] == '\r'
		switch {
		case s.pos >= s.limit:
			return 0, s.tooLarge()
		case c == '\n' && !afterCR:
			return 0, malformed("a line ends in LF without CR")
		case c != '\n' && afterCR:
			return 0, malformed("a CR without LF")
		case c == '\n':
			if s.pos-s.line == 1 {
				return s.pos + 1, nil
			}
			s.lines++
			s.line = s.pos + 1
			if s.lines > 1+maxFields {
				return 0, refusal(431, "more than "+strconv.Itoa(maxFields)+" fields")
			}
		case c != '\r' && charClasses[c]&valueChar == 0:
			return 0, malformed("a control character")
		}
	}
	return 0, nil
}

func (s *headScanner) tooLarge() error {
	text := "a head of more than " + strconv.Itoa(s.limit) + " bytes"
	if s.lines == 0 {
		return refusal(414, text)
	}
	return refusal(431, text)
}

// A fieldKind is what a field means to the codec.
type fieldKind uint8

const (
	plainField fieldKind = iota // none of our business
	hostField
	lengthField
	codingField
	connectionField
	upgradeField
	expectField
	trailerField
	hopField       // meant for one hop, without use to us
	lookalikeField // read as framing by those who fold "_" and "-" into one
)

// kindOf dispatches on the length first: most fields are plain and fall through.
func kindOf(name string) fieldKind {
	is := func(s string) bool { return strings.EqualFold(name, s) }
	switch len(name) {
	case 2:
		if is("TE") {
			return hopField
		}
	case 4:
		if is("Host") {
			return hostField
		}
	case 6:
		if is("Expect") {
			return expectField
		}
	case 7:
		switch {
		case is("Upgrade"):
			return upgradeField
		case is("Trailer"):
			return trailerField
		}
	case 10:
		switch {
		case is("Connection"):
			return connectionField
		case is("Keep-Alive"):
			return hopField
		}
	case 14:
		switch {
		case is("Content-Length"):
			return lengthField
		case is("Content_Length"):
			return lookalikeField
		case is("HTTP2-Settings"):
			return hopField
		}
	case 16:
		if is("Proxy-Connection") {
			return hopField
		}
	case 17:
		switch {
		case is("Transfer-Encoding"):
			return codingField
		case is("Transfer_Encoding"):
			return lookalikeField
		}
	}
	return plainField
}

// single is a field of which a message may have one line.
type single struct {
	value string
	count int
}

func (s *single) add(value string) {
	s.value = value
	s.count++
}

// control is what a head says to its receiver alone.
type control struct {
	host, length, coding, upgrade, expect single

	trailer bool // a Trailer field was there

	// Of Connection:
	close       bool
	upgradeHere bool     // the token "upgrade"
	named       []string // every other option: the fields to remove
}

// parseFields reads field lines, each with its CRLF, of which there are about n.
// The fields it returns are those that go on to the other side.
func parseFields(lines string, n int) (exchange.Fields, control, error) {
	var ctl control
	fields := make(exchange.Fields, 0, n)
	for lines != "" {
		var line string
		line, lines, _ = strings.Cut(lines, "\r\n")
		name, value, err := parseField(line)
		if err != nil {
			return nil, ctl, err
		}
		switch kindOf(name) {
		case plainField:
			fields = append(fields, exchange.Field{Name: name, Value: value})
		case hostField:
			ctl.host.add(value)
		case lengthField:
			ctl.length.add(value)
		case codingField:
			ctl.coding.add(value)
		case upgradeField:
			ctl.upgrade.add(value)
		case expectField:
			ctl.expect.add(value)
		case trailerField:
			ctl.trailer = true
		case connectionField:
			if err := ctl.addOptions(value); err != nil {
				return nil, ctl, err
			}
		case lookalikeField:
			return nil, ctl, malformed("the field " + name)
		}
	}
	for _, name := range ctl.named {
		fields.Del(name)
	}
	return fields, ctl, nil
}

// parseField reads one line. A folded line fails here too: its name would begin
// with white space.
func parseField(line string) (name, value string, err error) {
	name, value, ok := strings.Cut(line, ":")
	if !ok || !isToken(name) {
		return "", "", malformed("a field line without a valid name")
	}
	value = trimSpace(value)
	if !consistsOf(value, valueChar) {
		return "", "", malformed("a control character in the value of " + name)
	}
	return name, value, nil
}

// addOptions reads one Connection value.
func (ctl *control) addOptions(value string) error {
	for option := range strings.SplitSeq(value, ",") {
		option = trimSpace(option)
		switch {
		case option == "":
			continue // RFC 9110 §5.6.1: empty elements are ignored
		case !isToken(option):
			return malformed("a Connection option that is no token")
		case strings.EqualFold(option, "close"):
			ctl.close = true
			continue
		case strings.EqualFold(option, "upgrade"):
			ctl.upgradeHere = true
			continue
		case len(ctl.named) == maxOptions:
			return malformed("more than " + strconv.Itoa(maxOptions) + " Connection options")
		}
		switch kindOf(option) {
		case hostField, lengthField, codingField:
			return malformed("Connection names " + option)
		}
		ctl.named = append(ctl.named, option)
	}
	return nil
}

// bodyLength reads the framing that request and response have in common: the
// content's length, -1 for chunked, or stated false where the head says nothing.
func (ctl *control) bodyLength(minor int) (n int64, stated bool, err error) {
	switch {
	case ctl.coding.count > 0:
		switch {
		case minor == 0:
			return 0, false, malformed("Transfer-Encoding in HTTP/1.0")
		case ctl.length.count > 0:
			return 0, false, malformed("Transfer-Encoding and Content-Length")
		case ctl.coding.count > 1:
			return 0, false, malformed("more than one Transfer-Encoding")
		case !isWord(ctl.coding.value, "chunked"):
			return 0, false, unknownCoding(ctl.coding.value)
		}
		return -1, true, nil
	case ctl.length.count > 1:
		return 0, false, malformed("more than one Content-Length")
	case ctl.length.count == 1:
		n, err := parseLength(ctl.length.value)
		return n, true, err
	}
	return 0, false, nil
}

// parseLength reads 1*DIGIT up to maxLength (RFC 9110 §8.6).
func parseLength(s string) (int64, error) {
	if s == "" || len(s) > 19 || !consistsOf(s, digitChar) {
		return 0, malformed("a Content-Length that is no number")
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n > maxLength {
		return 0, malformed("a Content-Length beyond all bounds")
	}
	return n, nil
}

// unknownCoding tells codings that we do not have (501, RFC 9112 §6.1) from lists
// that leave the length in doubt (400, RFC 9112 §6.3).
func unknownCoding(value string) error {
	rest := value
	for rest != "" {
		var coding string
		coding, rest, _ = strings.Cut(rest, ",")
		coding = trimSpace(coding)
		if !isToken(coding) || strings.EqualFold(coding, "chunked") && rest != "" {
			return malformed("a Transfer-Encoding that is malformed or chunks twice")
		}
	}
	return refusal(501, "a Transfer-Encoding other than chunked")
}

// parseMinor reads HTTP-version (RFC 9112 §2.3).
func parseMinor(s string) (int, error) {
	switch {
	case s == "HTTP/1.1":
		return 1, nil
	case s == "HTTP/1.0":
		return 0, nil
	case len(s) == 8 && strings.HasPrefix(s, "HTTP/") && s[6] == '.' && consistsOf(s[5:6]+s[7:], digitChar):
		return 0, refusal(505, "the version "+s)
	}
	return 0, malformed("no HTTP version")
}
