package http1

import (
	"io"
	"strings"
	"testing"

	"holdfast/internal/exchange"
	"holdfast/internal/task"
)

const expecting = "POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\n"

// beginReading has a task of its own read the request's body, and says how that ended.
func beginReading(e exchange.Exchange, tk *task.Task) *error {
	ended := new(error)
	e.Loop().Tasks.Go(runner(func(reader *task.Task) {
		_, *ended = e.Read(reader)
		tk.Wake()
	}))
	tk.Pause() // it waits for the client
	return ended
}

// Nobody waits for a client that does not take its 100 when nobody wants its body any more.
func TestStopReadingEndsTheWaitForA100(t *testing.T) {
	t.Parallel()
	withoutTLS(t, "it fills the socket")
	stopped := make(chan struct{})
	s, _ := clocked(t, noLimits, handlerFunc(func(tk *task.Task, e exchange.Exchange) { // no time is ever over
		clog(e)
		ended := beginReading(e, tk)
		if *ended != nil {
			t.Errorf("it did not wait: %v", *ended)
		}
		e.StopReading()
		for *ended == nil {
			tk.Wait()
		}
		if *ended != errStopped || e.Over() != nil {
			t.Errorf("%v, and the exchange is over: %v", *ended, e.Over())
		}
		close(stopped)
		respond(t, tk, e, 503, "no")
	}))
	p := s.dial()
	p.send(expecting)
	await(t, "the end of the reading", stopped)
	all, err := io.ReadAll(p.r)
	got := strings.TrimLeft(string(all), "\x00")
	if err != nil || !strings.HasPrefix(got, "HTTP/1.1 503 Because\r\nConnection: close\r\n") || !strings.HasSuffix(got, "\r\n\r\nno") {
		t.Errorf("got %q, error %v", got, err)
	}
}

// Nor is it waited for while something else is sent.
func TestStopReadingEndsTheWaitForTheTurnOfA100(t *testing.T) {
	t.Parallel()
	withoutTLS(t, "it fills the socket")
	stopped := make(chan struct{})
	s, _ := clocked(t, noLimits, handlerFunc(func(tk *task.Task, e exchange.Exchange) {
		clog(e)
		e.Loop().Tasks.Go(runner(func(sender *task.Task) {
			if err := e.Inform(sender, &exchange.Response{Status: 103}); err != nil {
				t.Error(err)
			}
			tk.Wake()
		}))
		tk.Pause()
		ended := beginReading(e, tk)
		if *ended != nil {
			t.Errorf("it did not wait: %v", *ended)
		}
		e.StopReading()
		for *ended == nil {
			tk.Wait()
		}
		close(stopped)
		for e.(*serverExchange).sending {
			tk.Wait()
		}
		respond(t, tk, e, 503, "no")
	}))
	p := s.dial()
	p.send(expecting)
	await(t, "the end of the reading", stopped)
	all, err := io.ReadAll(p.r)
	got := strings.TrimLeft(string(all), "\x00")
	if err != nil || !strings.HasPrefix(got, "HTTP/1.1 103 \r\n\r\nHTTP/1.1 503 Because\r\nConnection: close\r\n") || !strings.HasSuffix(got, "\r\n\r\nno") {
		t.Errorf("got %q, error %v", got, err)
	}
}

// What is left of a 100 that nobody waits for stands before all else.
func TestTheRestOfA100LeavesWithWhatComesNext(t *testing.T) {
	t.Parallel()
	for name, inform := range map[string]bool{"a response": false, "an interim response": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := serve(t, noLimits, handlerFunc(func(tk *task.Task, e exchange.Exchange) {
				e.(*serverExchange).out.precede([]byte("the rest "))
				if inform {
					wantErr(t, e.Inform(tk, &exchange.Response{Status: 103, Reason: "\r"}))
					e.Inform(tk, &exchange.Response{Status: 103})
				}
				wantErr(t, e.Respond(&exchange.Response{Status: 503, Reason: "\r"}))
				respond(t, tk, e, 503, "no")
			}))
			p := s.dial()
			p.send(expecting)
			want := "the rest "
			if inform {
				want += "HTTP/1.1 103 \r\n\r\n"
			}
			p.wantBytes(want + "HTTP/1.1 503 Because\r\n")
		})
	}
}
