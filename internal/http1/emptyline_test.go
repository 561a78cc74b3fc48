package http1

import (
	"testing"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/stream/streamtest"
)

const postOne = "POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 1\r\n\r\nx"

// Some clients send an empty line behind a body (RFC 9112 §2.2): it begins no request, so
// none is due afterwards.
func TestAnEmptyLineBeginsNoRequest(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name  string
		first string   // what is sent at once
		later []string // what comes of the line behind that
		left  string   // and what comes of it with the next request
	}{
		{"with a request", postOne + "\r\n", nil, ""},
		{"behind a request", postOne, []string{"\r\n"}, ""},
		{"behind a request, byte by byte", postOne, []string{"\r", "\n"}, ""},
		{"half of it with a request", postOne + "\r", nil, "\n"},
		{"half of it behind a request", postOne, []string{"\r"}, "\n"},
		{"before the first request", "", []string{"\r\n"}, ""},
		{"half of it before the first request", "", []string{"\r"}, "\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s, clock := clocked(t, config.ListenerLimits{HeadTimeout: 5 * time.Second, IdleTimeout: time.Minute}, echo(t))
			begin := func() (p *peer, idle time.Time) {
				p = s.dial()
				s.await(1)
				received, _ := bytesOf(s.counted)
				if p.send(tt.first); tt.first != "" {
					p.want(200, "POST / x", false)
				}
				idle = clock.Now()
				received += int64(len(tt.first))
				s.wantReceived(received)
				for _, piece := range tt.later {
					clock.Advance(10 * time.Second)
					p.send(piece)
					received += int64(len(piece))
					s.wantReceived(received)
				}
				return p, idle
			}

			p, _ := begin()
			clock.Advance(6 * time.Second) // a head were too late
			s.wantParked(1)
			p.send(tt.left + postOne)
			p.want(200, "POST / x", false)
			p.conn.Close()
			s.await(0)

			p, idle := begin() // an empty line does not put off the end
			clock.Advance(idle.Add(time.Minute + granularity).Sub(clock.Now()))
			p.wantEOF()
			if n := len(s.refused); n > 0 {
				t.Errorf("%d requests were refused", n)
			}
		})
	}
}

// wantParked fails when not just so many connections wait for a request, or one of them has
// a task.
func (s *testServer) wantParked(n int) {
	s.t.Helper()
	s.wantOpen(n)
	streamtest.Do(s.loop, func() {
		if tasks := s.loop.Tasks.Live(); tasks > 0 {
			s.t.Errorf("%d tasks", tasks)
		}
	})
}

// A connection with an empty line goes on elsewhere as any other one does.
func TestAConnectionWithAnEmptyLineIsHandedOver(t *testing.T) {
	t.Parallel()
	withoutTLS(t, "idle connections stay")
	for _, line := range []string{"\r\n", "\r"} {
		s := serve(t, noLimits, echo(t))
		p := s.dial()
		s.await(1)
		p.send(line)
		s.wantReceived(int64(len(line)))
		k := taken{offer: true}
		s.HandOver(k.give) // nobody takes it yet
		s.wantParked(1)

		k.offer = false
		s.HandOver(k.give)
		i := k.wait(t, 1)[0]
		s.wantOpen(0)
		other := serve(t, noLimits, echo(t))
		streamtest.Do(other.loop, func() { other.Take(other.loop, i) })
		other.wantParked(1)
		p.send("\r\n"[len(line):] + postOne + "\r\n")
		p.want(200, "POST / x", false)
		other.wantParked(1)
	}
}

// One that comes with a connection is as good as one that is read from it.
func TestAnEmptyLineThatAnotherHasReadBeginsNoRequest(t *testing.T) {
	t.Parallel()
	for _, early := range []string{"\r", "\r\n", "\r\n" + postOne[:9]} {
		s, clock := clocked(t, config.ListenerLimits{HeadTimeout: 5 * time.Second}, echo(t))
		ours, theirs := tcpPair(t)
		fd := release(t, ours)
		streamtest.Do(s.loop, func() {
			s.Take(s.loop, Idle{FD: fd, Remote: remoteOf(theirs), Early: []byte(early), Since: clock.Now()})
		})
		p := newPeer(t, theirs)
		s.settled()
		if len(early) <= 2 {
			clock.Advance(6 * time.Second)
			s.wantParked(1)
		}
		p.send(("\r\n" + postOne)[len(early):])
		p.want(200, "POST / x", false)
	}
}
