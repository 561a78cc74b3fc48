package control

// RouteQuestion is what `holdfast route` has the proxy binary say about a configuration: which
// route a request gets, or whether requests get the routes that a file expects.
type RouteQuestion struct {
	Method   string   `json:"method,omitempty"`
	URL      string   `json:"url,omitempty"`
	Headers  []string `json:"headers,omitempty"`  // "Name: value"
	Listener string   `json:"listener,omitempty"` // "": the first one
	Client   string   `json:"client,omitempty"`   // its address; "": none
	Upgrade  string   `json:"upgrade,omitempty"`
	JSON     bool     `json:"json,omitempty"` // for a program, in place of a person

	// Tests is the content of a file of expectations, in place of a request, and Path its
	// name for messages.
	Tests []byte `json:"tests,omitempty"`
	Path  string `json:"path,omitempty"`
}

// RouteAnswer is what it says.
type RouteAnswer struct {
	Text  string   `json:"text,omitempty"`  // to be printed
	Unmet int      `json:"unmet,omitempty"` // expectations that are not met
	Wrong []string `json:"wrong,omitempty"` // mistakes in the question: it was not answered
}
