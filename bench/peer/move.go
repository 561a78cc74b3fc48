package peer

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"time"

	"holdfast/bench/proc"
)

const (
	// moveTimeout bounds how long tunnels may take to move.
	moveTimeout = 30 * time.Second

	// movePoll is how often one looks how many are left: each look costs those time that
	// move them.
	movePoll = 10 * time.Millisecond
)

// A generation is one of Holdfast's processes, as its status has it.
type generation struct {
	Number  int    `json:"generation"`
	State   string `json:"state"`
	PID     int    `json:"pid"`
	Tunnels int    `json:"tunnels"`
}

// Relieve puts a new generation into service and waits until it has passed its probation:
// from then on tunnels can move to it.
func (i *Instance) Relieve() error { return i.holdfast("reload", "--wait") }

// A Move is how tunnels went to another generation.
type Move struct {
	Tunnels int
	Began   time.Time // it was said
	Most    time.Time // 99 in 100 had gone
	Over    time.Time // the process that had them had ended
}

// Move has the tunnels of the generation that drains move to the one that serves.
func (i *Instance) Move() (Move, error) {
	from, err := i.draining()
	if err != nil {
		return Move{}, err
	}
	process, ok := proc.Find(from.PID)
	if !ok {
		return Move{}, fmt.Errorf("generation %d has ended", from.Number)
	}
	m := Move{Tunnels: from.Tunnels, Began: time.Now()}
	if err := i.ask("POST", fmt.Sprintf("/move?generation=%d", from.Number), nil); err != nil {
		return Move{}, err
	}
	for {
		now, ok := proc.Find(process.PID)
		if !ok || now.Started != process.Started || now.Ended {
			break
		}
		// Nothing drains any more, for a moment, when the process is about to end.
		if left, err := i.draining(); m.Most.IsZero() && (err != nil || 100*left.Tunnels <= m.Tunnels) {
			m.Most = time.Now()
		} else if time.Since(m.Began) > moveTimeout {
			return Move{}, fmt.Errorf("generation %d has %d tunnels left of %d (%v)", from.Number, left.Tunnels, m.Tunnels, err)
		}
		time.Sleep(movePoll)
	}
	m.Over = time.Now()
	if m.Most.IsZero() {
		m.Most = m.Over
	}
	return m, nil
}

// draining returns the one generation that drains.
func (i *Instance) draining() (generation, error) {
	var status struct {
		Generations []generation `json:"generations"`
	}
	if err := i.ask("GET", "/status", &status); err != nil {
		return generation{}, err
	}
	var found []generation
	for _, g := range status.Generations {
		if g.State == "draining" {
			found = append(found, g)
		}
	}
	if len(found) != 1 {
		return generation{}, fmt.Errorf("one generation should drain, of %+v", status.Generations)
	}
	return found[0], nil
}

// ask has the supervisor answer at its socket. A process that commands it, as the command
// line is, would take a processor for a while.
func (i *Instance) ask(method, path string, into any) error {
	ctx, cancel := context.WithTimeout(context.Background(), reloadTimeout)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, method, "http://localhost"+path, nil)
	if err != nil {
		return err
	}
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(i.runtimeDir(), "admin.sock"))
		},
	}}
	answer, err := client.Do(r)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		why, _ := io.ReadAll(io.LimitReader(answer.Body, 1000))
		return fmt.Errorf("%s %s: %s: %s", method, path, answer.Status, bytes.TrimSpace(why))
	}
	if into == nil {
		return nil
	}
	return json.NewDecoder(answer.Body).Decode(into)
}
