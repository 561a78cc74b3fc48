package http1

import (
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/metrics"
)

// longAgo is a deadline that ends a read that is under way.
var longAgo = time.Unix(1, 0)

// lookTime is how long a look for bytes may take on a connection that is no socket.
const lookTime = time.Millisecond

// reader reads a connection into a buffer that it holds only while there are bytes
// in it: waiting for bytes costs none. One goroutine at a time uses it.
type reader struct {
	conn    net.Conn
	buffers *Buffers
	counted *metrics.Counter // of the bytes read
	raw     syscall.RawConn  // nil where conn is no socket
	buf     []byte           // nil, or from buffers
	from    int              // buf[from:to] is read and not consumed
	to      int

	// Used by recv, which is made once because a closure per read would be garbage.
	recv    func(fd uintptr) bool
	recvErr error
	look    bool // recv does not wait
}

func newReader(conn net.Conn, buffers *Buffers, counted *metrics.Counter) *reader {
	r := &reader{conn: conn, buffers: buffers, counted: counted}
	// Only these two: a type that embeds them has their SyscallConn, but may have
	// a Read of its own.
	switch c := conn.(type) {
	case *net.TCPConn:
		r.raw, _ = c.SyscallConn()
	case *net.UnixConn:
		r.raw, _ = c.SyscallConn()
	}
	r.recv = r.receive
	return r
}

// buffered returns what was read and not consumed; valid until the next call.
func (r *reader) buffered() []byte { return r.buf[r.from:r.to] }

// consume drops n bytes from the front, and the buffer with the last of them.
func (r *reader) consume(n int) {
	r.from += n
	if r.from == r.to && r.buf != nil {
		r.buffers.put(r.buf)
		r.buf, r.from, r.to = nil, 0, 0
	}
}

// fill waits for bytes and reads some behind what is buffered. The buffer grows as
// needed. No byte is lost when a deadline ends the wait.
func (r *reader) fill() error {
	if r.buf == nil {
		return r.wait(false)
	}
	r.makeRoom()
	n, err := r.read(r.buf[r.to:])
	r.to += n
	if n > 0 {
		return nil
	}
	return err
}

// read reads the connection, whatever is buffered.
func (r *reader) read(p []byte) (int, error) {
	n, err := r.conn.Read(p)
	r.counted.Add(uint64(n))
	return n, err
}

// poll looks for bytes without waiting. Nothing may be buffered and the read
// deadline is cleared.
func (r *reader) poll() bool {
	r.conn.SetReadDeadline(time.Time{})
	return r.wait(true) == nil
}

// wait reads into a buffer that it takes when there is something to read.
func (r *reader) wait(look bool) error {
	if r.raw == nil {
		return r.waitByte(look)
	}
	r.look, r.recvErr = look, nil
	if err := r.raw.Read(r.recv); err != nil {
		return err
	}
	return r.recvErr
}

// receive is called by the netpoller when the socket may have become readable,
// and once before; false waits for the next time.
func (r *reader) receive(fd uintptr) bool {
	buf := r.buffers.get(smallBuffer)
	n, err := unix.Read(int(fd), buf)
	for err == unix.EINTR {
		n, err = unix.Read(int(fd), buf)
	}
	switch {
	case n > 0:
		r.counted.Add(uint64(n))
		r.buf, r.from, r.to = buf, 0, n
		r.recvErr = nil
		return true
	case err == nil:
		r.recvErr = io.EOF
	default:
		r.recvErr = os.NewSyscallError("read", err)
	}
	r.buffers.put(buf)
	return r.look || err != unix.EAGAIN
}

// waitByte does the same for connections that only know Read.
func (r *reader) waitByte(look bool) error {
	if look {
		r.conn.SetReadDeadline(time.Now().Add(lookTime))
		defer r.conn.SetReadDeadline(time.Time{})
	}
	var first [1]byte
	n, err := r.read(first[:])
	if n == 0 {
		return err
	}
	r.buf = r.buffers.get(smallBuffer)
	r.from, r.to = 0, copy(r.buf, first[:])
	return nil
}

// makeRoom moves or grows a buffer that is full.
func (r *reader) makeRoom() {
	if r.to < len(r.buf) {
		return
	}
	to := r.buf
	if r.from < len(r.buf)/2 {
		to = r.buffers.get(2*len(r.buf) + 1)
	}
	n := copy(to, r.buf[r.from:r.to])
	if &to[0] != &r.buf[0] {
		r.buffers.put(r.buf)
	}
	r.buf, r.from, r.to = to, 0, n
}

// bodyReader reads a body from a connection.
type bodyReader struct {
	in    *reader
	dec   bodyDecoder
	arm   func() error // called before each read of the connection; may be nil
	limit int64        // most bytes of content; 0: no limit
	total int64        // bytes of content so far
	err   error        // what ended the body; io.EOF at its proper end
}

// read reads content. Errors of framing are those of a request.
func (b *bodyReader) read(p []byte) (int, error) {
	if b.err != nil {
		return 0, b.err
	}
	n, err := b.readSome(p)
	b.total += int64(n)
	if b.limit > 0 && b.total > b.limit {
		n, err = 0, refusal(413, "a body that is too large")
	}
	b.err = err
	return n, err
}

func (b *bodyReader) readSome(p []byte) (int, error) {
	for {
		n, err := b.gather(p)
		switch {
		case err != nil:
			return n, err
		case n > 0:
			return n, nil
		case b.dec.done():
			return 0, io.EOF
		case len(p) == 0:
			return 0, nil
		}
		if n, err = b.more(p); n > 0 || err != nil {
			return n, err
		}
	}
}

// gather takes what is buffered, of as many chunks as there are: each piece that is
// read costs a write on the other side, and a peer may send chunks of one byte.
func (b *bodyReader) gather(p []byte) (n int, err error) {
	for {
		content, consumed, err := b.dec.next(b.in.buffered(), len(p)-n)
		n += copy(p[n:], content)
		b.in.consume(consumed)
		if err != nil || consumed == 0 || n == len(p) {
			return n, err
		}
	}
}

// more reads the connection: straight into p if p is large and nothing but content
// can come, otherwise into the buffer, whose rest is then framing cut in two.
func (b *bodyReader) more(p []byte) (n int, err error) {
	if b.arm != nil {
		if err := b.arm(); err != nil {
			return 0, err
		}
	}
	if run := b.dec.run(); run > 0 && len(p) >= smallBuffer {
		n, err = b.in.read(p[:min(int64(len(p)), run)])
		b.dec.took(n)
		if n > 0 {
			return n, nil
		}
	} else {
		err = b.in.fill()
	}
	switch {
	case err == io.EOF && b.dec.kind == untilClose:
		b.dec.finished = true
		return 0, io.EOF
	case err == io.EOF:
		return 0, io.ErrUnexpectedEOF
	case errors.Is(err, os.ErrDeadlineExceeded):
		return 0, refusal(408, "a body that came too slowly")
	}
	return 0, err
}
