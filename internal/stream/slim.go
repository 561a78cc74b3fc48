package stream

import (
	"bytes"
	"crypto/tls"
	"reflect"
	"unsafe"
)

// mostKept is what a buffer may have that crypto/tls keeps for the next record.
const mostKept = 4 << 10

// crypto/tls keeps two buffers as large as they ever were: one for records, of up to 17 KB, and
// one for what a handshake has said, with the peer's certificates. An idle connection needs
// neither, there is no other way to be rid of them, and they would be most of what it costs.
// Where a version of Go has not these fields, of these types, they are left alone.
var (
	rawInputAt, hasRawInput = fieldOf[bytes.Buffer]("rawInput")
	inputAt, hasInput       = fieldOf[bytes.Reader]("input") // what of rawInput is still to be read
	handAt, hasHand         = fieldOf[bytes.Buffer]("hand")
	canSlim                 = hasRawInput && hasInput && hasHand
)

// fieldOf finds a field of a tls.Conn.
func fieldOf[T any](name string) (at uintptr, ok bool) {
	f, ok := reflect.TypeFor[tls.Conn]().FieldByName(name)
	return f.Offset, ok && f.Type == reflect.TypeFor[T]()
}

// slim gives up memory that an idle connection does not need. Nobody uses it meanwhile.
func (s *Secure) slim() {
	if !canSlim {
		return
	}
	conn := unsafe.Pointer(s.conn)
	raw, hand := (*bytes.Buffer)(unsafe.Add(conn, rawInputAt)), (*bytes.Buffer)(unsafe.Add(conn, handAt))
	input := (*bytes.Reader)(unsafe.Add(conn, inputAt))
	if raw.Len() == 0 && input.Len() == 0 && raw.Cap() > mostKept {
		*raw = bytes.Buffer{}
		input.Reset(nil)
	}
	if hand.Len() == 0 && hand.Cap() > 0 {
		*hand = bytes.Buffer{}
	}
}
