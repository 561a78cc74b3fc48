package accesslog

// Events are the occasions of records.
type Events uint8

// Each record is made on one of them.
const (
	Requests Events = 1 << iota
	TunnelsOpened
	TunnelsClosed

	AllEvents = Requests | TunnelsOpened | TunnelsClosed
)

// event is one of them, by its number.
type event uint8

const (
	request event = iota
	tunnelOpen
	tunnelClose
)

// events are what lines call them.
var events = [...]string{request: "request", tunnelOpen: "tunnel_open", tunnelClose: "tunnel_close"}

// EventOf returns the event of a name that lines have.
func EventOf(name string) (Events, bool) {
	for e, n := range events {
		if n == name {
			return 1 << e, true
		}
	}
	return 0, false
}
