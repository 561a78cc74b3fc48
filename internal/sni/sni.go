// Package sni finds out which server a TLS client asks for, from the first bytes that it has
// sent and without taking part in TLS (RFC 8446 §4.1.2, RFC 6066 §3).
//
//	hello := sni.Scan(received)
//	for hello.State == sni.More {
//		// receive until there are hello.Need bytes or more, and scan all of them again
//	}
//
// It keeps nothing, and what it takes is bounded: a hello of at most [MostHello] bytes in at
// most [MostRecords] records, of which it never wants to see more than [MostBytes]. Whoever
// does not send TLS is known as early as his first byte that says so.
package sni

import (
	"encoding/binary"
)

// What a hello may take. Programs send one record as a rule, and a few where they want to hide
// the name from who looks at single packets; a client whose records are as small as RFC 6066 §4
// lets it make them (512 bytes) needs 32 for the largest hello.
const (
	MostHello   = 16 << 10
	MostRecords = 64
	MostBytes   = recordHead*MostRecords + messageHead + MostHello
)

const (
	recordHead  = 5 // RFC 8446 §5.1
	messageHead = 4 // RFC 8446 §4
	mostRecord  = 1 << 14
	mostName    = 255

	handshakeRecord = 22
	clientHello     = 1
	serverName      = 0 // the extension, and in it the kind of a name that is a host's
)

// A State is what is known of a client by what it has sent so far.
type State uint8

// The states. All but More are final.
const (
	More     State = iota // nothing yet
	NotTLS                // it does not begin as TLS does
	Named                 // there is a server's name
	Unnamed               // it is a hello without a name
	Invalid               // it begins like TLS, and is no hello that a server would take
	TooLarge              // the hello is larger than anybody needs
)

var states = [...]string{More: "more", NotTLS: "not TLS", Named: "name", Unnamed: "no name", Invalid: "invalid", TooLarge: "too large"}

func (s State) String() string { return states[s] }

// Hello is what [Scan] has found.
type Hello struct {
	State State
	Name  string // of Named: in lower case, of letters, digits, dots, dashes and underscores, without a dot at its end
	Need  int    // of More: how many bytes there have to be in all before there is more to say; at most MostBytes
}

// Scan says what is known by all bytes that a client has sent so far. It keeps nothing of them.
func Scan(sent []byte) Hello {
	var message []byte // the records' content, if it is more than one
	rest := sent
	for record := 1; ; record++ {
		if !beginsRecord(rest) {
			if record == 1 {
				return Hello{State: NotTLS}
			}
			return Hello{State: Invalid} // an alert, say
		}
		at := len(sent) - len(rest)
		if len(rest) < recordHead {
			return Hello{State: More, Need: at + recordHead}
		}
		size := int(binary.BigEndian.Uint16(rest[3:]))
		rest = rest[recordHead:]
		part := rest[:min(size, len(rest))]
		switch record {
		case 1:
			message = part
		case 2: // from now on it is a copy, which is made once
			message = append(make([]byte, 0, len(message)+len(rest)), message...)
			fallthrough
		default:
			message = append(message, part...)
		}
		if len(message) > 0 && message[0] != clientHello {
			return Hello{State: Invalid}
		}
		whole := messageHead
		if len(message) >= messageHead {
			if whole += int(message[1])<<16 | int(message[2])<<8 | int(message[3]); whole > messageHead+MostHello {
				return Hello{State: TooLarge}
			}
		}
		switch {
		case len(message) >= messageHead && len(message) >= whole:
			return scanHello(message[messageHead:whole])
		case record == MostRecords:
			return Hello{State: TooLarge}
		case len(part) < size: // no more than the message is wanted, and as much of this record as it has
			return Hello{State: More, Need: len(sent) + min(size-len(part), whole-len(message))}
		}
		rest = rest[size:]
	}
}

// beginsRecord says whether bytes, of which there may be none, are or may become the head of a
// record of a handshake.
func beginsRecord(b []byte) bool {
	switch {
	case len(b) > 0 && b[0] != handshakeRecord, len(b) > 1 && b[1] != 3:
		return false
	case len(b) < recordHead:
		return true
	}
	size := binary.BigEndian.Uint16(b[3:])
	return 0 < size && size <= mostRecord // one without content is forbidden (RFC 8446 §5.1)
}

// scanHello reads what stands behind the head of a hello.
func scanHello(b []byte) Hello {
	r := reader{rest: b, ok: true}
	r.bytes(2 + 32) // the version, and the random bytes
	r.bytes(r.number(1))
	r.bytes(r.number(2))
	r.bytes(r.number(1))
	if !r.ok {
		return Hello{State: Invalid}
	}
	if len(r.rest) == 0 {
		return Hello{State: Unnamed} // TLS 1.2 may have no extensions
	}
	extensions := reader{rest: r.bytes(r.number(2)), ok: true}
	if !r.ok || len(r.rest) > 0 {
		return Hello{State: Invalid}
	}
	found := Hello{State: Unnamed}
	for len(extensions.rest) > 0 {
		kind := extensions.number(2)
		body := extensions.bytes(extensions.number(2))
		if !extensions.ok {
			return Hello{State: Invalid}
		}
		if kind != serverName {
			continue
		}
		name, ok := scanNames(body)
		if !ok || found.State == Named { // nothing may be there twice (RFC 8446 §4.2)
			return Hello{State: Invalid}
		}
		found = Hello{State: Named, Name: name}
	}
	return found
}

// scanNames reads the extension, in which exactly one host may stand (RFC 6066 §3).
func scanNames(b []byte) (name string, ok bool) {
	list := reader{rest: b, ok: true}
	names := reader{rest: list.bytes(list.number(2)), ok: true}
	kind := names.number(1)
	host := names.bytes(names.number(2))
	if !list.ok || !names.ok || len(list.rest)+len(names.rest) > 0 || kind != serverName {
		return "", false
	}
	return canonical(host)
}

// canonical returns a host's name in the spelling in which it is compared. What cannot be a
// name is none: it would stand in logs.
func canonical(host []byte) (string, bool) {
	if n := len(host); n > 1 && host[n-1] == '.' {
		host = host[:n-1]
	}
	if len(host) == 0 || len(host) > mostName {
		return "", false
	}
	var name [mostName]byte
	for i, c := range host {
		switch {
		case 'a' <= c && c <= 'z', '0' <= c && c <= '9', c == '-', c == '_':
		case 'A' <= c && c <= 'Z':
			c += 'a' - 'A'
		case c == '.' && i > 0 && i+1 < len(host) && host[i-1] != '.':
		default:
			return "", false
		}
		name[i] = c
	}
	return string(name[:len(host)]), true
}

// reader takes bytes from the front. What is not there is zero, and ok false.
type reader struct {
	rest []byte
	ok   bool
}

func (r *reader) bytes(n int) []byte {
	if n > len(r.rest) {
		r.ok, r.rest = false, nil
		return nil
	}
	b := r.rest[:n]
	r.rest = r.rest[n:]
	return b
}

// number reads one of so many bytes.
func (r *reader) number(size int) (n int) {
	for _, c := range r.bytes(size) {
		n = n<<8 | int(c)
	}
	return n
}
