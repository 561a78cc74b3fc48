// Package load makes the load: a client and an upstream, each for a process of its
// own, so that neither's memory nor its CPU time is mistaken for the proxy's. Both are
// one thread on epoll, because they share the cores with what is measured.
//
// After the upgrade a tunnel carries bytes without WebSocket frames: no proxy that is
// measured looks at frames.
package load

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// A Command is what the client is to do; the answer comes when it is done.
type Command struct {
	// Do is one of:
	//
	//	open     open Tunnels tunnels more to Path
	//	echo     on each tunnel, the next message as soon as the last one is back
	//	paced    Rate messages a second, spread evenly over time and tunnels
	//	bulk     take what comes
	//	between  of the last pace, those messages that were due from From on and before To
	//	check    one message on each tunnel; For is how long to wait for all replies, if not as usual
	//	close    end all tunnels
	//	connect  open tunnels to Path, Tunnels at once, and end each when it is open
	//	hold     open Tunnels connections more, ask for Body bytes on each, and keep it
	//	ask      on each such connection, the next request as soon as the last one is answered
	//	askpaced Rate requests a second, spread evenly over time and these connections
	//	fresh    ask for Body bytes on a connection of its own, Tunnels at once
	//	handshake  connect, agree on TLS, and leave, Tunnels at once
	//	watch    ask for pages, and now and then for a tunnel, until unwatch
	//	unwatch
	Do string

	Address string // of the proxy
	Path    string
	Tunnels int
	Size    int // of a message
	Body    int // hold, fresh: length of what is asked for
	Rate    int
	Limit   int // connect, fresh, handshake: so many at most

	Secure bool // over TLS: open, echo, close, connect, handshake
	Resume bool // handshake: goes on with an earlier session

	Warm, For time.Duration // For is what is measured, after Warm
	From, To  time.Time

	PIDs []int // of the proxy: their CPU time is taken while it is measured
}

// An Answer says what came of a command.
type Answer struct {
	Error string `json:",omitempty"`

	Count     int           // tunnels opened, answered (check), opened and ended (connect); round trips; requests; messages (between); pages and tunnels (watch)
	Failed    int           // of these, in addition
	Bytes     int64         // bulk
	Measured  time.Duration // how long it was measured
	CPU       time.Duration // of the proxy meanwhile
	Latencies Latencies     // paced, askpaced, between

	LastFailure time.Time // watch
	Reason      string    // of the last failure, where it is known
}

// answerTimeout is how long a command may take beyond what it was told to take.
const answerTimeout = 60 * time.Second

// A Client speaks to a client process over its standard input and output.
type Client struct {
	in  io.Writer
	out *json.Decoder
}

// NewClient speaks to the process that reads from in and writes to out.
func NewClient(in io.Writer, out io.Reader) *Client {
	return &Client{in, json.NewDecoder(bufio.NewReader(out))}
}

// Do has a command carried out. After an error of the connection itself, or a
// command that took too long, the process is of no further use.
func (c *Client) Do(cmd Command) (Answer, error) {
	if err := json.NewEncoder(c.in).Encode(cmd); err != nil {
		return Answer{}, fmt.Errorf("%s: tell the client: %w", cmd.Do, err)
	}
	type decoded struct {
		a   Answer
		err error
	}
	done := make(chan decoded, 1)
	go func() {
		var d decoded
		d.err = c.out.Decode(&d.a)
		done <- d
	}()
	select {
	case d := <-done:
		if d.err != nil {
			return Answer{}, fmt.Errorf("%s: hear the client: %w", cmd.Do, d.err)
		}
		if d.a.Error != "" {
			return d.a, fmt.Errorf("%s: %s", cmd.Do, d.a.Error)
		}
		return d.a, nil
	case <-time.After(cmd.Warm + cmd.For + answerTimeout):
		return Answer{}, fmt.Errorf("%s: the client has not answered", cmd.Do)
	}
}

// ServeClient carries out commands until in ends.
func ServeClient(in io.Reader, out io.Writer) error {
	// The pace is kept by a timer whose accuracy belongs to the thread.
	runtime.LockOSThread()
	if err := unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0); err != nil {
		return err
	}
	c, err := newClient()
	if err != nil {
		return err
	}
	defer c.end()
	for commands, answers := json.NewDecoder(in), json.NewEncoder(out); ; {
		var cmd Command
		if err := commands.Decode(&cmd); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		a, err := c.do(cmd)
		if err != nil {
			a.Error = err.Error()
		}
		if a.Reason == "" {
			a.Reason = c.reason
		}
		if err := answers.Encode(a); err != nil {
			return err
		}
	}
}
