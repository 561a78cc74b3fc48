package proxy

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"unsafe"

	"holdfast/internal/exchange"
	"holdfast/internal/headers"
	"holdfast/internal/http1"
	"holdfast/internal/route"
)

// Why a route's actions refuse a request.
var (
	errNoPath        = errors.New("the route's regex_rewrite makes no path of the request's")
	errUnresolved    = errors.New("a path that has a dot segment once it is rewritten")
	errNoAuthority   = errors.New("the field of the route's host_rewrite_header holds no host")
	errUnknown       = errors.New("the field of the route's cluster_header names no cluster")
	errLargeBody     = &exchange.StatusError{Status: 413, Text: "a body beyond the route's max_body_size"}
	errLargeHead     = "a head beyond the route's max_head_size"
	errForeignOrigin = "the route's origins do not have the request's"
)

// aim is where a request goes, as its route and its own fields have it.
type aim struct {
	target string   // that the upstream gets
	host   string   // that the upstream gets, from a field; "" means none
	hash   uint64   // for whoever chooses by it
	hashed bool     // there is a hash
	given  []string // values of Set-Cookie that give the client what its hash is made of

	page      string // the origin of the page that may read the answer; "" means none
	preflight bool   // the answer is to a browser's question about a request to come

	edited bool // the request's fields are no longer those that it had
}

// act does what a route asks of every request before it is sent anywhere, or answers. It says
// whether the request goes on.
func (r *request) act() bool {
	of := r.route
	if r.head.Offer != "" && of.Upgrades(r.head.Offer) {
		r.head.Upgrade, r.head.UpgradeBody = r.head.Offer, r.head.ContentLength != 0
	}
	switch {
	case of.MaxHeadSize > 0 && headSize(r.head) > of.MaxHeadSize:
		r.refuse(431, refusedHeadSize, errLargeHead)
	case of.CORS != nil && r.asksAhead(of.CORS):
		r.answerAhead(of.CORS)
	case of.MaxBodySize > 0 && r.head.Upgrade == "" && r.head.ContentLength > of.MaxBodySize:
		r.refuse(413, refusedBodySize, errLargeBody.Text)
	default:
		return true
	}
	return false
}

// headSize is how many bytes a head has, about: what is said to us alone is not there any
// more, what we say is.
func headSize(head *exchange.Request) int64 {
	n := len(head.Method) + len(head.Target) + len(" HTTP/1.1\r\n") + 1 + len("Host: \r\n") + len(head.Authority) + len("\r\n")
	for _, f := range head.Fields {
		n += len(f.Name) + len(f.Value) + len(": \r\n")
	}
	return int64(n)
}

// direct gives the route's own answer.
func (r *request) direct() {
	d := r.route.Direct
	r.routeMetrics.direct.Inc()
	r.reply(answer{status: d.Status, body: d.Body, contentType: d.ContentType, empty: d.Body == ""})
}

// takeAim decides what of a request depends on the request itself, once for all attempts.
func (r *request) takeAim() error {
	of, ok := r.route, false
	if r.aim.target, ok = of.Rewrite(r.target); !ok {
		return errNoPath
	}
	if !r.edge.Path.Permits(r.target, r.aim.target) {
		return errUnresolved
	}
	if of.HostRewriteHeader != "" {
		if r.aim.host, _ = r.head.Fields.Get(of.HostRewriteHeader); r.aim.host != "" && !http1.IsAuthority(r.aim.host) {
			return errNoAuthority
		}
	}
	if of.HasHash() {
		r.aim.hash, r.aim.given, r.aim.hashed = of.Hash(&r.head.Fields, r.client, r.m.options.Random)
	}
	if of.ClusterHeader != "" {
		name, _ := r.head.Fields.Get(of.ClusterHeader)
		cluster, ok := r.m.options.Clusters.Get(name)
		if !ok {
			return errUnknown
		}
		r.cluster = cluster.Name // not a text of the client's
	}
	return nil
}

// choose returns the cluster of a request that has none yet.
func (r *request) choose() string {
	if r.route.SplitByHash && r.aim.hashed {
		return r.route.Cluster(route.Spread(r.aim.hash))
	}
	return r.route.Cluster(r.m.options.Random())
}

// asksAhead notes which page has sent the request, as far as it may read the answer, and says
// whether that asks what it may do (the Fetch standard, CORS-preflight request). What a page
// asks that may not read answers is for the upstream to say.
func (r *request) asksAhead(cors *route.CORS) bool {
	if r.head.Upgrade == "" {
		r.aim.page, r.aim.preflight = cors.Page(r.head.Method, &r.head.Fields)
	}
	return r.aim.preflight
}

// answerAhead tells a browser what a page may do.
func (r *request) answerAhead(cors *route.CORS) {
	var room [4]exchange.Field
	fields := exchange.Fields(room[:0])
	for _, f := range [...]exchange.Field{
		{Name: "Access-Control-Allow-Methods", Value: cors.AllowMethods},
		{Name: "Access-Control-Allow-Headers", Value: cors.AllowHeaders},
		{Name: "Access-Control-Max-Age", Value: cors.MaxAge},
	} {
		if f.Value != "" {
			fields = append(fields, f)
		}
	}
	r.routeMetrics.preflights.Inc()
	r.reply(answer{status: 200, fields: fields, empty: true})
}

// allowPage tells the browser whether the page may read the answer. What an upstream has said
// of that holds where the route's policy does not know the page.
func (r *request) allowPage(f *exchange.Fields, cors *route.CORS) {
	if !f.HasToken("Vary", "Origin") && !f.HasToken("Vary", "*") {
		f.Add("Vary", "Origin")
	}
	if r.aim.page == "" {
		return
	}
	f.Set("Access-Control-Allow-Origin", r.aim.page)
	if cors.Credentials {
		f.Set("Access-Control-Allow-Credentials", "true")
	} else {
		f.Del("Access-Control-Allow-Credentials")
	}
	if cors.ExposeHeaders != "" && !r.aim.preflight {
		f.Set("Access-Control-Expose-Headers", cors.ExposeHeaders)
	}
}

// editRequest changes the fields that the upstream gets: as the virtual host has it, as the
// route has it, as the cluster has it. Each attempt begins with what the client has sent.
func (r *request) editRequest() {
	own, clusters := &r.route.RequestHeaders, r.m.options.Routes.ClusterEdits(r.cluster).Request
	if own[0] == nil && own[1] == nil && clusters == nil {
		return
	}
	fields := &r.head.Fields
	if r.aim.edited {
		*fields = append((*fields)[:0], r.pristine...)
	} else {
		r.pristine = append(r.pristine[:0], *fields...)
		r.aim.edited = true
	}
	for _, e := range [...]*headers.Edits{own[0], own[1], clusters} {
		if e != nil {
			dropTwins(fields, e)
			r.edit(fields, e)
		}
	}
}

// dropTwins removes fields whose names have "_" where one that is removed or set has "-": some
// upstreams take the two for the same, and would believe the client's.
func dropTwins(f *exchange.Fields, e *headers.Edits) {
	*f = slices.DeleteFunc(*f, func(l exchange.Field) bool {
		if strings.IndexByte(l.Name, '_') < 0 {
			return false
		}
		for _, name := range e.Remove {
			if isTwin(l.Name, name) {
				return true
			}
		}
		for i := range e.Set {
			if isTwin(l.Name, e.Set[i].Name) {
				return true
			}
		}
		return false
	})
}

// isTwin says whether a name only resembles another one.
func isTwin(name, of string) bool {
	return len(name) == len(of) && resembles(name, of) && !strings.EqualFold(name, of)
}

// forgetPristine lets go of the request's texts, and keeps the room.
func (r *request) forgetPristine() {
	if len(r.pristine) > 0 {
		clear(r.pristine)
		r.pristine = r.pristine[:0]
	}
}

// prepareAction is [request.prepare], for what routes and clusters ask of responses.
func (r *request) prepareAction(resp *exchange.Response) {
	if r.route == nil {
		return
	}
	for _, e := range r.route.ResponseHeaders {
		r.edit(&resp.Fields, e)
	}
	r.edit(&resp.Fields, r.m.options.Routes.ClusterEdits(r.cluster).Response)
	if cors := r.route.CORS; cors != nil && r.head.Upgrade == "" {
		r.allowPage(&resp.Fields, cors)
	}
	for _, cookie := range r.aim.given {
		if r.scheme == "https" {
			cookie = r.head.Texts.Join(cookie, "; Secure")
		}
		resp.Fields.Add("Set-Cookie", cookie)
	}
}

// edit changes fields. A value of which nothing is left makes no field: what is set is gone
// then, so that nobody's else's value takes its place.
func (r *request) edit(f *exchange.Fields, e *headers.Edits) {
	if e == nil {
		return
	}
	for _, name := range e.Remove {
		f.Del(name)
	}
	for i := range e.Set {
		l := &e.Set[i]
		if value := r.text(&l.Value); value != "" {
			f.Set(l.Name, value)
		} else {
			f.Del(l.Name)
		}
	}
	for i := range e.Add {
		l := &e.Add[i]
		if value := r.text(&l.Value); value != "" {
			f.Add(l.Name, value)
		}
	}
}

// text puts a value together, in the request's memory.
func (r *request) text(v *headers.Value) string {
	if text, fixed := v.Text(); fixed {
		return text
	}
	var room [headers.MostParts]string
	return r.head.Texts.Join(v.Append(room[:0], r)...)
}

// startFormat is RFC 3339 to the millisecond.
const startFormat = "2006-01-02T15:04:05.000Z"

// Variable implements [headers.Source].
func (r *request) Variable(v headers.Variable, name string) string {
	switch v {
	case headers.RemoteAddress:
		return r.addressText(r.client)
	case headers.RequestField:
		return r.field(name)
	case headers.Protocol:
		return protocol(r.head)
	case headers.Hostname:
		return r.m.hostname
	case headers.StartTime:
		var space [2 * len(startFormat)]byte // there are years of five digits
		return r.made(r.began.UTC().AppendFormat(space[:0], startFormat))
	case headers.UpstreamCluster:
		return r.cluster
	case headers.UpstreamHost:
		if r.endpoint != nil {
			return r.endpoint.Address
		}
	case headers.RouteName:
		return r.route.Name
	case headers.RequestID:
		return r.id
	}
	return ""
}

// field returns a field of the request as it is now, or what HTTP/2 has for one.
func (r *request) field(name string) string {
	switch name {
	case ":authority":
		return r.authority
	case ":method":
		return r.head.Method
	case ":path":
		return r.original
	case ":scheme":
		return r.scheme
	}
	value, _ := r.head.Fields.Get(name)
	return value
}

func (r *request) addressText(of netip.Addr) string {
	if !of.IsValid() {
		return ""
	}
	var space [64]byte // the longest one has 39
	return r.made(of.AppendTo(space[:0]))
}

// made copies a text into the request's memory.
func (r *request) made(text []byte) string {
	return r.head.Texts.Join(unsafe.String(unsafe.SliceData(text), len(text)))
}
