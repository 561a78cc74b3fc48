package proxy

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"time"

	"holdfast/internal/accesslog"
	"holdfast/internal/control"
	"holdfast/internal/tunnel"
	"holdfast/internal/tunnel/inflight"
)

// What generations tell each other of a tunnel. The supervisor keeps it and passes it on,
// and knows nothing of what is in it. Whoever reads it believes no byte of it.

// recordVersion is that of records and states. What has another one is not understood.
const recordVersion = 2

// usualRecord is about how many bytes a record has.
const usualRecord = 384

var errRecord = errors.New("this is no record of a tunnel")

// record is who a tunnel is and where it is found.
type record struct {
	provenance
	id      string
	client  netip.AddrPort // zero for a unix socket
	started time.Time
	place   tunnel.Place
	tag     *accesslog.Tunnel // nil: its end is not recorded
}

// Flags of a record.
const (
	flagSurviveCrash = 1 << iota
	flagMove
	flagCloseRemoved

	// Builds that do not know the following decline tunnels that have them: those stay where
	// they are.
	flagCloseEndpointRemoved
	flagCloseEndpointUnhealthy
	unknownRecord
)

// appendRecord appends the record of a tunnel, with at most control.MaxVaultRecord bytes.
// All fits that there can be; if it did not, the end would not be recorded elsewhere.
func appendRecord(b []byte, d *tunnel.Deposit) []byte {
	begin := len(b)
	p := provenanceOf(d.Origin)
	flags := bits(flagSurviveCrash, p.surviveCrash) | bits(flagMove, p.move) | bits(flagCloseRemoved, p.closeRemoved) |
		bits(flagCloseEndpointRemoved, p.closeLeft) | bits(flagCloseEndpointUnhealthy, p.closeUnhealthy)
	b = append(b, recordVersion, flags)
	b = appendPlace(b, &d.Place)
	b = binary.NativeEndian.AppendUint64(b, uint64(d.Started.UnixNano()))
	l := &p.limits
	for _, n := range []int64{
		int64(l.IdleTimeout), int64(l.MaxAge), int64(l.DrainTimeout), l.Buffer,
		int64(l.KeepAlive.Idle), int64(l.KeepAlive.Interval), int64(l.KeepAlive.Count),
	} {
		b = binary.AppendUvarint(b, uint64(n))
	}
	b = appendAddress(appendAddress(b, d.Client), p.address)
	for _, s := range []string{d.ID, p.listener, p.virtualHost, p.route, p.cluster, p.endpoint} {
		b = appendText(b, brief(s))
	}
	if tag, ok := d.Tag.(*accesslog.Tunnel); ok && tag != nil {
		whole, _ := tag.AppendBinary(b) // it never fails
		if len(whole)-begin <= control.MaxVaultRecord {
			return whole
		}
	}
	return b
}

func bits(flag byte, on bool) byte {
	if on {
		return flag
	}
	return 0
}

func appendPlace(b []byte, p *tunnel.Place) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(p.Loop))
	b = binary.NativeEndian.AppendUint32(b, p.Slot)
	for _, flows := range [...][2]uint64{p.Taken, p.Given, p.Moved} {
		b = binary.NativeEndian.AppendUint64(b, flows[0])
		b = binary.NativeEndian.AppendUint64(b, flows[1])
	}
	return b
}

func appendAddress(b []byte, a netip.AddrPort) []byte {
	at := len(b)
	b, _ = a.AppendBinary(append(b, 0)) // it never fails
	b[at] = byte(len(b) - at - 1)
	return b
}

func appendText(b []byte, s string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

// parseRecord reads what appendRecord has made. It keeps no part of data.
func parseRecord(data []byte) (*record, error) {
	r, in := new(record), reader{rest: data, ok: true}
	version, flags := in.byte(), in.byte()
	if version != recordVersion || flags >= unknownRecord {
		return nil, errRecord
	}
	r.surviveCrash, r.move, r.closeRemoved = flags&flagSurviveCrash != 0, flags&flagMove != 0, flags&flagCloseRemoved != 0
	r.endpointPolicy = endpointPolicy{closeLeft: flags&flagCloseEndpointRemoved != 0, closeUnhealthy: flags&flagCloseEndpointUnhealthy != 0}
	r.place = in.place()
	r.started = time.Unix(0, int64(in.uint64()))
	l := &r.limits
	l.IdleTimeout, l.MaxAge, l.DrainTimeout, l.Buffer = in.duration(), in.duration(), in.duration(), in.positive()
	l.KeepAlive = tunnel.KeepAlive{Idle: in.duration(), Interval: in.duration(), Count: int(in.positive())}
	r.client, r.address = in.address(), in.address()
	for _, s := range []*string{&r.id, &r.listener, &r.virtualHost, &r.route, &r.cluster, &r.endpoint} {
		*s = in.text()
	}
	if in.ok && len(in.rest) > 0 {
		r.tag = new(accesslog.Tunnel)
		in.ok = r.tag.UnmarshalBinary(in.rest) == nil
	}
	if !in.ok {
		return nil, errRecord
	}
	return r, nil
}

// reader reads a record or a state. What is not there is zero, and ok false.
type reader struct {
	rest []byte
	ok   bool
}

func (r *reader) bytes(n uint64) []byte {
	if n > uint64(len(r.rest)) {
		r.ok, r.rest = false, nil
		return nil
	}
	b := r.rest[:n]
	r.rest = r.rest[n:]
	return b
}

func (r *reader) byte() byte {
	if b := r.bytes(1); b != nil {
		return b[0]
	}
	return 0
}

func (r *reader) uint64() uint64 {
	if b := r.bytes(8); b != nil {
		return binary.NativeEndian.Uint64(b)
	}
	return 0
}

func (r *reader) uvarint() uint64 {
	n, size := binary.Uvarint(r.rest)
	if size <= 0 {
		r.ok, r.rest = false, nil
		return 0
	}
	r.rest = r.rest[size:]
	return n
}

// positive is a number that is not negative as an int64.
func (r *reader) positive() int64 {
	n := int64(r.uvarint())
	r.ok = r.ok && n >= 0
	return max(n, 0)
}

func (r *reader) duration() time.Duration { return time.Duration(r.positive()) }

func (r *reader) text() string { return string(r.bytes(r.uvarint())) }

func (r *reader) address() (a netip.AddrPort) {
	if a.UnmarshalBinary(r.bytes(uint64(r.byte()))) != nil {
		r.ok = false
	}
	return a
}

func (r *reader) place() (p tunnel.Place) {
	if b := r.bytes(6); b != nil {
		p.Loop, p.Slot = int(binary.NativeEndian.Uint16(b)), binary.NativeEndian.Uint32(b[2:])
	}
	for _, flows := range [...]*[2]uint64{&p.Taken, &p.Given, &p.Moved} {
		flows[0], flows[1] = r.uint64(), r.uint64()
	}
	return p
}

// Flags of a state. There are two of each, by the socket or the flow.
const (
	flagFinSent = 1 << (2 * iota)
	flagEnded
	flagPiped
	unknownState
)

// appendState appends what becomes of a tunnel on its way, and returns the pipes that
// belong to it.
func appendState(b []byte, s *tunnel.Standing) (_ []byte, files []int) {
	var flags byte
	for i := range 2 {
		flags |= bits(flagFinSent<<i, s.FinSent[i]) | bits(flagEnded<<i, s.Ended[i]) | bits(flagPiped<<i, s.Pipe[i] != 0)
	}
	b = append(b, recordVersion, flags, byte(s.ClosedFirst))
	b = binary.AppendUvarint(b, uint64(max(s.Idle, 0)))
	for i := range 2 {
		b = binary.NativeEndian.AppendUint64(b, s.Moved[i])
		b = append(binary.AppendUvarint(b, uint64(len(s.Held[i]))), s.Held[i]...)
		if s.Pipe[i] != 0 {
			b = binary.AppendUvarint(b, uint64(s.Piped[i]))
			files = append(files, s.Pipe[i])
		}
	}
	return b, files
}

// parseState reads what appendState has made. It keeps no part of data; the descriptors
// are those of the pipes.
func parseState(data []byte, files []int) (tunnel.Standing, error) {
	var s tunnel.Standing
	in := reader{rest: data, ok: true}
	version, flags, first := in.byte(), in.byte(), tunnel.Reason(in.byte())
	s.ClosedFirst, s.Idle = first, in.duration()
	for i := range 2 {
		s.FinSent[i], s.Ended[i] = flags&(flagFinSent<<i) != 0, flags&(flagEnded<<i) != 0
		s.Moved[i] = in.uint64()
		if held := in.bytes(in.uvarint()); len(held) > 0 {
			s.Held[i] = append([]byte(nil), held...)
		}
		if flags&(flagPiped<<i) == 0 {
			continue
		}
		piped := in.positive()
		if len(files) == 0 || piped == 0 || piped > largestPipe {
			return tunnel.Standing{}, errRecord
		}
		s.Pipe[i], s.Piped[i], files = files[0], int(piped), files[1:]
	}
	closed := first == tunnel.Open || first == tunnel.DownstreamClosed || first == tunnel.UpstreamClosed
	held := max(len(s.Held[0]), len(s.Held[1])) <= inflight.BufferSize
	if !in.ok || len(in.rest) > 0 || len(files) > 0 || version != recordVersion || flags >= unknownState || !closed || !held {
		return tunnel.Standing{}, errRecord
	}
	return s, nil
}
