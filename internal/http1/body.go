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
	trailerRaw  []byte          // what has come of the section
	trailers    exchange.Fields // parts of trailerRaw
}

// reuse gives the decoder the memory of another one, whose body and trailers nobody
// uses any more.
func (d *bodyDecoder) reuse(of *bodyDecoder) {
	d.trailerRaw, d.trailers = of.trailerRaw[:0], of.trailers[:0]
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
	if had == 0 && len(p) >= 2 && p[0] == '\r' && p[1] == '\n' {
		d.finished = true
		return 2, nil
	}
	d.trailerRaw = append(d.trailerRaw, p[:min(len(p), maxTrailers+1-had)]...)
	end, err := d.trailerScan.scan(d.trailerRaw)
	if err != nil || end == 0 {
		return len(d.trailerRaw) - had, err
	}
	d.trailers, err = parseTrailers(viewOf(d.trailerRaw[:end-2]), d.trailers)
	d.finished = err == nil
	return end - had, err
}

// parseTrailers adds to trailers. It refuses what would be framing or routing to somebody,
// and drops what no definition allows in a trailer (RFC 9110 §6.5.1).
func parseTrailers(lines string, trailers exchange.Fields) (exchange.Fields, error) {
	for lines != "" {
		var line string
		line, lines = cutLine(lines)
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

// trailerNames are the fields that pass as trailers: those whose own definition says that
// they may stand there, which RFC 9110 §6.5.1 asks of a sender. They speak of content that
// was sent, or of how sending it went. None of them routes, authenticates a request or
// frames, and no proxy removes or sets one in a head, so that nothing can be slipped past
// a check of the head into a recipient that merges trailers with it.
var trailerNames = [...]string{
	"Accept-Ranges",           // RFC 9110 §14.3
	"Authentication-Info",     // RFC 9110 §11.6.3: of a response, to a client
	"Content-Digest",          // RFC 9530 §2
	"Digest",                  // RFC 3230, which RFC 9530 obsoletes; in use
	"ETag",                    // RFC 9110 §8.8.3
	"Proxy-Status",            // RFC 9209 §2: why a proxy behind us cut a response short
	"Repr-Digest",             // RFC 9530 §3
	"Server-Timing",           // W3C Server Timing §2; the one that browsers show
	"Signature",               // RFC 9421 §4.2
	"Signature-Input",         // RFC 9421 §4.1
	"Grpc-Status",             // gRPC's protocol: how a call ended
	"Grpc-Message",            // the same in words
	"Grpc-Status-Details-Bin", // the same for programs
	"X-Amz-Trailer-Signature", // AWS Signature Version 4: over the trailers before it
}

// trailerPrefixes begin the names of those that are many.
var trailerPrefixes = [...]string{
	"Grpc-Trailer-",   // what gateways to JSON make of gRPC's own trailing metadata
	"X-Amz-Checksum-", // S3 and what speaks like it: CRC32, SHA256 and others over the content
}

// MayTrail says whether a field may stand in trailers, of whatever protocol.
func MayTrail(name string) bool { return mayTrail(name) }

// mayTrail says whether a field may stand in a trailer section. A name that nobody has
// vouched for may not: it could be one that the recipient heeds in a head, in this
// spelling or in one that it takes for the same (X_Forwarded_For).
func mayTrail(name string) bool {
	for _, known := range trailerNames {
		if strings.EqualFold(name, known) {
			return true
		}
	}
	for _, prefix := range trailerPrefixes {
		if len(name) > len(prefix) && strings.EqualFold(name[:len(prefix)], prefix) {
			return true
		}
	}
	return false
}
