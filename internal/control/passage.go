package control

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// PassageVersion is that of the packets below. Where two builds have different ones, idle
// connections stay where they are. It has no part in whether a supervisor can command a
// generation.
const PassageVersion = 1

const (
	// PassageBatch is how many connections travel in one packet at most.
	PassageBatch = 32

	// MaxPassageEarly is the most bytes that were already read from a connection and go
	// with it, MaxPassageKey the most of a listener's key, and MaxPassagePacket the most
	// of a packet. It fits into a default send buffer.
	MaxPassageEarly  = 128 << 10
	MaxPassageKey    = 4 << 10
	MaxPassagePacket = 168 << 10

	passageHeader = 4
	passageEntry  = 16
	maxRemote     = 64 // bytes of an address: an IPv6 one with its zone and port

	maxIdle = uint64(10 * 365 * 24 * time.Hour)
)

// The packets of a passage.
const (
	passageKeys  = iota + 1 // from who takes, first of all: the listeners that it has
	passageConns            // to who takes
)

// Passed is a connection in a passage, which waits for a request.
type Passed struct {
	Key    string         // of its listener, as config.Socket.Key says it
	Remote netip.AddrPort // of the client; the zero value for a unix socket
	Idle   time.Duration  // how long it has waited for a request
	Early  []byte         // what was already read of that
	FD     int
}

// Passage is one end of the way that idle connections take from a generation that drains
// to the one that serves: a SOCK_SEQPACKET socket whose ends the supervisor has made and
// gives away, so that a generation reaches another only where that is wanted. Who takes
// says first from which listeners. Its end is the end of that other generation, or its
// wish.
//
// A connection is in one process, or in the queue between the two: it is the receiver's
// from the moment in which it was sent, also if the sender ends. If the receiver's process
// dies, so do the connections that wait in its queue, as those do that it has.
//
// One goroutine at a time may receive; any number may send.
type Passage struct {
	c     *net.UnixConn
	raw   syscall.RawConn
	files int // for how many descriptors there is room in what is received
}

// NewPassage takes over the descriptor of an end, which [Ends] has made, also when it
// fails.
func NewPassage(fd int) (*Passage, error) {
	c, err := newSeqpacket(fd, "passage")
	if err != nil {
		return nil, err
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("passage: %w", err), c.Close())
	}
	p := &Passage{c, raw, MaxFiles}
	// A crowd of connections goes in few turns.
	_ = p.on(func(fd int) error {
		n, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF)
		if err == nil && n < 2*sendBuffer {
			err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, max(sendBuffer, n/2)) // the kernel doubles it
		}
		return err
	})
	return p, nil
}

// on calls f with the descriptor, which nobody closes meanwhile.
func (p *Passage) on(f func(fd int) error) (err error) {
	if outer := p.raw.Control(func(fd uintptr) { err = f(int(fd)) }); outer != nil {
		return outer
	}
	return err
}

// Close ends the passage and unblocks Receive. What the other side has sent and was not
// received is lost; what was sent to it is not.
func (p *Passage) Close() { _ = p.c.Close() }

// End ends the passage for the other side, at once. What that has sent is still received,
// then comes io.EOF.
func (p *Passage) End() {
	_ = p.on(func(fd int) error { return unix.Shutdown(fd, unix.SHUT_RDWR) }) // it fails where the passage has ended
}

// ErrPassageBusy says that the queue of the other side is full, or that too many
// descriptors are on their way (unix(7), ETOOMANYREFS): it is a matter of time.
var ErrPassageBusy = errors.New("the passage is full")

// PassageTakes says whether a connection may go with those, in one packet.
func PassageTakes(all []Passed, another *Passed) bool {
	if len(another.Early) > MaxPassageEarly || len(another.Key) > MaxPassageKey || len(all) >= PassageBatch {
		return false
	}
	size := passageHeader + another.size()
	for i := range all {
		size += all[i].size()
	}
	return size <= MaxPassagePacket
}

func (c *Passed) size() int { return passageEntry + len(c.Key) + maxRemote + len(c.Early) }

// TrySend sends connections, which [PassageTakes] allows, and waits for nothing. The descriptors
// are still the caller's, to be closed if there is no error.
func (p *Passage) TrySend(all []Passed) error {
	if len(all) > PassageBatch {
		return fmt.Errorf("passage: %d connections at once", len(all))
	}
	data, fds := []byte{passageConns, 0}, make([]int, 0, len(all))
	e := binary.NativeEndian
	data = e.AppendUint16(data, uint16(len(all)))
	for i := range all {
		c := &all[i]
		remote, err := c.Remote.MarshalBinary()
		if err != nil || len(remote) > maxRemote || len(c.Key) > MaxPassageKey || len(c.Early) > MaxPassageEarly || uint64(c.Idle) > maxIdle {
			return fmt.Errorf("passage: a connection from %s at %q with %d bytes: %w", c.Remote, c.Key, len(c.Early), err)
		}
		data = e.AppendUint16(data, uint16(len(c.Key)))
		data = e.AppendUint16(data, uint16(len(remote)))
		data = e.AppendUint32(data, uint32(len(c.Early)))
		data = e.AppendUint64(data, uint64(c.Idle))
		data = append(append(append(data, c.Key...), remote...), c.Early...)
		fds = append(fds, c.FD)
	}
	return p.trySend(data, fds)
}

func (p *Passage) trySend(data []byte, fds []int) error {
	if len(data) > MaxPassagePacket {
		return fmt.Errorf("passage: a packet of %d bytes", len(data))
	}
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	// Not a write in Go's sense, which other writers would wait for.
	switch err := p.on(func(fd int) error {
		return unix.Sendmsg(fd, data, oob, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
	}); {
	case err == nil:
		return nil
	case err == unix.EAGAIN, err == unix.EINTR, crowded(err):
		return ErrPassageBusy
	default:
		return fmt.Errorf("passage: %w", err)
	}
}

// SendKeys is the first word of who takes: the keys of the listeners that it has. It waits
// for nothing.
func (p *Passage) SendKeys(keys []string) error {
	data := []byte{passageKeys, 0}
	e := binary.NativeEndian
	data = e.AppendUint16(data, uint16(len(keys)))
	for _, key := range keys {
		if len(key) > MaxPassageKey || len(keys) > maxPassageKeys {
			return fmt.Errorf("passage: %d keys, and one of %d bytes", len(keys), len(key))
		}
		data = append(e.AppendUint16(data, uint16(len(key))), key...)
	}
	return p.trySend(data, nil)
}

// maxPassageKeys is how many keys a packet has at most.
const maxPassageKeys = 1 << 14

// ReceiveKeys is for who gives: it blocks until the first word has come. After that
// nothing comes but the end, for which it can be called again.
func (p *Passage) ReceiveKeys() ([]string, error) {
	data, fds, err := p.receive()
	if err == nil && len(fds) > 0 {
		Discard(fds)
		err = fmt.Errorf("%w: passage: %d descriptors have come", ErrProtocol, len(fds))
	}
	if err != nil {
		return nil, err
	}
	in := &passageReader{data: data}
	var keys []string
	if n := in.header(passageKeys, maxPassageKeys); n > 0 {
		for range n {
			keys = append(keys, string(in.bytes(in.uint16(), MaxPassageKey)))
		}
	}
	return keys, in.end()
}

// Receive is for who takes: it blocks until connections have come, which are the caller's
// to close. io.EOF: the other side is gone, and all that it had sent was received.
//
// An error that wraps [ErrProtocol] is of one packet; others may follow it. With such an
// error come the connections of a packet of which the kernel had no room for every
// descriptor, as far as it had.
func (p *Passage) Receive() ([]Passed, error) {
	data, fds, err := p.receive()
	cut := errors.Is(err, errCutOff)
	if err != nil && !cut {
		Discard(fds)
		return nil, err
	}
	all, bad := decodePassed(data)
	if bad == nil && (len(fds) > len(all) || len(fds) < len(all) && !cut) {
		bad = fmt.Errorf("%w: passage: %d connections with %d descriptors", ErrProtocol, len(all), len(fds))
	}
	if bad != nil {
		Discard(fds)
		return nil, bad
	}
	all = all[:len(fds)]
	for i := range all {
		all[i].FD = fds[i]
	}
	return all, err
}

// errCutOff says that the kernel had no room for descriptors, and has closed them.
var errCutOff = fmt.Errorf("%w: passage: %w", ErrProtocol, os.NewSyscallError("recvmsg", unix.EMFILE))

func decodePassed(data []byte) ([]Passed, error) {
	in := &passageReader{data: data}
	all := make([]Passed, in.header(passageConns, PassageBatch))
	for i := range all {
		c := &all[i]
		key, remote, early, idle := in.uint16(), in.uint16(), in.uint32(), in.uint64()
		c.Key = string(in.bytes(key, MaxPassageKey))
		if err := c.Remote.UnmarshalBinary(in.bytes(remote, maxRemote)); err != nil || idle > maxIdle {
			in.bad = true
		}
		c.Idle = time.Duration(idle)
		c.Early = slices.Clone(in.bytes(early, MaxPassageEarly))
	}
	return all, in.end()
}

// passageReader takes a packet apart. Once something was wrong there is nothing in it.
type passageReader struct {
	data []byte
	bad  bool
}

func (r *passageReader) bytes(n, most int) []byte {
	if r.bad || n > most || n > len(r.data) {
		r.data, r.bad = nil, true
		return nil
	}
	taken := r.data[:n:n]
	r.data = r.data[n:]
	return taken
}

func (r *passageReader) uint16() int {
	if b := r.bytes(2, 2); b != nil {
		return int(binary.NativeEndian.Uint16(b))
	}
	return 0
}

func (r *passageReader) uint64() uint64 {
	if b := r.bytes(8, 8); b != nil {
		return binary.NativeEndian.Uint64(b)
	}
	return 0
}

func (r *passageReader) uint32() int {
	if b := r.bytes(4, 4); b != nil {
		return int(binary.NativeEndian.Uint32(b))
	}
	return 0
}

// header returns how many there are of what a packet of a type consists of.
func (r *passageReader) header(of byte, most int) int {
	head := r.bytes(2, 2)
	n := r.uint16()
	r.bad = r.bad || head[0] != of || head[1] != 0 || n > most
	if r.bad {
		return 0
	}
	return n
}

func (r *passageReader) end() error {
	if r.bad || len(r.data) > 0 {
		return fmt.Errorf("%w: passage: a packet that is none", ErrProtocol)
	}
	return nil
}

// receive waits for a packet.
func (p *Passage) receive() (data []byte, fds []int, err error) {
	var n, oobn, flags int
	oob := make([]byte, unix.CmsgSpace(p.files*4))
	outer := p.raw.Read(func(fd uintptr) bool {
		for {
			// Its length first: packets are small, as a rule, and nobody holds a buffer who waits.
			n, _, err = unix.Recvfrom(int(fd), nil, unix.MSG_PEEK|unix.MSG_TRUNC|unix.MSG_DONTWAIT)
			if err == nil {
				data = make([]byte, min(n, MaxPassagePacket)+1)
				n, oobn, flags, _, err = unix.Recvmsg(int(fd), data, oob, unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
			}
			if err != unix.EINTR && err != unix.ECONNRESET { // see Conn.Receive
				return err != unix.EAGAIN
			}
		}
	})
	if err = errors.Join(outer, err); err != nil {
		return nil, nil, fmt.Errorf("passage: %w", err)
	}
	fds, err = parseRights(oob[:max(oobn, 0)])
	switch {
	case err != nil:
		return nil, fds, fmt.Errorf("%w: passage: %w", ErrProtocol, err)
	case n <= 0: // also what has descriptors and no byte: there is no such packet
		Discard(fds)
		return nil, nil, io.EOF
	case flags&unix.MSG_TRUNC != 0 || n > MaxPassagePacket:
		return nil, fds, fmt.Errorf("%w: passage: a packet of more than %d bytes", ErrProtocol, MaxPassagePacket)
	case flags&unix.MSG_CTRUNC != 0:
		return data[:n], fds, errCutOff
	}
	return data[:n], fds, nil
}
