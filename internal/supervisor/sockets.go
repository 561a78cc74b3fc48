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
	left    bool // somebody has left it to us, and it has not served since
}

// hold gives p the socket that l describes: the one that is open, or a new one.
// Called in the loop.
func (s *Supervisor) hold(p *plan, l config.Socket) error {
	key := l.Key()
	h := s.open[key]
	if h == nil {
		opened, left, err := s.openSocket(l)
		if err != nil {
			return err
		}
		h = &held{Socket: opened, left: left}
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

// openSocket returns the socket that l describes: the one that was left to us, or a new
// one. Called in the loop.
func (s *Supervisor) openSocket(l config.Socket) (_ *socket.Socket, left bool, err error) {
	if fd, ok := s.left[l.Key()]; ok {
		delete(s.left, l.Key())
		adopted, err := socket.Adopt(l, fd)
		if err == nil {
			return adopted, true, nil
		}
		s.withdraw(storedListener + l.Key()) // nobody could have the address otherwise
		s.log.Error("a listening socket that was left is of no use", "err", err)
	}
	var ours []*socket.Socket
	for _, o := range s.open {
		ours = append(ours, o.Socket)
	}
	opened, err := socket.Open(l, ours, s.opts.Inherited)
	return opened, false, err
}

// leave takes over listening sockets, by key, that somebody has left to us, as far as
// there is none like it yet. It returns the keys of all. Called in the loop.
func (s *Supervisor) leave(fds map[string]int) (keys map[string]bool) {
	keys = make(map[string]bool)
	for key, fd := range fds {
		keys[key] = true
		if _, ok := s.left[key]; !ok && s.open[key] == nil {
			s.left[key] = fd
			delete(fds, key)
		}
	}
	return keys
}

// withdrawListener is for a socket that nobody wants any more. What a start that failed
// has found waits for the next one. Called in the loop.
func (s *Supervisor) withdrawListener(key string) {
	if !s.failed {
		s.withdraw(storedListener + key)
	}
}

// forgetLeft closes what was left to us and no configuration names. Called in the loop.
func (s *Supervisor) forgetLeft() {
	for key := range s.left {
		s.withdrawListener(key)
	}
	dropAll(s.left)
	clear(s.left)
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
			if h.left { // it waits for another plan
				s.left[key] = o.FD()
				continue
			}
			s.closeSocket(key, o)
		}
	}
}

// closeSockets closes all, whoever holds them. Called in the loop.
func (s *Supervisor) closeSockets() {
	for key, h := range s.open {
		s.withdrawListener(key)
		s.closeSocket(key, h.Socket)
	}
	clear(s.open)
	clear(s.sockets)
	s.forgetLeft()
}

// depositSockets has the service manager keep what p serves, and no others. What it has
// made itself it keeps anyway. Called in the loop.
func (s *Supervisor) depositSockets(p *plan) {
	for _, key := range p.removed {
		s.withdraw(storedListener + key)
	}
	for _, key := range p.added {
		if o := p.sockets[key]; o.Config().Address.Network != "systemd" {
			s.deposit(storedListener+key, o.FD())
		}
	}
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
