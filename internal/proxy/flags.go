package proxy

import (
	"errors"
	"io"
	"net"
	"os"
	"syscall"

	"holdfast/internal/accesslog/flags"
	"holdfast/internal/exchange"
	"holdfast/internal/http1"
	"holdfast/internal/tunnel"
	"holdfast/internal/upstream"
)

// flag adds flags to those of the request's record in the access log.
func (r *request) flag(f flags.Set) { r.flags |= f }

// flagsOf are those of our own errors that a request fails with.
var flagsOf = [...]struct {
	err   error
	flags flags.Set
}{
	{errNoCluster, flags.NoCluster},
	{errUnknown, flags.NoCluster},
	{errNoEndpoint, flags.NoHealthyUpstream},
	{errNoPath, flags.DownstreamProtocol},
	{errUnresolved, flags.DownstreamProtocol},
	{errNoAuthority, flags.InvalidHeader},
	{errTryTimeout, flags.UpstreamTimeout},
	{errResponseTimeout, flags.UpstreamTimeout},
	{errPendingTimeout, flags.UpstreamTimeout},
	{errHandshakeTimeout, flags.UpstreamTimeout},
	{errUnasked101, flags.UpstreamProtocol},
	{errImproper101, flags.UpstreamProtocol},
	{errIdleClient, flags.StreamIdle},
	{errIdleReader, flags.StreamIdle},
	{errIdleUpstream, flags.StreamIdle},
	{errUnauthorized, flags.Unauthorized},
	{errFault, flags.LocalReset},
}

// flagsOfFailure says what has gone wrong with a request that could not be completed, unless
// its client has gone.
func flagsOfFailure(err error) flags.Set {
	for _, of := range flagsOf {
		if err == of.err {
			return of.flags
		}
	}
	if _, ok := errors.AsType[*upstream.ConnectError](err); ok {
		return flags.UpstreamFailure
	}
	if errors.Is(err, errCrowded) || isOverflow(err) {
		return flags.UpstreamOverflow
	}
	if b, ok := errors.AsType[bodyError](err); ok {
		return flagsOfStatus(exchange.StatusOf(b, 400))
	}
	switch {
	case errors.Is(err, syscall.ECONNRESET):
		return flags.UpstreamReset
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, exchange.ErrNoAnswer):
		return flags.UpstreamTermination
	case isInvalid(err):
		return flags.UpstreamProtocol
	}
	return flags.UpstreamTermination
}

// flagsOfStatus says what was wrong with what a client sent that a codec refuses with
// this status.
func flagsOfStatus(status int) flags.Set {
	if status == 408 {
		return flags.StreamIdle
	}
	return flags.DownstreamProtocol
}

// flagsOfRefusal are those of a request that a codec has answered.
func flagsOfRefusal(f *http1.Refusal) flags.Set {
	s := flagsOfStatus(f.Status)
	switch {
	case f.Err == nil:
	case errors.Is(f.Err, net.ErrClosed):
		s |= flags.LocalReset
	case errors.Is(f.Err, os.ErrDeadlineExceeded):
		s |= flags.StreamIdle
	default:
		s |= flags.DownstreamTermination
	}
	return s
}

// flagsOfRefused are those of what is refused before it has anything to do with an
// upstream.
var flagsOfRefused = map[refusal]flags.Set{
	refusedMalformed: flags.DownstreamProtocol,
	refusedPath:      flags.DownstreamProtocol,
	refusedHeadSize:  flags.DownstreamProtocol,
	refusedBodySize:  flags.DownstreamProtocol,
	refusedNoRoute:   flags.NoRoute,
}

// flagsOfEnd are those of the end of a tunnel. One that its peers have closed has none; of a
// peer that is dead nobody tells which one it is.
var flagsOfEnd = map[tunnel.Reason]flags.Set{
	tunnel.DownstreamReset: flags.DownstreamTermination,
	tunnel.UpstreamReset:   flags.UpstreamReset,
	tunnel.DeadPeer:        flags.DownstreamTermination | flags.UpstreamTermination,
	tunnel.IdleTimeout:     flags.StreamIdle,
	tunnel.MaxAge:          flags.Duration,
	tunnel.DrainLimit:      flags.LocalReset,
	tunnel.Operator:        flags.LocalReset,
	tunnel.Stopped:         flags.LocalReset,
	tunnel.Failed:          flags.LocalReset,
	tunnel.LostInCrash:     flags.LocalReset,
	tunnel.Quarantined:     flags.LocalReset,
	tunnel.RouteRemoved:    flags.LocalReset,

	tunnel.EndpointRemoved:   flags.LocalReset,
	tunnel.EndpointUnhealthy: flags.LocalReset,
}
