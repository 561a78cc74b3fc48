// Package accesslog records requests and tunnels, in files or on the standard
// output, without ever making them wait.
//
//	log := accesslog.New([]accesslog.Output{{Path: "stdout", Format: "json", File: os.Stdout}}, generation, registry)
//	defer log.Close(time.Second)
//
// There is one record for each ordinary request, when it is over, however it ended;
// one for each tunnel when it opens, and one when it closes. A record is one line of
// at most 4096 bytes, in one write behind what is there already, so the generations
// may share a file and a pipe. Records that find no room because the output is slow,
// and those that could not be written, are dropped and counted.
//
// An output may leave out records by its [Filter], and have a format of package format.
//
// # Fields
//
// The JSON format is an object a line with all of these keys, the text format their
// values in this order, with a space between two.
//
//	time              when it happened, in UTC: 2026-07-27T18:04:05.000000Z. A request
//	                  began duration_seconds before that
//	event             request, tunnel_open or tunnel_close
//	duration_seconds  of the request, to the end of its response; of the handshake; of the tunnel
//	received_bytes    from the client: of the request's body; of the tunnel, what the upstream took
//	sent_bytes        to the client: of the response's body; of the tunnel, what the client took
//	reason            why Holdfast answered by itself or cut the response, or that the client has gone;
//	                  why the tunnel ended
//	flags             what went wrong, as package flags has it; "": nothing
//	status            of the response; 0: none was begun
//	upstream_seconds  until the head of the upstream's response; null, in text -: there was none
//	method, target, protocol
//	                  as the client sent them; in text one string with a space between two
//	scheme            that the client used
//	authority         host and port that the client asked for; of protocol TCP the server that a TLS client asked for
//	client            address and port of who has connected, or unix
//	client_address    the client's, behind proxies that are trusted; empty: not known
//	listener, virtual_host, route, cluster, endpoint
//	                  by their names in the configuration; empty as far as none was chosen
//	generation        that did it; a tunnel may end in another one than it was opened in
//	request_id        the same for a tunnel's two records
//	user_agent, referer, forwarded_for
//	                  the request's fields; in tunnel_close text "", and in JSON left out
//
// Where the client speaks TLS, the JSON format has these before the last three:
//
//	tls_version, server_name
//	                  the version, and the server that it has asked for
//	peer_subject, peer_fingerprint
//	                  of the certificate that it has shown, if it has: the subject, and its SHA-256 in hex
//
// Strings are JSON strings in both formats. Nothing that a client sends can end a line
// or a string, or reach a terminal as a control sequence: whatever cannot be printed
// is escaped, also where JSON does not ask for it. A string that is longer than its
// field may be is cut, and ends with … then.
package accesslog

import (
	"cmp"
	"log/slog"
	"net/netip"
	"os"
	"sync"
	"time"

	"holdfast/internal/accesslog/flags"
	"holdfast/internal/accesslog/format"
	"holdfast/internal/logs"
	"holdfast/internal/metrics"
)

// Output is where records go.
type Output struct {
	Path   string // as configured; no two have the same
	Format string // "text"; anything else means JSON
	File   *os.File

	Custom *format.Format // in place of Format; nil: none
	Events Events         // that are recorded; 0: all
	Filter *Filter        // of these; nil: all

	// Log hears when records begin to be dropped, and why, and when they are written
	// again how many are missing. nil: nobody.
	Log *slog.Logger
}

// Log writes records to its outputs. Its methods may be called concurrently, never
// wait, and do nothing on nil.
type Log struct {
	generation int
	outputs    []output

	// The fields of heads that outputs want, in lower case. kept are those of which a
	// tunnel's end knows.
	request, response         names
	keptRequest, keptResponse names
}

type output struct {
	path   string
	form   *form // one of its kind, or custom
	events Events
	filter *filter // nil: none
	writer *logs.Writer
	log    *slog.Logger
}

// form is how an output has its lines.
type form struct {
	kind   kind
	custom *custom
}

// New returns a Log that writes to all outputs. It owns their files. It starts a
// goroutine for each; [Log.Close] ends them.
func New(outputs []Output, generation int, m *metrics.Registry) *Log {
	l := &Log{generation: generation}
	standard := [...]form{jsonFormat: {kind: jsonFormat}, textFormat: {kind: textFormat}}
	for _, o := range outputs {
		f := &standard[jsonFormat]
		switch {
		case o.Custom != nil:
			f = &form{customFormat, newCustom(o.Custom, &l.request, &l.response)}
		case o.Format == "text":
			f = &standard[textFormat]
		}
		log := cmp.Or(o.Log, slog.New(slog.DiscardHandler)).With("path", o.Path)
		options := counting(m, o.Path)
		options.Notice = func(records uint64, err error) {
			if err != nil {
				log.Error("access log records are being dropped", "err", err)
			} else {
				log.Warn("access log records were dropped", "records", records)
			}
		}
		l.outputs = append(l.outputs, output{
			o.Path, f, cmp.Or(o.Events, AllEvents), newFilter(o.Filter, &l.request), logs.NewWriter(o.File, options), log,
		})
		if cmp.Or(o.Events, AllEvents)&TunnelsClosed != 0 {
			l.keep(f.custom, o.Filter)
		}
	}
	return l
}

// RequestFields returns the names of those fields of a request's head of which a [Record]
// is to have the values.
func (l *Log) RequestFields() []string {
	if l == nil {
		return nil
	}
	return l.request
}

// ResponseFields is the same for the response's head.
func (l *Log) ResponseFields() []string {
	if l == nil {
		return nil
	}
	return l.response
}

// Record is what is known about a request, or about a tunnel that has opened. What
// the client chose may be anything; see the package for what the fields mean.
type Record struct {
	Start    time.Time
	Duration time.Duration // to the end of the response, or of the handshake
	Upstream time.Duration // to the head of the upstream's response; 0: there was none

	RequestID   string
	Listener    string
	VirtualHost string
	Route       string
	Cluster     string
	Endpoint    string

	Client    netip.AddrPort // that has connected; zero for a unix socket
	Method    string
	Scheme    string
	Authority string
	Target    string
	Protocol  string // "HTTP/1.1"

	Status         int    // 0: no response was begun
	Received, Sent uint64 // bytes of the bodies, from and to the client
	Reason         string // why we answered or cut it ourselves; "" if we did neither
	Flags          flags.Set

	UserAgent    string
	Referer      string
	ForwardedFor string // as the client sent it

	// ClientAddress is the client's behind proxies that are trusted, without a zone. Zero: not known.
	ClientAddress netip.Addr

	HealthCheck bool // a health check was answered by ourselves

	TLS *TLS // that the client speaks; nil: none

	// The values of [Log.RequestFields] and [Log.ResponseFields], in their order.
	RequestFields, ResponseFields []Value
}

// TLS is what is known of a client's. It is not changed, and may be shared.
type TLS struct {
	Version    string // "TLSv1.3"
	Cipher     string // as IANA calls it
	ServerName string // that the client has asked for; "": none
	Peer       *Peer  // nil: the client has shown no certificate that was verified
}

// Peer is whose certificate a client has shown. Names in it may be anything that a certificate
// may have.
type Peer struct {
	Subject, Issuer string // as RFC 2253 writes them
	Serial          string // in hex
	Fingerprint     string // SHA-256 in hex
	URIs, DNSNames  string // those that it is for, with a comma between two
}

// Value is that of a field.
type Value struct {
	Text    string // of the first of its lines
	Present bool
}

// End is how a tunnel ended.
type End struct {
	At           time.Time
	Duration     time.Duration
	ToUpstream   uint64 // bytes that the upstream took
	ToDownstream uint64 // bytes that the client took
	Reason       string
	Flags        flags.Set // beside those of the opening
}

// buffers hold lines while they are put together.
var buffers = sync.Pool{New: func() any { return new([maxLine]byte) }}

// Request records a request that is over.
func (l *Log) Request(r *Record) { l.record(request, r) }

// TunnelOpened records a tunnel that has opened. What it returns is for
// [Log.TunnelClosed]; nil if nobody wants to know.
func (l *Log) TunnelOpened(r *Record) *Tunnel {
	if l == nil || len(l.outputs) == 0 {
		return nil
	}
	l.record(tunnelOpen, r)
	return &Tunnel{l.appendOpening(nil, r), r.TLS}
}

func (l *Log) record(e event, r *Record) {
	if l == nil {
		return
	}
	l.write(&occasion{r, e, r.Start, r.Duration, r.Received, r.Sent, r.Reason, r.Flags})
}

// TCP is the protocol of connections that are relayed as they are. Their authority is the
// server that a TLS client has asked for.
const TCP = "TCP"

// TunnelRefused records a connection that was to become a tunnel, and has ended without: as the
// end of one.
func (l *Log) TunnelRefused(r *Record) { l.record(tunnelClose, r) }

// TunnelClosed records the end of a tunnel that this Log, or one of another process, has
// opened; on a nil Tunnel it does nothing.
func (l *Log) TunnelClosed(t *Tunnel, end End) {
	if l == nil || t == nil {
		return
	}
	opening, fields, err := parseOpening(t.opening)
	if err != nil {
		return // a Tunnel that nobody has opened
	}
	opening.TLS = t.tls
	opening.RequestFields, opening.ResponseFields = fields.of(requestHead, l.request), fields.of(responseHead, l.response)
	l.write(&occasion{
		opening, tunnelClose, end.At.Add(-end.Duration), end.Duration, end.ToUpstream, end.ToDownstream, end.Reason, opening.Flags | end.Flags,
	})
}

// write queues a line for every output that is to have one. Outputs in a format of our own
// share it.
func (l *Log) write(o *occasion) {
	buffer := buffers.Get().(*[maxLine]byte)
	defer buffers.Put(buffer)
	var made *form // of line
	var line []byte
	for i := range l.outputs {
		out := &l.outputs[i]
		if out.events&(1<<o.event) == 0 || !out.filter.passes(o) {
			continue
		}
		if out.form != made {
			e := encoder{out.form.kind, buffer[:0]}
			e.occasion(out.form.custom, o, l.generation)
			made, line = out.form, e.line
		}
		_, _ = out.writer.Write(line) // it never fails
	}
}

// Reopen has later records written to the files, by the paths of their outputs, and
// owns the files. Those before are closed when the records before are written.
// Outputs that have no file here stay as they are.
func (l *Log) Reopen(files map[string]*os.File) {
	for path, file := range files {
		if o := l.output(path); o != nil {
			o.writer.Replace(file)
			continue
		}
		_ = file.Close() // nothing was written to it
	}
}

func (l *Log) output(path string) *output {
	if l == nil {
		return nil
	}
	for i := range l.outputs {
		if l.outputs[i].path == path {
			return &l.outputs[i]
		}
	}
	return nil
}

// Close writes what is queued, for at most within, and closes the files. Later records
// are dropped. A file that is stuck in a write is closed when that returns.
func (l *Log) Close(within time.Duration) {
	if l == nil {
		return
	}
	var closing sync.WaitGroup
	for _, o := range l.outputs {
		closing.Go(func() {
			if err := o.writer.Close(within); err != nil {
				o.log.Warn("access log ends before its last records", "err", err)
			}
		})
	}
	closing.Wait()
}
