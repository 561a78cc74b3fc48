package sni_test

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"holdfast/internal/sni"
)

// helloOf returns the bytes that a client of crypto/tls sends first.
func helloOf(t testing.TB, c *tls.Config) []byte {
	client, server := net.Pipe()
	defer client.Close()
	defer server.Close()
	go tls.Client(client, c).Handshake() // ends with its connection
	server.SetReadDeadline(time.Now().Add(20 * time.Second))
	head := make([]byte, 5)
	if _, err := io.ReadFull(server, head); err != nil {
		t.Fatal(err)
	}
	body := make([]byte, binary.BigEndian.Uint16(head[3:]))
	if _, err := io.ReadFull(server, body); err != nil {
		t.Fatal(err)
	}
	return append(head, body...)
}

func named(t testing.TB, name string) []byte {
	return helloOf(t, &tls.Config{ServerName: name, InsecureSkipVerify: true})
}

// fragment puts the content of a record into records of so many bytes.
func fragment(hello []byte, size int) (out []byte) {
	for rest := hello[5:]; len(rest) > 0; {
		n := min(size, len(rest))
		out = append(out, 22, 3, 1, byte(n>>8), byte(n))
		out = append(out, rest[:n]...)
		rest = rest[n:]
	}
	return out
}

// made is a hello of our own, with these extensions.
func made(extensions ...[]byte) []byte {
	body := append([]byte{3, 3}, make([]byte, 32)...)
	body = append(body, 0, 0, 2, 0x13, 1, 1, 0)
	if extensions != nil {
		all := bytes.Join(extensions, nil)
		body = append(binary.BigEndian.AppendUint16(body, uint16(len(all))), all...)
	}
	return record(append([]byte{1, 0, byte(len(body) >> 8), byte(len(body))}, body...))
}

func record(content []byte) []byte {
	return append([]byte{22, 3, 1, byte(len(content) >> 8), byte(len(content))}, content...)
}

// nameExtension asks for servers.
func nameExtension(names ...string) []byte {
	var list []byte
	for _, n := range names {
		list = append(list, 0, byte(len(n)>>8), byte(len(n)))
		list = append(list, n...)
	}
	size := len(list)
	return append([]byte{0, 0, byte((size + 2) >> 8), byte(size + 2), byte(size >> 8), byte(size)}, list...)
}

func TestScanFindsWhatAClientAsksFor(t *testing.T) {
	t.Parallel()
	hello := named(t, "chat.example.com")
	other := []byte{0, 23, 0, 0} // an extension without content
	large := append([]byte{1, 0, 0x40, 1}, make([]byte, 1000)...)
	for name, c := range map[string]struct {
		sent  []byte
		state sni.State
		found string
	}{
		"a client of crypto/tls":            {hello, sni.Named, "chat.example.com"},
		"what follows is not looked at":     {append(bytes.Clone(hello), "anything"...), sni.Named, "chat.example.com"},
		"TLS 1.2":                           {helloOf(t, &tls.Config{ServerName: "old.example", MaxVersion: tls.VersionTLS12}), sni.Named, "old.example"},
		"in small records":                  {fragment(hello, 100), sni.Named, "chat.example.com"},
		"no name":                           {helloOf(t, &tls.Config{InsecureSkipVerify: true}), sni.Unnamed, ""},
		"no extensions":                     {made(), sni.Unnamed, ""},
		"other extensions":                  {made(other), sni.Unnamed, ""},
		"the case does not count":           {made(other, nameExtension("A.Example")), sni.Named, "a.example"},
		"nor does a dot at the end":         {made(nameExtension("a.example.")), sni.Named, "a.example"},
		"the longest name":                  {made(nameExtension(strings.Repeat("a", 255))), sni.Named, strings.Repeat("a", 255)},
		"a longer one":                      {made(nameExtension(strings.Repeat("a", 256))), sni.Invalid, ""},
		"an empty name":                     {made(nameExtension("")), sni.Invalid, ""},
		"a dot alone":                       {made(nameExtension(".")), sni.Invalid, ""},
		"an empty label":                    {made(nameExtension("a..b")), sni.Invalid, ""},
		"a control character in it":         {made(nameExtension("a\nb")), sni.Invalid, ""},
		"a star":                            {made(nameExtension("*.example")), sni.Invalid, ""},
		"two names":                         {made(nameExtension("a.example", "b.example")), sni.Invalid, ""},
		"the extension twice":               {made(nameExtension("a.example"), nameExtension("a.example")), sni.Invalid, ""},
		"an extension that is cut short":    {made([]byte{0, 0, 0}), sni.Invalid, ""},
		"one that is longer than the hello": {made([]byte{0, 23, 0xff, 0xff}), sni.Invalid, ""},
		"a request of HTTP":                 {[]byte("GET / HTTP/1.1\r\n"), sni.NotTLS, ""},
		"a single byte of that":             {[]byte("G"), sni.NotTLS, ""},
		"another major version":             {[]byte{22, 2}, sni.NotTLS, ""},
		"an empty record":                   {[]byte{22, 3, 1, 0, 0}, sni.NotTLS, ""},
		"a record larger than there are":    {[]byte{22, 3, 1, 0x40, 1}, sni.NotTLS, ""},
		"an alert":                          {[]byte{21, 3, 1, 0, 2, 1, 0}, sni.NotTLS, ""},
		"the hello of a server":             {record([]byte{2, 0, 0, 0}), sni.Invalid, ""},
		"an alert between two records":      {append(record([]byte{1, 0}), 21, 3, 1, 0, 2), sni.Invalid, ""},
		"a hello that nobody needs":         {record(large), sni.TooLarge, ""},
		"too many records":                  {fragment(hello, 1), sni.TooLarge, ""},
		"nothing":                           {nil, sni.More, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if got := sni.Scan(c.sent); got.State != c.state || got.Name != c.found {
				t.Errorf("got %v %q, want %v %q", got.State, got.Name, c.state, c.found)
			}
		})
	}
}

// Whoever waits for the bytes that Scan needs gets there: it never wants bytes that need not
// come, and never says anything else at one place than at another.
func TestScanIsRightAboutWhatItNeedsWhereverAHelloIsCut(t *testing.T) {
	t.Parallel()
	for _, hello := range [][]byte{named(t, "a.example"), fragment(named(t, "a.example"), 60), made(nameExtension("a.example"))} {
		for n := range hello {
			got := sni.Scan(hello[:n])
			if got.State != sni.More {
				t.Fatalf("after %d bytes of %d: %v", n, len(hello), got.State)
			}
			if got.Need <= n || got.Need > len(hello) {
				t.Fatalf("after %d bytes of %d it needs %d", n, len(hello), got.Need)
			}
		}
		steps := 0
		for have := 0; ; steps++ {
			got := sni.Scan(hello[:have])
			if got.State == sni.Named {
				break
			}
			have = got.Need
		}
		if steps > 3*sni.MostRecords {
			t.Errorf("it took %d steps", steps)
		}
	}
}

// Whoever cuts a hello into as many records as there may be does not have us copy it as often.
func TestScanCopiesAHelloOnceAtMost(t *testing.T) {
	padding := append([]byte{0, 21, 0x3e, 0x80}, make([]byte, 16000)...)
	cut := fragment(made(padding), 260)
	cut = cut[:len(cut)-1]
	if state := sni.Scan(cut).State; state != sni.More {
		t.Fatal(state)
	}
	if n := testing.AllocsPerRun(10, func() { sni.Scan(cut) }); n > 1 {
		t.Errorf("%v allocations", n)
	}
}

func FuzzScan(f *testing.F) {
	hello := named(f, "chat.example.com")
	for _, seed := range [][]byte{
		hello, hello[:100], fragment(hello, 300), helloOf(f, &tls.Config{InsecureSkipVerify: true}),
		made(), made(nameExtension("a.example")), made(nameExtension("a", "b")), []byte("GET / HTTP/1.1\r\n\r\n"),
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, sent []byte) {
		whole := sni.Scan(sent)
		if whole.Name != "" != (whole.State == sni.Named) || strings.Trim(whole.Name, "abcdefghijklmnopqrstuvwxyz0123456789.-_") != "" || len(whole.Name) > 255 {
			t.Fatalf("%v %q", whole.State, whole.Name)
		}
		// What is final stays so whatever follows, and is found by whoever asks step by step.
		have := 0
		for {
			got := sni.Scan(sent[:have])
			if got.State != sni.More {
				if got != whole {
					t.Fatalf("after %d bytes %+v, after all %d %+v", have, got, len(sent), whole)
				}
				break
			}
			if got.Need <= have || got.Need > sni.MostBytes {
				t.Fatalf("after %d bytes it needs %d", have, got.Need)
			}
			if got.Need > len(sent) {
				if whole.State == sni.Named || whole.State == sni.Unnamed {
					t.Fatalf("after %d bytes of %d it needs %d of a hello that is there", have, len(sent), got.Need)
				}
				break
			}
			have = got.Need
		}
		if whole.State != sni.Named {
			return
		}
		asked := ""
		server := tls.Server(readOnly{bytes.NewReader(sent)}, &tls.Config{GetConfigForClient: func(h *tls.ClientHelloInfo) (*tls.Config, error) {
			asked = h.ServerName
			return nil, errors.New("that is all")
		}})
		if _ = server.Handshake(); asked != "" && !strings.EqualFold(asked, whole.Name) {
			t.Fatalf("crypto/tls reads %q, and we %q", asked, whole.Name)
		}
	})
}

// readOnly is a connection of which bytes come.
type readOnly struct{ io.Reader }

func (readOnly) Write(p []byte) (int, error)      { return len(p), nil }
func (readOnly) Close() error                     { return nil }
func (readOnly) LocalAddr() net.Addr              { return nil }
func (readOnly) RemoteAddr() net.Addr             { return nil }
func (readOnly) SetDeadline(time.Time) error      { return nil }
func (readOnly) SetReadDeadline(time.Time) error  { return nil }
func (readOnly) SetWriteDeadline(time.Time) error { return nil }
