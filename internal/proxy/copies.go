package proxy

import (
	"errors"
	"maps"
	"slices"
	"sync/atomic"

	"holdfast/internal/control"
)

// copies are the contents of files that the generation works with, for whoever takes its place
// when it dies: the files may be of no use by then.
type copies struct {
	legacy map[string][]byte // what a dead generation had, by path; nil: this one takes nobody's place, or nobody knows
	news   chan struct{}     // holds one: the supervisor has others than there are
	saying *atomic.Bool      // an answer is being made
}

func newCopies(legacy map[string][]byte) copies {
	return copies{legacy: legacy, news: make(chan struct{}, 1), saying: new(atomic.Bool)}
}

// inheritCopies reads what a dead generation had; fd -1: nothing.
func inheritCopies(fd int) (map[string][]byte, error) {
	if fd < 0 {
		return nil, nil
	}
	c, err := control.ReadCopies(fd)
	if err != nil {
		return nil, err
	}
	return c.Files, nil
}

// changed has the supervisor hear that there are others. Anybody may call it.
func (c *copies) changed() { signal(c.news) }

// sayCopied tells the supervisor. One that comes later asks by itself.
func (g *generation) sayCopied() {
	c := g.channels[g.fence.Commander()]
	if c == nil {
		return
	}
	if err := c.conn.Send(&control.Message{Type: control.TypeCopied}, sendTimeout); err != nil {
		g.log.Error("cannot tell the supervisor that files have changed", "err", err)
	}
}

// sayCopies answers with what there is. That may be much, so the loop only has it done.
func (g *generation) sayCopies(r received) {
	if g.phase == building || !g.copies.saying.CompareAndSwap(false, true) {
		g.answer(r, control.Message{}, errors.New("not possible now"))
		return
	}
	g.work.Go(func() {
		defer g.copies.saying.Store(false)
		all := control.Copies{Files: make(map[string][]byte)}
		g.clusters.Keep(all.Files)
		for _, name := range slices.Sorted(maps.Keys(g.tls)) {
			if err := g.tls[name].Keep(all.Files); err != nil {
				_ = g.reply(r, control.Message{Error: err.Error()})
				return
			}
		}
		file, err := control.Payload(all)
		if err != nil {
			_ = g.reply(r, control.Message{Error: err.Error()})
			return
		}
		defer file.Close()
		_ = g.reply(r, control.Message{}, int(file.Fd()))
	})
}
