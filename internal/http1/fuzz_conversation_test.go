package http1

import (
	"bufio"
	"bytes"
	"io"
	"net/http"
	"net/netip"
	"testing"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/exchange"
	"holdfast/internal/stream"
	"holdfast/internal/stream/streamtest"
	"holdfast/internal/task"
)

// FuzzConversation: whatever a client sends, all that it gets are whole responses.
func FuzzConversation(f *testing.F) {
	for _, c := range readCorpus(f) {
		f.Add(append(c.Raw, c.Then...))
	}
	limits := config.ListenerLimits{HeadTimeout: time.Second, BodyTimeout: time.Second, IdleTimeout: time.Second, BodySize: 1 << 20}
	l := streamtest.New(f)
	clock := streamtest.NewClock(l)
	f.Fuzz(func(t *testing.T, raw []byte) {
		ended := make(chan struct{})
		s := NewServer(ServerOptions{
			Limits: limits, Scheme: "http", Log: quiet(), Loops: []*stream.Loop{l}, Ended: func() { close(ended) },
			Handler: handlerFunc(answerWhatever),
		})
		ours, theirs := socketPair(t)
		var far stream.Conn
		streamtest.Do(l, func() {
			if err := l.Adopt(&far, theirs, nil, nil); err != nil {
				t.Error(err)
			}
			s.Serve(l, stream.Passed{FD: ours}, netip.AddrPort{})
		})
		sent := streamtest.Begin(l, func(tk *task.Task) { far.Send(tk, raw, nil, nil) })
		var got []byte
		received := streamtest.Begin(l, func(tk *task.Task) { got, _ = io.ReadAll(connReader{tk, &far}) })
		for over := false; !over; clock.Advance(lingerTime) {
			select {
			case <-ended:
				over = true
			default:
			}
		}
		<-received
		streamtest.Do(l, far.Close)
		<-sent
		r := bufio.NewReader(bytes.NewReader(got))
		for {
			if _, err := r.Peek(1); err != nil {
				return
			}
			resp, err := http.ReadResponse(r, nil)
			if err != nil {
				t.Fatalf("%q is no response: %v", got, err)
			}
			if bytes.Contains(raw, []byte("HEAD")) {
				return // whose answers end where only their reader knows
			}
			if _, err := io.Copy(io.Discard, resp.Body); err != nil {
				t.Fatalf("%q is no whole response: %v", got, err)
			}
		}
	})
}

// answerWhatever answers with what belongs to how the body has ended.
func answerWhatever(tk *task.Task, e exchange.Exchange) {
	_, err := readAll(tk, e)
	if err != nil && exchange.StatusOf(err, 0) == 0 {
		return
	}
	if e.Respond(&exchange.Response{Status: exchange.StatusOf(err, 200), ContentLength: -1}) == nil {
		e.Write(tk, []byte("x"))
		e.Finish(tk, e.Trailers())
	}
}
