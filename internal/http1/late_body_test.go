package http1

import (
	"errors"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"holdfast/internal/exchange"
	"holdfast/internal/stream"
	"holdfast/internal/stream/streamtest"
	"holdfast/internal/task"
)

// What Write was given is the caller's again once the task waits, also if it waits for
// the head that Receive sends.
func TestABodyThatWaitsForTheHeadIsTheExchangesOwn(t *testing.T) {
	t.Parallel()
	l := streamtest.New(t)
	c, theirs := adoptClient(t, l, ClientOptions{})
	var up exchange.Upstream
	var err error
	streamtest.Do(l, func() {
		if err = unix.SetsockoptInt(c.conn.FD(), unix.SOL_SOCKET, unix.SO_SNDBUF, 4<<10); err == nil {
			up, err = c.Exchange()
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	// two clients of the same loop
	var a, b stream.Conn
	aOurs, aTheirs := socketPair(t)
	bOurs, bTheirs := socketPair(t)
	streamtest.Do(l, func() { err = errors.Join(l.Adopt(&a, aOurs, nil, nil), l.Adopt(&b, bOurs, nil, nil)) })
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(aTheirs)
	defer unix.Close(bTheirs)
	defer streamtest.Do(l, func() { a.Close(); b.Close() })

	r := &exchange.Request{Method: "POST", Target: "/", Authority: "a.test", ContentLength: 6}
	for range 50 {
		r.Fields.Add("long", strings.Repeat("x", 1<<10))
	}
	e := &driven{t: t, loop: l, up: up}
	if err := e.Send(r); err != nil {
		t.Fatal(err)
	}
	receives := streamtest.Begin(l, func(task *task.Task) { up.Receive(task) })
	unix.Write(aTheirs, []byte("body-A"))
	writes := streamtest.Begin(l, func(task *task.Task) {
		a.Fill(task)
		p := a.Buffered()
		a.Consume(len(p))
		if err := errors.Join(up.Write(task, p), up.Finish(task, nil)); err != nil {
			t.Errorf("send: %v", err)
		}
	})
	for ok := false; !ok; {
		streamtest.Do(l, func() { ok = up.(*clientExchange).next != nil })
	}
	unix.Write(bTheirs, []byte("SECRET"))
	streamtest.Go(l, func(task *task.Task) { b.Fill(task) })
	p := newPeer(t, connOf(t, theirs))
	want, err := appendRequest(nil, r)
	if err != nil {
		t.Fatal(err)
	}
	p.wantBytes(string(want) + "body-A")
	p.send("HTTP/1.1 204 N\r\n\r\n")
	await(t, "the end of the request", writes)
	await(t, "the response", receives)
	e.Close()
}
