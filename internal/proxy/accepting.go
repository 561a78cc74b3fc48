package proxy

import (
	"net"
	"net/netip"
	"os"
	"strconv"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"holdfast/internal/control"
	"holdfast/internal/poller"
	"holdfast/internal/stream"
)

const (
	// acceptPause is the wait after accept failed for want of descriptors or memory.
	acceptPause = 200 * time.Millisecond

	// acceptsATurn is how many connections are accepted before others of the loop have
	// their turn.
	acceptsATurn = 16
)

// acceptState is what a listener waits for.
type acceptState uint8

const (
	off      acceptState = iota // for a socket
	taking                      // for somebody in the queue
	resting                     // for the end of the pause
	crowded                     // for room below limits.connections
	wanting                     // for a descriptor, or whatever else accepting has failed for
	emptying                    // for nothing: it goes on in the next turn, until the queue is empty
)

// acceptEvent is what may change that.
type acceptEvent uint8

const (
	queued  acceptEvent = iota // there may be somebody in the queue
	left                       // a connection has ended
	tried                      // it is time to try again what has failed
	resumed                    // the pause is over
)

// looks says which events have a listener look whether it can accept. What comes in
// another state is for nobody: the queue is looked at in any case when that state ends.
var looks = [...][4]bool{
	off:      {},
	taking:   {queued: true},
	resting:  {resumed: true},
	crowded:  {left: true},
	wanting:  {left: true, tried: true},
	emptying: {queued: true},
}

// acceptor is what the first loop has of a listener.
type acceptor struct {
	state   acceptState
	socket  int // of the generation's loop, which does not close it before state is off
	handle  poller.Handle
	again   poller.Deadline // when what has failed is tried again
	held    bool            // the present want of room was counted
	unset   int             // how many connections, from now on, may have to be set up themselves
	aside   accepted        // it has a descriptor that connections may not have; -1: nobody
	emptied chan struct{}   // to be closed when state is off

	batches [][]accepted // for each of the other loops
	from    unix.RawSockaddrAny
	fromLen uint32
}

// accepted is a connection that nobody serves yet.
type accepted struct {
	fd     int
	remote netip.AddrPort
}

// begin takes a socket, the first connections from which are to be set up themselves: those
// that came before it was, or all.
func (l *listener) begin(fd, unset int) (err error) {
	a := &l.acceptor
	a.handle, err = l.loops[0].Add(fd, l, 0)
	if err == nil {
		a.state, a.socket, a.unset = taking, fd, unset
	}
	return err
}

// Ready implements [poller.Owner].
func (l *listener) Ready(uint32, poller.Events) { l.happens(queued) }

// Expire implements [poller.Expirer].
func (l *listener) Expire(*poller.Deadline) { l.happens(tried) }

func (l *listener) happens(e acceptEvent) {
	switch state := l.acceptor.state; {
	case !looks[state][e]:
	case state == emptying:
		l.empty()
	default:
		l.look()
	}
}

// look accepts who is in the queue, until something is in the way.
func (l *listener) look() {
	a := &l.acceptor
	defer l.dealOut()
	for range acceptsATurn {
		if a.state = l.obstacle(); a.state != taking {
			return
		}
		c, err := l.take()
		switch {
		case err == nil && l.descriptors.allow(c.fd):
			l.give(c)
		case err == nil:
			a.aside = c
			a.state = l.lack(errNoDescriptor)
			return
		case err == unix.EAGAIN:
			return
		case err == unix.EINTR || err == unix.ECONNABORTED: // it went away in the queue
		default:
			a.state = l.lack(os.NewSyscallError("accept4", err))
			return
		}
	}
	l.loops[0].Again(a.handle)
}

// obstacle returns what has to be waited for before somebody is accepted; taking: nothing.
func (l *listener) obstacle() acceptState {
	switch {
	case !l.settle():
		return l.lack(errNoDescriptor)
	case l.paused.Load():
		return resting
	case l.isCrowded():
		l.countFull()
		return crowded
	case !l.descriptors.room():
		return l.lack(errNoDescriptor)
	}
	l.acceptor.held = false
	return taking
}

// isCrowded says whether there is no room. If so, it is told of the next connection that
// ends.
func (l *listener) isCrowded() bool {
	if !l.isFull() {
		return false
	}
	l.waits.Store(true)
	return l.isFull() // one may have ended before
}

// countFull counts that accepting is held up because there is no room.
func (l *listener) countFull() {
	if l.acceptor.held {
		return // what has woken us was gone again, as where a tunnel follows its connection
	}
	l.acceptor.held = true
	l.metrics.limitReached.Inc()
	if l.full.comesUp(time.Now()) {
		l.log.Warn("limits.connections is reached; connections wait in the queue", "limit", l.cfg.Limits.Connections)
	}
}

// lack waits a moment for what err says is wanting, and says so once.
func (l *listener) lack(err error) acceptState {
	l.metrics.failures.Inc()
	if l.failing.comesUp(time.Now()) {
		l.log.Error("cannot accept; connections wait in the queue", "err", err)
	}
	l.waits.Store(true)
	l.loops[0].SetDeadline(&l.acceptor.again, l, l.loops[0].Now().Add(acceptPause))
	return wanting
}

// settle brings who is set aside to a descriptor that connections may have, and serves
// him. While there is none he waits, and so does who stands behind him in the queue. One
// is then free below: room was made there. It returns false while he waits.
func (l *listener) settle() bool {
	c := &l.acceptor.aside
	if c.fd < 0 {
		return true
	}
	if again, err := unix.FcntlInt(uintptr(c.fd), unix.F_DUPFD_CLOEXEC, 0); err == nil {
		control.CloseAll([]int{c.fd})
		c.fd = again
	}
	if !l.descriptors.allow(c.fd) {
		return false
	}
	l.giveAside()
	return true
}

// giveAside serves who is set aside, wherever he is.
func (l *listener) giveAside() {
	l.give(l.acceptor.aside)
	l.acceptor.aside = accepted{fd: -1}
}

// end lets go of the socket, with empty after its queue was served.
func (l *listener) end(empty bool, done chan struct{}) {
	a := &l.acceptor
	if a.aside.fd >= 0 {
		l.giveAside() // nobody else will
	}
	a.emptied = done
	if empty {
		a.state = emptying
		l.empty()
		return
	}
	l.dealOut()
	l.letGo()
}

// empty serves who is in the queue, however many there are.
func (l *listener) empty() {
	defer l.dealOut()
	for range acceptsATurn {
		c, err := l.take()
		if err == unix.EINTR || err == unix.ECONNABORTED {
			continue
		}
		if err == nil && !l.descriptors.allow(c.fd) {
			control.CloseAll([]int{c.fd})
			err = errNoDescriptor
		}
		if err != nil {
			if err != unix.EAGAIN {
				l.log.Error("connections in the queue are lost", "err", err)
			}
			l.letGo()
			return
		}
		l.give(c)
	}
	l.loops[0].Again(l.acceptor.handle)
}

// letGo ends what the loop has to do with the socket.
func (l *listener) letGo() {
	a := &l.acceptor
	l.loops[0].Remove(a.handle)
	l.loops[0].Forget(&a.again)
	l.waits.Store(false)
	a.state = off
	close(a.emptied)
}

// give deals a connection to a loop. The others have theirs by dealOut.
func (l *listener) give(c accepted) {
	if n := l.deal(); n == 0 {
		l.arrive(l.loops[0], c)
	} else {
		l.acceptor.batches[n] = append(l.acceptor.batches[n], c)
	}
}

// dealOut sends the other loops what they were dealt.
func (l *listener) dealOut() {
	for n, batch := range l.acceptor.batches {
		if len(batch) == 0 {
			continue
		}
		l.acceptor.batches[n] = nil
		if !l.loops[n].Post(func() { l.serveAll(l.loops[n], batch) }) {
			for _, c := range batch {
				l.drop(c.fd)
			}
		}
	}
}

func (l *listener) serveAll(loop *stream.Loop, batch []accepted) {
	for _, c := range batch {
		l.arrive(loop, c)
	}
}

// take accepts the first one in the queue; unix.EAGAIN: there is nobody. No call that does
// not wait needs to tell the Go runtime, which costs more than it does.
func (l *listener) take() (accepted, error) {
	a := &l.acceptor
	a.fromLen = uint32(unsafe.Sizeof(a.from))
	fd, _, errno := unix.RawSyscall6(unix.SYS_ACCEPT4, uintptr(a.socket), uintptr(unsafe.Pointer(&a.from)),
		uintptr(unsafe.Pointer(&a.fromLen)), unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0, 0)
	if errno != 0 {
		return accepted{}, errno
	}
	if a.unset > 0 {
		a.unset--
		setOptions(int(fd))
	}
	return accepted{int(fd), remoteOf(&a.from)}, nil
}

// remoteOf is the zero value for a unix socket.
func remoteOf(from *unix.RawSockaddrAny) netip.AddrPort {
	switch from.Addr.Family {
	case unix.AF_INET:
		at := (*unix.RawSockaddrInet4)(unsafe.Pointer(from))
		return netip.AddrPortFrom(netip.AddrFrom4(at.Addr), portOf(&at.Port))
	case unix.AF_INET6:
		at := (*unix.RawSockaddrInet6)(unsafe.Pointer(from))
		ip := netip.AddrFrom16(at.Addr).Unmap()
		if at.Scope_id != 0 {
			ip = ip.WithZone(zoneOf(int(at.Scope_id)))
		}
		return netip.AddrPortFrom(ip, portOf(&at.Port))
	}
	return netip.AddrPort{}
}

// portOf reads a port in the order of the network.
func portOf(port *uint16) uint16 {
	b := (*[2]byte)(unsafe.Pointer(port))
	return uint16(b[0])<<8 | uint16(b[1])
}

// zoneOf names the interface of a link-local address.
func zoneOf(scope int) string {
	if i, err := net.InterfaceByIndex(scope); err == nil {
		return i.Name
	}
	return strconv.Itoa(scope)
}
