package http1

import (
	"bytes"
	"strconv"
	"strings"

	"holdfast/internal/exchange"
)

const (
	maxFields  = 200     // field lines of a head or of a trailer section
	maxAdded   = 64      // fields that we may add to those
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
// client with wrong line ends is told so instead of being waited for. In what it has
// found, every line ends in CRLF and no other control character stands than HTAB: the
// parsers rely on that.
type headScanner struct {
	limit   int  // most bytes of a head, with the empty line at its end
	request bool // the first line is a request's
	pos     int  // the first byte not looked at
	line    int  // where the line of pos begins
	lines   int  // complete lines before it; begins with 1 where there is no start line
}

// isTLS says whether TLS begins with b: a record with a hello, or with the alert of one who expects
// that (RFC 8446 §5.1). The rest of it may not be there, and what is said must not depend on that.
func isTLS(b byte) bool { return b == 0x15 || b == 0x16 }

// scan looks at b, which begins with what the last call was given. It returns the
// length of the head with the empty line that ends it, or 0 if there is no end yet.
func (s *headScanner) scan(b []byte) (end int, err error) {
	seen := b[:min(len(b), s.limit)]
	for {
		s.pos += valueLength(seen[s.pos:])
		switch rest := seen[s.pos:]; {
		case len(rest) == 0 || len(rest) == 1 && rest[0] == '\r':
			if len(b) > s.limit {
				return 0, s.tooLarge()
			}
			return 0, nil
		case rest[0] == '\n':
			return 0, malformed("a line ends in LF without CR")
		case rest[0] != '\r':
			if s.pos == 0 && isTLS(rest[0]) {
				return 0, malformed("it begins as TLS does, which is not spoken here")
			}
			return 0, malformed("a control character")
		case rest[1] != '\n':
			return 0, malformed("a CR without LF")
		case s.pos == s.line:
			return s.pos + 2, nil
		}
		if err := s.endLine(seen[s.line:s.pos]); err != nil {
			return 0, err
		}
	}
}

// endLine goes over to the next line.
func (s *headScanner) endLine(line []byte) error {
	if s.request && s.lines == 0 && isSimpleRequest(line) {
		return malformed("a request line without a version")
	}
	s.pos += 2
	s.line = s.pos
	if s.lines++; s.lines > 1+maxFields {
		return refusal(431, "more than "+strconv.Itoa(maxFields)+" fields")
	}
	return nil
}

// isSimpleRequest says whether a request line has no version. That of HTTP/0.9 is the whole
// request (RFC 1945 §4.1): its client would wait for us, and we for fields.
func isSimpleRequest(line []byte) bool { return bytes.Count(line, []byte(" ")) < 2 }

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
	teField
	hopField       // meant for one hop, without use to us
	lookalikeField // read as framing by those who fold "_" and "-" into one
)

// kindOf looks at the length and the first letter: most fields are plain by these alone.
func kindOf(name string) fieldKind {
	if name == "" {
		return plainField
	}
	var known string
	var kind fieldKind
	switch int(name[0]|0x20)<<8 | len(name) {
	case 't'<<8 | 2:
		known, kind = "TE", teField
	case 'h'<<8 | 4:
		known, kind = "Host", hostField
	case 'e'<<8 | 6:
		known, kind = "Expect", expectField
	case 'u'<<8 | 7:
		known, kind = "Upgrade", upgradeField
	case 't'<<8 | 7:
		known, kind = "Trailer", trailerField
	case 'c'<<8 | 10:
		known, kind = "Connection", connectionField
	case 'k'<<8 | 10:
		known, kind = "Keep-Alive", hopField
	case 'c'<<8 | 14:
		known, kind = "Content-Length", lengthField
		if name[7] == '_' {
			known, kind = "Content_Length", lookalikeField
		}
	case 'h'<<8 | 14:
		known, kind = "HTTP2-Settings", hopField
	case 'p'<<8 | 16:
		known, kind = "Proxy-Connection", hopField
	case 't'<<8 | 17:
		known, kind = "Transfer-Encoding", codingField
		if name[8] == '_' {
			known, kind = "Transfer_Encoding", lookalikeField
		}
	}
	if known == "" || !strings.EqualFold(name, known) {
		return plainField
	}
	return kind
}

// IsPlain says of a field that it goes on to the other side as it is: it is no framing and
// nothing that is meant for one hop.
func IsPlain(name string) bool { return kindOf(name) == plainField }

// IsLookalike says of a field that some would read it as framing.
func IsLookalike(name string) bool { return kindOf(name) == lookalikeField }

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

	trailer  bool // a Trailer field was there
	trailers bool // TE has the word "trailers"

	// Of Connection:
	close       bool
	upgradeHere bool     // the token "upgrade"
	teHere      bool     // the token "te"
	named       []string // every other option that could be a field to remove
}

// reset forgets a head, and keeps the memory.
func (ctl *control) reset() { *ctl = control{named: ctl.named[:0]} }

// readFields reads field lines, each with its CRLF, and adds those that go on to the
// other side to fields.
func (ctl *control) readFields(lines string, fields exchange.Fields) (exchange.Fields, error) {
	for lines != "" {
		var line string
		line, lines = cutLine(lines)
		name, value, err := parseField(line)
		if err != nil {
			return fields, err
		}
		kind := kindOf(name)
		if kind == plainField {
			fields = append(fields, exchange.Field{Name: name, Value: value})
			continue
		}
		if err := ctl.add(kind, name, value); err != nil {
			return fields, err
		}
	}
	for _, name := range ctl.named {
		fields.Del(name)
	}
	return fields, nil
}

// add notes a field that is meant for us.
func (ctl *control) add(kind fieldKind, name, value string) error {
	switch kind {
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
	case teField:
		ctl.addTE(value)
	case connectionField:
		return ctl.addOptions(value)
	case lookalikeField:
		return malformed("the field " + name)
	}
	return nil
}

// cutLine splits off the first line, of which a headScanner has seen the end.
func cutLine(lines string) (line, rest string) {
	end := strings.IndexByte(lines, '\r')
	return lines[:end], lines[end+len("\r\n"):]
}

// parseField reads one line. A folded line fails here too: its name would begin
// with white space.
func parseField(line string) (name, value string, err error) {
	end := 0
	for end < len(line) && charClasses[line[end]]&tokenChar != 0 {
		end++
	}
	if end == 0 || end == len(line) || line[end] != ':' {
		return "", "", malformed("a field line without a valid name")
	}
	return line[:end], trimSpace(line[end+1:]), nil
}

// addTE reads one TE value. Of all that may stand there, only one word is of use to us
// (RFC 9110 §10.1.4).
func (ctl *control) addTE(value string) {
	for more := true; more && !ctl.trailers; {
		var coding string
		coding, value, more = strings.Cut(value, ",")
		ctl.trailers = isWord(trimSpace(coding), "trailers")
	}
}

// addOptions reads one Connection value.
func (ctl *control) addOptions(value string) error {
	for more := true; more; {
		var option string
		option, value, more = strings.Cut(value, ",")
		if option = trimSpace(option); option == "" {
			continue // RFC 9110 §5.6.1: empty elements are ignored
		}
		if err := ctl.addOption(option); err != nil {
			return err
		}
	}
	return nil
}

func (ctl *control) addOption(option string) error {
	switch {
	case isWord(option, "keep-alive"): // names a field that is removed in any case
	case isWord(option, "close"):
		ctl.close = true
	case isWord(option, "upgrade"):
		ctl.upgradeHere = true
	case isWord(option, "te"): // a field that is removed in any case
		ctl.teHere = true
	case !isToken(option):
		return malformed("a Connection option that is no token")
	case len(ctl.named) == maxOptions:
		return malformed("more than " + strconv.Itoa(maxOptions) + " Connection options")
	default:
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
		case !isWord(ctl.coding.value, "chunked"): // in any case of letters (RFC 9112 §7), which goes no further: it is written anew
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
