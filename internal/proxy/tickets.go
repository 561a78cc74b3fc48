package proxy

import (
	"crypto/hmac"
	"crypto/sha256"
	"errors"
	"io"
	"sync"

	"holdfast/internal/control"
)

// ticketServer is whoever makes session tickets for a listener, as [servertls.Server] does.
type ticketServer interface {
	SetTicketKeys(keys [][32]byte)
}

// ticketKeys are the keys of session tickets, which the supervisor gives to all generations, and
// those who use them. As long as none have come, or where the supervisor is of a build that has
// none, each makes keys of its own. The methods may be called by anybody.
type ticketKeys struct {
	mu      sync.Mutex
	keys    [][32]byte // tickets are made with the first; nil: none have come
	servers map[string]ticketServer
}

// serve has the listener of that name use them, now and whenever there are others.
func (t *ticketKeys) serve(listener string, s ticketServer) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.servers == nil {
		t.servers = make(map[string]ticketServer)
	}
	t.servers[listener] = s
	if t.keys != nil {
		s.SetTicketKeys(keysFor(listener, t.keys))
	}
}

// take has others be used.
func (t *ticketKeys) take(fds []int) error {
	if len(fds) != 1 {
		control.Discard(fds)
		return errors.New("no keys have come with it")
	}
	keys, err := control.ReadTicketKeys(fds[0])
	if err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.keys = keys
	for listener, s := range t.servers {
		s.SetTicketKeys(keysFor(listener, keys))
	}
	return nil
}

// keysFor are a listener's own keys. A ticket of one listener means nothing to another, or
// somebody on the way could lead a client that resumes a session to a listener which has neither
// the certificate nor the rules that the session began with.
func keysFor(listener string, keys [][32]byte) [][32]byte {
	derived := make([][32]byte, len(keys))
	for i := range keys {
		h := hmac.New(sha256.New, keys[i][:])
		io.WriteString(h, "holdfast session tickets of "+listener)
		h.Sum(derived[i][:0])
	}
	return derived
}
