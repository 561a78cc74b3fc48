package e2e

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// upstream is a server whose every byte the test sends and receives by hand.
type upstream struct {
	t       *testing.T
	addr    string
	arrived chan net.Conn
}

func newUpstream(t *testing.T) *upstream { return newUpstreamAt(t, "tcp", "127.0.0.1:0") }

func newUpstreamAt(t *testing.T, network, address string) *upstream {
	t.Helper()
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	u := &upstream{t: t, addr: l.Addr().String(), arrived: make(chan net.Conn, 1000)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			u.arrived <- conn
		}
	}()
	t.Cleanup(func() {
		l.Close()
		<-done
		close(u.arrived)
		for conn := range u.arrived {
			conn.Close()
		}
	})
	return u
}

// accept returns the connection that the proxy makes next.
func (u *upstream) accept(t *testing.T) *wire {
	t.Helper()
	select {
	case conn := <-u.arrived:
		return newWire(t, conn)
	case <-time.After(patience):
		t.Fatal("no connection has arrived at the upstream")
		return nil
	}
}

// wantNobody makes sure that nobody has connected that was not accepted. The kernel
// hands connections out in the order in which they came, so that one of our own
// shows that none came before it.
func (u *upstream) wantNobody(t *testing.T) {
	t.Helper()
	own, err := net.Dial("tcp", u.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	for {
		w := u.accept(t)
		if w.conn.RemoteAddr().String() == own.LocalAddr().String() {
			w.close()
			return
		}
		t.Errorf("a connection has arrived at the upstream, with %q", w.head())
	}
}

// boundSocket is a TCP socket at an address of its own that does not listen yet.
func boundSocket(t *testing.T) (fd int, address string) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	at, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	addr := &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: at.(*unix.SockaddrInet4).Port}
	return fd, addr.String()
}

// refusing is an address that refuses connections: nobody listens, and nobody else
// can take it.
func refusing(t *testing.T) string {
	t.Helper()
	_, address := boundSocket(t)
	return address
}

// silent is an address that answers no attempt to connect: it listens, but its queue
// is full, and Linux then drops what asks to come in.
func silent(t *testing.T) string {
	t.Helper()
	fd, address := boundSocket(t)
	if err := unix.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
	for range 16 {
		conn, err := net.DialTimeout("tcp", address, 4*moment)
		if err != nil {
			return address
		}
		t.Cleanup(func() { conn.Close() })
	}
	t.Fatal("the queue of a socket that listens with a backlog of 0 never fills")
	return ""
}

// recorder is an upstream that notes what it gets and answers as the corpus says. It
// reads with net/http, so that a second opinion is heard on every request that the
// proxy lets through.
type recorder struct {
	addr    string
	answers map[string]string // by the id of a case
	conns   sync.WaitGroup

	mu   sync.Mutex
	seen []record
}

// A record is a request that has arrived whole, or other bytes.
type record struct {
	id string // of the case, "" if it tells none
	*http.Request
	body string
	raw  string // a malformed request, or bytes of a tunnel
}

func (r record) String() string {
	if r.Request == nil {
		return fmt.Sprintf("%q (behind %s)", r.raw, r.id)
	}
	return fmt.Sprintf("%s %s %v %q", r.Method, r.RequestURI, r.Header, r.body)
}

// corpusAnswers are what upstreams say, by the field "up" of a case.
var corpusAnswers = map[string]string{
	"200":     answer(200, "ok"),
	"400":     answer(400, "no"),
	"426":     answer(426, "no"),
	"404ch":   "HTTP/1.1 404 Not Found\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nno\r\n0\r\n\r\n",
	"101":     agreement,
	"101bare": "HTTP/1.1 101 Switching Protocols\r\n\r\n",
}

func newRecorder(t *testing.T, cases []*corpusCase) *recorder {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	rec := &recorder{addr: l.Addr().String(), answers: make(map[string]string)}
	for _, c := range cases {
		if rec.answers[c.ID] = corpusAnswers[c.Up]; rec.answers[c.ID] == "" {
			t.Fatalf("%s: unknown answer %q", c.ID, c.Up)
		}
	}
	rec.conns.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			conn.SetDeadline(time.Now().Add(2 * patience))
			rec.conns.Go(func() { rec.serve(conn) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		rec.conns.Wait() // the service has stopped, so that all are closed
	})
	return rec
}

func (rec *recorder) serve(conn net.Conn) {
	defer conn.Close()
	r, id := bufio.NewReader(conn), ""
	for {
		req, err := http.ReadRequest(r)
		if err != nil {
			if !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) {
				rec.note(record{id: id, raw: err.Error()})
			}
			return
		}
		body, err := io.ReadAll(req.Body)
		if err != nil {
			return // incomplete: the proxy has given it up
		}
		id = caseOf(req.RequestURI)
		reply := rec.answers[id]
		if strings.Contains(req.RequestURI, "/after/") {
			reply = answer(200, req.RequestURI)
		} else {
			rec.note(record{id: id, Request: req, body: string(body)})
		}
		if _, err := io.WriteString(conn, reply); err != nil {
			return
		}
		if strings.HasPrefix(reply, agreed) {
			rec.tunnel(conn, r, id)
			return
		}
	}
}

// caseOf finds the id of a case in its path, where it follows a word of its own.
func caseOf(target string) string {
	path, _, _ := strings.Cut(target, "?")
	parts := strings.Split(path, "/")
	for n, p := range parts[:len(parts)-1] {
		if p == "c" || p == "smug" || p == "after" {
			return parts[n+1]
		}
	}
	return ""
}

// tunnel notes and echoes everything behind a 101.
func (rec *recorder) tunnel(conn net.Conn, r io.Reader, id string) {
	buf := make([]byte, 4096)
	for {
		n, err := r.Read(buf)
		if n > 0 {
			rec.note(record{id: id, raw: string(buf[:n])})
			conn.Write(buf[:n])
		}
		if err != nil {
			return
		}
	}
}

func (rec *recorder) note(r record) {
	rec.mu.Lock()
	defer rec.mu.Unlock()
	rec.seen = append(rec.seen, r)
}

// take returns what was noted of a case, and forgets it.
func (rec *recorder) take(id string) (taken []record) {
	rec.mu.Lock()
	defer rec.mu.Unlock()
	rec.seen = slices.DeleteFunc(rec.seen, func(r record) bool {
		if r.id == id {
			taken = append(taken, r)
		}
		return r.id == id
	})
	return taken
}

func (rec *recorder) takeAll() []record {
	rec.mu.Lock()
	defer rec.mu.Unlock()
	seen := rec.seen
	rec.seen = nil
	return seen
}
