package load

import (
	"bytes"
	"fmt"
	"io"
	"net"

	"golang.org/x/sys/unix"
)

// What the upstream does is decided by the path of a request.
const (
	EchoPath = "/echo" // a tunnel that sends back what it gets
	BulkPath = "/bulk" // a tunnel that sends as much as can be taken
	PagePath = "/page" // no tunnel: a short answer
	BodyPath = "/body" // no tunnel: an answer as its path says (see bodyRequest)
)

const (
	// chunk is how much is read or written at once, and share how much of a bulk
	// tunnel's bytes are written before others have their turn.
	chunk = 128 << 10
	share = 4 * chunk

	// longestHead bounds what is kept of a request that has come in part.
	longestHead = 16 << 10
)

// The key is always the same, so its answer (RFC 6455, section 4.2.2) is too.
const (
	key    = "dGhlIHNhbXBsZSBub25jZQ=="
	accept = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
)

var (
	switching = []byte("HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: " + accept + "\r\n\r\n")
	page      = []byte("HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 3\r\n\r\nok\n")
	headEnd   = []byte("\r\n\r\n")
	lineEnd   = headEnd[:2]
)

type role uint8

const (
	none role = iota
	listening
	reading // a request's head
	echoing
	sending
	answering // with a body that did not go out at once
)

// An upstream is the server behind the proxies: one thread, and one system call each
// to read and to answer a message, so that it takes little from the cores that it shares.
type upstream struct {
	poll    *poll
	of      []served // by descriptor
	buf     []byte
	chunk   []byte
	answers map[int]*bodyAnswer // by the body's length
}

type served struct {
	role   role
	head   []byte      // of a request that has come in part
	answer *bodyAnswer // answering: what is being sent
	number number      // of its request
	sent   int         // so much of it
	last   bool        // nothing follows upon it
}

// ServeUpstream opens a listening socket on each of so many loopback addresses, writes
// their addresses to out, one a line, and serves for ever. A proxy that has an
// address of its own has all source ports for itself.
func ServeUpstream(addresses int, out io.Writer) error {
	p, err := newPoll()
	if err != nil {
		return err
	}
	u := &upstream{poll: p, buf: make([]byte, chunk), chunk: make([]byte, chunk), answers: map[int]*bodyAnswer{}}
	for i := range addresses {
		address, err := u.listen(net.IPv4(127, 0, 1, byte(1+i)))
		if err != nil {
			return fmt.Errorf("listen: %w", err)
		}
		fmt.Fprintln(out, address)
	}
	for {
		if err := p.wait(-1, u.event); err != nil {
			return fmt.Errorf("wait: %w", err)
		}
	}
}

func (u *upstream) listen(ip net.IP) (string, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	to := &unix.SockaddrInet4{Addr: [4]byte(ip.To4())}
	if err := unix.Bind(fd, to); err != nil {
		return "", err
	}
	if err := unix.Listen(fd, 4096); err != nil {
		return "", err
	}
	name, err := unix.Getsockname(fd)
	if err != nil {
		return "", err
	}
	u.begin(fd, listening)
	return fmt.Sprintf("%s:%d", ip, name.(*unix.SockaddrInet4).Port), u.poll.add(fd, unix.EPOLLIN, int32(fd), 0)
}

func (u *upstream) begin(fd int, r role) {
	for fd >= len(u.of) {
		u.of = append(u.of, served{})
	}
	u.of[fd] = served{role: r}
}

// event deals with one descriptor. An event may come late, when the descriptor is
// already that of another connection: then there is nothing to be read there.
func (u *upstream) event(e unix.EpollEvent) {
	fd := int(e.Fd)
	switch u.of[fd].role {
	case listening:
		u.accept(fd)
	case reading:
		u.readHead(e)
	case echoing:
		u.echo(e)
	case sending:
		u.pour(e)
	case answering:
		u.goOn(e)
	}
}

func (u *upstream) accept(listener int) {
	for {
		fd, _, err := unix.Accept4(listener, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
		if err != nil {
			return // nobody is waiting any more, or no descriptor is left: they wait on
		}
		unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
		u.begin(fd, reading)
		if u.poll.add(fd, interesting, int32(fd), 0) != nil {
			u.close(fd)
		}
	}
}

func (u *upstream) close(fd int) {
	u.of[fd] = served{}
	unix.Close(fd)
}

// readHead reads requests until one asks for a tunnel, or for a body that takes longer.
func (u *upstream) readHead(e unix.EpollEvent) {
	fd := int(e.Fd)
	for s := &u.of[fd]; s.role == reading; {
		n, errno := recv(fd, u.buf, 0)
		if errno == unix.EAGAIN {
			return
		}
		if errno != 0 || n == 0 || len(s.head)+n > longestHead {
			u.close(fd)
			return
		}
		head := u.buf[:n]
		if s.head != nil {
			head = append(s.head, head...)
		}
		s.head = nil
		if bytes.HasSuffix(head, headEnd) {
			u.answer(fd, head)
		} else {
			s.head = bytes.Clone(head)
		}
		if !more(n, u.buf, e) {
			return
		}
	}
}

// answer answers a request. Nobody here sends anything behind its head before the
// answer has come.
func (u *upstream) answer(fd int, head []byte) {
	reply, next := page, reading
	_, path, _ := bytes.Cut(head, []byte(" "))
	switch {
	case bytes.HasPrefix(path, []byte(BodyPath)):
		u.answerBody(fd, head, path)
		return
	case bytes.HasPrefix(path, []byte(EchoPath)):
		reply, next = switching, echoing
	case bytes.HasPrefix(path, []byte(BulkPath)):
		reply, next = switching, sending
	}
	if n, _ := send(fd, reply); n != len(reply) || next == reading && wantsClose(head) {
		u.close(fd)
		return
	}
	u.of[fd].role = next
	if next == sending {
		u.pour(unix.EpollEvent{Fd: int32(fd)})
	}
}

// wantsClose says whether a request is the connection's last.
func wantsClose(head []byte) bool {
	first, fields, _ := bytes.Cut(head, lineEnd)
	return bytes.HasSuffix(first, []byte(" HTTP/1.0")) || string(field(fields, "connection")) == "close"
}

// echo sends back what has come. What a client of ours has under way fits into a
// socket's buffers; a connection on which it does not is closed.
func (u *upstream) echo(e unix.EpollEvent) {
	fd := int(e.Fd)
	for {
		n, errno := recv(fd, u.buf, 0)
		if errno == unix.EAGAIN {
			return
		}
		if errno != 0 || n == 0 {
			u.close(fd)
			return
		}
		if sent, _ := send(fd, u.buf[:n]); sent != n {
			u.close(fd)
			return
		}
		if !more(n, u.buf, e) {
			return
		}
	}
}

// pour sends until the connection takes no more, or others should have their turn.
func (u *upstream) pour(e unix.EpollEvent) {
	fd := int(e.Fd)
	if e.Events&(lost|unix.EPOLLRDHUP) != 0 {
		u.close(fd)
		return
	}
	for sum := 0; sum < share; {
		n, errno := send(fd, u.chunk)
		if errno == unix.EAGAIN {
			return
		}
		if errno != 0 {
			u.close(fd)
			return
		}
		sum += n
	}
	u.poll.again(e)
}
