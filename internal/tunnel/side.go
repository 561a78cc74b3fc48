package tunnel

import (
	"errors"
	"net"
	"sync/atomic"
	"syscall"
	"time"

	"holdfast/internal/stream"
)

// side is one of the two connections of a tunnel. One goroutine reads it and
// another one writes it.
type side struct {
	conn   net.Conn
	raw    syscall.RawConn // nil for what can only be read by blocking
	tcp    *net.TCPConn    // nil for everything else
	closed Reason          // when this side closes first
	lost   Reason          // when this side is cut off

	resets *stream.Resets // nil: nobody tells of them

	finSent   atomic.Bool // set before our FIN goes out, and unset if it cannot
	truncated atomic.Bool // bytes for this side were given up, so a FIN would be a lie
}

func newSide(conn net.Conn, closed, lost Reason) *side {
	s := &side{conn: conn, closed: closed, lost: lost}
	// By type and not by interface: a wrapper that embeds a connection has a
	// SyscallConn that goes behind its back.
	switch c := conn.(type) {
	case *net.TCPConn:
		if raw, err := c.SyscallConn(); err == nil { // fails only on an invalid conn; then reads fail, too
			s.tcp, s.raw = c, raw
		}
	case *net.UnixConn:
		s.raw, _ = c.SyscallConn()
	}
	return s
}

// prepare removes what the connection's former owner may have set.
func (s *side) prepare(k KeepAlive) {
	s.conn.SetDeadline(time.Time{})
	if s.tcp != nil {
		s.raw.Control(func(fd uintptr) { k.set(int(fd), KeepAlive{}) })
	}
}

// closeWrite sends a FIN, once. It reports false for a connection that cannot
// be half-closed.
func (s *side) closeWrite() (ok bool, err error) {
	c, ok := s.conn.(interface{ CloseWrite() error })
	if !ok || s.finSent.Swap(true) {
		return ok, nil
	}
	if err = c.CloseWrite(); err != nil {
		// No FIN went out, and whoever takes the error of the connection
		// must not make the reader take the reset for an answer to a FIN.
		s.finSent.Store(false)
	}
	return true, err
}

// reset closes the connection so that its peer notices that the stream was cut.
// Bytes that the kernel still holds are discarded.
func (s *side) reset() {
	if s.tcp != nil {
		s.raw.Control(func(fd uintptr) { reset(int32(fd)) })
	}
	if s.resets != nil {
		s.resets.ByTunnel.Store(true)
	}
	s.conn.Close()
}

// close ends both directions.
func (s *side) close() {
	if s.tcp != nil {
		s.raw.Control(func(fd uintptr) { hangUp(int32(fd)) })
	}
	s.conn.Close()
}

// broken reports whether the kernel has given the connection up; see [prober].
func (s *side) broken() bool {
	if s.raw == nil {
		return false
	}
	broken := false
	s.raw.Control(func(fd uintptr) { broken = s.brokenFD(fd) })
	return broken
}

// A unix socket is also hung up by an ordinary close of its peer. Whether our FIN went
// out is asked last: the other direction may send it meanwhile.
func (s *side) brokenFD(fd uintptr) bool {
	failed, hungUp := new(prober).isBroken(int32(fd))
	if s.resets != nil && s.resets.ByPeer.Load() {
		return true
	}
	return failed || hungUp && s.tcp != nil && !s.finSent.Load()
}

// waitBroken waits until broken, or until the read deadline passes. The caller
// has read a FIN, so nothing is readable; the poller reports a reset as an edge.
// It returns false at once for a connection of which it cannot be told.
func (s *side) waitBroken() bool {
	if s.tcp == nil {
		return false
	}
	return s.raw.Read(s.brokenFD) == nil
}

// pendingError takes the error that the kernel holds for the socket.
func (s *side) pendingError() error {
	if s.raw == nil {
		return nil
	}
	var err error
	s.raw.Control(func(fd uintptr) {
		if errno := takeError(int32(fd)); errno != 0 {
			err = errno
		}
	})
	return err
}

// why turns an error of the connection into the reason that it is.
func (s *side) why(err error) Reason {
	var errno syscall.Errno
	if errors.As(err, &errno) && isDead(errno) {
		return DeadPeer
	}
	return s.lost
}

// waitSent waits until the peer has acknowledged everything, for as long as it
// makes progress at least every stall, and not beyond limit.
func (s *side) waitSent(limit time.Time, stall time.Duration) {
	var queue backlog
	for begin := time.Now(); ; time.Sleep(queue.pause) {
		left, now := s.unsent(), time.Now()
		if !now.Before(limit) || s.broken() || queue.done(left, now.Sub(begin), stall) {
			return
		}
	}
}

// unsent returns the bytes in the send queue that are not acknowledged, 0 where
// nobody knows.
func (s *side) unsent() (n int) {
	if s.raw == nil {
		return 0
	}
	s.raw.Control(func(fd uintptr) { n = unacked(int32(fd)) })
	return n
}
