package stream_test

import (
	"bytes"
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"

	"holdfast/internal/stream"
	"holdfast/internal/task"
	"holdfast/internal/tlstest"
)

// sides are the configurations of both sides of TLS.
type sides struct{ server, client *tls.Config }

// newSides returns those for one version, 0: whatever they agree on.
func newSides(t testing.TB, version uint16) sides {
	t.Helper()
	a := tlstest.NewAuthority(t)
	leaf := a.Leaf([]string{"a.test"}).Certificate
	return sides{
		server: &tls.Config{Certificates: []tls.Certificate{leaf}, MinVersion: version, MaxVersion: version},
		client: &tls.Config{RootCAs: a.Pool(), ServerName: "a.test", MinVersion: version, MaxVersion: version},
	}
}

// of returns that of one side, and that of the other.
func (s sides) of(server bool) (near, far *tls.Config) {
	if server {
		return s.server, s.client
	}
	return s.client, s.server
}

// tlsOf is crypto/tls over a connection of package net.
func tlsOf(conn net.Conn, config *tls.Config, server bool) *tls.Conn {
	if server {
		return tls.Server(conn, config)
	}
	return tls.Client(conn, config)
}

// secure has both ends of a connection use TLS, c as its server or client.
func (w *world) secure(c *stream.Conn, far net.Conn, s sides, server bool) *tls.Conn {
	w.t.Helper()
	near, other := s.of(server)
	conn := tlsOf(far, other, !server)
	failed := make(chan error, 1)
	go func() { failed <- conn.Handshake() }()
	w.run(func(t *task.Task) {
		if err := c.Handshake(t, near, server); err != nil {
			w.t.Errorf("the handshake: %v", err)
		}
	})
	if err := <-failed; err != nil {
		w.t.Fatalf("the handshake of the peer: %v", err)
	}
	return conn
}

// a wired connection is one in the hands of a test.
type wired struct {
	halfConn
	write func([]byte) (int, error) // nil: as it is
	read  func([]byte) (int, error)
}

func (w *wired) Write(p []byte) (int, error) {
	if w.write != nil {
		return w.write(p)
	}
	return w.halfConn.Write(p)
}

func (w *wired) Read(p []byte) (int, error) {
	if w.read != nil {
		return w.read(p)
	}
	return w.halfConn.Read(p)
}

// inPieces has what is written leave n bytes at a time.
func inPieces(far halfConn, n int) *wired {
	return &wired{halfConn: far, write: func(p []byte) (all int, err error) {
		for all < len(p) && err == nil {
			var more int
			more, err = far.Write(p[all:min(all+n, len(p))])
			all += more
		}
		return all, err
	}}
}

// errNoNotice is the end of a connection of which TLS does not know.
var errNoNotice = errors.New("a FIN without close_notify")

// strict has the end of a connection, which crypto/tls takes for one of TLS, fail.
func strict(far halfConn) *wired {
	return &wired{halfConn: far, read: func(p []byte) (int, error) {
		n, err := far.Read(p)
		if err == io.EOF {
			err = errNoNotice
		}
		return n, err
	}}
}

// author writes records of TLS 1.3 that crypto/tls would not, as the side whose secret is in a
// key log, which has sent nothing but its handshake.
type author struct {
	t      testing.TB
	hash   crypto.Hash
	size   int // of the key
	secret []byte
	count  uint64
	aead   cipher.AEAD
	iv     []byte
}

func newAuthor(t testing.TB, keyLog *bytes.Buffer, conn *tls.Conn, server bool) *author {
	t.Helper()
	label := "CLIENT_TRAFFIC_SECRET_0 "
	if server {
		label = "SERVER_TRAFFIC_SECRET_0 "
	}
	a := &author{t: t, hash: crypto.SHA256, size: 16}
	switch suite := conn.ConnectionState().CipherSuite; suite {
	case tls.TLS_AES_128_GCM_SHA256:
	case tls.TLS_AES_256_GCM_SHA384:
		a.hash, a.size = crypto.SHA384, 32
	default:
		t.Skipf("the test does not know %s", tls.CipherSuiteName(suite))
	}
	for line := range strings.Lines(keyLog.String()) {
		if rest, ok := strings.CutPrefix(line, label); ok {
			_, text, _ := strings.Cut(strings.TrimSpace(rest), " ")
			secret, err := hex.DecodeString(text)
			if err != nil {
				t.Fatal(err)
			}
			a.use(secret)
			return a
		}
	}
	t.Fatal("no secret was logged")
	return nil
}

func (a *author) use(secret []byte) {
	block, err := aes.NewCipher(a.expand(secret, "key", a.size))
	if err != nil {
		a.t.Fatal(err)
	}
	if a.aead, err = cipher.NewGCM(block); err != nil {
		a.t.Fatal(err)
	}
	a.secret, a.count, a.iv = secret, 0, a.expand(secret, "iv", 12)
}

// expand is HKDF-Expand-Label (RFC 8446 §7.1).
func (a *author) expand(secret []byte, label string, n int) []byte {
	info := binary.BigEndian.AppendUint16(nil, uint16(n))
	info = append(info, byte(len("tls13 "+label)))
	info = append(append(info, "tls13 "+label...), 0)
	p, err := hkdf.Expand(a.hash.New, secret, string(info), n)
	if err != nil {
		a.t.Fatal(err)
	}
	return p
}

// record is one of a content type.
func (a *author) record(typ byte, content []byte) []byte {
	nonce := bytes.Clone(a.iv)
	binary.BigEndian.PutUint64(nonce[4:], binary.BigEndian.Uint64(nonce[4:])^a.count)
	a.count++
	header := binary.BigEndian.AppendUint16([]byte{23, 3, 3}, uint16(len(content)+1+a.aead.Overhead()))
	return a.aead.Seal(header, nonce, append(bytes.Clone(content), typ), header)
}

// keyUpdate is a request for new keys, which begins with new ones itself.
func (a *author) keyUpdate() []byte {
	r := a.record(22, []byte{24, 0, 0, 1, 1})
	a.use(a.expand(a.secret, "traffic upd", a.hash.Size()))
	return r
}

// wantData fails unless these bytes come.
func wantData(t *task.Task, c *stream.Conn, want []byte) error {
	for at := 0; at < len(want); {
		if len(c.Buffered()) == 0 {
			if err := c.Fill(t); err != nil {
				return fmt.Errorf("after %d of %d bytes: %w", at, len(want), err)
			}
		}
		b := c.Buffered()
		b = b[:min(len(b), len(want)-at)]
		if !bytes.Equal(b, want[at:at+len(b)]) {
			return fmt.Errorf("other bytes behind %d", at)
		}
		at += len(b)
		c.Consume(len(b))
	}
	return nil
}
