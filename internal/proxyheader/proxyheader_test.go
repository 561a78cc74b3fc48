package proxyheader_test

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"net"
	"net/netip"
	"strings"
	"testing"

	proxyproto "github.com/pires/go-proxyproto"

	"holdfast/internal/proxyheader"
)

func at(s string) netip.AddrPort {
	if s == "" {
		return netip.AddrPort{}
	}
	return netip.MustParseAddrPort(s)
}

const signature = "\r\n\r\n\x00\r\nQUIT\n"

// v2 is a header of version 2 with its length.
func v2(command, family byte, rest string) string {
	b := append([]byte(signature), command, family)
	b = binary.BigEndian.AppendUint16(b, uint16(len(rest)))
	return string(b) + rest
}

const (
	v4Addresses = "\xc0\x00\x02\x01\x0a\x00\x00\x01\x30\x39\x00\x50" // 192.0.2.1:12345 to 10.0.0.1:80
	mapped      = "\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\xff\xff\xc0\x00\x02\x01" + "\x20\x01\x0d\xb8\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01" + "\x00\x01\x00\x02"
)

// extension is a TLV.
func extension(kind byte, value string) string {
	return string(append([]byte{kind, byte(len(value) >> 8), byte(len(value))}, value...))
}

// checked is a header with a checksum behind other extensions.
func checked(wrong uint32) string {
	rest := v4Addresses + extension(1, "h2") + extension(proxyChecksum, "\x00\x00\x00\x00") + extension(4, "padding")
	h := []byte(v2(0x21, 0x11, rest))
	sum := crc32.Checksum(h, crc32.MakeTable(crc32.Castagnoli)) + wrong
	at := bytes.Index(h, []byte{proxyChecksum, 0, 4}) + 3
	binary.BigEndian.PutUint32(h[at:], sum)
	return string(h)
}

const proxyChecksum = 0x03

// headers are those that mean something; with an error none does.
var headers = []struct {
	name, header        string
	source, destination string // "": none is named
	fails               bool
}{
	{"v1 of IPv4", "PROXY TCP4 192.0.2.1 10.0.0.1 12345 80\r\n", "192.0.2.1:12345", "10.0.0.1:80", false},
	{"v1 of IPv6", "PROXY TCP6 2001:db8::1 ::1 1 65535\r\n", "[2001:db8::1]:1", "[::1]:65535", false},
	{"v1 of IPv4 in IPv6", "PROXY TCP6 ::ffff:192.0.2.1 ::1 1 2\r\n", "192.0.2.1:1", "[::1]:2", false},
	{"v1 unknown", "PROXY UNKNOWN\r\n", "", "", false},
	{"v1 unknown, with addresses", "PROXY UNKNOWN 192.0.2.1 10.0.0.1 12345 80\r\n", "", "", false},
	{"v1 unknown, the longest", "PROXY UNKNOWN " + strings.Repeat("f", 107-16) + "\r\n", "", "", false},
	{"v1 without an end", "PROXY UNKNOWN " + strings.Repeat("f", 107-15) + "\r\n", "", "", true},
	{"v1 of nothing", "PROXY \r\n", "", "", true},
	{"v1 with a bare newline", "PROXY UNKNOWN\n", "", "", true},
	{"v1 with another family", "PROXY TCP4 ::1 ::1 1 2\r\n", "", "", true},
	{"v1 with a zone", "PROXY TCP6 fe80::1%lo ::1 1 2\r\n", "", "", true},
	{"v1 with a large port", "PROXY TCP4 192.0.2.1 10.0.0.1 65536 80\r\n", "", "", true},
	{"v1 in lower case", "proxy TCP4 192.0.2.1 10.0.0.1 1 80\r\n", "", "", true},
	{"v1 glued", "PROXYTCP4 192.0.2.1 10.0.0.1 1 80\r\n", "", "", true},
	{"v2 of IPv4", v2(0x21, 0x11, v4Addresses), "192.0.2.1:12345", "10.0.0.1:80", false},
	{"v2 of IPv4 in IPv6", v2(0x21, 0x21, mapped), "192.0.2.1:1", "[2001:db8::1]:2", false},
	{"v2 with extensions", v2(0x21, 0x11, v4Addresses+extension(1, "h2")+extension(4, "")), "192.0.2.1:12345", "10.0.0.1:80", false},
	{"v2 with a checksum", checked(0), "192.0.2.1:12345", "10.0.0.1:80", false},
	{"v2 with a wrong checksum", checked(1), "", "", true},
	{"v2 with a short checksum", v2(0x21, 0x11, v4Addresses+extension(proxyChecksum, "\x00")), "", "", true},
	{"v2 with half an extension", v2(0x21, 0x11, v4Addresses+"\x01\x00\x05h2"), "", "", true},
	{"v2 local", v2(0x20, 0x00, ""), "", "", false},
	{"v2 local with addresses", v2(0x20, 0x11, v4Addresses), "", "", false},
	{"v2 local with anything", v2(0x20, 0x11, "abc"), "", "", false},
	{"v2 unspecified", v2(0x21, 0x00, ""), "", "", false},
	{"v2 unspecified with anything", v2(0x21, 0x00, "abc"), "", "", false},
	{"v2 of unix", v2(0x21, 0x31, strings.Repeat("/", 216)), "", "", false},
	{"v2 of UDP", v2(0x21, 0x12, v4Addresses), "", "", false},
	{"v2 with too few bytes of addresses", v2(0x21, 0x11, v4Addresses[1:]), "", "", true},
	{"v2 of no family", v2(0x21, 0x41, v4Addresses), "", "", true},
	{"v2 of no command", v2(0x22, 0x11, v4Addresses), "", "", true},
	{"v2 of no version", v2(0x11, 0x11, v4Addresses), "", "", true},
	{"v2, the longest", v2(0x21, 0x11, v4Addresses+extension(4, strings.Repeat("x", 4096-12-3))), "192.0.2.1:12345", "10.0.0.1:80", false},
	{"v2, too long", v2(0x21, 0x11, v4Addresses+extension(4, strings.Repeat("x", 4096-12-2))), "", "", true},
	{"HTTP", "GET / HTTP/1.1\r\n\r\n", "", "", true},
	{"HTTP that resembles it", "PROPFIND / HTTP/1.1\r\n\r\n", "", "", true},
}

// read reads a header as a listener does, from what has come of a connection.
func read(b string) (n int, a proxyheader.Announcement, err error) {
	if n, err = proxyheader.Scan([]byte(b)); err != nil || n == 0 {
		return n, a, err
	}
	a, err = proxyheader.Parse([]byte(b[:n]))
	return n, a, err
}

// Whatever is behind the header, and however much of it has come, does not matter.
func TestAHeaderIsReadInPieces(t *testing.T) {
	t.Parallel()
	for _, c := range headers {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			want := proxyheader.Announcement{Source: at(c.source), Destination: at(c.destination)}
			for _, behind := range []string{"", "G", "GET / HTTP/1.1\r\n\r\n", "PROXY UNKNOWN\r\n", "\n"} {
				n, a, err := read(c.header + behind)
				if c.fails {
					if err == nil {
						t.Fatalf("before %q it is %d bytes that say %v", behind, n, a)
					}
					continue
				}
				if n != len(c.header) || a != want || err != nil {
					t.Fatalf("before %q: %d of %d bytes say %v, %v; want %v", behind, n, len(c.header), a, err, want)
				}
			}
			for i := range len(c.header) {
				n, _, err := read(c.header[:i])
				if n != 0 {
					t.Fatalf("complete after %d bytes of %d", n, len(c.header))
				}
				if err != nil && !c.fails {
					t.Fatalf("refused after %d bytes: %v", i, err)
				}
			}
		})
	}
}

func TestALongHeaderIsRefusedBeforeItHasCome(t *testing.T) {
	t.Parallel()
	for _, b := range []string{"PROXY " + strings.Repeat("x", 101), v2(0x20, 0, strings.Repeat("x", 4097))[:16]} {
		if n, err := proxyheader.Scan([]byte(b)); n != 0 || err != proxyheader.ErrTooLong {
			t.Errorf("%q: %d, %v", b, n, err)
		}
	}
	if proxyheader.MaxSize != 16+int(proxyproto.MaxV2HeaderSize) {
		t.Error("the library has another bound")
	}
}

// What we send the library reads, and so do we.
func TestWhatIsSentIsRead(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ source, destination, text, wantSource, wantDestination string }{
		{"192.0.2.1:12345", "10.0.0.1:80", "PROXY TCP4 192.0.2.1 10.0.0.1 12345 80\r\n", "192.0.2.1:12345", "10.0.0.1:80"},
		{"[2001:db8::1]:1", "[::1]:2", "PROXY TCP6 2001:db8::1 ::1 1 2\r\n", "[2001:db8::1]:1", "[::1]:2"},
		{"[::ffff:192.0.2.1]:1", "10.0.0.1:2", "PROXY TCP4 192.0.2.1 10.0.0.1 1 2\r\n", "192.0.2.1:1", "10.0.0.1:2"},
		{"[2001:db8::1]:1", "10.0.0.1:2", "PROXY TCP6 2001:db8::1 ::ffff:10.0.0.1 1 2\r\n", "[2001:db8::1]:1", "10.0.0.1:2"},
		{"192.0.2.1:0", "[::1]:2", "PROXY TCP6 ::ffff:192.0.2.1 ::1 0 2\r\n", "192.0.2.1:0", "[::1]:2"},
		{"[fe80::1%lo]:1", "[fe80::2%lo]:2", "PROXY TCP6 fe80::1 fe80::2 1 2\r\n", "[fe80::1]:1", "[fe80::2]:2"},
		{"192.0.2.1:1", "", "PROXY TCP4 192.0.2.1 0.0.0.0 1 0\r\n", "192.0.2.1:1", "0.0.0.0:0"},
		{"[::1]:1", "", "PROXY TCP6 ::1 :: 1 0\r\n", "[::1]:1", "[::]:0"},
		{"", "10.0.0.1:80", "PROXY UNKNOWN\r\n", "", ""},
		{"", "", "PROXY UNKNOWN\r\n", "", ""},
	} {
		sent := proxyheader.Announcement{Source: at(c.source), Destination: at(c.destination)}
		if got := string(proxyheader.Append([]byte("x"), 1, sent)); got != "x"+c.text {
			t.Errorf("%q, want %q", got, c.text)
		}
		for _, version := range []int{1, 2} {
			b := proxyheader.Append(nil, version, sent)
			n, a, err := read(string(b) + "behind")
			if want := (proxyheader.Announcement{Source: at(c.wantSource), Destination: at(c.wantDestination)}); n != len(b) || a != want || err != nil {
				t.Errorf("version %d of %v: %d of %d bytes, %v, %v", version, sent, n, len(b), a, err)
			}
			h, err := proxyproto.Read(bufio.NewReader(bytes.NewReader(b)))
			if err != nil || int(h.Version) != version || h.Command.IsLocal() != (c.source == "") {
				t.Errorf("version %d of %v: the library reads %v, %v", version, sent, h, err)
			}
		}
	}
}

// Whatever comes, we find the same header as the library does that reads from a connection,
// of the same length; but for one whose addresses are of no kind, which it refuses, and for
// one with a wrong checksum or extensions that are none, at which it does not look.
func FuzzScanAndTheLibraryAgree(f *testing.F) {
	for _, c := range headers {
		f.Add([]byte(c.header + "behind"))
		f.Add([]byte(c.header[:len(c.header)/2]))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		before := bytes.Clone(b)
		in := bytes.NewReader(b)
		r := bufio.NewReaderSize(in, max(len(b), 16))
		h, libraryErr := proxyproto.Read(r)
		consumed := len(b) - in.Len() - r.Buffered()

		n, err := proxyheader.Scan(b)
		if n < 0 || n > len(b) || n > proxyheader.MaxSize || err != nil && n != 0 {
			t.Fatalf("%d of %d bytes, %v", n, len(b), err)
		}
		if n == 0 {
			if libraryErr == nil {
				t.Fatalf("the library reads %v", h)
			}
			return
		}
		a, err := proxyheader.Parse(b[:n])
		if !bytes.Equal(b, before) {
			t.Fatal("it was changed")
		}
		unspecified := n >= 16 && b[12] == 0x21 && b[13] == 0 && bytes.HasPrefix(b, []byte(signature))
		switch {
		case err != nil && libraryErr == nil:
			if h.Version != 2 || h.Command.IsLocal() {
				t.Fatalf("%v; the library reads %v", err, h)
			}
		case err == nil && libraryErr != nil && !unspecified:
			t.Fatalf("%v; the library says %v", a, libraryErr)
		case err == nil && libraryErr == nil:
			if consumed != n {
				t.Fatalf("%d bytes, for the library %d", n, consumed)
			}
			source, _ := h.SourceAddr.(*net.TCPAddr)
			if (source != nil && !h.Command.IsLocal()) != a.Source.IsValid() {
				t.Fatalf("%v; the library reads %v", a, h)
			}
			if a.Source.IsValid() && (!net.IP(a.Source.Addr().AsSlice()).Equal(source.IP) || int(a.Source.Port()) != source.Port) {
				t.Fatalf("%v; the library reads %v", a, h)
			}
		}
	})
}
