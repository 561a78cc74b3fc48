package load

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/bench/proc"
)

const (
	// atOnce is how many connections may be on their way into a listening queue.
	atOnce = 128

	// openTimeout bounds the opening of tunnels, and settleTimeout the wait for
	// replies that are still under way when something ends.
	openTimeout   = 45 * time.Second
	settleTimeout = 5 * time.Second

	// longestMessage bounds the size of messages: one always fits into a socket.
	longestMessage = 16 << 10
)

// stage is how far a connection is.
type stage uint8

const (
	closed stage = iota
	connecting
	upgrading // the request for a tunnel was sent
	open
	waiting // a request for a body was sent
	ending  // its answer has come, and only the end is to follow
	kept    // until the next request
)

// A conn is a tunnel, or a connection for requests, seen from its client.
type conn struct {
	fd         int32
	generation int32 // no other has the same, so that a late event is told from one for this
	stage      stage
	head       []byte // of an answer that has come in part

	sent, received int // echo and paced: bytes of messages

	asking asking // a connection for requests
}

// A client is the side that opens tunnels and asks for bodies.
type client struct {
	poll    *poll
	conns   []conn
	started int32 // connections so far
	buf     []byte
	message []byte

	// For the command under way:
	to      unix.SockaddrInet4
	request []byte // for a tunnel
	wish    *wish  // instead of tunnels; the last command's that said one
	mode    mode
	reason  string // why the last one failed, where that is known

	secure  secure
	watch   *watch
	samples []sample // of the last pace
}

// A mode is what a command does with connections.
type mode interface {
	opened(c *client, i int)
	moved(c *client, i, n int) // n bytes have come
	answered(c *client, i int) // a body has come, all of it
	ended(c *client, i int)    // the other side has ended it, or it was not opened
}

func newClient() (*client, error) {
	p, err := newPoll()
	if err != nil {
		return nil, err
	}
	return &client{poll: p, buf: make([]byte, share), message: make([]byte, longestMessage)}, nil
}

// end ends everything.
func (c *client) end() {
	if c.watch != nil {
		c.stopWatch()
	}
	c.closeAll()
	c.secure.closeAll()
	c.poll.close()
}

func (c *client) do(cmd Command) (Answer, error) {
	if cmd.Secure {
		return c.secure.do(cmd)
	}
	if err := c.prepare(cmd); err != nil {
		return Answer{}, err
	}
	switch cmd.Do {
	case "open":
		return c.open(cmd)
	case "echo":
		return c.echo(cmd)
	case "paced":
		return c.paced(cmd)
	case "bulk":
		return c.bulk(cmd)
	case "between":
		return c.between(cmd), nil
	case "check":
		return c.check(cmd)
	case "close":
		return c.closeAll(), nil
	case "connect", "fresh":
		return c.connect(cmd)
	case "hold":
		return c.open(cmd)
	case "ask":
		return c.askAgain(cmd)
	case "askpaced":
		return c.askPaced(cmd)
	case "watch":
		return c.startWatch(cmd)
	case "unwatch":
		return c.stopWatch()
	}
	return Answer{}, fmt.Errorf("there is no command %q", cmd.Do)
}

func (c *client) prepare(cmd Command) error {
	if cmd.Size < 0 || cmd.Size > longestMessage {
		return fmt.Errorf("a message of %d bytes", cmd.Size)
	}
	c.reason = ""
	if cmd.Address == "" {
		return nil
	}
	to, err := netip.ParseAddrPort(cmd.Address)
	if err != nil {
		return err
	}
	if !to.Addr().Is4() || !to.Addr().IsLoopback() {
		return fmt.Errorf("%s is no IPv4 loopback address", to)
	}
	c.to = unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())}
	c.request, c.wish = upgrade(cmd.Address, cmd.Path), nil
	if cmd.Do == "hold" || cmd.Do == "fresh" {
		c.wish, err = newWish(cmd)
	}
	return err
}

// upgrade returns a request for a tunnel.
func upgrade(address, path string) []byte {
	return fmt.Appendf(nil, "GET %s HTTP/1.1\r\nHost: %s\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"+
		"Sec-WebSocket-Key: %s\r\nSec-WebSocket-Version: 13\r\n\r\n", path, address, key)
}

// switched begins the answer that lets a tunnel begin.
var switched = []byte("HTTP/1.1 101 ")

// start begins to open the tunnel of slot i.
func (c *client) start(i int) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	c.started++
	s := &c.conns[i]
	*s = conn{fd: int32(fd), generation: c.started, stage: connecting}
	if err := unix.Connect(fd, &c.to); err != nil && !errors.Is(err, unix.EINPROGRESS) {
		s.stage = closed
		unix.Close(fd)
		return fmt.Errorf("connect: %w", err)
	}
	return c.poll.add(fd, interesting, int32(i), s.generation)
}

// drop ends the connection of a slot, if it has one.
func (c *client) drop(i int) {
	if s := &c.conns[i]; s.stage != closed {
		s.stage = closed
		unix.Close(int(s.fd))
	}
}

func (c *client) event(e unix.EpollEvent) {
	i := int(e.Fd)
	if i >= len(c.conns) || c.conns[i].generation != e.Pad {
		return
	}
	switch s := &c.conns[i]; s.stage {
	case connecting:
		c.ask(i, e)
	case upgrading:
		c.readAnswer(i, e)
	case open:
		c.read(i, e)
	case waiting:
		c.readBody(i, e)
	case kept, ending:
		c.readEnd(i)
	}
}

func (c *client) fail(i int) {
	c.drop(i)
	c.mode.ended(c, i)
}

// failed fails a connection of which is known what is wrong with it.
func (c *client) failed(i int, format string, args ...any) {
	c.reason = fmt.Sprintf(format, args...)
	c.fail(i)
}

func (c *client) ask(i int, e unix.EpollEvent) {
	if e.Events&lost != 0 {
		c.fail(i)
		return
	}
	if c.wish != nil {
		c.wish.send(c, i)
		return
	}
	n, errno := send(int(c.conns[i].fd), c.request)
	switch {
	case errno == unix.EAGAIN: // it is not connected yet
	case n != len(c.request):
		c.fail(i)
	default:
		c.conns[i].stage = upgrading
	}
}

func (c *client) readAnswer(i int, e unix.EpollEvent) {
	s := &c.conns[i]
	n, errno := recv(int(s.fd), c.buf, 0)
	if errno == unix.EAGAIN {
		return
	}
	if errno != 0 || n == 0 || len(s.head) > longestHead {
		c.fail(i)
		return
	}
	head := append(s.head, c.buf[:n]...)
	at := bytes.Index(head, headEnd)
	if at < 0 {
		s.head = head
		return
	}
	if !bytes.HasPrefix(head, switched) {
		c.fail(i)
		return
	}
	s.head, s.stage = nil, open
	generation := s.generation
	c.mode.opened(c, i)
	if early := len(head) - at - len(headEnd); early > 0 {
		c.mode.moved(c, i, early)
	}
	if more(n, c.buf, e) && c.conns[i].generation == generation {
		c.poll.again(e)
	}
}

// read takes what has come, without looking at it: it is thrown away in the kernel.
func (c *client) read(i int, e unix.EpollEvent) {
	n, errno := recv(int(c.conns[i].fd), c.buf, unix.MSG_TRUNC)
	if errno == unix.EAGAIN {
		return
	}
	if errno != 0 || n == 0 {
		c.fail(i)
		return
	}
	c.mode.moved(c, i, n)
	if more(n, c.buf, e) {
		c.poll.again(e)
	}
}

// more says whether something may be left after n bytes were read into b. A short read
// has taken all that there was, unless an end stands behind it.
func more(n int, b []byte, e unix.EpollEvent) bool {
	return n == len(b) || e.Events&(lost|unix.EPOLLRDHUP) != 0
}

// run handles events for a mode until a time, or until done says so. It calls done
// once per turn, and waits no longer than done's answer then allows.
func (c *client) run(m mode, until time.Time, done func() (finished bool, wait time.Duration)) error {
	c.mode = m
	for {
		finished, wait := done()
		left := time.Until(until)
		if finished || left <= 0 {
			return nil
		}
		if err := c.poll.wait(min(wait, left), c.event); err != nil {
			return err
		}
	}
}

// How long a turn may wait for events.
const (
	long = time.Hour // for ever
	over = -1        // not at all: nothing is left to be measured
)

// A window is the time in which something is measured.
type window struct {
	pids       []int
	begin, end time.Time
	cpu        time.Duration
	running    bool
}

// during runs a mode to warm up and then for what is measured. It calls begin and end
// at the borders, while load goes on.
func (c *client) during(cmd Command, m mode, turn func(now time.Time) time.Duration, begin, end func()) (Answer, error) {
	w := window{pids: cmd.PIDs, begin: time.Now().Add(cmd.Warm)}
	w.end = w.begin.Add(cmd.For)
	var failure error
	err := c.run(m, w.end.Add(settleTimeout), func() (bool, time.Duration) {
		now := time.Now()
		wait := turn(now)
		switch {
		case !w.running && !now.Before(w.begin):
			w.running, w.begin = true, now
			w.end = now.Add(cmd.For)
			w.cpu, failure = proc.CPUOf(w.pids)
			begin()
		case w.running && (!now.Before(w.end) || wait == over):
			var cpu time.Duration
			cpu, failure = proc.CPUOf(w.pids)
			w.end, w.cpu = now, cpu-w.cpu
			end()
			return true, 0
		}
		next := w.begin
		if w.running {
			next = w.end
		}
		return failure != nil || wait == over, min(wait, next.Sub(now))
	})
	return Answer{Measured: w.end.Sub(w.begin), CPU: w.cpu}, errors.Join(err, failure)
}

// openSlots returns the slots of the tunnels that are open, or of the connections that
// are kept.
func (c *client) openSlots() []int {
	var slots []int
	for i := range c.conns {
		if s := c.conns[i].stage; s == open || s == kept {
			slots = append(slots, i)
		}
	}
	return slots
}

func (c *client) closeAll() Answer {
	a := Answer{Count: len(c.openSlots())}
	for i := range c.conns {
		c.drop(i)
	}
	c.conns = c.conns[:0:0]
	return a
}
