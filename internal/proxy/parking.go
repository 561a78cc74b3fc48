package proxy

import (
	"net/netip"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/stream"
)

// parking has the connections of a listener that are not served yet: until what they begin with
// is complete it stays in the kernel, so a connection that waits for that holds no memory but
// what every parked one does, and what follows is touched by nobody.
type parking struct {
	first []*parked    // by loop: of a list, which is owned by its goroutine
	count atomic.Int64 // all of them
}

func newParking(loops int) parking { return parking{first: make([]*parked, loops)} }

// parked is one of them, and a part of what knows what it waits for.
type parked struct {
	stream.Conn
	remote     netip.AddrPort
	in         *parking
	owner      attendant
	prev, next *parked
}

// attendant is who a parked connection belongs to.
type attendant interface {
	stream.Owner
	cut() // ends it
}

// park takes fd over, as w's, for at most a time. With an error it is the caller's still.
func (p *parking) park(w *parked, on *stream.Loop, fd int, owner attendant, within time.Duration) error {
	if err := on.Adopt(&w.Conn, fd, owner, nil); err != nil {
		return err
	}
	w.in, w.owner = p, owner
	w.Limit(on.Now().Add(within))
	if w.next = p.first[on.Index]; w.next != nil {
		w.next.prev = w
	}
	p.first[on.Index] = w
	p.count.Add(1)
	return nil
}

// leave takes the connection from those that wait.
func (w *parked) leave() {
	if w.prev != nil {
		w.prev.next = w.next
	} else {
		w.in.first[w.Loop().Index] = w.next
	}
	if w.next != nil {
		w.next.prev = w.prev
	}
	w.prev, w.next = nil, nil
	w.in.count.Add(-1)
}

// unpark takes the connection from the loop, too. Its descriptor is the caller's.
func (w *parked) unpark() (fd int) {
	w.leave()
	fd, _ = w.Detach()
	return fd
}

// cut ends all that wait. It does not wait, and may be called by any goroutine.
func (p *parking) cut(loops []*stream.Loop) {
	for _, on := range loops {
		on.Post(func() {
			for w := p.first[on.Index]; w != nil; {
				next := w.next
				w.owner.cut()
				w = next
			}
		})
	}
}

// peekAt reads what is there and leaves it there as well.
func peekAt(fd int, b []byte) (n int, from unix.Sockaddr, err error) {
	for {
		n, from, err = unix.Recvfrom(fd, b, unix.MSG_PEEK|unix.MSG_DONTWAIT)
		if err != unix.EINTR {
			return n, from, err
		}
	}
}
