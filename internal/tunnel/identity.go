package tunnel

import "encoding/hex"

// identity is a request's ID as a slot has it. Nearly all are UUIDs in their usual
// spelling (RFC 9562 §4), of which the 16 bytes say everything; others are kept as they
// are, beside the table.
type identity struct {
	uuid [16]byte
	form idForm
}

type idForm uint8

const (
	noID idForm = iota
	uuidID
	otherID
)

const uuidText = "xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx"

// parseUUID returns the bytes of a UUID in lower case, and whether s is one.
func parseUUID(s string) (id [16]byte, ok bool) {
	if len(s) != len(uuidText) {
		return id, false
	}
	var digits [32]byte
	n := 0
	for i := range len(s) {
		c := s[i]
		switch {
		case uuidText[i] == '-':
			if c != '-' {
				return id, false
			}
		case '0' <= c && c <= '9', 'a' <= c && c <= 'f':
			digits[n] = c
			n++
		default:
			return id, false
		}
	}
	hex.Decode(id[:], digits[:])
	return id, true
}

func uuidString(id [16]byte) string {
	var b [len(uuidText)]byte
	at := 0
	for _, part := range [][]byte{id[0:4], id[4:6], id[6:8], id[8:10], id[10:16]} {
		if at > 0 {
			b[at] = '-'
			at++
		}
		at += hex.Encode(b[at:], part)
	}
	return string(b[:])
}

// setID gives a tunnel its ID.
func (e *engine) setID(n uint32, t *slot, id string) {
	uuid, ok := parseUUID(id)
	switch {
	case ok:
		t.id = identity{uuid: uuid, form: uuidID}
	case id != "":
		t.id = identity{form: otherID}
		e.ids[n] = id
	}
}

// id returns the ID of a tunnel.
func (e *engine) id(n uint32, t *slot) string {
	switch t.id.form {
	case uuidID:
		return uuidString(t.id.uuid)
	case otherID:
		return e.ids[n]
	}
	return ""
}
