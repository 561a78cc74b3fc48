package demo

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coder/websocket"
)

const (
	// pause is between two messages of a socket.
	pause = 5 * time.Millisecond

	// echoTimeout is after which a message counts as lost.
	echoTimeout = 10 * time.Second
)

// talk is a number of WebSockets, each of which sends numbered messages and checks
// that they come back as they were. It ends with the first that is lost.
type talk struct {
	ctx    context.Context // ends when the talk is closed
	cancel context.CancelFunc
	done   sync.WaitGroup

	echoed  atomic.Int64
	open    atomic.Int64
	missing atomic.Int64

	broken chan struct{} // closed when a message is lost
	breaks sync.Once
	reason error // set before broken is closed
}

// openTalk opens n WebSockets, all of them or none, and starts to talk.
func openTalk(ctx context.Context, url string, n int) (*talk, error) {
	opening, opened := context.WithTimeout(ctx, patience)
	defer opened()
	t := &talk{broken: make(chan struct{})}
	t.ctx, t.cancel = context.WithCancel(context.Background())
	var conns []*websocket.Conn
	for range n {
		conn, _, err := websocket.Dial(opening, url, nil)
		if err != nil {
			t.cancel()
			for _, c := range conns {
				c.CloseNow()
			}
			return nil, err
		}
		conns = append(conns, conn)
	}
	t.open.Store(int64(n))
	for i, conn := range conns {
		t.done.Go(func() { t.converse(conn, i+1) })
	}
	return t, nil
}

// converse talks until the talk is closed or a message is lost.
func (t *talk) converse(conn *websocket.Conn, socket int) {
	defer conn.CloseNow()
	for n := 1; t.ctx.Err() == nil; n++ {
		// Messages differ in length, so that they end at all kinds of places in the stream.
		message := fmt.Sprintf("socket %d, message %d, %s", socket, n, strings.Repeat("x", n*37%3000))
		if err := exchange(conn, message); err != nil {
			t.open.Add(-1)
			t.missing.Add(1)
			t.fail(fmt.Errorf("WebSocket %d lost message %d: %w", socket, n, err))
			return
		}
		t.echoed.Add(1)
		select {
		case <-time.After(pause):
		case <-t.ctx.Done():
		}
	}
	conn.Close(websocket.StatusNormalClosure, "the demo ends")
}

// exchange sends a message and waits for it to come back. It is not cut short by
// the end of the talk, so that every message that was sent is accounted for.
func exchange(conn *websocket.Conn, message string) error {
	ctx, cancel := context.WithTimeout(context.Background(), echoTimeout)
	defer cancel()
	if err := conn.Write(ctx, websocket.MessageText, []byte(message)); err != nil {
		return err
	}
	_, back, err := conn.Read(ctx)
	if err != nil {
		return err
	}
	if string(back) != message {
		return fmt.Errorf("another came back: %.80q", back)
	}
	return nil
}

func (t *talk) fail(err error) {
	t.breaks.Do(func() {
		t.reason = err
		close(t.broken)
	})
}

// err is what was lost, if anything was.
func (t *talk) err() error {
	select {
	case <-t.broken:
		return fmt.Errorf("%w (%s)", t.reason, t)
	default:
		return nil
	}
}

// waitFor returns when n more messages have come back.
func (t *talk) waitFor(ctx context.Context, n int64) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for until := t.echoed.Load() + n; t.echoed.Load() < until; {
		select {
		case <-time.After(pause):
		case <-t.broken:
			return t.err()
		case <-ctx.Done():
			return fmt.Errorf("wait for echoes: %w", context.Cause(ctx))
		}
	}
	return nil
}

func (t *talk) String() string {
	return fmt.Sprintf("%d messages echoed, %d lost, %d WebSockets open", t.echoed.Load(), t.missing.Load(), t.open.Load())
}

// close ends the talk between two messages and waits until it has ended.
func (t *talk) close() {
	t.cancel()
	t.done.Wait()
}
