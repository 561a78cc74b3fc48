package canary

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strconv"
	"time"
)

const (
	echoPath = "/echo" // answers with the body of the request
	slowPath = "/slow" // answers for a second
)

// The answer of slowPath: a stream, in pieces.
const (
	slowPieces = 20
	slowPiece  = 1000
	slowPause  = 50 * time.Millisecond
)

// keepAlive sends requests on a connection for as long as the proxy keeps it, then on
// another.
func (c *canary) keepAlive() {
	for c.live.Err() == nil {
		storms := c.storms.Load()
		conn, ok := c.dial(c.address)
		if !ok {
			c.pause(requestPause)
			continue
		}
		c.converse(conn, storms)
		conn.Close()
	}
}

// converse sends requests on a connection that was opened when there had been so many
// storms.
func (c *canary) converse(conn *conn, storms int64) {
	answers := bufio.NewReader(conn)
	for n := 1; c.live.Err() == nil && c.next(conn, answers, storms, n); n++ {
		c.pause(requestPause)
	}
}

// next sends the request of that number and returns whether there may be another one.
func (c *canary) next(conn *conn, answers *bufio.Reader, storms int64, number int) bool {
	c.requests.RLock()
	defer c.requests.RUnlock()
	if c.storms.Load() != storms {
		return false // it may have taken the connection along
	}
	began := time.Now()
	last, err := c.echo(conn, answers, false)
	if err != nil {
		c.tally.failOn(conn, &c.tally.Failed, "request %d on a connection that was kept: %v", number, err)
		return false
	}
	c.tally.count(func(r *Report) { r.Pauses.Request = max(r.Pauses.Request, time.Since(began)) })
	return !last
}

// oneRequest opens a connection for it.
func (c *canary) oneRequest() {
	began := time.Now()
	conn, ok := c.dial(c.address)
	if !ok {
		return
	}
	defer conn.Close()
	_, err := c.echo(conn, bufio.NewReader(conn), true)
	if err == nil {
		c.tally.count(func(r *Report) { r.Pauses.Connection = max(r.Pauses.Connection, time.Since(began)) })
		return
	}
	counted := &c.tally.Refused
	if _, answered := errors.AsType[*wrongAnswer](err); answered {
		counted = &c.tally.Failed
	}
	c.tally.failOn(conn, counted, "the request of a new connection: %v", err)
}

// wrongAnswer is an answer that is not what it should be.
type wrongAnswer struct{ error }

// echo sends a request, whose body must come back, and returns whether it was the
// last one of its connection.
func (c *canary) echo(conn *conn, answers *bufio.Reader, last bool) (bool, error) {
	body := make([]byte, rand.IntN(2)*rand.IntN(20_000))
	streamOf(rand.Uint64()).fill(body, 0)
	request, err := http.NewRequest("POST", "http://drill"+echoPath, bytes.NewReader(body))
	if err != nil {
		return true, err
	}
	request.Close = last
	c.tally.count(func(r *Report) { r.Requests++ })
	conn.SetDeadline(time.Now().Add(patience))
	if err := request.Write(conn); err != nil {
		return true, err
	}
	response, err := http.ReadResponse(answers, request)
	if err != nil {
		return true, err
	}
	back, err := io.ReadAll(response.Body)
	switch {
	case err != nil:
		return true, &wrongAnswer{fmt.Errorf("after %d of %d bytes of the answer: %w", len(back), len(body), err)}
	case response.StatusCode != http.StatusOK:
		return true, &wrongAnswer{fmt.Errorf("%s: %.200q", response.Status, back)}
	case !bytes.Equal(back, body):
		return true, &wrongAnswer{fmt.Errorf("%d bytes came back otherwise, as %d", len(body), len(back))}
	case last && !response.Close:
		return true, &wrongAnswer{errors.New("the connection stays open although its end was asked for")}
	}
	return response.Close, nil
}

// slowRequests asks for answers that take their time.
func (c *canary) slowRequests() {
	for c.live.Err() == nil {
		if !c.oneSlowRequest() {
			c.pause(requestPause)
		}
	}
}

// oneSlowRequest returns whether there was somebody to ask.
func (c *canary) oneSlowRequest() bool {
	c.requests.RLock()
	defer c.requests.RUnlock()
	conn, ok := c.dial(c.address)
	if !ok {
		return false
	}
	defer conn.Close()
	if err := c.slowRequest(conn); err != nil {
		c.tally.failOn(conn, &c.tally.Failed, "a slow answer: %v", err)
	}
	return true
}

func (c *canary) slowRequest(conn *conn) error {
	number := rand.Uint64()
	request, err := http.NewRequest("GET", "http://drill"+slowPath+"?stream="+strconv.FormatUint(number, 10), nil)
	if err != nil {
		return err
	}
	request.Close = true
	c.tally.count(func(r *Report) { r.Requests++ })
	conn.SetDeadline(time.Now().Add(patience + slowPieces*slowPause))
	if err := request.Write(conn); err != nil {
		return err
	}
	response, err := http.ReadResponse(bufio.NewReader(conn), request)
	if err != nil {
		return err
	}
	check := checker{stream: streamOf(number)}
	n, err := io.Copy(feeder{&check}, response.Body)
	if err != nil {
		return fmt.Errorf("after %d bytes of it: %w", n, err)
	}
	if d := check.end(slowPieces * slowPiece); response.StatusCode != http.StatusOK || d != (Damage{}) {
		return fmt.Errorf("%s; its bytes: %s", response.Status, d)
	}
	return nil
}

type feeder struct{ *checker }

func (f feeder) Write(b []byte) (int, error) {
	f.feed(b)
	return len(b), nil
}
