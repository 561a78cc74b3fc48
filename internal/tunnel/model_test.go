package tunnel_test

import (
	"errors"
	"fmt"
	"os"
	"slices"

	"holdfast/internal/tunnel"
)

// model knows what can have come of a tunnel.
type model struct {
	*schedule
	*pair
	client, server outcome
	record         tunnel.Record

	mistakes []string
}

func (m *model) errorf(format string, args ...any) {
	m.mistakes = append(m.mistakes, fmt.Sprintf(format, args...))
}

// check compares what has come of the tunnel and returns what is wrong with it.
func (m *model) check() []string {
	m.checkStream("upstream", &m.down, &m.up, &m.client, &m.server, m.record.ToUp)
	m.checkStream("downstream", &m.up, &m.down, &m.server, &m.client, m.record.ToDown)
	m.checkReason()
	if m.mistakes != nil {
		m.errorf("of %+v, kept %t, closing %v:\nclient %+v\n%+v\nserver %+v\n%+v\n%+v", m.relay, m.kept, m.closing,
			m.down, m.client, m.up, m.server, m.record)
	}
	return m.mistakes
}

// checkStream compares one direction: what "from" sent and what "to" got.
func (m *model) checkStream(name string, from, to *script, sent, got *outcome, counted uint64) {
	s, g := *sent, *got
	s.wrote, g.got = s.wrote-from.head, max(g.got-from.head, 0) // the head does not count
	sent, got = &s, &g
	if got.corrupt != nil {
		m.errorf("%s: %v", name, got.corrupt)
	}
	if errors.Is(got.readErr, os.ErrDeadlineExceeded) || errors.Is(sent.writeErr, os.ErrDeadlineExceeded) {
		m.errorf("%s: nothing was heard any more: write %v, read %v", name, sent.writeErr, got.readErr)
	}
	if got.got > sent.wrote {
		m.errorf("%s: %d bytes arrived of %d", name, got.got, sent.wrote)
	}
	// Of a receiver that is gone no successor can say what it was given last.
	unsure := m.moves && (from.ending != fin || to.ending != fin)
	if uint64(got.got) > counted && !unsure || counted > uint64(sent.wrote) {
		m.errorf("%s: %d bytes sent, %d counted, %d arrived", name, sent.wrote, counted, got.got)
	}
	closed := m.record.Reason == tunnel.Operator
	nobodyCuts := from.ending == fin && to.ending == fin && !closed
	if nobodyCuts && (sent.writeErr != nil || got.readErr != nil) {
		m.errorf("%s: errors without a cause: write %v, read %v", name, sent.writeErr, got.readErr)
	}
	if nobodyCuts && (got.got != sent.wrote || counted != uint64(sent.wrote)) {
		m.errorf("%s: %d bytes sent, %d counted, %d arrived", name, sent.wrote, counted, got.got)
	}
	// A receiver that did not leave and saw no error took the stream for
	// complete. A plain net.Conn cannot be reset, and when a write takes the
	// error of its reset, a read cannot be told from one of a FIN.
	if from.plain || to.plain || to.ending != fin || got.readErr != nil || got.writeErr != nil {
		return
	}
	if uint64(got.got) != counted {
		m.errorf("%s: a FIN after %d of %d bytes that were passed on", name, got.got, counted)
	}
	if !closed && (from.ending == resetAtOnce || got.got != sent.wrote) {
		m.errorf("%s: a stream that was cut after %d of %d bytes looks complete", name, got.got, sent.wrote)
	}
}

func (m *model) checkReason() {
	var allowed []tunnel.Reason
	// A plain connection shows a reset that a write noticed as a FIN.
	if m.down.plain || m.up.plain || m.down.ending != resetAtOnce && m.up.ending != resetAtOnce {
		allowed = append(allowed, tunnel.DownstreamClosed, tunnel.UpstreamClosed)
	}
	if m.down.ending != fin {
		allowed = append(allowed, tunnel.DownstreamReset)
	}
	if m.up.ending != fin {
		allowed = append(allowed, tunnel.UpstreamReset)
	}
	if m.closing > 0 {
		allowed = append(allowed, tunnel.Operator)
	}
	if m.moves {
		allowed = append(allowed, tunnel.Open) // its process died before it could report the end
	}
	if !slices.Contains(allowed, m.record.Reason) {
		m.errorf("reason is %q, want one of %v", m.record.Reason, allowed)
	}
}
