package service

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"time"

	"holdfast/internal/control"
	"holdfast/internal/version"
)

// farewellTimeout is how long a supervisor that commands waits for the word that the
// service manager knows it.
const farewellTimeout = 2 * systemdTimeout

// maxReason bounds what a candidate says about why it refuses, in bytes.
const maxReason = 4 << 10

// predecessor is the supervisor that has started this process to take its place. It
// implements [supervisor.Predecessor]. Its methods are called one after the other.
type predecessor struct {
	flip flip
	conn *control.Conn

	estate *control.Estate
	fds    map[string]int // the supervisor's

	// Set before the supervisor starts.
	log        *slog.Logger
	takeOver   func() error // called when this process commands
	known      func()       // called when the service manager knows it
	supervised bool         // there is a service manager, which starts another supervisor if this one ends

	commands bool  // this process commands
	parted   error // it must not go on: the service manager may not know it
}

// meet returns nil if nobody has started this process to take its place.
func meet(f flip) (*predecessor, error) {
	if !f.HasParent() {
		return nil, nil
	}
	at(born)
	conn, err := passed(f)
	if err != nil {
		return nil, fmt.Errorf("upgrade: %w", err)
	}
	p := &predecessor{flip: f, conn: conn, fds: make(map[string]int)}
	hello := &control.Hello{Core: control.Core, CoreMin: control.CoreMin, Version: version.String(), PID: os.Getpid()}
	if err = conn.Send(&control.Message{Type: control.TypeCandidate, Hello: hello}, sendTimeout); err == nil {
		at(introduced)
		err = p.inherit()
	}
	if err != nil {
		p.end(err)
		return nil, fmt.Errorf("upgrade: %w", err)
	}
	at(endowed)
	return p, nil
}

// inherit takes what the predecessor leaves.
func (p *predecessor) inherit() error {
	for {
		m, fds, err := p.receive()
		if err != nil {
			return err
		}
		switch {
		case m.Type == control.TypeInherit && len(m.Keys) == len(fds):
			for i, key := range m.Keys {
				p.fds[key] = fds[i]
			}
		case m.Type == control.TypeEstate && len(fds) == 1:
			p.estate = new(control.Estate)
			return control.ReadPayload(fds[0], p.estate)
		default:
			control.Discard(fds)
			return fmt.Errorf("the predecessor has said %q with %d descriptors, which is not understood", m.Type, len(fds))
		}
	}
}

// receive returns what the predecessor says next.
func (p *predecessor) receive() (*control.Message, []int, error) {
	m, fds, err := p.conn.Receive()
	if errors.Is(err, io.EOF) {
		err = errors.New("the predecessor is gone, or goes on by itself")
	}
	return m, fds, err
}

// take is how the service gets what is its own: the descriptors whose keys begin with
// prefix.
func (p *predecessor) take(prefix string) map[string]int {
	taken := make(map[string]int)
	for key, fd := range p.fds {
		if strings.HasPrefix(key, prefix) {
			taken[key] = fd
			delete(p.fds, key)
		}
	}
	return taken
}

// takeOne is take for a descriptor that must be there.
func (p *predecessor) takeOne(key string) (int, error) {
	fd, ok := p.fds[key]
	if !ok {
		return -1, fmt.Errorf("the predecessor has passed no %s", key)
	}
	delete(p.fds, key)
	return fd, nil
}

// Estate implements [supervisor.Predecessor].
func (p *predecessor) Estate() (*control.Estate, map[string]int) { return p.estate, p.fds }

// Prepared implements [supervisor.Predecessor].
func (p *predecessor) Prepared() error {
	at(prepared)
	if err := p.conn.Send(&control.Message{Type: control.TypePrepared}, sendTimeout); err != nil {
		return err
	}
	m, fds, err := p.receive()
	control.Discard(fds)
	if err != nil {
		return err
	}
	if m.Type != control.TypeCommit {
		return fmt.Errorf("the predecessor has said %q, and not %q", m.Type, control.TypeCommit)
	}
	at(told)
	return nil
}

// Refuse implements [supervisor.Predecessor]. Only the first reason is heard.
func (p *predecessor) Refuse(err error) {
	reason := strings.ToValidUTF8(err.Error()[:min(len(err.Error()), maxReason)], "")
	_ = p.conn.Send(&control.Message{Type: control.TypePrepared, Error: reason}, sendTimeout) // a predecessor that is gone asks no more
}

// Committed implements [supervisor.Predecessor].
func (p *predecessor) Committed() error {
	at(commands)
	p.commands = true
	if err := p.takeOver(); err != nil {
		p.log.Error("not everything of the predecessor could be taken over", "err", err)
	}
	if err := p.flip.Ready(); err != nil {
		p.log.Warn("the predecessor has ended already", "err", err)
	}
	at(ready)
	err := p.awaitFarewell()
	switch {
	case err == nil:
		p.known()
	case p.supervised:
		p.parted = fmt.Errorf("the service manager may not know this process: %w", err)
	default:
		p.log.Warn("the predecessor has ended without a farewell", "err", err)
	}
	return p.parted
}

func (p *predecessor) awaitFarewell() error {
	defer p.conn.Close() // all is said then
	late := time.AfterFunc(farewellTimeout, func() { p.conn.Close() })
	defer late.Stop()
	m, fds, err := p.receive()
	control.Discard(fds)
	if err == nil && m.Type != control.TypeFarewell {
		err = fmt.Errorf("the predecessor has said %q, and not %q", m.Type, control.TypeFarewell)
	}
	return err
}

// end is called when this process is no candidate any more, or ends.
func (p *predecessor) end(err error) {
	if err != nil && !p.commands {
		p.Refuse(err)
	}
	_ = p.conn.Close() // what was said is said
}
