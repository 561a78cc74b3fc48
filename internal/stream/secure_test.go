package stream_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/stream"
	"holdfast/internal/stream/streamtest"
	"holdfast/internal/task"
)

// What two peers say to each other through us arrives, in both roles and versions, however it
// is cut into pieces, with the ends of both directions.
func TestTLSInAllRolesAndSizes(t *testing.T) {
	t.Parallel()
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		for i, server := range []bool{false, true} {
			for j, pieces := range []int{0, 1, 1000} {
				t.Run(fmt.Sprintf("%s, as server %v, pieces of %d", tls.VersionName(version), server, pieces), func(t *testing.T) {
					t.Parallel()
					size := 3 << 20
					if pieces == 1 {
						size = 20 << 10
					}
					w, s := start(t), newSides(t, version)
					random := rand.New(rand.NewPCG(uint64(version), uint64(10*i+j)))
					from, far := w.adoptAny(true)
					to, near := w.adoptAny(false)
					if pieces > 0 {
						far, near = inPieces(far, pieces), inPieces(near, pieces)
					}
					unix.SetsockoptInt(to.FD(), unix.SOL_SOCKET, unix.SO_SNDBUF, 4096) // it is often full
					source, sink := w.secure(from, far, s, server), w.secure(to, near, s, !server)
					if got := from.Secure().State().Version; got != version {
						t.Errorf("version %x", got)
					}
					ends := make(chan error, 6)
					relay := func(from, to *stream.Conn, random *rand.Rand) {
						w.begin(func(t *task.Task) { ends <- alternate(t, from, to, size, random) })
					}
					relay(from, to, random)
					relay(to, from, rand.New(rand.NewPCG(5, 6)))
					for seed, conn := range []*tls.Conn{source, sink} {
						random := rand.New(rand.NewPCG(uint64(seed), 7))
						go func() { ends <- feed(conn, byte(seed), size, random) }()
					}
					go func() { ends <- drain(sink, 0, size, rand.New(rand.NewPCG(1, 7))) }()
					go func() { ends <- drain(source, 1, size, rand.New(rand.NewPCG(1, 8))) }()
					for range 6 {
						select {
						case err := <-ends:
							if err != nil {
								t.Error(err)
							}
						case <-time.After(bound):
							t.Fatal("it did not come")
						}
					}
					w.on(func() {
						if from.Secure().Truncated() || to.Secure().Truncated() {
							t.Error("the end was said, and is taken for none")
						}
					})
				})
			}
		}
	}
}

// Both sides may be ours, on one loop. A session is resumed with the ticket that has come on a
// connection where nobody has read, and which is quiet all the time.
func TestASessionIsResumed(t *testing.T) {
	t.Parallel()
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		w, s := start(t), newSides(t, version)
		s.client.ClientSessionCache = tls.NewLRUClientSessionCache(1)
		for i := range 2 {
			server, fd := w.adoptOne(nil)
			o := newOwner()
			client := new(stream.Conn)
			w.on(func() {
				if err := w.loop.Adopt(client, fd, o, nil); err != nil {
					w.t.Error(err)
				}
			})
			serving := w.begin(func(t *task.Task) {
				if err := server.Handshake(t, s.server, true); err != nil {
					w.t.Error(err)
				}
			})
			w.run(func(t *task.Task) {
				if err := client.Handshake(t, s.client, false); err != nil {
					w.t.Error(err)
				}
			})
			w.await(serving)
			w.on(func() {
				if got := client.Secure().State().DidResume; got != (i == 1) {
					t.Errorf("%s: resumed: %v", tls.VersionName(version), got)
				}
				if !client.Quiet() || !server.Quiet() || client.Working() || server.Working() {
					t.Error("a ticket is taken for something")
				}
				server.Close()
			})
			eventually(t, "the end", func() (ended bool) {
				w.on(func() { ended = !client.Quiet() && client.Readable() })
				return ended
			})
			w.run(func(t *task.Task) {
				if err := client.Fill(t); err != io.EOF || client.Secure().Truncated() {
					w.t.Errorf("the end: %v, cut: %v", err, client.Secure().Truncated())
				}
				client.Close()
			})
		}
	}
}

// A ticket that comes later wakes the owner of an idle connection, who finds nothing, again and
// again.
func TestATicketIsNothingToBeRead(t *testing.T) {
	t.Parallel()
	w, s := start(t), newSides(t, tls.VersionTLS13)
	o := newOwner()
	c, far := w.adopt(o)
	var keys bytes.Buffer
	s.server.KeyLogWriter = &keys
	s.server.SessionTicketsDisabled = true
	conn := w.secure(c, far, s, false)
	a := newAuthor(t, &keys, conn, true)
	quiet := func() (quiet bool) {
		w.on(func() { quiet = c.Quiet() && !c.Working() && !c.Readable() })
		return quiet
	}
	if !quiet() {
		t.Error("it is not quiet to begin with")
	}
	for range 3 {
		far.Write(a.record(22, []byte{4, 0, 0, 14, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 1, 'T', 0, 0}))
		<-o.ready
		if !quiet() {
			t.Error("a ticket is taken for something")
		}
	}
	data := a.record(23, []byte("data"))
	far.Write(data[:3])
	<-o.ready
	if !quiet() {
		t.Error("a part of a record is taken for something")
	}
	far.Write(data[3:])
	<-o.ready
	w.on(func() {
		if c.Quiet() {
			t.Error("data are taken for nothing")
		}
		wantBuffered(t, c, []byte("data"))
		c.Consume(4)
		c.Close()
	})
}

// A record that is larger than what somebody wants of it is read without another event.
func TestTheRestOfARecordIsReadable(t *testing.T) {
	t.Parallel()
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		w, s := start(t), newSides(t, version)
		c, far := w.adopt(nil)
		conn := w.secure(c, far, s, true)
		conn.Write(text(1, 0, 10))
		conn.Write(text(1, 10, 16<<10))
		w.run(func(t *task.Task) {
			for at := 0; at < 10+16<<10; {
				if err := c.FillUpTo(t, 7); err != nil {
					w.t.Error(err)
					return
				}
				n := len(c.Buffered())
				if n > 7 || string(c.Buffered()) != string(text(1, at, n)) {
					w.t.Errorf("%d bytes at %d", n, at)
				}
				c.Consume(n)
				if at += n; at < 10+16<<10 && !c.Readable() {
					w.t.Error("there is more, and nobody will tell")
				}
			}
			if !c.Quiet() {
				w.t.Error("it is not quiet behind that")
			}
		})
	}
}

// Whoever does not read holds a bounded amount of memory, and waits are those of connections
// without TLS.
func TestASlowReaderOfTLSHoldsBack(t *testing.T) {
	t.Parallel()
	w, s := start(t), newSides(t, 0)
	c, far := w.adoptAny(true)
	steady(t, c, far)
	conn := w.secure(c, far, s, true)
	const size = 8 << 20
	sent := 0
	sending := w.begin(func(t *task.Task) {
		for sent < size {
			n, err := c.SendSome(t, text(0, sent, min(1<<20, size-sent)))
			if err != nil || n <= 0 {
				w.t.Errorf("%d, %v", n, err)
				return
			}
			sent += n
		}
		if err := c.Send(t, text(0, size, 100), text(0, size+100, 20<<10), text(0, size+100+20<<10, 1)); err != nil {
			w.t.Error(err)
		}
		if owed := c.Owed(); owed > 0 {
			w.t.Errorf("%d bytes were not taken", owed)
		}
	})
	eventually(t, "a full socket", func() (full bool) {
		w.on(func() {
			full = c.Owed() > 0
			if owed := c.Owed(); owed > 70<<10 || sent > 6<<20 {
				t.Errorf("%d bytes were sent, and %d are kept", sent, owed)
			}
		})
		return full
	})
	w.on(func() { c.Taken(1) })
	got, err := io.ReadAll(io.LimitReader(conn, size+100+20<<10+1))
	if err != nil || !bytes.Equal(got, text(0, 0, size+100+20<<10+1)) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	w.await(sending)
}

// A peer that does not take what it is sent may say something nevertheless.
func TestReadingGoesOnWhileASendWaits(t *testing.T) {
	t.Parallel()
	w, s := start(t), newSides(t, 0)
	c, far := w.adoptAny(true)
	steady(t, c, far)
	conn := w.secure(c, far, s, true)
	sending := w.begin(func(t *task.Task) { c.Send(t, text(0, 0, 8<<20), nil, nil) })
	eventually(t, "a full socket", func() (full bool) {
		w.on(func() { full = c.Owed() > 0 })
		return full
	})
	for i := range 20 {
		conn.Write(text(1, 3000*i, 3000))
		w.run(func(t *task.Task) {
			if err := wantData(t, c, text(1, 3000*i, 3000)); err != nil {
				w.t.Error(err)
			}
		})
	}
	w.on(c.Close)
	w.await(sending)
}

// What fills a socket that nobody reads fails with the deadline, and an end that is said then
// comes behind all that was taken.
func TestAnEndComesBehindWhatIsOwed(t *testing.T) {
	t.Parallel()
	w, s := start(t), newSides(t, 0)
	c, far := w.adoptAny(true)
	steady(t, c, far)
	conn := w.secure(c, strict(far), s, true)
	sent := 0
	w.run(func(t *task.Task) {
		c.Limit(w.loop.Now().Add(time.Millisecond))
		var err error
		for err == nil {
			var n int
			n, err = c.SendSome(t, text(0, sent, 64<<10))
			sent += n
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) || c.Owed() == 0 {
			w.t.Errorf("%v, and %d are kept", err, c.Owed())
		}
		if err := c.CloseWrite(); err != nil {
			w.t.Error(err)
		}
	})
	got, err := io.ReadAll(conn)
	if err != nil || !bytes.Equal(got, text(0, 0, sent)) {
		t.Errorf("%d bytes of %d, %v", len(got), sent, err)
	}
	if n, err := far.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("behind close_notify: %d, %v", n, err)
	}
	conn.Write([]byte("still"))
	w.run(func(t *task.Task) {
		c.Limit(time.Time{})
		if err := wantData(t, c, []byte("still")); err != nil {
			w.t.Errorf("in the direction that is open: %v", err)
		}
	})
}

// The ends that a peer may come to.
func TestTheEndsOfTLS(t *testing.T) {
	t.Parallel()
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		for name, tt := range map[string]struct {
			end       func(conn *tls.Conn, raw *net.TCPConn)
			want      error
			truncated bool
			open      bool // our direction
		}{
			"half-closed": {func(conn *tls.Conn, _ *net.TCPConn) { conn.CloseWrite() }, io.EOF, false, true},
			"half-closed with a FIN": {func(conn *tls.Conn, raw *net.TCPConn) {
				conn.CloseWrite()
				raw.CloseWrite()
			}, io.EOF, false, true},
			"closed":      {func(conn *tls.Conn, _ *net.TCPConn) { conn.Close() }, io.EOF, false, false},
			"a FIN alone": {func(_ *tls.Conn, raw *net.TCPConn) { raw.CloseWrite() }, io.EOF, true, true},
			"within a record": {func(_ *tls.Conn, raw *net.TCPConn) {
				raw.Write([]byte{23, 3, 3, 1, 0, 'x'})
				raw.CloseWrite()
			}, io.ErrUnexpectedEOF, true, true},
			"reset": {func(_ *tls.Conn, raw *net.TCPConn) {
				raw.SetLinger(0)
				raw.Close()
			}, unix.ECONNRESET, false, false},
		} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				w, s := start(t), newSides(t, version)
				c, far := w.adoptTCP(nil)
				conn := w.secure(c, far, s, true)
				conn.Write([]byte("before"))
				ended := w.begin(func(t *task.Task) {
					if err := wantData(t, c, []byte("before")); err != nil {
						w.t.Error(err)
					}
					for range 2 { // it stays so
						err := c.Fill(t)
						if !errors.Is(err, tt.want) || c.Secure().Truncated() != tt.truncated {
							w.t.Errorf("%v, cut: %v; want %v, %v", err, c.Secure().Truncated(), tt.want, tt.truncated)
						}
						if c.Quiet() {
							w.t.Error("an end is taken for nothing")
						}
					}
					err := c.Send(t, []byte("behind"), nil, nil)
					if tt.open && err != nil {
						w.t.Errorf("our direction: %v", err)
					}
				})
				w.on(func() {})
				tt.end(conn, far)
				w.await(ended)
				if tt.open && readN(t, conn, 6) != "behind" {
					t.Error("other bytes")
				}
			})
		}
	}
}

// What the peer hears of our ends.
func TestOurEndsOfTLS(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		end  func(*stream.Conn)
		want error
	}{
		"Close":            {(*stream.Conn).Close, io.EOF},
		"CloseWrite":       {func(c *stream.Conn) { c.CloseWrite() }, io.EOF},
		"both":             {func(c *stream.Conn) { c.CloseWrite(); c.Close() }, io.EOF},
		"ResetOnClose":     {func(c *stream.Conn) { c.ResetOnClose(); c.Close() }, unix.ECONNRESET},
		"the socket's own": {func(c *stream.Conn) { unix.Shutdown(c.FD(), unix.SHUT_WR) }, errNoNotice},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w, s := start(t), newSides(t, 0)
			c, far := w.adoptAny(true)
			conn := w.secure(c, strict(far), s, true)
			w.run(func(t *task.Task) {
				if err := c.Send(t, []byte("last"), nil, nil); err != nil {
					w.t.Error(err)
				}
			})
			if readN(t, conn, 4) != "last" {
				t.Error("other bytes")
			}
			w.on(func() { tt.end(c) })
			got, err := io.ReadAll(conn)
			if err == nil {
				err = io.EOF
			}
			if len(got) > 0 || !errors.Is(err, tt.want) {
				t.Errorf("%q, %v; want %v", got, err, tt.want)
			}
		})
	}
	t.Run("a peer that does not read", func(t *testing.T) {
		t.Parallel()
		w, s := start(t), newSides(t, 0)
		c, far := w.adopt(nil)
		w.secure(c, far, s, true)
		fill(c)
		w.on(func() {
			c.Close() // and does not wait
			if c.Open() {
				t.Error("it is open")
			}
		})
	})
}

// A record that somebody has changed is an error, of which the peer is told.
func TestARecordThatWasChanged(t *testing.T) {
	t.Parallel()
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		w, s := start(t), newSides(t, version)
		c, far := w.adoptAny(false)
		change := false
		conn := w.secure(c, &wired{halfConn: far, write: func(p []byte) (int, error) {
			p = bytes.Clone(p)
			if change {
				p[len(p)-1] ^= 1
			}
			return far.Write(p)
		}}, s, true)
		conn.Write([]byte("good"))
		change = true
		conn.Write([]byte("bad"))
		w.run(func(t *task.Task) {
			if err := wantData(t, c, []byte("good")); err != nil {
				w.t.Error(err)
			}
			for range 2 {
				if err := c.Fill(t); err == nil || err == io.EOF || !strings.Contains(err.Error(), "bad record MAC") {
					w.t.Errorf("got %v", err)
				}
			}
		})
		if _, err := conn.Read(make([]byte, 1)); err == nil || !strings.Contains(err.Error(), "bad record MAC") {
			t.Errorf("the peer: %v", err)
		}
	}
}

// Whoever asks for new keys and does not take the answers is not read any more, until it has
// taken them. Others have their turn meanwhile.
func TestRequestsForKeysAreBounded(t *testing.T) {
	t.Parallel()
	for _, parked := range []bool{false, true} {
		w, s := start(t), newSides(t, tls.VersionTLS13)
		o := newOwner()
		c, far := w.adopt(o)
		var keys bytes.Buffer
		s.client.KeyLogWriter = &keys
		conn := w.secure(c, far, s, true)
		a := newAuthor(t, &keys, conn, false)
		unix.SetsockoptInt(c.FD(), unix.SOL_SOCKET, unix.SO_SNDBUF, 4096)
		var storm []byte
		const requests = 6000
		var data []byte
		for i := range requests {
			storm = append(storm, a.keyUpdate()...)
			if i%10 == 0 { // crypto/tls allows some without
				storm = append(storm, a.record(23, []byte("x"))...)
				data = append(data, 'x')
			}
		}
		writing := make(chan bool)
		go func() {
			defer close(writing)
			if _, err := far.Write(storm); err != nil {
				t.Error(err)
			}
		}()
		came := make(chan struct{})
		fill := func() {
			w.loop.Tasks.Go(runner(func(t *task.Task) {
				defer close(came)
				if err := wantData(t, c, data); err != nil {
					w.t.Error(err)
				}
			}))
		}
		w.on(func() {
			if !parked {
				fill()
			}
		})
		eventually(t, "many answers", func() (stalled bool) {
			w.on(func() {
				if parked {
					c.Quiet()
					data = data[len(c.Buffered()):]
					c.Consume(len(c.Buffered()))
				}
				if stalled = c.Stalled(); c.Owed() > 64<<10 {
					t.Errorf("%d bytes are kept", c.Owed())
				}
			})
			return stalled
		})
		select {
		case <-came:
			t.Fatal("all was read")
		default:
		}
		for len(o.ready) > 0 {
			<-o.ready
		}
		// The answers are not of interest, but they have to be read.
		go io.Copy(io.Discard, far)
		if parked {
			for done := false; !done; {
				select {
				case <-o.ready:
				case <-time.After(bound):
					t.Fatal("nobody is told that there is more")
				}
				w.on(func() { done = !c.Quiet() && len(c.Buffered()) > 0 })
			}
			w.on(fill)
		}
		w.await(came)
		<-writing
		far.CloseRead()
		w.on(c.Close)
	}
}

// A peer whose records have little in them does not keep the loop for itself.
func TestALoopHasOthersThanAPeerOfSmallRecords(t *testing.T) {
	t.Parallel()
	w, s := start(t), newSides(t, tls.VersionTLS13)
	c, far := w.adopt(nil)
	unix.SetsockoptInt(c.FD(), unix.SOL_SOCKET, unix.SO_RCVBUF, 4<<20)
	far.SetWriteBuffer(4 << 20)
	var keys bytes.Buffer
	s.client.KeyLogWriter = &keys
	conn := w.secure(c, far, s, true)
	a := newAuthor(t, &keys, conn, false)
	var storm []byte
	for len(storm) < 300<<10 {
		storm = append(storm, a.record(23, []byte("x"))...)
	}
	total := len(storm) / len(a.record(23, []byte("x")))
	if _, err := far.Write(storm); err != nil {
		t.Fatal(err)
	}
	w.on(func() {
		for got, looks := 0, 0; got < total; looks++ {
			if !c.Readable() {
				t.Errorf("there is more than %d, and nobody will tell", got)
				break
			}
			c.More()
			if n := len(c.Buffered()); n > total/2 {
				t.Errorf("%d of %d at once", n, total)
			}
			got += len(c.Buffered())
			c.Consume(len(c.Buffered()))
		}
		c.Close()
	})
}

// A handshake ends with what ends its connection, wherever it stands, and leaves nothing.
func TestAHandshakeIsInterrupted(t *testing.T) {
	t.Parallel()
	why := errors.New("why")
	ways := map[string]struct {
		end  func(*stream.Conn)
		want error
	}{
		"Close":     {(*stream.Conn).Close, net.ErrClosed},
		"Interrupt": {func(c *stream.Conn) { c.Interrupt(why) }, why},
		"Limit":     {func(c *stream.Conn) { c.Limit(time.Now()) }, os.ErrDeadlineExceeded},
		"both":      {func(c *stream.Conn) { c.Interrupt(why); c.Close(); c.Close() }, why},
	}
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		for _, server := range []bool{false, true} {
			for name, tt := range ways {
				for _, after := range []int{0, 1, 4, 100, 300} {
					t.Run(fmt.Sprintf("%s %s as server %v after %d bytes", tls.VersionName(version), name, server, after), func(t *testing.T) {
						t.Parallel()
						w, s := start(t), newSides(t, version)
						c, far := w.adopt(nil)
						// The peer says some of its part, and no more.
						left := after
						said := make(chan bool)
						near, other := s.of(server)
						ctx, cancel := context.WithCancel(t.Context())
						conn := tlsOf(&wired{halfConn: far, write: func(p []byte) (int, error) {
							n, err := far.Write(p[:min(left, len(p))])
							if left -= n; n < len(p) {
								close(said)
								<-ctx.Done()
								return n, io.ErrClosedPipe
							}
							return n, err
						}}, other, !server)
						over := make(chan bool)
						go func() {
							defer close(over)
							conn.Handshake()
						}()
						shaken := w.begin(func(t *task.Task) {
							if err := c.Handshake(t, near, server); !errors.Is(err, tt.want) {
								w.t.Errorf("%v, want %v", err, tt.want)
							}
							if c.Open() {
								w.t.Error("it is open")
							}
						})
						<-said
						w.on(func() { tt.end(c) })
						w.await(shaken)
						cancel()
						<-over
					})
				}
			}
		}
	}
}

// While a handshake computes its connection keeps its descriptor: it could be another one's.
func TestAHandshakesDescriptorIsClosedBehindIt(t *testing.T) {
	t.Parallel()
	for _, end := range []func(*stream.Conn){(*stream.Conn).Close, func(c *stream.Conn) { c.Interrupt(net.ErrClosed) }} {
		w, s := start(t), newSides(t, 0)
		c, far := w.adopt(nil)
		computes, goes := make(chan bool), make(chan bool)
		server := s.server.Clone()
		server.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
			close(computes)
			<-goes
			return nil, nil
		}
		over := make(chan bool)
		go func() {
			defer close(over)
			tls.Client(far, s.client).Handshake()
		}()
		shaken := w.begin(func(t *task.Task) {
			if err := c.Handshake(t, server, true); err != net.ErrClosed {
				w.t.Error(err)
			}
		})
		<-computes
		w.on(func() { end(c) })
		w.on(func() {
			if !c.Open() || c.FD() < 0 {
				t.Error("the descriptor is closed, and somebody uses it")
			}
		})
		close(goes)
		w.await(shaken)
		w.on(func() {
			if c.Open() {
				t.Error("it is open")
			}
		})
		<-over
	}
}

// A handshake whose connection is closed ends, also if its loop does in the same moment.
func TestAHandshakeEndsWithItsLoop(t *testing.T) {
	t.Parallel()
	for range 20 {
		l := streamtest.New(t)
		s := newSides(t, 0)
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fds[1])
		var c stream.Conn
		streamtest.Do(l, func() { err = l.Adopt(&c, fds[0], nil, nil) })
		if err != nil {
			t.Fatal(err)
		}
		streamtest.Begin(l, func(t *task.Task) { c.Handshake(t, s.server, true) })
		l.Post(c.Close)
	}
}

// What is no TLS is refused, and costs nobody else.
func TestGarbageInsteadOfAHello(t *testing.T) {
	t.Parallel()
	s := newSides(t, 0)
	for name, garbage := range map[string]string{
		"HTTP":             "GET / HTTP/1.1\r\nHost: a.test\r\n\r\n",
		"SSLv2":            "\x80\x2e\x01\x00\x02\x00\x15\x00\x00\x00\x10" + strings.Repeat("x", 40),
		"zeros":            strings.Repeat("\x00", 100),
		"a record of data": "\x17\x03\x03\x00\x05hello",
		"a large hello":    "\x16\x03\x01\x40\x00\x01\x7f\xff\xff" + strings.Repeat("x", 16<<10),
		"a bad hello":      "\x16\x03\x01\x00\x08\x01\x00\x00\x04xxxx",
		"an empty record":  strings.Repeat("\x16\x03\x01\x00\x00", 100),
		"nothing":          "",
	} {
		for _, server := range []bool{false, true} {
			w := start(t)
			c, far := w.adopt(nil)
			far.Write([]byte(garbage))
			far.CloseWrite()
			near, _ := s.of(server)
			w.run(func(t *task.Task) {
				if err := c.Handshake(t, near, server); err == nil {
					w.t.Errorf("%s: it is taken", name)
				}
				if c.Open() {
					w.t.Errorf("%s: it is open", name)
				}
			})
		}
	}
}

// Whoever takes a connection over has all that was read of it, decrypted or not.
func TestTLSIsPassedOn(t *testing.T) {
	t.Parallel()
	w, s := start(t), newSides(t, 0)
	c, far := w.adopt(nil)
	conn := w.secure(c, far, s, true)
	conn.Write(text(2, 0, 10<<10))
	received := new(stream.Traffic)
	var second stream.Conn
	w.run(func(t *task.Task) {
		if err := c.FillUpTo(t, 1000); err != nil {
			w.t.Error(err)
		}
		c.Consume(100)
		p := c.PassOn()
		if c.Secure() != nil || p.Secure == nil || len(p.Early) != 900 {
			w.t.Errorf("%d bytes", len(p.Early))
		}
		if err := w.loop.Resume(&second, &p, nil, received); err != nil {
			w.t.Error(err)
		}
		if err := wantData(t, &second, text(2, 100, 10<<10-100)); err != nil {
			w.t.Error(err)
		}
		if !second.Quiet() {
			w.t.Error("there is more")
		}
	})
	conn.Write([]byte("now"))
	w.run(func(t *task.Task) {
		if err := wantData(t, &second, []byte("now")); err != nil {
			w.t.Error(err)
		}
		second.Send(t, []byte("then"), nil, nil)
		second.Close()
	})
	if got, err := io.ReadAll(conn); string(got) != "then" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
}

// In Go's way it goes on where the loop has left off, also with what the socket has not taken.
func TestTLSInGosWay(t *testing.T) {
	t.Parallel()
	for _, secured := range []bool{false, true} {
		w, s := start(t), newSides(t, 0)
		c, far := w.adoptAny(true)
		steady(t, c, far)
		if secured {
			far = w.secure(c, far, s, true)
		}
		far.Write(text(2, 0, 10<<10))
		var conn net.Conn
		sent := 0
		w.run(func(t *task.Task) {
			for len(c.Buffered()) < 1000 {
				if err := c.FillUpTo(t, 1000); err != nil {
					w.t.Error(err)
				}
			}
			c.Consume(100)
			c.Limit(w.loop.Now().Add(time.Millisecond))
			for n := 1; n > 0 && c.Owed() == 0; {
				n, _ = c.SendSome(t, text(3, sent, 64<<10))
				sent += n
			}
			var err error
			if conn, err = c.Blocking(); err != nil {
				w.t.Error(err)
			}
		})
		if _, ok := conn.(interface{ ConnectionState() tls.ConnectionState }); ok != secured {
			t.Errorf("it knows of TLS: %v", ok)
		}
		if got := readN(t, conn, 10<<10-100); got != string(text(2, 100, 10<<10-100)) {
			t.Error("other bytes")
		}
		go func() {
			conn.Write(text(3, sent, 10))
			conn.(interface{ CloseWrite() error }).CloseWrite()
		}()
		if got, err := io.ReadAll(far); err != nil || !bytes.Equal(got, text(3, 0, sent+10)) {
			t.Errorf("%d bytes of %d, %v", len(got), sent+10, err)
		}
		conn.Close()
	}
}

// What is dialled with TLS begins with what comes first, and says when the two do not agree.
func TestDiallingWithTLS(t *testing.T) {
	t.Parallel()
	w, s := start(t), newSides(t, 0)
	strange := newSides(t, 0).client
	for name, tt := range map[string]struct {
		config *tls.Config
		answer bool
		check  func(error) bool
	}{
		"trusted": {s.client, true, func(err error) bool { return err == nil }},
		"unknown authority": {strange, true, func(err error) bool {
			_, ok := errors.AsType[*tls.CertificateVerificationError](err)
			_, unknown := errors.AsType[x509.UnknownAuthorityError](err)
			return ok && unknown
		}},
		"silence": {s.client, false, func(err error) bool { return errors.Is(err, os.ErrDeadlineExceeded) }},
	} {
		t.Run(name, func(t *testing.T) {
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			o := &stream.DialOptions{First: []byte("PROXY"), TLS: tt.config, Until: time.Now().Add(bound)}
			if !tt.answer {
				o.Until = time.Now()
			}
			served := make(chan bool)
			go func() {
				defer close(served)
				far, err := ln.Accept()
				if err != nil {
					t.Error(err)
					return
				}
				defer far.Close()
				if !tt.answer {
					io.Copy(io.Discard, far)
					return
				}
				if readN(t, far, 5) != "PROXY" {
					t.Error("something else comes first")
				}
				conn := tls.Server(far, s.server)
				if conn.Handshake() == nil {
					io.Copy(conn, conn)
				}
			}()
			var c stream.Conn
			w.run(func(tk *task.Task) {
				err := w.loop.Dial(tk, &c, ln.Addr().(*net.TCPAddr).AddrPort(), o)
				if !tt.check(err) {
					t.Errorf("got %v", err)
				}
				_, ok := errors.AsType[*stream.HandshakeError](err)
				if ok != (err != nil) && tt.answer {
					t.Errorf("it is no error of the handshake: %v", err)
				}
				if err == nil {
					c.Send(tk, []byte("echo"), nil, nil)
					if err := wantData(tk, &c, []byte("echo")); err != nil {
						t.Error(err)
					}
				}
				c.Close()
			})
			<-served
		})
	}
}

// An idle connection with TLS that has an owner wakes him for what is not TLS's own, once.
func TestAnIdleConnectionTellsOfItsEnd(t *testing.T) {
	t.Parallel()
	w, s := start(t), newSides(t, 0)
	o := newOwner()
	c, far := w.adopt(o)
	conn := w.secure(c, far, s, true)
	w.on(func() {
		if !c.Quiet() {
			t.Error("something is there")
		}
	})
	conn.CloseWrite()
	if hup := <-o.ready; hup {
		t.Error("there is no FIN")
	}
	w.on(func() {
		if c.Quiet() || c.HungUp() {
			t.Error("the end is taken for nothing")
		}
	})
	far.CloseWrite()
	for !<-o.ready {
	}
}
