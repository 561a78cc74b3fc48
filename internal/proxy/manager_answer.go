package proxy

import (
	"cmp"
	"log/slog"
	"net"
	"strconv"
	"unsafe"

	"holdfast/internal/accesslog/flags"
	"holdfast/internal/exchange"
)

// answer is a response of our own.
type answer struct {
	status      int
	fields      exchange.Fields // beside those of the body
	body        string          // "": a line with the status and its reason
	contentType string          // of the body; "": text
	empty       bool            // there is no body at all
}

// prepare makes the last changes to the head of a response, an endpoint's or our own, or of
// a 101, before it is sent. Every one passes here once.
func (r *request) prepare(resp *exchange.Response) {
	if r.filter != nil {
		resp.Fields = append(resp.Fields, r.filter.Response...)
	}
	r.introduce(resp)
	r.prepareAction(resp)
	if r.m.options.AccessLog != nil { // last: it is what was sent
		r.logged.keepResponse(r.m.options.AccessLog, resp)
	}
}

func (r *request) redirect() {
	status, location, ok := r.route.Redirect(r.scheme, r.authority, r.target)
	if !ok {
		r.refuse(400, refusedMalformed, "no redirect can be made of the request: it names no host, or no path comes of its path")
		return
	}
	r.routeMetrics.redirects.Inc()
	r.reply(answer{status: status, fields: append(r.ownFields[:0], exchange.Field{Name: "Location", Value: location})})
}

// reply answers by ourselves. Where that fails it settles who is to blame: a client that
// has gone, or we, who give it limited time.
func (r *request) reply(a answer) {
	r.loop.SetDeadline(&r.replyDue.Deadline, &r.replyDue, r.loop.Now().Add(replyTimeout))
	err := r.send(a)
	if err == nil {
		r.complete = true
		return
	}
	cause := clientGone
	switch {
	case r.replyDue.over:
		cause = answerNotTaken
		r.flag(flags.StreamIdle)
	case r.x.Over() == net.ErrClosed:
		cause = cutByTheStop
		r.flag(flags.LocalReset)
	default:
		r.clientLeft = true
		r.flag(flags.DownstreamTermination)
	}
	r.reason = cmp.Or(r.reason, cause)
	if r.logs(slog.LevelDebug) {
		r.log(slog.LevelDebug, "the client did not take its answer", slog.Int("status", a.status), slog.String("reason", cause), slog.Any("err", err))
	}
}

// send sends an answer of our own. If it has no body of its own, the client learns the
// status and nothing else.
func (r *request) send(a answer) error {
	if a.body == "" && !a.empty {
		a.body = r.head.Texts.Join(strconv.Itoa(a.status), " ", reasons[a.status], "\n")
	}
	r.own = exchange.Response{
		Status: a.status, Reason: reasons[a.status], Fields: append(r.ownFields[:0], a.fields...),
		ContentLength: int64(len(a.body)), Close: r.closes() || r.upload.broken(),
	}
	if !a.empty {
		r.own.Fields.Add("Content-Type", cmp.Or(a.contentType, "text/plain; charset=utf-8"))
	}
	r.prepare(&r.own)
	if err := r.x.Respond(&r.own); err != nil {
		return err
	}
	r.begins(a.status)
	if r.head.Method != "HEAD" && !a.empty {
		body := unsafe.Slice(unsafe.StringData(a.body), len(a.body)) // a Write reads only
		if err := r.x.Write(r.task, body); err != nil {
			return err
		}
		r.sent = uint64(len(a.body))
	}
	return r.x.Finish(r.task, nil)
}

// reasons are those of RFC 9110 §15, for what we answer ourselves and for what
// codecs ask us to.
var reasons = map[int]string{
	200: "OK",
	201: "Created",
	202: "Accepted",
	204: "No Content",
	205: "Reset Content",
	301: "Moved Permanently",
	302: "Found",
	303: "See Other",
	304: "Not Modified",
	307: "Temporary Redirect",
	308: "Permanent Redirect",
	400: "Bad Request",
	401: "Unauthorized",
	403: "Forbidden",
	404: "Not Found",
	405: "Method Not Allowed",
	406: "Not Acceptable",
	407: "Proxy Authentication Required",
	408: "Request Timeout",
	409: "Conflict",
	410: "Gone",
	413: "Content Too Large",
	418: "I'm a Teapot",
	429: "Too Many Requests",
	431: "Request Header Fields Too Large",
	451: "Unavailable For Legal Reasons",
	500: "Internal Server Error",
	501: "Not Implemented",
	502: "Bad Gateway",
	503: "Service Unavailable",
	504: "Gateway Timeout",
}
