package format

// Op is an operator, or Literal.
type Op uint8

// The operators. Their meanings are in [Operators].
const (
	Literal Op = iota
	Event
	StartTime
	Request             // REQ
	RequestWithoutQuery // REQ_WITHOUT_QUERY
	Response            // RESP
	Protocol
	RequestedServerName
	ResponseCode
	ResponseCodeDetails
	ResponseFlags
	BytesReceived
	BytesSent
	Duration
	ResponseDuration
	UpstreamHost
	UpstreamCluster
	RouteName
	VirtualHostName
	ListenerName
	RemoteAddress
	RemoteAddressWithoutPort
	RemotePort
	ClientAddress
	RequestID
	Reason
	TransportFailureReason
	Generation
	TLSVersion
	TLSCipher
	PeerSubject
	PeerIssuer
	PeerSerial
	PeerFingerprint
	PeerURIs
	PeerDNSNames
	numOps
)

// An Operator is one in words.
type Operator struct {
	Op      Op
	Name    string
	Takes   string // what stands in its parentheses; "": it has none
	Number  bool   // the value is a number
	Meaning string // for the documentation
}

// Operators are all of them, in the order of their documentation.
var Operators = [...]Operator{
	{StartTime, "START_TIME", "(FORMAT)", false, "When the request, or the tunnel, began, in UTC; without a format as in `2026-07-27T18:04:05.123Z`"},
	{Event, "EVENT", "", false, "`request`, `tunnel_open` or `tunnel_close`"},
	{Request, "REQ", "(NAME?OTHER):MAX", false, "A field of the request's head, or `:METHOD`, `:PATH`, `:AUTHORITY`, `:SCHEME` as the client sent them"},
	{RequestWithoutQuery, "REQ_WITHOUT_QUERY", "(NAME?OTHER):MAX", false, "The same up to the first `?`"},
	{Response, "RESP", "(NAME?OTHER):MAX", false, "A field of the response's head"},
	{Protocol, "PROTOCOL", "", false, "`HTTP/1.1` or `HTTP/1.0`; `TCP` of a connection that is relayed as it is"},
	{RequestedServerName, "REQUESTED_SERVER_NAME", "", false, "The server that a TLS client asks for, where TLS ends here, or where a connection is relayed by that"},
	{ResponseCode, "RESPONSE_CODE", "", true, "The status of the response; 0: none was begun"},
	{ResponseCodeDetails, "RESPONSE_CODE_DETAILS", "", false, "`via_upstream`, `direct_response`, or the reason with `_` for each space"},
	{ResponseFlags, "RESPONSE_FLAGS", "", false, "The flags, with a comma between two"},
	{Reason, "REASON", "", false, "Why Holdfast answered by itself or cut the response; why the tunnel ended"},
	{TransportFailureReason, "UPSTREAM_TRANSPORT_FAILURE_REASON", "", false, "What of that says why an endpoint could not be spoken to by TLS"},
	{BytesReceived, "BYTES_RECEIVED", "", true, "Bytes from the client: of the request's body, or of the tunnel"},
	{BytesSent, "BYTES_SENT", "", true, "Bytes to the client: of the response's body, or of the tunnel"},
	{Duration, "DURATION", "", true, "Milliseconds from the request's beginning to the end of its response, or of the handshake; of the tunnel's life"},
	{ResponseDuration, "RESPONSE_DURATION", "", true, "Milliseconds from the request's beginning to the head of the upstream's response"},
	{UpstreamHost, "UPSTREAM_HOST", "", false, "The endpoint's address"},
	{UpstreamCluster, "UPSTREAM_CLUSTER", "", false, "The cluster's name"},
	{RouteName, "ROUTE_NAME", "", false, "The route's name"},
	{VirtualHostName, "VIRTUAL_HOST_NAME", "", false, "The virtual host's name"},
	{ListenerName, "LISTENER_NAME", "", false, "The listener's name"},
	{RemoteAddress, "DOWNSTREAM_REMOTE_ADDRESS", "", false, "Address and port of who has connected, which may be a proxy in front, or `unix`"},
	{RemoteAddressWithoutPort, "DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT", "", false, "Its address, or `unix`"},
	{RemotePort, "DOWNSTREAM_REMOTE_PORT", "", true, "Its port"},
	{ClientAddress, "CLIENT_ADDRESS", "", false, "The client's address: who has connected, or, behind trusted proxies, the one of whom they say so"},
	{TLSVersion, "DOWNSTREAM_TLS_VERSION", "", false, "The version of the client's TLS: `TLSv1.3`"},
	{TLSCipher, "DOWNSTREAM_TLS_CIPHER", "", false, "Its cipher suite, as IANA calls it"},
	{PeerSubject, "DOWNSTREAM_PEER_SUBJECT", "", false, "The subject of the client's certificate, if it has shown one that was verified"},
	{PeerIssuer, "DOWNSTREAM_PEER_ISSUER", "", false, "Its issuer"},
	{PeerSerial, "DOWNSTREAM_PEER_SERIAL", "", false, "Its serial number in hex"},
	{PeerFingerprint, "DOWNSTREAM_PEER_FINGERPRINT_256", "", false, "Its SHA-256 in hex"},
	{PeerURIs, "DOWNSTREAM_PEER_URI_SAN", "", false, "The URIs that it is for, with a comma between two"},
	{PeerDNSNames, "DOWNSTREAM_PEER_DNS_SAN", "", false, "The DNS names that it is for, with a comma between two"},
	{RequestID, "REQUEST_ID", "", false, "The request's id, the same for all records of a tunnel"},
	{Generation, "GENERATION", "", true, "The number of the generation that wrote the record"},
}

// named returns the operator of a name.
func named(name string) (Operator, bool) {
	for _, o := range Operators {
		if o.Name == name {
			return o, true
		}
	}
	return Operator{}, false
}

// Names returns those of all operators.
func Names() []string {
	names := make([]string, len(Operators))
	for i, o := range Operators {
		names[i] = o.Name
	}
	return names
}
