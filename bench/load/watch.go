package load

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"time"
)

const (
	// tunnelEach says which of the watch's connections are tunnels.
	tunnelEach = 5

	// patience is how long one may take, connection included.
	patience = 3 * time.Second

	// watchAtMost bounds how long a watch that nobody ends goes on.
	watchAtMost = 2 * time.Minute
)

// A watch looks whether a proxy serves: at its rate it opens a connection, asks for a
// page or a tunnel, and uses it. It needs little time, so it is plain Go.
type watch struct {
	address string
	stop    chan struct{}
	wait    sync.WaitGroup

	mu          sync.Mutex
	tried       int
	failed      int
	lastFailure time.Time
	reason      error // of that one
}

func (c *client) startWatch(cmd Command) (Answer, error) {
	if c.watch != nil || cmd.Rate <= 0 {
		return Answer{}, errors.New("there is a watch already, or no rate")
	}
	w := &watch{address: cmd.Address, stop: make(chan struct{})}
	w.wait.Go(func() { w.run(cmd.Rate) })
	c.watch = w
	return Answer{}, nil
}

func (c *client) stopWatch() (Answer, error) {
	w := c.watch
	if w == nil {
		return Answer{}, errors.New("there is no watch")
	}
	c.watch = nil
	close(w.stop)
	w.wait.Wait()
	a := Answer{Count: w.tried, Failed: w.failed, LastFailure: w.lastFailure}
	if w.reason != nil {
		a.Reason = w.reason.Error()
	}
	return a, nil
}

func (w *watch) run(rate int) {
	tick := time.NewTicker(time.Second / time.Duration(rate))
	defer tick.Stop()
	end := time.After(watchAtMost)
	for n := 0; ; n++ {
		select {
		case <-tick.C:
		case <-w.stop:
			return
		case <-end:
			return
		}
		w.wait.Go(func() {
			try := w.page
			if n%tunnelEach == 0 {
				try = w.tunnel
			}
			w.note(try())
		})
	}
}

func (w *watch) note(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.tried++
	if err != nil {
		w.failed++
		w.lastFailure = time.Now()
		w.reason = err
	}
}

func (w *watch) page() error {
	client := http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: true}}
	r, err := client.Get("http://" + w.address + PagePath)
	if err != nil {
		return err
	}
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	if err == nil && (r.StatusCode != http.StatusOK || string(body) != "ok\n") {
		err = fmt.Errorf("%s: %q", r.Status, body)
	}
	return err
}

func (w *watch) tunnel() error {
	conn, err := net.DialTimeout("tcp", w.address, patience)
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	if _, err := conn.Write(upgrade(w.address, EchoPath)); err != nil {
		return err
	}
	var head []byte // byte by byte, so that nothing behind it is taken
	for b := make([]byte, 1); !bytes.HasSuffix(head, headEnd); head = append(head, b[0]) {
		if _, err := conn.Read(b); err != nil {
			return err
		}
	}
	if !bytes.HasPrefix(head, switched) {
		return fmt.Errorf("answered with %.40q", head)
	}
	message := []byte("are you there?")
	if _, err := conn.Write(message); err != nil {
		return err
	}
	reply := make([]byte, len(message))
	if _, err := io.ReadFull(conn, reply); err != nil {
		return err
	}
	if !bytes.Equal(reply, message) {
		return fmt.Errorf("came back as %q", reply)
	}
	return nil
}
