// Package http1 speaks HTTP/1.1 on both sides of the proxy: a [Server] serves
// downstream connections as exchanges, a [Conn] carries exchanges to an upstream.
//
// # Strictness
//
// Both sides follow RFC 9110 and RFC 9112, and wherever these leave a choice they
// take the one under which no other reader of the same bytes can see another
// message. A request that is in doubt is answered by the codec (400, 408, 413,
// 414, 417, 431, 501, 505) and its connection ends; a response in doubt is an
// [exchange.StatusError] 502. In particular:
//
//   - Lines end in CRLF. Bare CR, bare LF, NUL, every other control character,
//     folded lines, and white space before a colon are refused. One empty line is
//     skipped before a request, as RFC 9112 §2.2 asks; it does not end the idle time.
//   - Versions are HTTP/1.0 and HTTP/1.1. A connection over which HTTP/1.0 was
//     spoken is never kept. A request line without a version, as of HTTP/0.9, is
//     refused before anything follows it, and so is a 1xx in HTTP/1.0.
//   - There is exactly one Host, in HTTP/1.0 too, because routes need one. Its
//     name is made of letters, digits, "-", ".", "_" and "~", or is an IP address;
//     RFC 3986 would allow percent-encoding and more. An absolute-form target must
//     name the same host.
//   - CONNECT is refused: a reverse proxy opens no tunnels to other places.
//   - There is one Content-Length of digits, or one Transfer-Encoding that is
//     exactly "chunked", never both, never twice, even if the values agree. Names
//     that a CGI-style upstream would take for these two (Content_Length) are
//     refused.
//   - Connection may not name Host, Content-Length or Transfer-Encoding. Any other
//     field that it names is removed.
//   - A chunk-size is at most 16 hexadecimal digits, directly followed by CRLF or
//     ";". Chunk extensions are checked for control characters, bounded, and
//     dropped.
//   - Trailers that speak about framing or Host are refused. Of the others those pass
//     whose definition allows it (RFC 9110 §6.5.1): digests and signatures, ETag,
//     Server-Timing, gRPC's status and a few more. All that are not on this list are
//     dropped.
//   - A response 204 or 1xx with "Content-Length: 0" is tolerated, as other proxies
//     do; any other framing on them is refused.
//
// Nothing is copied through raw: heads are written anew from the exchange's
// fields, bodies are framed anew. What could not be read back is not written.
//
// # Where it runs
//
// A connection lives on one loop ([stream.Loop]), and all that concerns it happens on that
// loop's goroutine: there are no locks. While it waits between two requests it is a small
// record with a deadline. When something comes, a task serves it until it waits again, with
// an exchange and buffers that one request after the other uses: a request in steady state
// allocates nothing. The strings of a head are parts of such a buffer, and good for as long
// as its exchange.
//
// A body is read where it was received, in the loop's buffer, and sent from there. Of a body by
// Content-Length both sides tell the connection and how much is left ([exchange.Source],
// [exchange.Sink]), so that whoever relays it may have the kernel move the rest.
//
// # Layers
//
// The parser (head.go, request.go, response.go) and the body framing (body.go,
// encode.go) are functions and state machines over byte slices and do no input or
// output. What knows a connection (bodyio.go, server.go, serverconn.go, downstream.go,
// client.go) stands above them.
package http1
