package supervisor

import (
	"slices"

	"holdfast/internal/config"
	"holdfast/internal/socket"
)

// held is an open socket with how many want it: what is served, and every plan
// under way. A reload and the mending of a crash may be under way at once. What is
// adopted first must not close what the other is about to serve, and neither may
// find an address taken by the other.
type held struct {
	*socket.Socket
	holders int
}

// hold gives p the socket that l describes: the one that is open, or a new one.
// Called in the loop.
func (s *Supervisor) hold(p *plan, l config.Socket) error {
	key := l.Key()
	h := s.open[key]
	if h == nil {
		var ours []*socket.Socket
		for _, o := range s.open {
			ours = append(ours, o.Socket)
		}
		opened, err := socket.Open(l, ours, s.opts.Inherited)
		if err != nil {
			return err
		}
		h = &held{Socket: opened}
		s.open[key] = h
	} else if err := h.CanBecome(l); err != nil {
		return err
	} else if err := h.Listen(); err != nil { // a generation may have shut it down
		return err
	}
	h.holders++
	p.sockets[key] = h.Socket
	return nil
}

// giveBack closes those of the sockets that nobody else holds. Called in the loop.
func (s *Supervisor) giveBack(sockets map[string]*socket.Socket) {
	for key, o := range sockets {
		h := s.open[key]
		if h == nil || h.Socket != o {
			continue // closed by the stop, which asks nobody
		}
		if h.holders--; h.holders == 0 {
			delete(s.open, key)
			s.closeSocket(key, o)
		}
	}
}

// closeSockets closes all, whoever holds them. Called in the loop.
func (s *Supervisor) closeSockets() {
	for key, h := range s.open {
		s.closeSocket(key, h.Socket)
	}
	clear(s.open)
	clear(s.sockets)
}

func (s *Supervisor) closeSocket(key string, o *socket.Socket) {
	if err := o.Close(); err != nil {
		s.log.Error("close listener", "key", key, "err", err)
	}
}

// missing returns the keys of sockets that are not among those of from.
func missing(from, sockets map[string]*socket.Socket) []string {
	var keys []string
	for key := range sockets {
		if from[key] == nil {
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	return keys
}

// descriptors are the sockets as they travel.
func descriptors(p *plan) map[string]int {
	fds := make(map[string]int, len(p.sockets))
	for key, s := range p.sockets {
		fds[key] = s.FD()
	}
	return fds
}
