package stream

import (
	"sync"

	"golang.org/x/sys/unix"
)

// What a relay uses of the TLS of a socket that a connection has passed on to it ([Passed]). It
// has the socket on a loop, on whose goroutine all of this is called, and nothing of it waits.

// Again is the error of a read that finds nothing.
const Again = unix.EAGAIN

// Read reads once. [Again]: nothing is there, or too much is owed. io.EOF: the peer has
// ended its direction; [Secure.Truncated] says whether it did so properly. Any other error is
// for good.
func (s *Secure) Read(p []byte) (int, error) {
	for {
		// The relay is told of events: only a socket that says so has nothing.
		s.budget, s.dry, s.thirsty = readSize, false, true
		n, err := s.conn.Read(p)
		switch {
		case n > 0:
			return n, nil
		case err != errNothing:
			return 0, err
		case s.dry || s.stalled:
			s.slim()
			return 0, errAgain
		}
	}
}

// batches have memory for what a relay sends at once.
var batches = sync.Pool{New: func() any { return &batch{make([]byte, 0, batchSize)} }}

// Write encrypts some of p, and says how much. What the socket does not take of that is owed:
// nothing more is taken then before [Secure.Flush] has sent it. Any error is for good.
func (s *Secure) Write(p []byte) (n int, err error) {
	if s.owes() {
		return 0, nil
	}
	s.batch = batches.Get().(*batch)
	for n < len(p) && err == nil && len(s.batch.records)+mostRecord <= batchSize {
		b := p[n:min(len(p), n+record)]
		if _, err = s.conn.Write(b); err == nil {
			n += len(b)
		}
	}
	b := s.batch
	s.batch = nil
	if err == nil {
		_, err = (*wire)(s).Write(b.records)
		s.asked = 0
	}
	b.records = b.records[:0]
	batches.Put(b)
	return n, err
}

// Owes says whether something is kept that the socket has not taken: of what was written, or
// what TLS has to say by itself.
func (s *Secure) Owes() bool { return s.owes() }

// Flush sends what is owed, as far as the socket takes it.
func (s *Secure) Flush() error {
	s.sendOwn()
	if s.sendErr == nil && int(s.taken) == len(s.own) {
		s.own, s.taken, s.asked, s.stalled = nil, 0, 0, false
	}
	return s.sendErr
}

// End tells the peer that nothing more comes (close_notify, RFC 8446 §6.1). That may be owed
// then, and the FIN is for after it.
func (s *Secure) End() error { return s.conn.CloseWrite() }
