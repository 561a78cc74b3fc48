package http1

import (
	"strconv"
	"strings"

	"holdfast/internal/exchange"
)

const (
	maxExtension  = 1 << 10  // bytes of one chunk's extensions
	maxExtensions = 16 << 10 // bytes of all extensions of a body
	maxTrailers   = 16 << 10 // bytes of a trailer section
	maxSizeDigits = 16
)

// A bodyKind is how the end of a body is told (RFC 9112 §6.3).
type bodyKind uint8

const (
	noBody bodyKind = iota
	byLength
	byChunks
	untilClose
)

// bodyDecoder takes the framing off a body. The zero value is that of a message
// without one.
type bodyDecoder struct {
	kind     bodyKind
	finished bool  // the last byte of the body, with its framing, was consumed
	left     int64 // content bytes to come: of the body, or of the chunk

	// Of byChunks:
	state       chunkState
	digits      int
	extension   int
	extensions  int
	trailerScan headScanner
	trailerRaw  []byte
	trailers    exchange.Fields
}

// A chunkState is what the next byte of a chunked body must be (RFC 9112 §7.1).
type chunkState uint8

const (
	chunkSize      chunkState = iota // a digit, or what may follow the digits
	chunkExtension                   // a byte of an extension, or CR
	chunkSizeLF                      // LF behind size and extensions
	chunkData                        // a byte of content
	chunkDataCR                      // CR behind the content
	chunkDataLF                      // LF behind the content
	chunkTrailers                    // the trailer section
)

// decoderFor returns the decoder of a body of n bytes; -1 is chunked.
func decoderFor(n int64) bodyDecoder {
	switch n {
	case 0:
		return bodyDecoder{}
	case -1:
		return bodyDecoder{kind: byChunks, trailerScan: headScanner{limit: maxTrailers, lines: 1}}
	}
	return bodyDecoder{kind: byLength, left: n}
}

// done says that the body has ended; what follows is another message.
func (d *bodyDecoder) done() bool {
	return d.kind == noBody || d.finished || d.kind == byLength && d.left == 0
}

// run is how many bytes, at least, are content before any framing comes.
func (d *bodyDecoder) run() int64 {
	switch {
	case d.kind == untilClose:
		return maxLength
	case d.kind == byLength, d.kind == byChunks && d.state == chunkData:
		return d.left
	}
	return 0
}

// took says that n bytes of the run were consumed.
func (d *bodyDecoder) took(n int) {
	if d.kind == untilClose {
		return
	}
	d.left -= int64(n)
	if d.kind == byChunks && d.state == chunkData && d.left == 0 {
		d.state = chunkDataCR
	}
}

// next takes framing and at most limit bytes of content from the front of p. It
// returns the content, a part of p, and how many bytes of p it has consumed with
// it. No content and no end means that it needs more than p.
func (d *bodyDecoder) next(p []byte, limit int) (content []byte, consumed int, err error) {
	if d.done() {
		return nil, 0, nil
	}
	if d.kind == byChunks {
		if consumed, err = d.skipFraming(p); err != nil {
			return nil, consumed, err
		}
	}
	n := int(min(int64(len(p)-consumed), int64(limit), d.run()))
	content = p[consumed : consumed+n]
	d.took(n)
	return content, consumed + n, nil
}

// skipFraming consumes up to the next byte of content or the end of the body.
func (d *bodyDecoder) skipFraming(p []byte) (n int, err error) {
	for n < len(p) && d.state != chunkData {
		if d.state == chunkTrailers {
			k, err := d.takeTrailers(p[n:])
			return n + k, err
		}
		if err := d.step(p[n]); err != nil {
			return n, err
		}
		n++
	}
	return n, nil
}

// step consumes one byte of framing.
func (d *bodyDecoder) step(c byte) error {
	switch d.state {
	case chunkSize:
		return d.stepSize(c)
	case chunkExtension:
		return d.stepExtension(c)
	case chunkSizeLF:
		if c != '\n' {
			return malformed("a chunk-size without CRLF")
		}
		d.digits, d.extension = 0, 0
		d.state = chunkData
		if d.left == 0 {
			d.state = chunkTrailers
		}
	case chunkDataCR:
		if c != '\r' {
			return malformed("a chunk longer than its size")
		}
		d.state = chunkDataLF
	case chunkDataLF:
		if c != '\n' {
			return malformed("a chunk without CRLF")
		}
		d.state = chunkSize
	}
	return nil
}

func (d *bodyDecoder) stepSize(c byte) error {
	digit, ok := hexDigit(c)
	switch {
	case ok:
		d.digits++
		if d.digits > maxSizeDigits || d.left > maxLength>>4 {
			return malformed("a chunk-size beyond all bounds")
		}
		d.left = d.left<<4 | digit
	case d.digits == 0:
		return malformed("no chunk-size")
	case c == '\r':
		d.state = chunkSizeLF
	case c == ';':
		d.state = chunkExtension
	default:
		return malformed("a malformed chunk-size")
	}
	return nil
}

func (d *bodyDecoder) stepExtension(c byte) error {
	if c == '\r' {
		d.state = chunkSizeLF
		return nil
	}
	d.extension++
	d.extensions++
	switch {
	case charClasses[c]&valueChar == 0:
		return malformed("a control character in a chunk extension")
	case d.extension > maxExtension || d.extensions > maxExtensions:
		return malformed("more than " + strconv.Itoa(maxExtensions) + " bytes of chunk extensions")
	}
	return nil
}

func hexDigit(c byte) (int64, bool) {
	switch {
	case '0' <= c && c <= '9':
		return int64(c - '0'), true
	case 'a' <= c|0x20 && c|0x20 <= 'f':
		return int64(c|0x20-'a') + 10, true
	}
	return 0, false
}

// takeTrailers gathers the trailer section, which must be seen whole, and reads it.
func (d *bodyDecoder) takeTrailers(p []byte) (consumed int, err error) {
	had := len(d.trailerRaw)
	d.trailerRaw = append(d.trailerRaw, p[:min(len(p), maxTrailers+1-had)]...)
	end, err := d.trailerScan.scan(d.trailerRaw)
	if err != nil || end == 0 {
		return len(d.trailerRaw) - had, err
	}
	d.trailers, err = parseTrailers(string(d.trailerRaw[:end-2]), d.trailerScan.lines-1)
	d.trailerRaw = nil
	d.finished = err == nil
	return end - had, err
}

// parseTrailers refuses what would be framing or routing to somebody, and drops
// what must not be merged into a head (RFC 9110 §6.5.1).
func parseTrailers(lines string, n int) (exchange.Fields, error) {
	if lines == "" {
		return nil, nil
	}
	trailers := make(exchange.Fields, 0, n)
	for lines != "" {
		var line string
		line, lines, _ = strings.Cut(lines, "\r\n")
		name, value, err := parseField(line)
		if err != nil {
			return nil, err
		}
		switch kindOf(name) {
		case hostField, lengthField, codingField, lookalikeField:
			return nil, malformed("a trailer " + name)
		}
		if mayTrail(name) {
			trailers.Add(name, value)
		}
	}
	return trailers, nil
}

// neverTrailers are fields that change how a message is routed, authenticated,
// processed or cached; in a trailer they come too late to be judged.
var neverTrailers = map[string]bool{
	"age": true, "authorization": true, "cache-control": true, "cookie": true, "date": true, "expires": true,
	"forwarded": true, "location": true, "max-forwards": true, "pragma": true, "range": true, "retry-after": true,
	"set-cookie": true, "vary": true, "via": true, "warning": true, "www-authenticate": true, "x-real-ip": true,
	"x-request-id": true,
}

// mayTrail says whether a field may stand in a trailer section.
func mayTrail(name string) bool {
	// Who merges trailers and folds "_" and "-" into one must find nothing either.
	lower := strings.ReplaceAll(strings.ToLower(name), "_", "-")
	if kindOf(name) != plainField || neverTrailers[lower] {
		return false
	}
	for _, prefix := range []string{"content-", "if-", "proxy-", "sec-websocket-", "x-envoy-", "x-forwarded-"} {
		if strings.HasPrefix(lower, prefix) {
			return false
		}
	}
	return true
}
