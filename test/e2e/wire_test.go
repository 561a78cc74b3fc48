package e2e

import (
	"bufio"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// moment is how long we look for something that must not come.
const moment = 50 * time.Millisecond

// wire is one end of a connection in the hands of a test. Whatever it wants and
// does not get within patience fails the test.
type wire struct {
	t    *testing.T
	conn net.Conn
	r    *bufio.Reader
}

func newWire(t *testing.T, conn net.Conn) *wire {
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(patience))
	return &wire{t: t, conn: conn, r: bufio.NewReader(conn)}
}

// send sends everything in one write. What is wanted afterwards has patience from now on.
func (w *wire) send(parts ...string) {
	w.t.Helper()
	w.conn.SetDeadline(time.Now().Add(patience))
	if _, err := io.WriteString(w.conn, strings.Join(parts, "")); err != nil {
		w.t.Fatalf("send: %v", err)
	}
}

func (w *wire) sendFIN() { w.conn.(interface{ CloseWrite() error }).CloseWrite() }
func (w *wire) close()   { w.conn.Close() }

// reset ends the connection by a RST.
func (w *wire) reset() {
	w.conn.(*net.TCPConn).SetLinger(0)
	w.conn.Close()
}

// head reads a head as it is, up to its empty line.
func (w *wire) head() head {
	w.t.Helper()
	var h strings.Builder
	for {
		line, err := w.r.ReadString('\n')
		h.WriteString(line)
		if err != nil {
			w.t.Fatalf("read a head: %v after %q", err, h.String())
		}
		if line == "\r\n" {
			return head(h.String())
		}
	}
}

// wantStart reads a head and compares its first line.
func (w *wire) wantStart(start string) head {
	w.t.Helper()
	h := w.head()
	if h.start() != start {
		w.t.Fatalf("got the head %q, want it to start with %q", h, start)
	}
	return h
}

// reply is a response as net/http reads it, with its whole body.
type reply struct {
	*http.Response
	body string
}

// reply reads the answer to a request of that method.
func (w *wire) reply(method string) reply {
	w.t.Helper()
	resp, err := http.ReadResponse(w.r, &http.Request{Method: method})
	if err != nil {
		w.t.Fatalf("read a response: %v", err)
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		w.t.Fatalf("read the body of a %d: %v after %.100q", resp.StatusCode, err, body)
	}
	return reply{resp, string(body)}
}

// want reads a response behind which the connection goes on.
func (w *wire) want(status int, body string) reply {
	w.t.Helper()
	r := w.reply("GET")
	if r.StatusCode != status || r.body != body || r.Close {
		w.t.Fatalf("got %d %.100q, the last one: %v; want %d %.100q", r.StatusCode, r.body, r.Close, status, body)
	}
	return r
}

// wantLast reads a response that says that it is the connection's last one, and the
// end of the connection.
func (w *wire) wantLast(status int, body string) reply {
	w.t.Helper()
	r := w.reply("GET")
	if r.StatusCode != status || r.body != body || !r.Close {
		w.t.Fatalf("got %d %.100q, the last one: %v; want %d %.100q and the last one", r.StatusCode, r.body, r.Close, status, body)
	}
	w.wantEOF()
	w.close()
	return r
}

// wantRefused is wantLast for an answer of the proxy's own, which says the status
// and nothing else.
func (w *wire) wantRefused(status int) {
	w.t.Helper()
	r := w.reply("GET")
	if r.StatusCode != status || !strings.HasPrefix(r.body, strconv.Itoa(status)+" ") || !r.Close {
		w.t.Fatalf("got %d %.100q, the last one: %v; want a %d of the proxy and the last one", r.StatusCode, r.body, r.Close, status)
	}
	w.wantEOF()
	w.close()
}

func (w *wire) wantBytes(want string) {
	w.t.Helper()
	got := make([]byte, len(want))
	n, err := io.ReadFull(w.r, got)
	if err != nil || string(got) != want {
		w.t.Fatalf("got %.200q, %v; want %.200q", got[:n], err, want)
	}
}

// wantNothing makes sure that nothing comes for a moment, an end neither.
func (w *wire) wantNothing() {
	w.t.Helper()
	w.conn.SetReadDeadline(time.Now().Add(moment))
	defer w.conn.SetReadDeadline(time.Now().Add(patience))
	if b, err := w.r.Peek(1); !errors.Is(err, os.ErrDeadlineExceeded) {
		w.t.Fatalf("got %q, %v; want nothing yet", b, err)
	}
}

// wantEOF wants a FIN and no byte before it.
func (w *wire) wantEOF() {
	w.t.Helper()
	if rest, err := io.ReadAll(w.r); len(rest) > 0 || err != nil {
		w.t.Fatalf("got %.200q, %v; want a proper end", rest, err)
	}
}

// wantReset wants a RST and no byte before it.
func (w *wire) wantReset() {
	w.t.Helper()
	if rest, err := io.ReadAll(w.r); len(rest) > 0 || !errors.Is(err, syscall.ECONNRESET) {
		w.t.Fatalf("got %.200q, %v; want a reset", rest, err)
	}
}

// wantClosed wants an end of any kind and no byte before it.
func (w *wire) wantClosed() {
	w.t.Helper()
	if rest, err := io.ReadAll(w.r); len(rest) > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
		w.t.Fatalf("got %.200q, %v; want the end", rest, err)
	}
}

// head is a message's head, byte for byte.
type head string

func (h head) start() string {
	line, _, _ := strings.Cut(string(h), "\r\n")
	return line
}

// values are those of all fields of that name, in order.
func (h head) values(name string) (values []string) {
	for line := range strings.SplitSeq(string(h), "\r\n") {
		if n, v, ok := strings.Cut(line, ": "); ok && strings.EqualFold(n, name) {
			values = append(values, v)
		}
	}
	return values
}

// wantField wants exactly these values; none means that the field is absent.
func (h head) wantField(t *testing.T, name string, values ...string) {
	t.Helper()
	if got := h.values(name); !slices.Equal(got, values) {
		t.Errorf("%s is %q, want %q, in %q", name, got, values, h)
	}
}
