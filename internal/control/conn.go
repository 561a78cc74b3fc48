// Package control is the channel between the supervisor and one generation: small
// JSON messages on a SOCK_SEQPACKET socket, with descriptors beside them.
//
// A message is one packet, so message and descriptors can never come apart, order
// is kept, and the end of the other process is an end of file. What may be large
// (a configuration) travels as a sealed memory file ([Payload]).
//
// The messages of the core ([Hello], [TypeServe], [TypeDrain], …) are only ever
// extended: a field that a build does not know is ignored, so any supervisor can
// command any generation at least that far.
//
// # Adoption
//
// A generation outlives its supervisor. Supervisors have numbers, their epochs, and a
// generation obeys the one of the highest epoch that has said [TypeObey], at the channel
// where it was said. There are two ways to such a channel. A generation that has lost
// its own looks for a supervisor at the rendezvous ([Reunite]); and a supervisor that is
// about to be succeeded hands one over ([TypePrepare]). Either way the adopter asks with
// [TypeAdopt] what the generation has and does, which changes nothing, and then
// commands with [TypeObey], upon which the generation closes every other channel.
package control

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// MaxMessage is the most bytes that a message may have. It is far below the
	// default send buffer, so a message that the peer has room for is sent whole.
	MaxMessage = 32 << 10

	// MaxFiles is the most descriptors that one message may carry: the kernel's
	// SCM_MAX_FD.
	MaxFiles = 253

	// crowdPause is the time between attempts to send in a crowd: those who are to receive
	// what is on its way need a moment.
	crowdPause = 5 * time.Millisecond
)

// ErrProtocol is wrapped by the errors that Receive returns when the peer does not
// keep to the protocol. Such a channel must be closed.
var ErrProtocol = errors.New("control protocol violated")

// Conn is one end of a control channel. One goroutine at a time may receive; any
// number may send.
type Conn struct {
	c *net.UnixConn

	sends, takes map[Type]int // descriptors, at most, by type

	mu sync.Mutex // held for one sendmsg, so that a deadline is its sender's own
}

// Pair makes a channel: the supervisor's end, and that of a generation in the form
// that os/exec takes. The caller closes the latter after the start.
func Pair() (*Conn, *os.File, error) {
	a, b, err := Ends()
	if err != nil {
		return nil, nil, err
	}
	theirs := os.NewFile(uintptr(b), "control channel")
	ours, err := NewSupervisorConn(a)
	if err != nil {
		return nil, nil, errors.Join(err, theirs.Close())
	}
	return ours, theirs, nil
}

// NewSupervisorConn is [NewConn] for a supervisor's end.
func NewSupervisorConn(fd int) (*Conn, error) {
	return newConn(fd, filesOfSupervisor, filesOfGeneration)
}

// NewPredecessorConn is [NewConn] for a supervisor's end of the channel to a candidate.
func NewPredecessorConn(fd int) (*Conn, error) { return newConn(fd, filesOfPredecessor, nil) }

// NewCandidateConn is [NewConn] for a candidate's end.
func NewCandidateConn(fd int) (*Conn, error) { return newConn(fd, nil, filesOfPredecessor) }

// Ends makes a channel and returns its two ends as descriptors, which the caller closes
// or turns into a [Conn] each.
func Ends() (a, b int, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, -1, fmt.Errorf("make a control channel: %w", err)
	}
	return fds[0], fds[1], nil
}

// NewConn takes over the descriptor of a generation's end, also when it fails.
func NewConn(fd int) (*Conn, error) { return newConn(fd, filesOfGeneration, filesOfSupervisor) }

func newConn(fd int, sends, takes map[Type]int) (*Conn, error) {
	c, err := newSeqpacket(fd, "control channel")
	if err != nil {
		return nil, err
	}
	return &Conn{c: c, sends: sends, takes: takes}, nil
}

// newSeqpacket takes over the descriptor of an end of a channel, also when it fails.
func newSeqpacket(fd int, what string) (*net.UnixConn, error) {
	f := os.NewFile(uintptr(fd), what)
	if f == nil {
		return nil, fmt.Errorf("%s: no descriptor %d", what, fd)
	}
	defer f.Close()
	if err := wantSeqpacket(fd); err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	c, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	uc, ok := c.(*net.UnixConn)
	if !ok {
		return nil, errors.Join(fmt.Errorf("%s: descriptor %d is no unix socket", what, fd), c.Close())
	}
	return uc, nil
}

// wantSeqpacket fails if fd cannot be an end of a channel.
func wantSeqpacket(fd int) error {
	kind, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil {
		return fmt.Errorf("descriptor %d: %w", fd, err)
	}
	if kind != unix.SOCK_SEQPACKET {
		return fmt.Errorf("descriptor %d is no SOCK_SEQPACKET socket", fd)
	}
	return nil
}

// Close ends the channel and unblocks Send and Receive. Descriptors that were sent and
// not received are closed with it, which may block: see [Discard].
func (c *Conn) Close() error { return c.c.Close() }

// Send sends a message with duplicates of the descriptors, which stay the
// caller's. It blocks while the peer's queue is full, or too many descriptors are on their
// way (unix(7), ETOOMANYREFS), at most for within. The error wraps
// [os.ErrDeadlineExceeded] then.
func (c *Conn) Send(m *Message, within time.Duration, fds ...int) error {
	data, err := json.Marshal(m)
	if err != nil {
		return fmt.Errorf("send %s: %w", m.Type, err)
	}
	if len(data) > MaxMessage {
		return fmt.Errorf("send %s: %d bytes are too many for a message (%d)", m.Type, len(data), MaxMessage)
	}
	if most := c.sends[m.Type]; len(fds) > most {
		return fmt.Errorf("send %s: %d descriptors are too many (%d)", m.Type, len(fds), most)
	}
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	deadline := time.Now().Add(within)
	if err := persist(deadline, func() error { return c.send(data, oob, deadline) }); err != nil {
		return fmt.Errorf("send %s: %w", m.Type, err)
	}
	return nil
}

// send sends a packet once there is room for it.
func (c *Conn) send(data, oob []byte, deadline time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.c.SetWriteDeadline(deadline); err != nil {
		return err
	}
	_, _, err := c.c.WriteMsgUnix(data, oob, nil)
	return err
}

// persist calls send until it has succeeded, or failed for another reason than a crowd. An
// error that says that the time is over names the crowd that took it, too.
func persist(deadline time.Time, send func() error) error {
	var crowd error
	for {
		err := send()
		switch {
		case crowd != nil && errors.Is(err, os.ErrDeadlineExceeded):
			return fmt.Errorf("%w: %w", err, crowd)
		case !crowded(err):
			return err
		case time.Until(deadline) < crowdPause:
			return fmt.Errorf("%w: %w", os.ErrDeadlineExceeded, err)
		}
		crowd = err
		time.Sleep(crowdPause)
	}
}

// crowded says of a sendmsg that failed that it is a matter of time, although no event
// tells when there is room: the user has too many descriptors on their way (unix(7),
// ETOOMANYREFS), which also those of other processes are, or memory is short.
func crowded(err error) bool {
	return errors.Is(err, unix.ETOOMANYREFS) || errors.Is(err, unix.ENOBUFS) || errors.Is(err, unix.ENOMEM)
}

// Receive blocks until a message has come. Its descriptors are the caller's to
// close. They are close-on-exec; whether they block is as the sender has it, since
// both share one open file description, and nothing here changes that (os.File's
// Fd would). io.EOF means that the other side is gone.
func (c *Conn) Receive() (*Message, []int, error) {
	data := make([]byte, MaxMessage+1)
	oob := make([]byte, unix.CmsgSpace(MaxFiles*4))
	// The net package asks for MSG_CMSG_CLOEXEC.
	n, oobn, flags, _, err := c.c.ReadMsgUnix(data, oob)
	if errors.Is(err, unix.ECONNRESET) {
		// The peer has closed without reading all of what we had sent. The kernel says so
		// once, before what the peer itself had sent.
		n, oobn, flags, _, err = c.c.ReadMsgUnix(data, oob)
	}
	if err != nil {
		if errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET) {
			return nil, nil, io.EOF
		}
		return nil, nil, fmt.Errorf("receive: %w", err)
	}
	fds, err := parseRights(oob[:oobn])
	if err == nil {
		var m *Message
		if m, err = decode(data[:n], flags); err == nil {
			if most := c.takes[m.Type]; len(fds) <= most {
				return m, fds, nil
			}
			err = fmt.Errorf("%q with %d descriptors, at most %d belong to it", m.Type, len(fds), c.takes[m.Type])
		}
	}
	Discard(fds)
	return nil, nil, fmt.Errorf("%w: %w", ErrProtocol, err)
}

// decode judges a packet.
func decode(data []byte, flags int) (*Message, error) {
	switch {
	case flags&unix.MSG_CTRUNC != 0:
		// The kernel has closed what did not fit.
		return nil, errors.New("descriptors were cut off")
	case flags&unix.MSG_TRUNC != 0 || len(data) > MaxMessage:
		return nil, fmt.Errorf("a message of more than %d bytes", MaxMessage)
	}
	m := new(Message)
	if err := json.Unmarshal(data, m); err != nil {
		return nil, fmt.Errorf("no message: %w", err)
	}
	if m.Type == "" {
		return nil, errors.New("a message without a type")
	}
	return m, nil
}

// parseRights returns every descriptor that came. With an error it returns those
// that it has understood.
func parseRights(oob []byte) ([]int, error) {
	if len(oob) == 0 {
		return nil, nil
	}
	cmsgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("control data: %w", err)
	}
	var all []int
	for i := range cmsgs {
		if cmsgs[i].Header.Level != unix.SOL_SOCKET || cmsgs[i].Header.Type != unix.SCM_RIGHTS {
			continue
		}
		fds, err := unix.ParseUnixRights(&cmsgs[i])
		if err != nil {
			return all, fmt.Errorf("control data: %w", err)
		}
		all = append(all, fds...)
	}
	return all, nil
}

// Duplicate returns a duplicate of a descriptor, which the caller closes.
func Duplicate(fd int) (int, error) {
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("duplicate: %w", err)
	}
	return dup, nil
}

// DuplicateOf is [Duplicate] for what belongs to Go. It leaves the flags of the open file
// description alone, which all processes share that have it; [os.File.Fd] may clear
// O_NONBLOCK.
func DuplicateOf(c syscall.Conn) (dup int, err error) {
	dup = -1
	err = onDescriptor(c, func(fd int) (err error) {
		dup, err = Duplicate(fd)
		return err
	})
	return dup, err
}

// Discard closes descriptors that a peer has sent, and waits for nothing: to close the
// last one of a socket blocks for as long as its SO_LINGER says (socket(7)), which is
// the peer's choice.
func Discard(fds []int) {
	if len(fds) > 0 {
		go CloseAll(fds)
	}
}

// CloseAll closes descriptors. Those that somebody has sent who is not trusted are for
// [Discard].
func CloseAll(fds []int) {
	for _, fd := range fds {
		_ = unix.Close(fd) // carries no data of ours: an error says nothing
	}
}

// CloseNamed is [CloseAll] for descriptors with keys.
func CloseNamed(named map[string]int) {
	for _, fd := range named {
		CloseAll([]int{fd})
	}
}
