package proxy

import (
	"time"

	"holdfast/internal/http1"
	"holdfast/internal/http2"
	"holdfast/internal/stream"
)

// protocols has the connections of one listener, of which some speak HTTP/1 and some HTTP/2.
type protocols struct {
	one *http1.Server
	two *http2.Server
}

// serveHTTP has a listener's connections served by the versions of HTTP that it has. Who speaks
// HTTP/2 is found out by TLS (serve2), or without it by what the client begins with.
func (g *generation) serveHTTP(l *listener) {
	cfg, scheme := &l.cfg, "http"
	if cfg.TLS != nil {
		scheme = "https"
	}
	counts := http1.NewServerMetrics(g.registry, cfg.Name)
	o := http1.ServerOptions{
		Limits: cfg.Limits, Scheme: scheme, Listener: cfg.Name, Server: cfg.Server.Name, Handler: g.manager, Log: g.log,
		Metrics: counts, Loops: g.loops.streams, Refused: g.manager.Refused, Ended: l.ended,
	}
	if !cfg.HTTP2.Enabled {
		l.serveBy(http1.NewServer(o))
		return
	}
	two := http2.NewServer(http2.ServerOptions{
		Limits: o.Limits, Scheme: scheme, Listener: o.Listener, Server: o.Server, Handler: o.Handler, Log: o.Log,
		Connect: cfg.HTTP2.WebSockets,
		Metrics: http2.NewServerMetrics(g.registry, cfg.Name, counts), Loops: o.Loops, Refused: o.Refused, Ended: o.Ended,
	})
	if cfg.TLS == nil {
		o.HTTP2 = two.Continue
	}
	one := http1.NewServer(o)
	l.serveBy(one)
	l.server, l.serve2 = &protocols{one, two}, two.Serve
}

func (p *protocols) Drain(idleGrace time.Duration) {
	p.one.Drain(idleGrace)
	p.two.Drain(idleGrace)
}

func (p *protocols) Retire(grace time.Duration) {
	p.one.Retire(grace)
	p.two.Retire(grace)
}

func (p *protocols) Resume() {
	p.one.Resume()
	p.two.Resume()
}

// HandOver gives idle connections of HTTP/1 away: what a connection of HTTP/2 knows is in its
// process only.
func (p *protocols) HandOver(give func(*stream.Loop, http1.Idle) bool) { p.one.HandOver(give) }

func (p *protocols) Close() {
	p.one.Close()
	p.two.Close()
}

func (p *protocols) Connections() int { return p.one.Connections() + p.two.Connections() }
func (p *protocols) Requests() int    { return p.one.Requests() + p.two.Requests() }
