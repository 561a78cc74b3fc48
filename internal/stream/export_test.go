package stream

// Working says whether c has what it needs while something is under way.
func (c *Conn) Working() bool { return c.work != nil }

// MostPipes is how many pipes a loop has.
const MostPipes = mostPipes

// WithoutPipes has the loop do without pipes, as if there were none to be had.
// WithPipes takes that back.
func (l *Loop) WithoutPipes() { l.pipes.made += mostPipes }
func (l *Loop) WithPipes()    { l.pipes.made -= mostPipes }

// Owed is how much of TLS the socket has not taken.
func (c *Conn) Owed() int {
	if s := c.Secure(); s != nil {
		return len(s.own) - int(s.taken)
	}
	return 0
}

// Stalled says whether reading waits until that was sent.
func (c *Conn) Stalled() bool { return c.Secure().stalled }
