package accesslog

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"time"
	"unicode/utf8"
)

// Tunnel is what the record of a tunnel's end needs of its opening. It can go to another
// process, whose Log may have other outputs: see [Tunnel.AppendBinary].
type Tunnel struct {
	opening []byte // as appendOpening makes it, which is small
}

// AppendBinary appends at most some 3 KiB, and as a rule a tenth of that. The error is
// nil.
func (t *Tunnel) AppendBinary(b []byte) ([]byte, error) { return append(b, t.opening...), nil }

// UnmarshalBinary makes t what another one was. It keeps no part of data, which may be
// anything.
func (t *Tunnel) UnmarshalBinary(data []byte) error {
	r, err := parseOpening(data)
	if err == nil {
		t.opening = appendOpening(nil, r)
	}
	return err
}

// kept is a string of a record that belongs to a tunnel's opening and to its end.
type kept struct {
	text  *string
	limit int // in a line
}

// kept are all of them.
func (r *Record) kept() [11]kept {
	return [...]kept{
		{&r.Method, maxMethod}, {&r.Target, maxTarget}, {&r.Protocol, maxProtocol}, {&r.Scheme, maxScheme}, {&r.Authority, maxAuthority},
		{&r.Listener, maxName}, {&r.VirtualHost, maxName}, {&r.Route, maxRoute}, {&r.Cluster, maxName}, {&r.Endpoint, maxEndpoint},
		{&r.RequestID, maxRequestID},
	}
}

// cut shortens a string without a difference in any line: what is longer than the limit
// is cut there, too, and no character is shorter there than here.
func cut(s string, limit int) string { return s[:min(len(s), limit+utf8.UTFMax)] }

// appendOpening appends what a tunnel's end has in common with its opening.
func appendOpening(b []byte, r *Record) []byte {
	b = binary.AppendUvarint(b, uint64(max(r.Status, 0)))
	b = binary.AppendUvarint(b, uint64(max(r.Upstream, 0)))
	client := r.Client.Addr()
	if zone := client.Zone(); zone != "" { // the name of an interface may be anything
		client = client.WithZone(cut(zone, maxClient))
	}
	address, _ := netip.AddrPortFrom(client, r.Client.Port()).MarshalBinary() // it never fails
	b = append(binary.AppendUvarint(b, uint64(len(address))), address...)
	for _, k := range r.kept() {
		s := cut(*k.text, k.limit)
		b = append(binary.AppendUvarint(b, uint64(len(s))), s...)
	}
	return b
}

var errOpening = errors.New("access log: this is no opening of a tunnel")

// parseOpening reads what appendOpening has made.
func parseOpening(b []byte) (*Record, error) {
	r, o := new(Record), opening{b, true}
	r.Status, r.Upstream = int(o.number()), time.Duration(o.number())
	if r.Client.UnmarshalBinary(o.bytes()) != nil || r.Status < 0 || r.Upstream < 0 {
		return nil, errOpening
	}
	for _, k := range r.kept() {
		*k.text = string(o.bytes())
	}
	if !o.ok || len(o.rest) > 0 {
		return nil, errOpening
	}
	return r, nil
}

// opening is what is left to read of one.
type opening struct {
	rest []byte
	ok   bool
}

func (o *opening) number() uint64 {
	n, size := binary.Uvarint(o.rest)
	if size <= 0 {
		o.ok, o.rest = false, nil
		return 0
	}
	o.rest = o.rest[size:]
	return n
}

func (o *opening) bytes() []byte {
	n := o.number()
	if n > uint64(len(o.rest)) {
		o.ok, o.rest = false, nil
		return nil
	}
	b := o.rest[:n]
	o.rest = o.rest[n:]
	return b
}
