package control

import "fmt"

// TicketsVersion is that of the payload of [TypeTickets]. Of two builds with different ones the
// generation makes keys of its own, which nobody shares. It has no part in whether a supervisor
// can command a generation.
const TicketsVersion = 1

// mostTicketKeys is how many keys a generation takes.
const mostTicketKeys = 16

// TicketKeys is the payload of [TypeTickets]: the keys themselves, one behind the other. Tickets
// are made with the first, and understood of each.
func TicketKeys(keys [][32]byte) []byte {
	var b []byte
	for i := range keys {
		b = append(b, keys[i][:]...)
	}
	return b
}

// ReadTicketKeys reads what [TicketKeys] has made, of a payload that it closes.
func ReadTicketKeys(fd int) ([][32]byte, error) {
	const size = 32
	b, err := ReadBytes(fd, mostTicketKeys*int64(size))
	if err != nil {
		return nil, err
	}
	if len(b) == 0 || len(b)%size != 0 {
		return nil, fmt.Errorf("ticket keys: %d bytes cannot be", len(b))
	}
	var keys [][32]byte
	for ; len(b) > 0; b = b[size:] {
		keys = append(keys, [size]byte(b[:size]))
	}
	return keys, nil
}
