package http2

import (
	"io"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"

	"holdfast/internal/metrics"
)

// An endpoint that answers PINGs is alive, however long it says nothing else. One that does not is
// given up, and counted.
func TestAPeerThatAnswersNoPingIsGivenUp(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const interval, answers = time.Minute, 10
		ours, theirs := net.Pipe()
		frames := make(chan http2.Frame) // from the peer's view; closed at the end
		go func() {
			defer close(frames)
			if _, err := io.CopyN(io.Discard, theirs, int64(len(http2.ClientPreface))); err != nil {
				return
			}
			fr := http2.NewFramer(nil, theirs)
			for {
				f, err := fr.ReadFrame()
				if err != nil {
					return
				}
				if ping, ok := f.(*http2.PingFrame); ok {
					frames <- &http2.PingFrame{FrameHeader: ping.FrameHeader, Data: ping.Data}
				}
			}
		}()
		answer := func(f http2.Frame) {
			if err := http2.NewFramer(theirs, nil).WritePing(true, f.(*http2.PingFrame).Data); err != nil {
				t.Error(err)
			}
		}
		timeouts, o := new(metrics.Counter), newTestOwner()
		began := make(chan struct{})
		var client *ClientConn
		go func() {
			defer close(began)
			var err error
			client, err = NewClient(ClientOptions{PingInterval: interval, Counts: ClientCounts{PingTimeouts: timeouts}}).Begin(t.Context(), ours, false, o.owner())
			if err != nil {
				t.Error(err)
			}
		}()
		if err := http2.NewFramer(theirs, nil).WriteSettings(); err != nil {
			t.Fatal(err)
		}
		answer(<-frames)
		<-began
		start := time.Now()
		for range answers {
			answer(<-frames)
		}
		synctest.Wait()
		if quiet := time.Since(start); quiet < answers*interval || !client.Usable() || timeouts.Value() != 0 {
			t.Fatalf("after %v: usable %v, %d timeouts", quiet, client.Usable(), timeouts.Value())
		}
		<-frames // and nobody answers
		asked := time.Now()
		<-o.ended
		if waited := time.Since(asked); waited != pingTimeout {
			t.Errorf("the answer was waited for %v, want %v", waited, pingTimeout)
		}
		if _, more := <-frames; more {
			t.Error("the connection is used on")
		}
		if client.Usable() || timeouts.Value() != 1 {
			t.Errorf("usable %v, %d timeouts", client.Usable(), timeouts.Value())
		}
		theirs.Close()
	})
}
