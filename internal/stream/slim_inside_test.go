package stream

import (
	"bytes"
	"crypto/tls"
	"io"
	"net"
	"testing"
	"unsafe"

	"holdfast/internal/tlstest"
)

// What crypto/tls has may change with a version of Go: then idle connections cost more, until
// somebody has looked at what has become of its buffers.
func TestTheBuffersOfTLSAreWhereTheyAreLookedFor(t *testing.T) {
	t.Parallel()
	if !canSlim {
		t.Error("the buffers of crypto/tls cannot be given up")
	}
}

func TestAFieldThatIsNotAsExpectedIsNotUsed(t *testing.T) {
	t.Parallel()
	if _, ok := fieldOf[bytes.Buffer]("nowhere"); ok {
		t.Error("a field is found that is not there")
	}
	if _, ok := fieldOf[bytes.Reader]("rawInput"); ok {
		t.Error("a field of another type is taken")
	}
}

// What is given up is what nobody needs, and the connection goes on: also where nothing can be.
// It changes canSlim, and so runs beside no other test.
func TestBuffersAreGivenUpBetweenRecords(t *testing.T) {
	had := canSlim
	defer func() { canSlim = had }()
	for _, can := range []bool{had, false} {
		canSlim = can
		authority := tlstest.NewAuthority(t)
		near, far := net.Pipe()
		server := tls.Server(near, &tls.Config{Certificates: []tls.Certificate{authority.Leaf([]string{"a.test"}).Certificate}})
		client := tls.Client(far, &tls.Config{RootCAs: authority.Pool(), ServerName: "a.test"})
		sent := bytes.Repeat([]byte("0123456789abcdef"), 8<<10) // more than the records that are small at first
		const rounds = 3
		go func() {
			for range rounds {
				_, _ = client.Write(sent)
			}
		}()
		s := &Secure{conn: server}
		raw := func() int { return (*bytes.Buffer)(unsafe.Add(unsafe.Pointer(s.conn), rawInputAt)).Cap() }
		got := make([]byte, len(sent))
		for round := range rounds {
			if _, err := io.ReadFull(server, got[:1000]); err != nil {
				t.Fatal(err)
			}
			s.slim() // within a record, of which nothing may be lost
			if _, err := io.ReadFull(server, got[1000:]); err != nil || !bytes.Equal(got, sent) {
				t.Fatalf("round %d: other bytes came than were sent, error %v", round, err)
			}
			before := raw()
			s.slim()
			if after := raw(); can && (before <= mostKept || after != 0) || !can && after != before {
				t.Errorf("round %d, with slim %t: the buffer had %d bytes, and %d then", round, can, before, after)
			}
		}
		near.Close()
		far.Close()
	}
}
