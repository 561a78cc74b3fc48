// Package http2 is HTTP/2 on both sides: requests of clients as [exchange.Exchange], and those to
// endpoints as [exchange.Upstream].
//
// golang.org/x/net/http2 has the protocol, with goroutines of its own for each connection and
// request. What this package does is to bring these to a loop and its tasks, and to keep from
// the rest of the proxy what the library lets pass.
package http2
