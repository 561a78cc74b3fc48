package load

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"time"
)

// A plain mode does nothing on its own; others build on it.
type plain struct{}

func (plain) opened(*client, int)     {}
func (plain) moved(*client, int, int) {}
func (plain) answered(*client, int)   {}
func (plain) ended(*client, int)      {}

// An opening opens the slots from first on, a few at a time.
type opening struct {
	plain
	first, next, under, failed int
	err                        error
}

func (o *opening) opened(c *client, _ int) {
	o.under--
	o.more(c)
}

func (o *opening) answered(c *client, i int) { o.opened(c, i) }

func (o *opening) ended(c *client, i int) {
	if i < o.first {
		return
	}
	o.under--
	o.failed++
	o.more(c)
}

func (o *opening) more(c *client) {
	for ; o.under < atOnce && o.next < len(c.conns) && o.err == nil; o.next++ {
		if o.err = c.start(o.next); o.err == nil {
			o.under++
		}
	}
}

func (c *client) open(cmd Command) (Answer, error) {
	first := len(c.conns)
	c.conns = append(c.conns, make([]conn, cmd.Tunnels)...)
	o := &opening{first: first, next: first}
	o.more(c)
	err := c.run(o, time.Now().Add(openTimeout), func() (bool, time.Duration) {
		return o.under == 0, long
	})
	for i := first; i < len(c.conns); i++ {
		if s := c.conns[i].stage; s == connecting || s == upgrading || s == waiting {
			c.drop(i)
			o.failed++
		}
	}
	a := Answer{Count: len(c.openSlots()), Failed: o.failed}
	return a, errors.Join(err, o.err)
}

// An exchange sends messages and counts what comes back.
type exchange struct {
	plain
	size    int
	loop    bool // the next message follows a reply
	replies int
	lost    int // tunnels
	under   int // messages
}

func (x *exchange) send(c *client, i int) {
	s := &c.conns[i]
	if n, _ := send(int(s.fd), c.message[:x.size]); n != x.size {
		c.fail(i)
		return
	}
	s.sent += x.size
	x.under++
}

func (x *exchange) moved(c *client, i, n int) {
	s := &c.conns[i]
	if s.received+n > s.sent {
		c.fail(i) // whose bytes are these?
		return
	}
	before := s.received / x.size
	s.received += n
	whole := s.received/x.size - before
	x.replies += whole
	x.under -= whole
	if x.loop && s.received == s.sent {
		x.send(c, i)
	}
}

func (x *exchange) ended(c *client, i int) {
	s := &c.conns[i]
	x.under -= s.sent/x.size - s.received/x.size
	x.lost++
}

// settle waits for replies that are under way. One that does not come is an error.
func (x *exchange) settle(c *client, m mode) error {
	x.loop = false
	err := c.run(m, time.Now().Add(settleTimeout), func() (bool, time.Duration) {
		return x.under == 0, long
	})
	if err == nil && x.under > 0 {
		err = fmt.Errorf("%d messages have not come back", x.under)
	}
	return err
}

// begin makes the slots ready for messages.
func (c *client) beginExchange() []int {
	slots := c.openSlots()
	for _, i := range slots {
		c.conns[i].sent, c.conns[i].received = 0, 0
	}
	return slots
}

func (c *client) echo(cmd Command) (Answer, error) {
	x := &exchange{size: cmd.Size, loop: true}
	c.mode = x
	for _, i := range c.beginExchange() {
		x.send(c, i)
	}
	before, after := 0, 0
	a, err := c.during(cmd, x, func(time.Time) time.Duration { return long },
		func() { before = x.replies }, func() { after = x.replies })
	a.Count, a.Failed = after-before, x.lost
	return a, errors.Join(err, x.settle(c, x))
}

func (c *client) check(cmd Command) (Answer, error) {
	x := &exchange{size: cmd.Size}
	c.mode = x
	for _, i := range c.beginExchange() {
		x.send(c, i)
	}
	err := c.run(x, time.Now().Add(cmp.Or(cmd.For, settleTimeout)), func() (bool, time.Duration) {
		return x.under == 0, long
	})
	a := Answer{}
	for i := range c.conns {
		if s := &c.conns[i]; s.stage == open && s.received == s.sent {
			a.Count++
		} else {
			a.Failed++
		}
	}
	return a, err
}

// A schedule says when what is due, on one connection after the other. How long something
// takes is counted from then, whatever has held up its sender.
type schedule struct {
	slots []int
	place []int // of a slot in slots
	start time.Time
	every time.Duration
	next  int

	from    time.Time // what is due from then on is measured; zero: nothing yet
	samples []sample
}

// A sample is one thing that was due.
type sample struct {
	due  time.Time
	took time.Duration
}

func newSchedule(c *client, cmd Command, slots []int) (schedule, error) {
	if len(slots) == 0 || cmd.Rate <= 0 {
		return schedule{}, errors.New("a pace needs connections and a rate")
	}
	s := schedule{slots: slots, place: make([]int, len(c.conns)), start: time.Now(), every: time.Second / time.Duration(cmd.Rate)}
	for place, i := range slots {
		s.place[i] = place
	}
	s.samples = make([]sample, 0, int(cmd.For.Seconds()*float64(cmd.Rate))*2)
	return s, nil
}

func (s *schedule) at(n int) time.Time { return s.start.Add(time.Duration(n) * s.every) }

// turn calls send with the slot of all that is due, and returns how long nothing will be.
func (s *schedule) turn(now time.Time, send func(i int)) time.Duration {
	for ; !s.at(s.next).After(now); s.next++ {
		send(s.slots[s.next%len(s.slots)])
	}
	return s.at(s.next).Sub(now)
}

// done notes that what was due on a slot is done, from the one with a number up to
// another, which is not.
func (s *schedule) done(i, from, to int) {
	if s.from.IsZero() {
		return
	}
	now := time.Now()
	for k := from; k < to; k++ {
		if at := s.at(k*len(s.slots) + s.place[i]); !at.Before(s.from) {
			s.samples = append(s.samples, sample{at, now.Sub(at)})
		}
	}
}

// A pace sends message n at its time, whatever has become of those before.
type pace struct {
	exchange
	schedule
}

func (p *pace) moved(c *client, i, n int) {
	first := c.conns[i].received / p.size
	p.exchange.moved(c, i, n)
	p.done(i, first, c.conns[i].received/p.size)
}

func (c *client) paced(cmd Command) (Answer, error) {
	s, err := newSchedule(c, cmd, c.beginExchange())
	if err != nil {
		return Answer{}, err
	}
	p := &pace{exchange{size: cmd.Size}, s}
	send := func(i int) {
		if c.conns[i].stage == open {
			p.send(c, i)
		}
	}
	before, after := 0, 0
	a, err := c.during(cmd, p, func(now time.Time) time.Duration { return p.turn(now, send) },
		func() { p.from, before = time.Now(), p.replies }, func() { after = p.replies })
	err = errors.Join(err, p.settle(c, p))
	c.samples = p.samples
	a.Count, a.Failed, a.Latencies = after-before, p.lost, summarise(took(c.samples))
	return a, err
}

// between looks again at a pace that is over, after something has happened in it whose
// begin and end are known only now.
func (c *client) between(cmd Command) Answer {
	outside := func(s sample) bool { return s.due.Before(cmd.From) || !s.due.Before(cmd.To) }
	all := took(slices.DeleteFunc(slices.Clone(c.samples), outside))
	return Answer{Count: len(all), Latencies: summarise(all)}
}

func took(samples []sample) []time.Duration {
	all := make([]time.Duration, len(samples))
	for i, s := range samples {
		all[i] = s.took
	}
	return all
}

// A pouring takes what comes.
type pouring struct {
	plain
	bytes int64
	lost  int
}

func (b *pouring) moved(_ *client, _, n int) { b.bytes += int64(n) }
func (b *pouring) ended(*client, int)        { b.lost++ }

func (c *client) bulk(cmd Command) (Answer, error) {
	b := &pouring{}
	before, after := int64(0), int64(0)
	a, err := c.during(cmd, b, func(time.Time) time.Duration { return long },
		func() { before = b.bytes }, func() { after = b.bytes })
	a.Bytes, a.Failed = after-before, b.lost
	return a, err
}

// A turnover ends each tunnel when it is open, or waits for the end of each connection
// on which one request was answered; and opens another in its place.
type turnover struct {
	plain
	left, under    int
	opens, refused int
	err            error
}

func (t *turnover) opened(c *client, i int) {
	t.opens++
	c.drop(i)
	t.again(c, i)
}

func (t *turnover) answered(c *client, i int) { t.opened(c, i) }

func (t *turnover) ended(c *client, i int) {
	t.refused++
	t.again(c, i)
}

func (t *turnover) again(c *client, i int) {
	t.under--
	t.begin(c, i)
}

func (t *turnover) begin(c *client, i int) {
	if t.left == 0 || t.err != nil {
		return
	}
	t.left--
	if t.err = c.start(i); t.err == nil {
		t.under++
	}
}

func (c *client) connect(cmd Command) (Answer, error) {
	c.closeAll()
	c.conns = make([]conn, cmd.Tunnels)
	t := &turnover{left: cmd.Limit}
	c.mode = t
	for i := range c.conns {
		t.begin(c, i)
	}
	before, after := 0, 0
	a, err := c.during(cmd, t, func(time.Time) time.Duration {
		if t.under == 0 {
			return over
		}
		return long
	}, func() { before = t.opens }, func() { after = t.opens })
	c.closeAll()
	a.Count, a.Failed = after-before, t.refused
	return a, errors.Join(err, t.err)
}
