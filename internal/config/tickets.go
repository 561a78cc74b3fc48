package config

import (
	"errors"
	"time"
)

// Tickets is how TLS session tickets are made, for all listeners.
type Tickets struct {
	Off      bool          // none are
	Rotation time.Duration // for how long each key is used; tickets are understood for two or three times as long
}

// DefaultTicketRotation is that of a file that says nothing.
const DefaultTicketRotation = 12 * time.Hour

func readTickets(t *table) Tickets {
	k := Tickets{Rotation: DefaultTicketRotation}
	on := true
	t.boolean("tickets", &on)
	k.Off = !on
	read(t, "ticket_rotation", &k.Rotation, ticketRotation)
	t.strict()
	return k
}

// mostTicketRotation has tickets understood for as long as TLS allows, seven days (RFC 8446
// §4.6.1), and no key that a ticket was made with is there for longer than one and a half times
// that.
const mostTicketRotation = 84 * time.Hour

var ticketRotation = form[time.Duration]{`a duration like "12h"`, func(s string) (time.Duration, error) {
	d, err := positive(s)
	switch {
	case err != nil:
		return 0, err
	case d < time.Second:
		return 0, errors.New("the shortest is 1s")
	case d > mostTicketRotation:
		return 0, errors.New("the longest is 84h: tickets are understood for two rotations, and TLS allows seven days")
	}
	return d, nil
}, writeDuration}
