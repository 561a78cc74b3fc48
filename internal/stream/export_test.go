package stream

// Working says whether c has what it needs while something is under way.
func (c *Conn) Working() bool { return c.work != nil }

// MostPipes is how many pipes a loop has.
const MostPipes = mostPipes

// WithoutPipes has the loop do without pipes, as if there were none to be had.
// WithPipes takes that back.
func (l *Loop) WithoutPipes() { l.pipes.made += mostPipes }
func (l *Loop) WithPipes()    { l.pipes.made -= mostPipes }
