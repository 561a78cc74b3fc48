package clienttls_test

import (
	"io"
	"net"
	"sync"
)

// end is one of two ends of a connection whose writes do not wait, as those of sockets.
type end struct {
	net.Conn // nil: nobody asks for deadlines
	in, out  *queue
}

func newPipe() (a, b net.Conn) {
	one, other := newQueue(), newQueue()
	return &end{in: one, out: other}, &end{in: other, out: one}
}

func (e *end) Read(p []byte) (int, error)  { return e.in.read(p) }
func (e *end) Write(p []byte) (int, error) { return e.out.write(p) }

// RemoteAddr is that of nobody, as it is on a loop.
func (e *end) RemoteAddr() net.Addr { return new(net.TCPAddr) }

func (e *end) Close() error {
	e.in.close()
	e.out.close()
	return nil
}

type queue struct {
	mu     sync.Mutex
	comes  sync.Cond
	bytes  []byte
	closed bool
}

func newQueue() *queue {
	q := new(queue)
	q.comes.L = &q.mu
	return q
}

func (q *queue) read(p []byte) (int, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.bytes) == 0 && !q.closed {
		q.comes.Wait()
	}
	if len(q.bytes) == 0 {
		return 0, io.EOF
	}
	n := copy(p, q.bytes)
	q.bytes = q.bytes[n:]
	return n, nil
}

func (q *queue) write(p []byte) (int, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return 0, io.ErrClosedPipe
	}
	q.bytes = append(q.bytes, p...)
	q.comes.Broadcast()
	return len(p), nil
}

func (q *queue) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed = true
	q.comes.Broadcast()
}
