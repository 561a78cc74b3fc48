package admin

import (
	"fmt"
	"net"
	"net/netip"

	"holdfast/internal/control"
)

// KeyPrefix begins the keys of the listening sockets of a surface.
const KeyPrefix = "admin "

const keyUnix = KeyPrefix + "unix"

func keyTCP(address netip.AddrPort) string { return KeyPrefix + "tcp " + address.String() }

// Listeners returns duplicates of the listening sockets, for the surface that is to
// take the place of this one. The caller closes them.
func (s *Server) Listeners() (map[string]int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := map[string]*endpoint{keyUnix: s.unix}
	if s.tcp != nil {
		all[keyTCP(s.tcp.address)] = s.tcp
	}
	fds := make(map[string]int, len(all))
	for key, e := range all {
		fd, err := control.DuplicateOf(e.listener)
		if err != nil {
			control.CloseNamed(fds)
			return nil, fmt.Errorf("%s: %w", key, err)
		}
		fds[key] = fd
	}
	return fds, nil
}

// Inherit takes over what Listeners of another process has returned. It is called
// before Start, and nothing is accepted before Open.
func (s *Server) Inherit(fds map[string]int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.inherited, s.held = fds, true
}

// setRemovesPath says whether the path of a unix socket goes when g is closed.
func setRemovesPath(g *gate, removes bool) {
	if l, ok := g.listener.(*net.UnixListener); ok {
		l.SetUnlinkOnClose(removes)
	}
}

// takeInherited returns nil if nothing was inherited under the key.
func (s *Server) takeInherited(key string) (listener, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fd, ok := s.inherited[key]
	if !ok {
		return nil, nil
	}
	delete(s.inherited, key)
	return takeOver(fd)
}

// Hold has whoever comes wait until Open, or for another process that accepts from the
// same sockets. Connections that were accepted before are answered all the same.
func (s *Server) Hold() { s.setHeld(true) }

// Open ends Hold, and makes what was inherited this surface's own.
func (s *Server) Open() {
	s.mu.Lock()
	control.CloseNamed(s.inherited)
	s.inherited = nil
	s.mu.Unlock()
	setRemovesPath(s.unix.listener, true)
	s.setHeld(false)
}

func (s *Server) setHeld(held bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.held = held
	for _, e := range []*endpoint{s.unix, s.tcp} {
		switch {
		case e == nil:
		case held:
			e.listener.hold()
		default:
			e.listener.open()
		}
	}
}
