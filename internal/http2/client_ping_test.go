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

// pipePeer is the other end of a connection in the memory, within a bubble of synctest.
type pipePeer struct {
	t      *testing.T
	conn   net.Conn
	pings  chan [8]byte // that it was sent; closed at the end
	client *ClientConn
	*testOwner
}

// beginOnPipe makes a connection to a peer that says nothing by itself from then on.
func beginOnPipe(t *testing.T, o ClientOptions) *pipePeer {
	ours, theirs := net.Pipe()
	p := &pipePeer{t: t, conn: theirs, pings: make(chan [8]byte), testOwner: newTestOwner()}
	go p.read()
	began := make(chan struct{})
	go func() {
		defer close(began)
		var err error
		if p.client, err = NewClient(o).Begin(t.Context(), ours, false, p.owner()); err != nil {
			t.Error(err)
		}
	}()
	if err := http2.NewFramer(theirs, nil).WriteSettings(); err != nil {
		t.Fatal(err)
	}
	p.answer(<-p.pings)
	<-began
	return p
}

func (p *pipePeer) read() {
	defer close(p.pings)
	if _, err := io.CopyN(io.Discard, p.conn, int64(len(http2.ClientPreface))); err != nil {
		return
	}
	fr := http2.NewFramer(nil, p.conn)
	for {
		f, err := fr.ReadFrame()
		if err != nil {
			return
		}
		if ping, ok := f.(*http2.PingFrame); ok {
			p.pings <- ping.Data
		}
	}
}

func (p *pipePeer) answer(ping [8]byte) {
	if err := http2.NewFramer(p.conn, nil).WritePing(true, ping); err != nil {
		p.t.Error(err)
	}
}

// An endpoint that answers PINGs is alive, however long it says nothing else. One that does not is
// given up, and counted.
func TestAPeerThatAnswersNoPingIsGivenUp(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const interval, answers = time.Minute, 10
		timeouts := new(metrics.Counter)
		p := beginOnPipe(t, ClientOptions{PingInterval: interval, Counts: ClientCounts{PingTimeouts: timeouts}})
		start := time.Now()
		for range answers {
			p.answer(<-p.pings)
		}
		synctest.Wait()
		if quiet := time.Since(start); quiet < answers*interval || !p.client.Usable() || timeouts.Value() != 0 {
			t.Fatalf("after %v: usable %v, %d timeouts", quiet, p.client.Usable(), timeouts.Value())
		}
		<-p.pings // and nobody answers
		asked := time.Now()
		<-p.ended
		if waited := time.Since(asked); waited != pingTimeout {
			t.Errorf("the answer was waited for %v, want %v", waited, pingTimeout)
		}
		if _, more := <-p.pings; more {
			t.Error("the connection is used on")
		}
		if p.client.Usable() || timeouts.Value() != 1 {
			t.Errorf("usable %v, %d timeouts", p.client.Usable(), timeouts.Value())
		}
		p.conn.Close()
	})
}

func TestAConnectionWithoutExchangesEnds(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const idle = time.Minute
		start := time.Now()
		p := beginOnPipe(t, ClientOptions{IdleTimeout: idle})
		<-p.ended
		if lasted := time.Since(start); lasted != idle {
			t.Errorf("it has lasted %v, want %v", lasted, idle)
		}
		if _, ok := p.client.Exchange(nil, false); ok {
			t.Error("it takes an exchange")
		}
		p.conn.Close()
	})
}
