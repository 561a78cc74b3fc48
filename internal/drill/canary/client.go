package canary

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"
)

// answerTimeout is how long a command may take. The slowest waits for everything to
// be closed.
const answerTimeout = 4 * patience

// A Client speaks to a canary over its standard input and output.
type Client struct {
	Upstream string // the address of the server that is to be proxied

	in      io.Writer
	answers chan Answer // closed when nothing more can be understood
}

// NewClient speaks to the process that reads from in and writes to out, until out
// ends.
func NewClient(in io.Writer, out io.Reader) (*Client, error) {
	c := &Client{in: in, answers: make(chan Answer)}
	go func() {
		defer close(c.answers)
		for decode := json.NewDecoder(out); ; {
			var a Answer
			if decode.Decode(&a) != nil {
				return
			}
			c.answers <- a
		}
	}()
	a, err := c.answer("begin")
	c.Upstream = a.Upstream
	return c, err
}

// Do has a command carried out. The report is empty if the command is not one for which
// there is one. After an error the process is of no further use.
func (c *Client) Do(cmd Command) (*Report, error) {
	if err := json.NewEncoder(c.in).Encode(cmd); err != nil {
		return nil, fmt.Errorf("%s: tell the canary: %w", cmd.Do, err)
	}
	a, err := c.answer(cmd.Do)
	return &a.Report, err
}

func (c *Client) answer(what string) (Answer, error) {
	select {
	case a, ok := <-c.answers:
		if !ok {
			return a, fmt.Errorf("%s: the canary has ended", what)
		}
		if a.Error != "" {
			return a, fmt.Errorf("%s: %s", what, a.Error)
		}
		return a, nil
	case <-time.After(answerTimeout):
		return Answer{}, errors.New(what + ": the canary has not answered")
	}
}
