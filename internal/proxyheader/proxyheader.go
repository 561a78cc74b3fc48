// Package proxyheader is the PROXY protocol, versions 1 and 2: what a proxy says at the
// beginning of a connection of whose it is (https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt).
//
//	n, err := proxyheader.Scan(received)  // 0: more has to come
//	a, err := proxyheader.Parse(received[:n])
//	header = proxyheader.Append(nil, 2, a)
//
// What is said is read and written by a library. Here is what that has no way to do: to find
// out without waiting whether all of a header has come, and to look at no byte behind it.
package proxyheader

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"net"
	"net/netip"

	proxyproto "github.com/pires/go-proxyproto"
)

// MaxSize is the most bytes that a header may have. The protocol allows more of version 2:
// 64 KiB of extensions, of which a usual header has a few dozen.
const MaxSize = prefixV2 + mostV2

const (
	mostV1   = 107  // with the end of its line
	prefixV2 = 16   // with the length of what follows
	mostV2   = 4096 // behind that, as the library has it
)

// Errors of [Scan] and [Parse]. There are others.
var (
	ErrAbsent  = errors.New("what the connection begins with is no PROXY header")
	ErrTooLong = errors.New("the PROXY header is too long")
)

// Announcement is the connection that a header is about, from its client to the proxy that
// was first to take it. Without a valid source it is the proxy's own, as for a health check.
type Announcement struct {
	Source, Destination netip.AddrPort
}

// Scan returns the length of the header that b begins with. 0: it is not complete yet.
func Scan(b []byte) (n int, err error) {
	switch {
	case begins(b, proxyproto.SIGV1):
		return scanV1(b)
	case begins(b, proxyproto.SIGV2):
		return scanV2(b)
	}
	return 0, ErrAbsent
}

// begins says whether b begins with a signature, or is the beginning of it.
func begins(b, signature []byte) bool {
	n := min(len(b), len(signature))
	return bytes.Equal(b[:n], signature[:n])
}

func scanV1(b []byte) (n int, err error) {
	line := b[:min(len(b), mostV1)]
	if i := bytes.IndexByte(line, '\n'); i >= 0 {
		return i + 1, nil
	}
	if len(line) == mostV1 {
		return 0, ErrTooLong
	}
	return 0, nil
}

func scanV2(b []byte) (n int, err error) {
	if len(b) < prefixV2 {
		return 0, nil
	}
	length := int(binary.BigEndian.Uint16(b[prefixV2-2:]))
	switch {
	case length > mostV2:
		return 0, ErrTooLong
	case len(b) < prefixV2+length:
		return 0, nil
	}
	return prefixV2 + length, nil
}

// Parse reads a header, which is all of b, as [Scan] has found it. A header that names no
// addresses of TCP/IP says nothing: the zero Announcement.
func Parse(b []byte) (a Announcement, err error) {
	defer func() {
		if p := recover(); p != nil { // it would cost all connections of the loop
			a, err = Announcement{}, fmt.Errorf("the PROXY header cannot be read: %v", p)
		}
	}()
	if isUnspecified(b) {
		return Announcement{}, nil
	}
	in := bytes.NewReader(b)
	r := bufio.NewReaderSize(in, len(b))
	h, err := proxyproto.Read(r)
	switch {
	case err != nil:
		return Announcement{}, err
	case in.Len()+r.Buffered() > 0:
		return Announcement{}, errors.New("the PROXY header has a wrong length")
	case h.Command.IsLocal():
		return Announcement{}, nil
	}
	if err := verify(b, h); err != nil {
		return Announcement{}, err
	}
	source, destination, ok := h.TCPAddrs()
	if !ok {
		return Announcement{}, nil
	}
	return Announcement{addrPort(source), addrPort(destination)}, nil
}

// isUnspecified says whether the header is one of version 2 for a connection of which the
// sender knows nothing. The library takes it for an error, which a receiver may.
func isUnspecified(b []byte) bool {
	return len(b) >= prefixV2 && begins(b, proxyproto.SIGV2) && b[12] == byte(proxyproto.PROXY) && b[13] == byte(proxyproto.UNSPEC)
}

func addrPort(a *net.TCPAddr) netip.AddrPort {
	ip, _ := netip.AddrFromSlice(a.IP)
	return netip.AddrPortFrom(ip.Unmap(), uint16(a.Port))
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// verify looks at the checksum that a header of version 2 may have among its extensions,
// and so at the form of these.
func verify(b []byte, h *proxyproto.Header) error {
	if h.Version != 2 {
		return nil
	}
	if _, err := h.TLVs(); err != nil {
		return err
	}
	for at := prefixV2 + addressSize(h.TransportProtocol); at+3 <= len(b); {
		value := at + 3
		size := int(binary.BigEndian.Uint16(b[at+1:]))
		if proxyproto.PP2Type(b[at]) == proxyproto.PP2_TYPE_CRC32C {
			if size != crc32.Size {
				return errors.New("the checksum of the PROXY header has a wrong length")
			}
			sum := crc32.Update(0, castagnoli, b[:value])
			sum = crc32.Update(sum, castagnoli, make([]byte, crc32.Size)) // as if it were not there
			sum = crc32.Update(sum, castagnoli, b[value+crc32.Size:])
			if sum != binary.BigEndian.Uint32(b[value:]) {
				return errors.New("the checksum of the PROXY header is wrong")
			}
		}
		at = value + size
	}
	return nil
}

// addressSize is how many bytes addresses of a kind take.
func addressSize(p proxyproto.AddressFamilyAndProtocol) int {
	switch {
	case p.IsIPv4():
		return 2*4 + 2*2
	case p.IsIPv6():
		return 2*16 + 2*2
	case p.IsUnix():
		return 2 * 108
	}
	return 0
}

// Append appends the header of a version, 1 or 2. Where the addresses are of two families
// both are written as IPv6, and a destination that is not known as the address of nothing.
func Append(b []byte, version int, a Announcement) []byte {
	h := proxyproto.Header{Version: byte(version), Command: proxyproto.LOCAL, TransportProtocol: proxyproto.UNSPEC}
	if a.Source.IsValid() {
		source, destination := plain(a.Source), plain(a.Destination)
		h.Command, h.TransportProtocol = proxyproto.PROXY, proxyproto.TCPv4
		if !destination.IsValid() {
			nothing := netip.IPv4Unspecified()
			if source.Addr().Is6() {
				nothing = netip.IPv6Unspecified()
			}
			destination = netip.AddrPortFrom(nothing, 0)
		}
		if source.Addr().Is6() || destination.Addr().Is6() {
			h.TransportProtocol = proxyproto.TCPv6
		}
		h.SourceAddr, h.DestinationAddr = net.TCPAddrFromAddrPort(source), net.TCPAddrFromAddrPort(destination)
	}
	text, err := h.Format()
	if err != nil {
		panic("proxyheader: " + err.Error()) // addresses are valid, and of one family
	}
	return append(b, text...)
}

// plain is an address as headers have it.
func plain(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap().WithZone(""), a.Port())
}
