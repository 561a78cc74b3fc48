package proxy

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/accesslog"
	"holdfast/internal/accesslog/flags"
	"holdfast/internal/exchange"
	"holdfast/internal/route"
	"holdfast/internal/sni"
	"holdfast/internal/stream"
	"holdfast/internal/task"
	"holdfast/internal/tunnel"
	"holdfast/internal/upstream"
	"holdfast/internal/upstream/balance"
)

// Why a connection does not become a tunnel, where nobody else has said it.
var (
	errDenied       = errors.New("the client's address is not allowed")
	errNoTCPRoute   = errors.New("there is no route for it")
	errSNITimeout   = errors.New("the server that is asked for was not known within sni_timeout")
	errHelloSize    = errors.New("the client's hello is too large")
	errClientGone   = errors.New(clientGone)
	errNotConnected = errors.New("no endpoint was connected to within handshake_timeout")
)

// tcpConn is a connection until it is a tunnel. All of it is done on the goroutine of its loop.
// Where its first bytes are waited for it is parked: it has no task before something comes.
type tcpConn struct {
	stream.Conn
	on     *tcpLoop
	remote netip.AddrPort
	began  time.Time
	id     string

	task    *task.Task       // nil: it is parked
	attempt upstream.Attempt // to connect
	cause   error            // why it is given up; nil: it is not
	over    bool             // it was refused, or is a tunnel

	server   string          // that a TLS client asks for; "": none
	secure   *agreement      // nil: TLS does not end here
	route    *route.TCPRoute // nil: not known
	cluster  string
	endpoint *upstream.Endpoint
}

// newTunnelID returns the id of a connection that is relayed, as requests have one.
func (m *Manager) newTunnelID() string { return newID(new(exchange.Texts), m.options.Random) }

// address is the client's without port, as lists of addresses and hashes have it.
func (c *tcpConn) address() netip.Addr { return c.remote.Addr().Unmap().WithZone("") }

// begin begins at once where nothing needs to be known of the client.
func (c *tcpConn) begin() {
	if c.secure = agreementOf(c.Secure()); c.secure != nil {
		c.server = serverNamed(c.secure)
	} else if c.on.routes.BySNI {
		c.Limit(c.began.Add(c.on.cfg.SNITimeout))
		if len(c.Buffered()) == 0 {
			return // Ready goes on
		}
	}
	c.run()
}

func (c *tcpConn) run() { c.task = c.on.loop.Tasks.Go(c) }

// Ready implements [stream.Owner]: something has come while nobody reads.
func (c *tcpConn) Ready(*stream.Conn) {
	switch {
	case c.Broken():
		c.giveUp(errClientGone)
	case c.task == nil:
		c.run()
	}
}

// Expired implements [stream.Owner].
func (c *tcpConn) Expired(*stream.Conn) {
	if c.task == nil {
		c.giveUp(errSNITimeout)
	} else {
		c.giveUp(errNotConnected)
	}
}

// giveUp ends what is done to make a tunnel. The first reason counts.
func (c *tcpConn) giveUp(why error) {
	if c.cause != nil || c.over {
		return
	}
	c.cause = why
	if c.task == nil {
		c.refuse(why)
		return
	}
	c.Interrupt(why)
	c.attempt.Cancel(why)
}

// Run implements [task.Runner].
func (c *tcpConn) Run(t *task.Task) {
	c.task = t // it may run before Go has returned
	why := errFault
	defer func() {
		if !c.over { // after a panic, too, which the loop logs
			c.refuse(why)
		}
	}()
	why = c.relay(t)
	if c.cause != nil {
		why = c.cause
	}
}

// relay makes a tunnel of the connection, or says why not.
func (c *tcpConn) relay(t *task.Task) error {
	if c.on.routes.BySNI && c.secure == nil {
		if err := c.peek(t); err != nil {
			return err
		}
	}
	if c.route = c.on.routes.Match(c.server); c.route == nil {
		return errNoTCPRoute
	}
	limit := time.Time{}
	if within := c.on.cfg.Tunnels.HandshakeTimeout; within > 0 {
		limit = c.on.loop.Now().Add(within)
	}
	c.Limit(limit)
	server, err := c.connect(t)
	if err != nil {
		return err
	}
	if c.cause != nil {
		server.Close(c.on.loop)
		c.endpoint.TunnelDropped(&c.attempt)
		return c.cause
	}
	c.start(&server)
	return nil
}

// serverNamed is the server that a client has asked for whose TLS ends here, as routes have it.
func serverNamed(a *agreement) string { return strings.ToLower(a.TLS.ServerName) }

// soonKnown is how many first bytes are looked at whenever one has come, since they may say that
// it is no hello. Of those behind them nobody has each one scanned who sends them one by one.
const soonKnown = 16

// peek reads the client's first bytes until they say which server it asks for, or that it asks
// for none. They go to the endpoint with all others.
func (c *tcpConn) peek(t *task.Task) error {
	for {
		hello := sni.Scan(c.Buffered())
		if hello.State != sni.More {
			c.on.metrics.hellos[hello.State].Inc()
		}
		switch hello.State {
		case sni.More:
		case sni.TooLarge:
			return errHelloSize
		default:
			c.server = hello.Name
			return nil
		}
		err := c.FillUpTo(t, hello.Need-len(c.Buffered()))
		for n := len(c.Buffered()); err == nil && soonKnown < n && n < hello.Need; n = len(c.Buffered()) {
			err = c.FillUpTo(t, hello.Need-n)
		}
		switch {
		case err == nil:
		case c.cause != nil:
			return c.cause
		case errors.Is(err, os.ErrDeadlineExceeded):
			return errSNITimeout
		case err == io.EOF, c.Broken():
			return errClientGone
		default:
			return err
		}
	}
}

// connect chooses a cluster, and connects to one of its endpoints: to the next in turn, or to
// others where that one cannot be reached.
func (c *tcpConn) connect(t *task.Task) (server stream.Passed, err error) {
	m := c.on.m
	c.cluster = c.route.Choose(m.options.Random())
	cluster, ok := m.options.Clusters.Get(c.cluster)
	if !ok {
		return server, errNoCluster
	}
	var q balance.Query
	if cluster.Announces() {
		c.attempt.Announcement = upstream.Announcement{Source: c.remote, Destination: stream.LocalAddr(c.FD())}
	}
	q.Hash, q.Hashed = route.HashOfClient(c.address())
	err = errNoEndpoint
	round := cluster.Round(q)
	for range cluster.ConnectAttempts() {
		e := round.Next()
		if e == nil {
			break
		}
		c.endpoint = e
		if server, err = e.Connect(t, c.on.loop, &c.attempt); err == nil || c.cause != nil || isOverflow(err) {
			return server, err
		}
		m.notConnected(err)
		c.log(slog.LevelDebug, "an endpoint cannot be connected to", err)
	}
	cluster.Unserved(c.endpoint != nil)
	return server, err
}

// start hands both connections on. Nothing is waited for between here and the first look at
// them.
func (c *tcpConn) start(server *stream.Passed) {
	loop, counts := c.on.loop, &c.on.metrics
	took := loop.Clock().Sub(c.began)
	client := c.PassOn()
	c.over = true
	c.endpoint.TunnelConnected(&c.attempt)
	figures := &counts.routes[c.route.Number]
	figures.tunnels.Inc()
	figures.active.Add(1)
	counts.handshake.Observe(int64(took))
	spec := tunnel.Spec{
		FDs: [2]int{client.FD, server.FD}, Loop: loop.Index, On: loop.Loop,
		Secure: [2]*stream.Secure{client.Secure, server.Secure},
		About: [2]tunnel.About{
			about(&client, c.remote.IsValid(), clientKeepAlive, false), // systemd's may be multipath TCP
			about(server, c.endpoint.Path == "", upstream.KeepAlive, true),
		},
		DownEarly: client.Early, UpEarly: server.Early,
		Origin: c.on.origin(c), ID: c.id, Client: c.remote,
	}
	if log := c.on.m.options.AccessLog; log != nil {
		record := c.record(took)
		spec.Tag = log.TunnelOpened(&record)
	}
	c.on.m.options.Tunnels.Start(spec)
	counts.Switched(took)
	c.on.remove(c)
}

// refuse ends the connection. It is reset: a proper end would be the server's word.
func (c *tcpConn) refuse(why error) {
	c.ResetOnClose()
	c.Close()
	c.refused(why)
}

// refused counts and records that the connection has ended without becoming a tunnel.
func (c *tcpConn) refused(why error) {
	c.over = true
	took := c.on.loop.Clock().Sub(c.began)
	refusal, flag := refusalOf(why)
	counts := &c.on.metrics
	counts.refused[refusal].Inc()
	if refusal == tcpCut {
		counts.Cut(took)
	} else {
		counts.Closed(took, refusal == tcpGone)
	}
	reason := why.Error()
	if refusal == tcpCut {
		reason = cutByTheStop
	}
	level := slog.LevelDebug
	if log := c.on.m.options.AccessLog; log != nil {
		record := c.record(took)
		record.Reason, record.Flags = reason, flag
		log.TunnelRefused(&record)
	} else if refusal != tcpGone {
		level = slog.LevelInfo
	}
	c.log(level, "connection refused", errors.New(reason))
	c.on.remove(c)
}

// refusalOf says what a reason is counted as, and its flags in the access log.
func refusalOf(why error) (tcpRefusal, flags.Set) {
	if e, ok := errors.AsType[*upstream.ConnectError](why); ok {
		if e.Timeout {
			return tcpTooSlow, flags.UpstreamFailure
		}
		return tcpUnreachable, flags.UpstreamFailure
	}
	if isOverflow(why) {
		return tcpUnreachable, flags.UpstreamOverflow
	}
	switch why {
	case errDenied:
		return tcpAddress, 0
	case errNoTCPRoute:
		return tcpNoRoute, flags.NoRoute
	case errNoCluster:
		return tcpUnreachable, flags.NoCluster
	case errNoEndpoint:
		return tcpUnreachable, flags.NoHealthyUpstream
	case errSNITimeout:
		return tcpSlow, flags.StreamIdle
	case errHelloSize:
		return tcpLarge, flags.DownstreamProtocol
	case errNotConnected:
		return tcpTooSlow, flags.UpstreamTimeout
	case errClientGone:
		return tcpGone, flags.DownstreamTermination
	case net.ErrClosed:
		return tcpCut, flags.LocalReset
	}
	return tcpFault, flags.LocalReset
}

// record is the connection as the access log has it, when it took so long.
func (c *tcpConn) record(took time.Duration) accesslog.Record {
	r := accesslog.Record{
		Start: c.began, Duration: took, RequestID: c.id, Listener: c.on.name, Cluster: c.cluster,
		Client: c.remote, ClientAddress: c.address(), Protocol: accesslog.TCP, Authority: c.server,
		TLS: c.secure.tls(),
	}
	if c.route != nil {
		r.Route = c.route.Name
	}
	if c.endpoint != nil {
		r.Endpoint = c.endpoint.Address
	}
	return r
}

// log writes a line about the connection. What the client chose is in attributes only.
func (c *tcpConn) log(level slog.Level, message string, err error) {
	log := c.on.m.options.Log
	if !log.Enabled(context.Background(), level) {
		return
	}
	client := "unix"
	if c.remote.IsValid() {
		client = c.remote.String()
	}
	attrs := []slog.Attr{slog.Any("err", err), slog.String("request_id", c.id), slog.String("listener", c.on.name), slog.String("client", client)}
	if c.server != "" {
		attrs = append(attrs, slog.String("server", c.server))
	}
	if c.cluster != "" {
		attrs = append(attrs, slog.String("cluster", c.cluster))
	}
	if c.endpoint != nil {
		attrs = append(attrs, slog.String("endpoint", c.endpoint.String()))
	}
	log.LogAttrs(context.Background(), level, message, attrs...)
}

// resetOnClose has the close of a socket reset its connection.
func resetOnClose(fd int) {
	_ = unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}) // a unix socket has no reset
}
