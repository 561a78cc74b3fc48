package http2

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"holdfast/internal/http1"
)

const (
	frameHeader = 9        // bytes
	maxFrame    = 16 << 10 // what we take, and say so
	maxTable    = 4096     // bytes of HPACK's table, the default (RFC 9113 §6.5.2)

	// maxContinuations is how many frames may follow the first one of a header block.
	maxContinuations = 64

	// stuckTime is how long a client may take nothing of what it is sent, whatever the stream.
	stuckTime = time.Minute

	// farewell is how long a connection that is given up stays open for its client to read why.
	farewell = time.Second
)

// A wire stands between the library and a client's connection. It knows the frames that pass by
// in both directions, to do what the library does not:
//
//   - Heads of requests and trailers it reads itself, and refuses there what is malformed. The
//     library gets a stand-in by which its handler finds the head: so no field is lost, put in
//     another order, or taken for valid that is not.
//   - It counts what floods are made of, and ends the connection.
//   - It says that the connection is about to be drained, before the library says so finally.
//   - It knows why a stream is reset.
//
// One goroutine reads at a time, one writes; the rest may be called by anybody.
type wire struct {
	net.Conn
	on       wireOwner
	scheme   string        // of requests
	most     int64         // bytes of a head, as HTTP/2 counts it
	head     time.Duration // that one may take; 0: any
	connects bool          // extended CONNECT is offered (RFC 8441)

	// Owned by who reads.
	buf     [4096]byte
	in      []byte // of buf: read and not used
	preface int    // bytes of the client's preface that are still to come
	ready   []byte // for the library
	made    []byte // the memory of ready
	pass    int    // bytes of the frame's payload that pass as they are
	dead    bool   // the library knows that the connection is over: nothing passes any more
	failed  error  // what a read ended with
	last    uint32 // the highest stream that the client has opened
	recent  [128]recentStream
	block   headerBlock
	decoder *hpack.Decoder
	inbound inbound

	outbound
}

// A wireOwner is told what passes. All but the first may be called by several goroutines at once.
type wireOwner interface {
	// opened is told of a request before the library is; false: there are too many.
	opened(id uint32, h *serverHead) bool
	// find returns a request that has not ended, or nil.
	find(id uint32) *serverHead
	// malformed is told of a request that is none.
	malformed(h *serverHead, err error)
	// resetByClient and resetByUs are told that a stream is.
	// The former says whether that is early: it has hardly begun.
	resetByClient(id uint32) (early bool)
	resetByUs(id uint32, code http2.ErrCode)
	// goAway is told that one is sent or was received.
	goAway(byClient bool, code http2.ErrCode)
	flooded(kind flood)
	received(n int)
	sent(n int)
}

// recentStream is one that the client has opened; ended: and of which it has said that nothing
// follows.
type recentStream struct {
	id    uint32
	ended bool
}

// remembered returns a stream that the client has opened not long ago.
func (w *wire) remembered(id uint32) (*recentStream, bool) {
	r := &w.recent[id/2%uint32(len(w.recent))]
	return r, r.id == id
}

// headerBlock is a header block that is being read.
type headerBlock struct {
	id       uint32 // 0: there is none
	flags    http2.Flags
	priority []byte
	frames   int
	encoded  int64
	size     int64 // of the fields
	fields   []hpack.HeaderField
	large    bool // more than is taken; the fields are not all there
	began    time.Time
}

func newWire(conn net.Conn, on wireOwner, scheme string, most int64, head time.Duration) *wire {
	w := &wire{Conn: conn, on: on, scheme: scheme, most: most, head: head, preface: len(http2.ClientPreface)}
	w.in = w.buf[:0]
	w.inbound.began = time.Now()
	w.decoder = hpack.NewDecoder(maxTable, w.field)
	w.decoder.SetMaxStringLength(int(2 * most))
	return w
}

// RemoteAddr implements [net.Conn]. A socket whose client has gone knows of none, and the library
// wants one.
func (w *wire) RemoteAddr() net.Addr {
	if a := w.Conn.RemoteAddr(); a != nil {
		return a
	}
	return new(net.TCPAddr)
}

// Read implements [net.Conn], for the library.
func (w *wire) Read(p []byte) (n int, err error) {
	for {
		switch {
		case len(w.ready) > 0:
			n = copy(p, w.ready)
			w.ready = w.ready[n:]
			return n, nil
		case w.preface > 0:
			n, err = w.take(p[:min(len(p), w.preface)])
			w.preface -= n
			return n, err
		case w.pass > 0:
			n, err = w.take(p[:min(len(p), w.pass)])
			w.pass -= n
			return n, err
		case w.dead:
			w.in = w.buf[:0]
			err = w.fill(1)
		default:
			err = w.next()
		}
		if err != nil {
			return 0, err
		}
	}
}

// take reads into p.
func (w *wire) take(p []byte) (n int, err error) {
	if len(w.in) == 0 && len(p) < len(w.buf) {
		if err := w.fill(1); err != nil {
			return 0, err
		}
	}
	if len(w.in) > 0 {
		n = copy(p, w.in)
		w.in = w.in[n:]
		return n, nil
	}
	return w.receive(p)
}

// fill reads until n bytes are there, which have room in buf.
func (w *wire) fill(n int) error {
	if len(w.in) < n && cap(w.in) < len(w.buf) {
		w.in = w.buf[:copy(w.buf[:], w.in)]
	}
	for len(w.in) < n {
		got, err := w.receive(w.buf[len(w.in):])
		w.in = w.buf[:len(w.in)+got]
		if err != nil && len(w.in) < n {
			return err
		}
	}
	return nil
}

func (w *wire) receive(p []byte) (int, error) {
	if w.failed != nil {
		return 0, w.failed
	}
	n, err := w.Conn.Read(p)
	w.on.received(n)
	w.failed = err
	if n > 0 {
		err = nil
	}
	return n, err
}

// next reads the next frame, as far as that is looked at.
func (w *wire) next() error {
	if err := w.fill(frameHeader); err != nil {
		return err
	}
	f := parseFrameHeader(w.in)
	if kind := w.inbound.frame(f, w.sentFrames.Load(), w.provoked.Load()); kind != noFlood {
		return w.giveUp(kind)
	}
	expected := w.block.id != 0
	switch {
	case f.length > maxFrame:
		w.set(w.in[:frameHeader]) // the library knows what to say
		w.dead = true
	case expected != (f.kind == http2.FrameContinuation) || expected && f.id != w.block.id:
		w.violate()
	case f.kind == http2.FrameHeaders || f.kind == http2.FrameContinuation:
		return w.headers(f)
	case f.kind == http2.FrameData:
		return w.data(f)
	default:
		return w.other(f)
	}
	return nil
}

// set has b be read by the library next.
func (w *wire) set(b []byte) {
	w.made = append(w.made[:0], b...)
	w.ready = w.made
}

// violate has the library end the connection with PROTOCOL_ERROR.
func (w *wire) violate() {
	w.set(appendFrame(nil, http2.FrameHeaders, http2.FlagHeadersEndHeaders, 0, nil))
	w.dead = true
}

// other passes on a frame that is of no interest but for its kind.
func (w *wire) other(f frame) error {
	switch {
	case f.kind == http2.FrameRSTStream && f.length == 4:
		if early := w.on.resetByClient(f.id); early {
			w.inbound.resets++
		}
		if r, ok := w.remembered(f.id); ok {
			r.ended = true
		}
	case f.kind == http2.FrameGoAway && f.length >= 8:
		if err := w.fill(frameHeader + 8); err != nil {
			return err
		}
		w.on.goAway(true, http2.ErrCode(binary.BigEndian.Uint32(w.in[frameHeader+4:])))
	}
	w.passOn(f)
	return nil
}

// passOn has the library read the frame as it is.
func (w *wire) passOn(f frame) {
	w.set(w.in[:frameHeader])
	w.in = w.in[frameHeader:]
	w.pass = f.length
}

// data passes on a part of a body. A body that ends and has not the length that was announced is
// not whole: its stream is reset, so that nobody takes it for a request (RFC 9113 §8.1.1).
func (w *wire) data(f frame) error {
	h := w.on.find(f.id)
	if h == nil {
		w.passOn(f)
		return nil
	}
	n := f.length
	if f.flags.Has(http2.FlagDataPadded) && f.length > 0 {
		if err := w.fill(frameHeader + 1); err != nil {
			return err
		}
		n -= 1 + int(w.in[frameHeader])
	}
	h.received += int64(max(n, 0))
	w.passOn(f)
	if f.flags.Has(http2.FlagDataEndStream) {
		h.ended = true
		if r, ok := w.remembered(f.id); ok {
			r.ended = true
		}
	}
	if f.flags.Has(http2.FlagDataEndStream) && h.short() {
		w.made[4] &^= byte(http2.FlagDataEndStream)
		return w.cut(f)
	}
	return nil
}

// short says that a body has ended before its time, or behind it.
func (h *serverHead) short() bool { return h.declared >= 0 && h.received != h.declared }

// cut passes on the rest of a frame and behind it that the client has reset the stream, and tells
// the client so.
func (w *wire) cut(f frame) error {
	payload := make([]byte, f.length)
	for n := 0; n < len(payload); {
		got, err := w.take(payload[n:])
		if err != nil {
			return err
		}
		n += got
	}
	w.pass = 0
	w.made = append(w.made, payload...)
	w.fail(f.id)
	w.ready = w.made
	return nil
}

// fail ends a stream because what came on it is malformed. The library is told that the client
// has done so, and the client is told why.
func (w *wire) fail(id uint32) {
	w.on.malformed(w.on.find(id), malformedError("a body of another length than announced"))
	w.on.resetByUs(id, http2.ErrCodeProtocol)
	w.provoked.Add(1)
	var code [4]byte
	binary.BigEndian.PutUint32(code[:], uint32(http2.ErrCodeProtocol))
	w.made = appendFrame(w.made, http2.FrameRSTStream, 0, id, code[:])
	w.inject(appendFrame(nil, http2.FrameRSTStream, 0, id, code[:]))
}

// headers reads a HEADERS or CONTINUATION frame.
func (w *wire) headers(f frame) error {
	b := &w.block
	if f.kind == http2.FrameHeaders {
		*b = headerBlock{id: f.id, flags: f.flags, fields: b.fields[:0], began: time.Now()}
		w.decoder.SetEmitEnabled(true)
		if f.id == 0 {
			w.violate()
			return nil
		}
		if w.head > 0 && (!f.flags.Has(http2.FlagHeadersEndHeaders) || len(w.in) < frameHeader+f.length) {
			_ = w.Conn.SetReadDeadline(b.began.Add(w.head))
		}
	} else if b.frames++; b.frames > maxContinuations {
		return w.giveUp(floodOfContinuations)
	}
	payload, err := w.payload(f)
	if err != nil {
		return err
	}
	fragment, ok := payload, true
	if f.kind == http2.FrameHeaders {
		fragment, ok = b.strip(payload)
	}
	b.encoded += int64(len(fragment))
	switch {
	case !ok:
		w.violate()
		return nil
	case b.encoded > 2*w.most:
		return w.giveUp(floodOfHeaders)
	}
	_, err = w.decoder.Write(fragment)
	if err == nil && f.flags.Has(http2.FlagHeadersEndHeaders) {
		if err = w.decoder.Close(); err == nil {
			if w.head > 0 {
				_ = w.Conn.SetReadDeadline(time.Time{})
			}
			return w.endBlock()
		}
	}
	if err != nil {
		w.set(appendFrame(nil, http2.FrameHeaders, http2.FlagHeadersEndHeaders, b.id, []byte{hpackInvalid})) // COMPRESSION_ERROR
		w.dead = true
	}
	return nil
}

// payload reads that of the next frame. It is good until the next read.
func (w *wire) payload(f frame) (p []byte, err error) {
	if frameHeader+f.length <= len(w.buf) {
		if err := w.fill(frameHeader + f.length); err != nil {
			return nil, err
		}
		p = w.in[frameHeader : frameHeader+f.length]
		w.in = w.in[frameHeader+f.length:]
		return p, nil
	}
	w.in = w.in[frameHeader:]
	p = make([]byte, f.length)
	for n := 0; n < len(p); {
		got, err := w.take(p[n:])
		if err != nil {
			return nil, err
		}
		n += got
	}
	return p, nil
}

// strip takes padding and priority from the payload of HEADERS.
func (b *headerBlock) strip(p []byte) ([]byte, bool) {
	padding := 0
	if b.flags.Has(http2.FlagHeadersPadded) {
		if len(p) == 0 {
			return nil, false
		}
		padding, p = int(p[0]), p[1:]
	}
	if b.flags.Has(http2.FlagHeadersPriority) {
		if len(p) < 5 {
			return nil, false
		}
		b.priority, p = append([]byte(nil), p[:5]...), p[5:]
	}
	if padding > len(p) {
		return nil, false
	}
	return p[:len(p)-padding], true
}

// field is told of each that the decoder finds.
func (w *wire) field(f hpack.HeaderField) {
	b := &w.block
	if b.size += int64(f.Size()); b.size > w.most || len(b.fields) == http1.MaxFields+5 { // with those of the request line
		b.large = true
		w.decoder.SetEmitEnabled(false)
		return
	}
	b.fields = append(b.fields, f)
}

// endBlock makes something of a header block that is whole.
func (w *wire) endBlock() error {
	b := w.block
	w.block.id = 0
	defer func() { clear(b.fields) }()
	switch ended := b.flags.Has(http2.FlagHeadersEndStream); {
	case b.id > w.last && b.id%2 == 1:
		w.last = b.id
		w.recent[b.id/2%uint32(len(w.recent))] = recentStream{b.id, ended}
		return w.request(&b, ended)
	default:
		h := w.on.find(b.id)
		switch r, known := w.remembered(b.id); {
		case known && r.ended, h != nil && h.ended: // nothing may follow (RFC 9113 §5.1)
			return w.goodbye(http2.ErrCodeStreamClosed)
		case known && h == nil: // it was sent before the client knew that the stream has ended
			return nil
		case known:
			r.ended = ended
		}
		if h == nil || !ended { // the library says what is wrong
			w.pretend(&b, nil)
			return nil
		}
		h.open = false
		trailers, err := parseTrailers(b.fields)
		switch {
		case err != nil || b.large || h.short():
			w.made = w.made[:0]
			w.fail(b.id)
			w.ready = w.made
		default:
			h.trailers, h.ended = trailers, true
			w.pretend(&b, nil)
		}
	}
	return nil
}

// request is told to the owner, and to the library.
func (w *wire) request(b *headerBlock, ended bool) error {
	h, err := parseHead(b.fields, ended, w.scheme)
	h.began, h.ended = b.began, ended
	if b.large {
		h.refusal, err = http1.Refuse(431, "a head that is too large"), nil
		h.open, h.declared, h.expect = !ended, -1, false
	}
	if h.protocol != "" && err == nil && !w.connects {
		err = malformedError("an extended CONNECT, which was not offered")
	}
	if err != nil {
		w.on.malformed(h, err)
		w.pretend(b, []byte{hpackGet}) // no path: PROTOCOL_ERROR
		return nil
	}
	if !w.on.opened(b.id, h) {
		return w.giveUp(floodOfStreams)
	}
	w.pretend(b, h.standIn(nil, b.id))
	return nil
}

// pretend has the library read a header block in place of the one that came.
func (w *wire) pretend(b *headerBlock, block []byte) {
	flags := b.flags & (http2.FlagHeadersEndStream | http2.FlagHeadersPriority)
	w.set(appendFrame(nil, http2.FrameHeaders, flags|http2.FlagHeadersEndHeaders, b.id, b.priority, block))
}

// giveUp ends the connection of a client that sends what is of no use.
func (w *wire) giveUp(kind flood) error {
	w.on.flooded(kind)
	return w.goodbye(http2.ErrCodeEnhanceYourCalm)
}

// goodbye ends the connection, and tells the client why, as far as that reads.
func (w *wire) goodbye(code http2.ErrCode) error {
	var p [8]byte
	binary.BigEndian.PutUint32(p[:], w.last)
	binary.BigEndian.PutUint32(p[4:], uint32(code))
	w.on.goAway(false, code)
	deadline := time.Now().Add(farewell)
	w.hurry(deadline)
	w.inject(appendFrame(nil, http2.FrameGoAway, 0, 0, p[:]))
	_ = w.Conn.SetReadDeadline(deadline)
	for n := 0; n < 1<<20; {
		got, err := w.Conn.Read(w.buf[:])
		n += got
		if err != nil {
			break
		}
	}
	return io.EOF
}

// A frame is the header of one.
type frame struct {
	length int
	kind   http2.FrameType
	flags  http2.Flags
	id     uint32
}

func parseFrameHeader(b []byte) frame {
	return frame{
		length: int(b[0])<<16 | int(b[1])<<8 | int(b[2]),
		kind:   http2.FrameType(b[3]), flags: http2.Flags(b[4]),
		id: binary.BigEndian.Uint32(b[5:]) &^ (1 << 31),
	}
}

func (f frame) append(b []byte) []byte {
	b = append(b, byte(f.length>>16), byte(f.length>>8), byte(f.length), byte(f.kind), byte(f.flags))
	return binary.BigEndian.AppendUint32(b, f.id)
}

// appendFrame appends one of which the payload is in parts.
func appendFrame(b []byte, kind http2.FrameType, flags http2.Flags, id uint32, payload ...[]byte) []byte {
	f := frame{kind: kind, flags: flags, id: id}
	for _, p := range payload {
		f.length += len(p)
	}
	b = f.append(b)
	for _, p := range payload {
		b = append(b, p...)
	}
	return b
}

// outbound is the direction to the client.
type outbound struct {
	sending sync.Mutex // held while anything is sent
	header  []byte     // of a frame, which is not whole
	store   [frameHeader]byte
	left    int  // bytes of the payload of the frame
	begun   bool // a frame has passed
	within  bool // a header block, of which the next frame is a part: no other may stand there
	rewrite bool // the frame is a reset, of which the payload is held back
	reset   uint32
	code    [4]byte
	tail    []byte // to be sent behind the payload
	edited  []byte // memory

	mu      sync.Mutex
	pending []byte                   // frames that wait for the end of the one that passes
	codes   map[uint32]http2.ErrCode // what RST_STREAM of these streams is to say
	until   time.Time                // when all sending ends; zero: never

	sentFrames atomic.Uint64 // with content
	provoked   atomic.Uint64 // streams that were reset because of what the client has sent
}

// Write implements [net.Conn], for the library.
func (w *wire) Write(p []byte) (int, error) {
	w.sending.Lock()
	b := w.scan(p)
	err := w.send(b)
	w.sending.Unlock()
	if err != nil {
		return 0, err
	}
	w.push()
	return len(p), nil
}

// send sends all of b, as long as the client takes something now and then.
func (w *wire) send(b []byte) error {
	for len(b) > 0 {
		deadline := time.Now().Add(stuckTime)
		w.mu.Lock()
		if !w.until.IsZero() {
			deadline = w.until
		}
		w.mu.Unlock()
		_ = w.Conn.SetWriteDeadline(deadline)
		n, err := w.Conn.Write(b)
		w.on.sent(n)
		b = b[n:]
		if err != nil && (n == 0 || !errors.Is(err, os.ErrDeadlineExceeded)) {
			return err
		}
	}
	return nil
}

// hurry bounds the time of everything that is sent.
func (w *wire) hurry(until time.Time) {
	w.mu.Lock()
	w.until = until
	w.mu.Unlock()
	_ = w.Conn.SetWriteDeadline(until)
}

// inject sends a frame of our own, now or behind the frame that just passes. It may wait as any
// write does.
func (w *wire) inject(frame []byte) {
	w.mu.Lock()
	w.pending = append(w.pending, frame...)
	w.mu.Unlock()
	w.push()
}

// push sends what is pending, if nobody else is about to.
func (w *wire) push() {
	for w.hasPending() && w.sending.TryLock() {
		whole := w.left == 0 && len(w.header) == 0 && w.begun && !w.within
		if whole {
			if w.send(w.takePending()) != nil {
				w.Conn.Close()
			}
		}
		w.sending.Unlock()
		if !whole { // what passes is not, and whoever sends the rest sends ours
			return
		}
	}
}

func (w *wire) hasPending() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.pending) > 0
}

func (w *wire) takePending() []byte {
	w.mu.Lock()
	defer w.mu.Unlock()
	p := w.pending
	w.pending = nil
	return p
}

// resetAs has the stream's reset say another code than INTERNAL_ERROR, if there is one.
func (w *wire) resetAs(id uint32, code http2.ErrCode) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.codes == nil {
		w.codes = make(map[uint32]http2.ErrCode)
	}
	w.codes[id] = code
}

// forget ends what resetAs has begun.
func (w *wire) forget(id uint32) {
	w.mu.Lock()
	delete(w.codes, id)
	w.mu.Unlock()
}

// scan looks at what the library sends, and returns what is to be sent in its place. Headers of
// frames leave whole.
func (w *wire) scan(p []byte) []byte {
	out := outgoing{p: p, b: w.edited[:0]}
	for out.at < len(p) {
		if w.left > 0 {
			n := min(w.left, len(p)-out.at)
			if w.rewrite {
				copy(w.code[len(w.code)-w.left:], p[out.at:out.at+n])
				out.replace(n, nil) // until all of it is there
			} else {
				out.at += n
			}
			w.left -= n
			w.endFrame(&out)
			continue
		}
		if len(w.header) == 0 && len(p)-out.at >= frameHeader {
			f := parseFrameHeader(p[out.at:])
			w.begin(&out, f, frameHeader)
			continue
		}
		n := min(frameHeader-len(w.header), len(p)-out.at)
		w.header = append(w.store[:len(w.header)], p[out.at:out.at+n]...)
		if len(w.header) < frameHeader {
			out.replace(n, nil)
			break
		}
		f := parseFrameHeader(w.header)
		w.header = nil
		out.edit()
		out.at += n
		out.done = out.at
		out.b = append(out.b, w.store[:]...)
		w.begin(&out, f, 0)
	}
	b := out.bytes()
	if out.edited {
		w.edited = b
		if cap(b) > 64<<10 {
			w.edited = nil
		}
	}
	return b
}

// begin begins a frame, of whose header n bytes are next.
func (w *wire) begin(out *outgoing, f frame, n int) {
	w.begun, w.left, w.rewrite, w.tail = true, f.length, false, nil
	if longer := w.offering(f); longer.length != f.length {
		out.replace(n, nil)
		if n == 0 { // the header is there already
			out.b = out.b[:len(out.b)-frameHeader]
		}
		out.b = longer.append(out.b)
		w.tail = []byte{0, byte(http2.SettingEnableConnectProtocol), 0, 0, 0, 1}
		n = 0
	}
	out.at += n
	switch f.kind {
	case http2.FrameHeaders, http2.FrameContinuation:
		w.within = !f.flags.Has(http2.FlagHeadersEndHeaders)
	case http2.FrameData:
		if f.length > 0 {
			w.sentFrames.Add(1)
		}
	case http2.FrameRSTStream:
		w.rewrite, w.reset = f.length == len(w.code), f.id
	case http2.FrameGoAway:
		if rest := out.p[out.at:]; len(rest) >= 8 {
			w.on.goAway(false, http2.ErrCode(binary.BigEndian.Uint32(rest[4:])))
		}
	}
	w.endFrame(out)
}

// offering returns the header of a frame that offers what we do beside the library.
func (w *wire) offering(f frame) frame {
	if f.kind == http2.FrameSettings && !f.flags.Has(http2.FlagSettingsAck) && w.connects {
		f.length += 6
	}
	return f
}

// endReset decides which code a reset says, when all of the frame is there.
func (w *wire) endReset(out *outgoing) {
	code := http2.ErrCode(binary.BigEndian.Uint32(w.code[:]))
	w.mu.Lock()
	if other, ok := w.codes[w.reset]; ok && code == http2.ErrCodeInternal {
		code = other
	}
	delete(w.codes, w.reset)
	w.mu.Unlock()
	binary.BigEndian.PutUint32(w.code[:], uint32(code))
	out.insert(w.code[:])
	if code == http2.ErrCodeProtocol || code == http2.ErrCodeFlowControl || code == http2.ErrCodeStreamClosed || code == http2.ErrCodeRefusedStream {
		w.provoked.Add(1)
	}
	w.on.resetByUs(w.reset, code)
}

// endFrame has what waits follow a frame that has ended.
func (w *wire) endFrame(out *outgoing) {
	if w.left > 0 {
		return
	}
	if len(w.tail) > 0 {
		out.insert(w.tail)
		w.tail = nil
	}
	if w.rewrite {
		w.rewrite = false
		w.endReset(out)
	}
	if w.within {
		return
	}
	if p := w.takePending(); len(p) > 0 {
		out.insert(p)
	}
}

// outgoing is what is written of p, which is copied only if something is changed.
type outgoing struct {
	p      []byte
	at     int // where we are
	done   int // p[:done] is in b, or was left out
	b      []byte
	edited bool
}

func (o *outgoing) edit() {
	o.edited = true
	o.b = append(o.b, o.p[o.done:o.at]...)
	o.done = o.at
}

// replace has other bytes in place of the next n.
func (o *outgoing) replace(n int, by []byte) {
	o.edit()
	o.at += n
	o.done = o.at
	o.b = append(o.b, by...)
}

func (o *outgoing) insert(by []byte) { o.replace(0, by) }

func (o *outgoing) bytes() []byte {
	if !o.edited {
		return o.p
	}
	return append(o.b, o.p[o.done:]...)
}
