package accesslog

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"slices"
	"time"
	"unicode/utf8"

	"holdfast/internal/accesslog/flags"
)

// Tunnel is what the record of a tunnel's end needs of its opening. It can go to another
// process, whose Log may have other outputs: see [Tunnel.AppendBinary]. One whose client speaks TLS
// goes nowhere, so of that nothing goes with it.
type Tunnel struct {
	opening []byte // as appendOpening makes it, which is small
	tls     *TLS
}

// AppendBinary appends at most some 3 KiB, and as a rule a tenth of that. The error is
// nil.
func (t *Tunnel) AppendBinary(b []byte) ([]byte, error) { return append(b, t.opening...), nil }

// UnmarshalBinary makes t what another one was. It keeps no part of data, which may be
// anything.
func (t *Tunnel) UnmarshalBinary(data []byte) error {
	r, fields, err := parseOpening(data)
	if err == nil {
		t.opening = appendClientAddress(fields.append(appendRecord(nil, r), r.Flags), r)
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
func (l *Log) appendOpening(b []byte, r *Record) []byte {
	begin := len(b)
	b = appendRecord(b, r)
	room := min(mostKept, mostWithFields-(len(b)-begin))
	var fields keptFields
	for _, h := range [...]struct {
		head   head
		names  names
		wanted names
		values []Value
	}{{requestHead, l.request, l.keptRequest, r.RequestFields}, {responseHead, l.response, l.keptResponse, r.ResponseFields}} {
		for i, name := range h.names {
			if i < len(h.values) && h.values[i].Present && slices.Contains(h.wanted, name) {
				fields.add(keptField{h.head, name, h.values[i].Text}, room)
			}
		}
	}
	return appendClientAddress(fields.append(b, r.Flags), r)
}

// appendClientAddress appends it, which has no bytes where it is not known.
func appendClientAddress(b []byte, r *Record) []byte {
	address, _ := r.ClientAddress.WithZone("").MarshalBinary() // it never fails
	return append(binary.AppendUvarint(b, uint64(len(address))), address...)
}

// appendRecord appends what is the same whatever outputs want to know.
func appendRecord(b []byte, r *Record) []byte {
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

// head is one of the two of an exchange.
type head uint8

const (
	requestHead head = iota
	responseHead
	numHeads
)

// keptField is a field that is wanted when the tunnel has ended.
type keptField struct {
	head        head
	name, value string
}

// keptFields are some, together not larger than a tunnel's opening may be.
type keptFields []keptField

const (
	mostKept       = 512  // bytes of them
	mostWithFields = 2048 // bytes of an opening that has some
)

func (f keptFields) size() (n int) {
	for _, k := range f {
		n += len(k.name) + len(k.value) + 4
	}
	return n
}

// add adds a field if there is room, or leaves it out.
func (f *keptFields) add(k keptField, room int) {
	k.value = cut(k.value, maxField)
	if with := append(*f, k); with.size() <= room {
		*f = with
	}
}

// of returns the values of these names.
func (f keptFields) of(h head, names names) []Value {
	values := make([]Value, len(names))
	for _, k := range f {
		if i := slices.Index(names, k.name); i >= 0 && k.head == h {
			values[i] = Value{k.value, true}
		}
	}
	return values
}

// append appends the fields, and the flags of the opening.
func (f keptFields) append(b []byte, s flags.Set) []byte {
	b = binary.AppendUvarint(b, uint64(s))
	b = binary.AppendUvarint(b, uint64(len(f)))
	for _, k := range f {
		b = append(b, byte(k.head))
		for _, s := range [...]string{k.name, k.value} {
			b = append(binary.AppendUvarint(b, uint64(len(s))), s...)
		}
	}
	return b
}

// parseOpening reads what appendOpening has made.
func parseOpening(b []byte) (*Record, keptFields, error) {
	r, o := new(Record), opening{b, true}
	r.Status, r.Upstream = int(o.number()), time.Duration(o.number())
	if r.Client.UnmarshalBinary(o.bytes()) != nil || r.Status < 0 || r.Upstream < 0 {
		return nil, nil, errOpening
	}
	for _, k := range r.kept() {
		*k.text = string(o.bytes())
	}
	known := o.number()
	r.Flags = flags.Set(known)
	var fields keptFields
	for n := o.number(); o.ok && n > 0; n-- {
		h := o.number()
		fields = append(fields, keptField{head(h), string(o.bytes()), string(o.bytes())})
		o.ok = o.ok && h < uint64(numHeads) && fields.size() <= mostKept
	}
	o.ok = r.ClientAddress.UnmarshalBinary(o.bytes()) == nil && r.ClientAddress.Zone() == "" && o.ok
	if !o.ok || known > uint64(flags.Known) || len(o.rest) > 0 {
		return nil, nil, errOpening
	}
	return r, fields, nil
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
