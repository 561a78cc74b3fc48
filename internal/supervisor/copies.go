package supervisor

import (
	"time"

	"holdfast/internal/control"
)

// Generations work with files that change while they run, as certificates do. What the serving one
// has read is kept for the case that it dies when the files are of no use: who takes its place begins
// with that. It is a memory file that is passed on as it came, and it has private keys: nothing here
// looks into it.

// copiesTimeout is how long a generation may take to hand out its copies.
const copiesTimeout = 5 * time.Second

// copies is what the supervisor has of files. Owned by the loop.
type copies struct {
	fd     int         // the descriptor of what the one had that serves or has served last; -1: nobody has said
	of     *generation // which has nothing newer, as far as is known
	asking bool        // somebody is being asked
	newer  bool        // and has said meanwhile that they are others
}

// keep has fd in the place of the copies so far.
func (c *copies) keep(fd int) {
	if c.fd >= 0 {
		control.Discard([]int{c.fd})
	}
	c.fd = fd
}

// hasCopies says whether g is of a build that has copies as this one expects them.
func (g *generation) hasCopies() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.copiesVersion == control.CopiesVersion
}

// onCopied notes that g has other copies than before. Called in the loop.
func (s *Supervisor) onCopied(g *generation) {
	c := &s.copies
	if c.asking {
		c.newer = true
	}
	if c.of == g {
		c.of = nil
	}
	s.askCopies()
}

// askCopies has the serving generation asked for its copies, unless it is, or has nothing new.
// Called in the loop.
func (s *Supervisor) askCopies() {
	c, g := &s.copies, s.serving
	if c.asking || s.upgrading != nil || s.succeeded || s.stopping || g == nil || g == c.of || !g.hasCopies() {
		return
	}
	c.asking, c.newer = true, false
	s.workers.Go(func() {
		fd, err := g.payload(s.work, control.TypeCopies, copiesTimeout, control.MaxCopies)
		if err != nil {
			g.log.Debug("generation does not hand out its copies of files", "err", err)
		}
		s.do(func() {
			c.asking = false
			if err == nil && (s.serving == g || s.serving == nil) {
				g.log.Debug("its copies of files are kept")
				c.keep(fd)
				fd = -1
				c.of = g
			}
			if c.newer || s.serving != g { // otherwise it is asked again later
				c.of = nil
				s.askCopies()
			}
		})
		if err == nil && fd >= 0 {
			control.Discard([]int{fd})
		}
	})
}

// copiesOfLast returns what the one had that serves or has served last, as the caller's own
// descriptor, or -1.
func (s *Supervisor) copiesOfLast() (fd int) {
	fd = -1
	s.do(func() {
		if s.copies.fd < 0 {
			return
		}
		if dup, err := control.Duplicate(s.copies.fd); err == nil {
			fd = dup
		}
	})
	return fd
}
