package load

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// asking is how far a connection for requests is.
type asking struct {
	number   number // of the last request
	under    bool   // its answer has not come
	began    bool   // but its head has
	looks    bool   // all of its body is compared
	received int    // of its body

	answers int // so far
	owed    int // requests that are due: they wait for the answer to the one before
}

// send asks on a connection. One that is not connected yet it leaves as it is.
func (w *wish) send(c *client, i int) {
	s := &c.conns[i]
	d := newNumber(w.sent)
	copy(w.request[w.at:], d[:])
	n, errno := send(int(s.fd), w.request)
	if errno == unix.EAGAIN && s.stage == connecting {
		return
	}
	w.sent++
	a := &s.asking
	a.number, a.under, a.began, a.received = d, true, false, 0
	a.looks = len(w.body) <= looksAt || a.answers%looksEach == 0
	if n != len(w.request) {
		c.failed(i, "request %s: %v", d, errno)
		return
	}
	s.stage = waiting
}

// readBody reads of an answer what has come of it.
func (c *client) readBody(i int, e unix.EpollEvent) {
	s := &c.conns[i]
	a, flags := &s.asking, 0
	if a.began && !a.looks {
		flags = unix.MSG_TRUNC
	}
	n, errno := recv(int(s.fd), c.buf, flags)
	if errno == unix.EAGAIN {
		return
	}
	if errno != 0 || n == 0 {
		c.failed(i, "the connection ended in the answer to request %s (%v)", a.number, errno)
		return
	}
	if err := c.wish.take(s, c.buf[:n]); err != nil {
		c.failed(i, "answer to request %s: %v", a.number, err)
		return
	}
	generation := s.generation
	if a.began && a.received == len(c.wish.body) {
		c.hasBody(i)
	}
	if more(n, c.buf, e) && s.generation == generation {
		c.poll.again(e)
	}
}

// hasBody follows upon an answer that is there with all of its body.
func (c *client) hasBody(i int) {
	s := &c.conns[i]
	s.asking.under = false
	s.asking.answers++
	if c.wish.last {
		s.stage = ending
		return
	}
	s.stage = kept
	c.mode.answered(c, i)
}

// readEnd reads from a connection from which nothing but its end should come, if that.
func (c *client) readEnd(i int) {
	s := &c.conns[i]
	n, errno := recv(int(s.fd), c.buf, 0)
	switch {
	case errno == unix.EAGAIN:
	case errno == 0 && n == 0 && s.stage == ending:
		c.drop(i)
		c.mode.answered(c, i)
	case errno == 0 && n > 0:
		c.failed(i, "behind the answer to request %s: %.40q", s.asking.number, c.buf[:n])
	default:
		c.failed(i, "ended behind the answer to request %s (%v)", s.asking.number, errno)
	}
}

// A requests mode asks on connections that are kept, and counts the answers.
type requests struct {
	plain
	loop    bool // the next request follows an answer
	answers int
	lost    int // connections
	under   int // requests
}

func (r *requests) send(c *client, i int) {
	r.under++
	c.wish.send(c, i)
}

func (r *requests) answered(c *client, i int) {
	r.under--
	r.answers++
	if r.loop {
		r.send(c, i)
	}
}

func (r *requests) ended(c *client, i int) {
	r.lost++
	if c.conns[i].asking.under {
		r.under--
	}
}

// settle waits for answers that are under way. One that does not come is an error.
func (r *requests) settle(c *client, m mode) error {
	r.loop = false
	err := c.run(m, time.Now().Add(settleTimeout), func() (bool, time.Duration) {
		return r.under == 0, long
	})
	if err == nil && r.under > 0 {
		err = fmt.Errorf("%d requests have not been answered", r.under)
	}
	return err
}

// keptSlots makes the connections that are kept ready for a mode.
func (c *client) keptSlots() ([]int, error) {
	if c.wish == nil || c.wish.last {
		return nil, errors.New("no connection is kept for requests")
	}
	slots := c.openSlots()
	for _, i := range slots {
		a := &c.conns[i].asking
		a.answers, a.owed = 0, 0
	}
	return slots, nil
}

func (c *client) askAgain(cmd Command) (Answer, error) {
	slots, err := c.keptSlots()
	if err != nil {
		return Answer{}, err
	}
	r := &requests{loop: true}
	c.mode = r
	for _, i := range slots {
		r.send(c, i)
	}
	before, after := 0, 0
	a, err := c.during(cmd, r, func(time.Time) time.Duration { return long },
		func() { before = r.answers }, func() { after = r.answers })
	a.Count, a.Failed = after-before, r.lost
	return a, errors.Join(err, r.settle(c, r))
}

// A requestPace asks at its times. Where the answer before has not come yet, a request
// waits for it.
type requestPace struct {
	requests
	schedule
}

func (p *requestPace) due(c *client, i int) {
	switch s := &c.conns[i]; s.stage {
	case kept:
		p.send(c, i)
	case waiting:
		s.asking.owed++
	}
}

func (p *requestPace) answered(c *client, i int) {
	a := &c.conns[i].asking
	p.requests.answered(c, i)
	p.done(i, a.answers-1, a.answers)
	if a.owed > 0 {
		a.owed--
		p.send(c, i)
	}
}

func (c *client) askPaced(cmd Command) (Answer, error) {
	slots, err := c.keptSlots()
	if err != nil {
		return Answer{}, err
	}
	s, err := newSchedule(c, cmd, slots)
	if err != nil {
		return Answer{}, err
	}
	p := &requestPace{schedule: s}
	before, after := 0, 0
	a, err := c.during(cmd, p, func(now time.Time) time.Duration { return p.turn(now, func(i int) { p.due(c, i) }) },
		func() { p.from, before = time.Now(), p.answers }, func() { after = p.answers })
	err = errors.Join(err, p.settle(c, p))
	c.samples = p.samples
	a.Count, a.Failed, a.Latencies = after-before, p.lost, summarise(took(c.samples))
	return a, err
}
