package upstream

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"

	"holdfast/internal/clienttls"
	"holdfast/internal/config"
	"holdfast/internal/exchange"
	"holdfast/internal/http2"
	"holdfast/internal/stream"
	"holdfast/internal/task"
	"holdfast/internal/upstream/health"
)

// mostAnswer is how much of an answer a check reads: of the body, by HTTP, whose head has a
// limit of its own. What is longer is passed by what has come until then.
const mostAnswer = 64 << 10

// checkAgent is what checks call themselves.
const checkAgent = "holdfast-health-check"

// whereToAsk is the place that checks of the endpoint connect to: of several addresses the one
// that requests try first.
func (e *Endpoint) whereToAsk() (network, address string, err error) {
	if e.Path != "" {
		return "unix", e.Path, nil
	}
	all := interleave(e.Addresses(), e.cluster.cfg.Connecting.Source)
	if len(all) == 0 {
		return "", "", errNowhere
	}
	at := all[0]
	if port := e.cluster.cfg.HealthCheck.Port; port != 0 {
		at = netip.AddrPortFrom(at.Addr(), port)
	}
	return "tcp", at.String(), nil
}

// httpProbe asks an endpoint by HTTP. Its connections are counted nowhere: they are none of the
// cluster's.
type httpProbe struct {
	e       *Endpoint
	cfg     *config.HTTPCheck
	loop    *stream.Loop
	request exchange.Request
	texts   *health.Matcher // nil: nothing is looked for

	attempt   Attempt
	conn      Conn // nil: there is none
	cancelled error
}

func newHTTPProbe(e *Endpoint, l *stream.Loop) *httpProbe {
	cfg := e.cluster.cfg.HealthCheck
	p := &httpProbe{e: e, cfg: cfg.HTTP, loop: l}
	p.request = exchange.Request{Method: cfg.HTTP.Method, Scheme: "http", Authority: cfg.HTTP.Host, Target: cfg.HTTP.Target, Major: 1, Minor: 1}
	if p.request.Authority == "" {
		p.request.Authority = e.Address
		if e.Path != "" { // which is no host
			p.request.Authority = "localhost"
		}
	}
	for _, h := range cfg.HTTP.Headers {
		p.request.Fields = append(p.request.Fields, exchange.Field{Name: h.Name, Value: h.Value})
	}
	if !p.request.Fields.Has("User-Agent") {
		p.request.Fields = append(p.request.Fields, exchange.Field{Name: "User-Agent", Value: checkAgent})
	}
	if cfg.HTTP.Body != "" {
		p.texts = health.NewMatcher([]byte(cfg.HTTP.Body))
	}
	return p
}

// Probe implements [health.Probe].
func (p *httpProbe) Probe(t *task.Task) error {
	p.cancelled = nil
	reused := p.conn != nil
	err := p.ask(t)
	if reused && p.cancelled == nil && errors.Is(err, exchange.ErrNoAnswer) {
		err = p.ask(t) // the endpoint had closed the kept connection meanwhile, which is its right
	}
	if !p.cfg.Reuse {
		p.Close()
	}
	if p.cancelled != nil {
		p.Close()
		return p.cancelled
	}
	return err
}

// ask makes the request, on the kept connection if there is one.
func (p *httpProbe) ask(t *task.Task) error {
	if p.conn != nil && !p.conn.Alive() {
		p.Close()
	}
	if p.conn == nil {
		if err := p.connect(t); err != nil {
			return err
		}
	}
	up, err := p.conn.Exchange()
	if err != nil {
		p.Close()
		return err
	}
	defer up.Close() // which closes the connection unless all is as it should be
	if err := up.Send(t, &p.request); err != nil {
		return err
	}
	if err := up.Finish(t, nil); err != nil && p.cancelled != nil {
		return err
	}
	for {
		resp, err := up.Receive(t)
		switch {
		case err != nil:
			return invalid(err)
		case resp.Status == 101:
			return &health.Failure{Text: "it has changed the protocol unasked"}
		case resp.Status >= 200:
			return p.judge(t, up, resp)
		}
	}
}

// invalid tells an answer that is none from no answer.
func invalid(err error) error {
	if exchange.StatusOf(err, 0) != 0 && !errors.Is(err, io.ErrUnexpectedEOF) {
		return &health.Failure{Text: "the answer is not valid HTTP: " + err.Error()}
	}
	return err
}

// connect makes a connection, which is p.conn until it ends.
func (p *httpProbe) connect(t *task.Task) error {
	network, address, err := p.e.whereToAsk()
	if err != nil {
		return noConnection(err)
	}
	p.attempt = Attempt{source: p.e.cluster.cfg.Connecting.Source, header: p.e.Header(Announcement{})}
	purpose := clienttls.Upgrades
	if p.e.cluster.cfg.Protocol == config.HTTP2 {
		purpose = clienttls.Requests
	}
	if err := p.e.secureCheck(&p.attempt, purpose); err != nil {
		return noConnection(err)
	}
	var ended bool
	until := p.loop.Now().Add(p.e.cluster.cfg.HealthCheck.Timeout)
	conn, err := p.e.cluster.options.Network.Connect(t, p.loop, network, address, until, &p.attempt, Owner{
		Idle:  func(Conn) {},
		Ended: func(bool) { ended, p.conn = true, nil },
		Taken: func() { ended, p.conn = true, nil },
	})
	p.attempt.Wait(nil)
	switch err = p.e.secured(&p.attempt, err); {
	case err != nil:
		return noConnection(err)
	case ended:
		return net.ErrClosed
	}
	if p.e.cluster.cfg.Protocol == config.HTTP2 {
		speaks, err := p.e.speak(t, p.loop, &p.attempt, conn, http2.Owner{Room: func() {}, Ended: func(bool) {}}, until)
		if err != nil {
			return noConnection(err)
		}
		conn = probeConn{speaks, p.loop}
	}
	p.conn = conn
	if p.cancelled != nil {
		return p.cancelled
	}
	return nil
}

// noConnection tells what the endpoint does from what this machine lacks: if that made endpoints
// fail, all of them would at once, when there is too much work anyway.
func noConnection(err error) error {
	if isOurs(err) || clienttls.IsOurs(err) {
		return fmt.Errorf("%w: %w", health.ErrNoResult, err)
	}
	return fmt.Errorf("it cannot be connected to: %w", err)
}

// judge is what a response says, of which the rest is read so that the connection can be kept.
func (p *httpProbe) judge(t *task.Task, up exchange.Upstream, resp *exchange.Response) error {
	if failure := p.judgeHead(resp); failure != nil {
		return failure
	}
	var match health.Match
	if p.texts != nil {
		match.Of = p.texts
	}
	for n := 0; n < mostAnswer; {
		b, err := up.Read(t)
		b = b[:min(len(b), mostAnswer-n)]
		n += len(b)
		if match.Of != nil {
			match.Feed(b)
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			return invalid(err)
		}
	}
	if match.Of != nil && !match.Done() {
		return &health.Failure{Text: "the body does not have the expected text"}
	}
	return nil
}

// judgeHead says what is wrong with a head; nil: nothing is.
func (p *httpProbe) judgeHead(resp *exchange.Response) error {
	if saysFailing(resp.Fields) {
		return &health.Failure{Text: saidSo, AtOnce: true}
	}
	if slices.ContainsFunc(p.cfg.Statuses, func(r config.StatusRange) bool { return r.From <= resp.Status && resp.Status <= r.To }) {
		return nil
	}
	return &health.Failure{Text: fmt.Sprintf("status %d", resp.Status), AtOnce: resp.Status == 503}
}

// Cancel implements [health.Probe].
func (p *httpProbe) Cancel(err error) {
	if p.cancelled == nil {
		p.cancelled = err
	}
	p.attempt.Cancel(err)
	p.Close()
}

// Close implements [health.Probe].
func (p *httpProbe) Close() {
	if conn := p.conn; conn != nil {
		p.conn = nil
		conn.Close()
	}
}

// tcpProbe asks an endpoint by TCP, on a connection of its own each time.
type tcpProbe struct {
	e     *Endpoint
	cfg   *config.EndpointCheck
	texts *health.Matcher
	loop  *stream.Loop

	attempt   Attempt // its TLS
	conn      stream.Conn
	cancelled error
}

func newTCPProbe(e *Endpoint, l *stream.Loop) *tcpProbe {
	cfg := e.cluster.cfg.HealthCheck
	return &tcpProbe{e: e, cfg: cfg, texts: health.NewMatcher(cfg.TCP.Receive...), loop: l}
}

// Probe implements [health.Probe].
func (p *tcpProbe) Probe(t *task.Task) error {
	p.cancelled = nil
	err := p.ask(t)
	p.conn.Close()
	if p.cancelled != nil {
		return p.cancelled
	}
	return err
}

func (p *tcpProbe) ask(t *task.Task) error {
	if err := p.connect(t); err != nil {
		return noConnection(err)
	}
	if err := p.conn.Send(t, p.cfg.TCP.Send, nil, nil); err != nil {
		return err
	}
	match := health.Match{Of: p.texts}
	for n := 0; !match.Done(); {
		err := p.conn.Fill(t)
		b := p.conn.Buffered()
		b = b[:min(len(b), mostAnswer-n)]
		n += len(b)
		switch {
		case match.Feed(b):
		case err == io.EOF:
			return &health.Failure{Text: "the connection ended without the expected texts"}
		case err != nil:
			return err
		case n == mostAnswer:
			return &health.Failure{Text: fmt.Sprintf("the expected texts are not among the first %d KiB", mostAnswer>>10)}
		}
		p.conn.Consume(len(b))
	}
	return nil
}

func (p *tcpProbe) connect(t *task.Task) error {
	p.attempt = Attempt{}
	if err := p.e.secureCheck(&p.attempt, clienttls.Bytes); err != nil {
		return err
	}
	err := p.dial(t)
	if s := p.conn.Secure(); err == nil && s != nil && s.State().DidResume {
		p.attempt.Resumed()
	}
	p.attempt.err = p.cancelled
	return p.e.secured(&p.attempt, err)
}

func (p *tcpProbe) dial(t *task.Task) error {
	o := &stream.DialOptions{
		Until: p.loop.Now().Add(p.cfg.Timeout), MayHave: p.e.cluster.options.MayHave,
		Source: p.e.cluster.cfg.Connecting.Source, First: p.e.Header(Announcement{}), TLS: p.attempt.TLS(),
	}
	network, address, err := p.e.whereToAsk()
	if err != nil {
		return err
	}
	if network == "unix" {
		return p.loop.DialUnix(t, &p.conn, address, o)
	}
	to, err := netip.ParseAddrPort(address)
	if err != nil {
		return err
	}
	return p.loop.Dial(t, &p.conn, to, o)
}

// secureCheck is secure for a check.
func (e *Endpoint) secureCheck(a *Attempt, p clienttls.Purpose) error {
	if e.cluster.cfg.HealthCheck.Plain {
		return nil
	}
	return e.secure(a, p)
}

// Cancel implements [health.Probe].
func (p *tcpProbe) Cancel(err error) {
	if p.cancelled == nil {
		p.cancelled = err
	}
	p.conn.Interrupt(err)
}

// Close implements [health.Probe].
func (p *tcpProbe) Close() {}

// The fields by which an endpoint says in any response that it wants no more work: our own
// name, and Envoy's.
const (
	failField      = "Holdfast-Immediate-Health-Check-Fail"
	envoyFailField = "X-Envoy-Immediate-Health-Check-Fail"
	saidSo         = "it has said so in a response (immediate health check fail)"
)

func isFailField(f exchange.Field) bool {
	return len(f.Name) == len(failField) && strings.EqualFold(f.Name, failField) ||
		len(f.Name) == len(envoyFailField) && strings.EqualFold(f.Name, envoyFailField)
}

// saysFailing says whether one of the fields is there, whatever its value.
func saysFailing(fields exchange.Fields) bool { return slices.ContainsFunc(fields, isFailField) }

func deleteFailFields(fields exchange.Fields) exchange.Fields {
	return slices.DeleteFunc(fields, isFailField)
}
