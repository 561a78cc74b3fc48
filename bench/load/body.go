package load

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

// A body is of the length that its request asks for. It begins with the request's number,
// so that an answer that belongs to another request is noticed; what follows is always
// the same.
const (
	shortestBody = len(number{})
	longestBody  = 1 << 20

	// A longer body than looksAt is not read every time, only its head and its length are:
	// the rest is thrown away in the kernel. But of the first answer on a connection, and
	// then of one in looksEach, every byte is compared.
	looksAt   = 64 << 10
	looksEach = 16
)

// A number tells a client's requests apart, in hexadecimal digits.
type number [8]byte

func newNumber(n uint32) (d number) {
	for i := range d {
		d[len(d)-1-i] = "0123456789abcdef"[n&15]
		n >>= 4
	}
	return d
}

// bodies are what every body is, but for its number, as far as it goes.
var bodies = sync.OnceValue(func() []byte {
	b := make([]byte, longestBody)
	rand.NewChaCha8([32]byte{}).Read(b)
	return b
})

// A wish is what a client asks for, the same each time but for the number.
type wish struct {
	request []byte
	at      int    // of the number, in request
	body    []byte // but for its number
	length  []byte // of body, as it is written
	last    bool   // each on a connection of its own
	sent    uint32
}

func newWish(cmd Command) (*wish, error) {
	if cmd.Body < shortestBody || cmd.Body > longestBody {
		return nil, fmt.Errorf("a body of %d bytes", cmd.Body)
	}
	w := &wish{body: bodies()[:cmd.Body], length: strconv.AppendInt(nil, int64(cmd.Body), 10), last: cmd.Do == "fresh"}
	w.request, w.at = bodyRequest(cmd.Address, cmd.Body, w.last)
	return w, nil
}

// bodyRequest returns a request, and where its number is to be put: GET /body/LENGTH/NUMBER.
// It has as many fields as that of a simple client.
func bodyRequest(address string, length int, last bool) (request []byte, at int) {
	request = fmt.Appendf(nil, "GET %s/%d/", BodyPath, length)
	at = len(request)
	request = fmt.Appendf(request, "%s HTTP/1.1\r\nHost: %s\r\nUser-Agent: bench\r\nAccept: */*\r\n", newNumber(0), address)
	if last {
		request = append(request, "Connection: close\r\n"...)
	}
	return append(request, lineEnd...), at
}

// take looks at what has come of an answer.
func (w *wish) take(s *conn, b []byte) error {
	a := &s.asking
	thrownAway := a.began && !a.looks
	if !a.began {
		var err error
		if b, err = w.takeHead(s, b); err != nil || !a.began {
			return err
		}
	}
	if a.received += len(b); a.received > len(w.body) {
		return fmt.Errorf("%d bytes more than its length", a.received-len(w.body))
	}
	if thrownAway {
		return nil
	}
	return w.compare(a, b)
}

// takeHead returns what has come behind the head, once that is there.
func (w *wish) takeHead(s *conn, b []byte) ([]byte, error) {
	if s.head != nil {
		b, s.head = append(s.head, b...), nil
	}
	at := bytes.Index(b, headEnd)
	if at < 0 {
		s.head = bytes.Clone(b)
		if len(b) > longestHead {
			return nil, errors.New("its head has no end")
		}
		return nil, nil
	}
	s.asking.began = true
	return b[at+len(headEnd):], w.checkHead(b[:at])
}

// checkHead looks at an answer's head, without the empty line that ends it.
func (w *wish) checkHead(head []byte) error {
	status, fields, _ := bytes.Cut(head, lineEnd)
	switch {
	case !bytes.HasPrefix(status, []byte("HTTP/1.1 200 ")):
		return fmt.Errorf("%.40q", status)
	case !bytes.Equal(field(fields, "Content-Length"), w.length):
		return fmt.Errorf("its length is %.40q, not %s", field(fields, "Content-Length"), w.length)
	case !w.last && bytes.EqualFold(field(fields, "Connection"), []byte("close")):
		return errors.New("it is to be the connection's last")
	}
	return nil
}

// compare compares the last bytes that have come.
func (w *wish) compare(a *asking, b []byte) error {
	from := a.received - len(b)
	for from < len(a.number) && len(b) > 0 {
		if b[0] != a.number[from] {
			return fmt.Errorf("its body is another's: byte %d is not of its number", from)
		}
		from, b = from+1, b[1:]
	}
	if len(b) > 0 && !bytes.Equal(b, w.body[from:a.received]) {
		return fmt.Errorf("wrong bytes between %d and %d of its body", from, a.received)
	}
	return nil
}

// field returns the value of the first field with a name, of lines without the empty one.
func field(lines []byte, name string) []byte {
	for len(lines) > 0 {
		var line []byte
		line, lines, _ = bytes.Cut(lines, lineEnd)
		if n := len(name); len(line) > n && line[n] == ':' && bytes.EqualFold(line[:n], []byte(name)) {
			return bytes.TrimSpace(line[n+1:])
		}
	}
	return nil
}

// A bodyAnswer is an upstream's answer, ready to be sent with any number.
type bodyAnswer struct {
	whole []byte
	at    int // of the number
}

// newBodyAnswer makes an answer with the fields that servers usually give.
func newBodyAnswer(length int) *bodyAnswer {
	head := fmt.Appendf(nil, "HTTP/1.1 200 OK\r\nServer: bench\r\nDate: Mon, 23 Nov 2026 00:00:00 GMT\r\n"+
		"Content-Type: application/octet-stream\r\nContent-Length: %d\r\n\r\n", length)
	return &bodyAnswer{whole: append(head, bodies()[:length]...), at: len(head)}
}

// answerBody answers a request for a body. path is the head from its target on.
func (u *upstream) answerBody(fd int, head, path []byte) {
	target, _, _ := bytes.Cut(path[len(BodyPath):], []byte(" "))
	length, digits, _ := bytes.Cut(bytes.TrimPrefix(target, []byte("/")), []byte("/"))
	n, err := strconv.Atoi(string(length))
	if err != nil || n < shortestBody || n > longestBody || len(digits) != len(number{}) {
		u.close(fd)
		return
	}
	if u.answers[n] == nil {
		u.answers[n] = newBodyAnswer(n)
	}
	s := &u.of[fd]
	s.role, s.answer, s.number, s.sent = answering, u.answers[n], number(digits), 0
	s.last = wantsClose(head)
	u.goOn(unix.EpollEvent{Fd: int32(fd)})
}

// goOn sends of an answer what the connection takes, until others should have their turn.
func (u *upstream) goOn(e unix.EpollEvent) {
	fd := int(e.Fd)
	if e.Events&lost != 0 {
		u.close(fd)
		return
	}
	s := &u.of[fd]
	whole := s.answer.whole
	for most := s.sent + share; s.sent < len(whole); {
		if s.sent >= most {
			u.poll.again(e)
			return
		}
		copy(whole[s.answer.at:], s.number[:])
		n, errno := send(fd, whole[s.sent:])
		if errno == unix.EAGAIN {
			return
		}
		if errno != 0 {
			u.close(fd)
			return
		}
		s.sent += n
	}
	if s.last {
		u.close(fd)
		return
	}
	s.role, s.answer = reading, nil
}
