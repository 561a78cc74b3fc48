package config

import (
	"errors"
	"net/netip"
	"strings"
)

// RouteTest is a request, and what is expected to become of it. Of what is empty nothing is
// expected.
type RouteTest struct {
	Name     string
	Method   string
	URL      string
	Headers  []string // "Name: value"
	Listener string   // "": the first one
	Client   string   // an address; "": none
	Upgrade  string   // the protocol, in lower case; "": none
	Expect   Expectation
}

// Expectation is what must be so. Where chance decides it must be so in any case; of several
// names, each of those that chance may choose must be one; of filters, each must be there.
type Expectation struct {
	VirtualHost string
	Routes      []string
	Clusters    []string
	Target      string // that the upstream gets
	Host        string // that the upstream gets
	Redirect    string // the Location
	Status      int    // of an answer of our own
	Filters     []string
	Hash        string
	Mirror      string // a cluster
}

// ParseRouteTests reads a file of expectations. Errors are as those of [Parse].
func ParseRouteTests(name string, data []byte) ([]RouteTest, error) {
	all, _, err := readTersely(name, data, readRouteTests)
	if err != nil {
		return nil, err
	}
	return all, nil
}

func readRouteTests(_ *document, root *table) (all []RouteTest) {
	declared := map[string]node{}
	for _, t := range root.tables("tests") {
		all = append(all, readRouteTest(t, declared))
	}
	if root.empty("tests") {
		root.at("tests").fail("missing; at least one [[tests]] is needed")
	}
	root.strict()
	return all
}

func readRouteTest(t *table, declared map[string]node) RouteTest {
	test := RouteTest{Method: "GET"}
	read(t, "name", &test.Name, sentence)
	if n := t.at("name"); !t.has("name") {
		n.fail("missing; must be %s", sentence.is)
	} else if other, taken := declared[test.Name]; taken && test.Name != "" {
		n.fail("%s is already the name of another one (%s)", quote(test.Name), other)
	} else {
		declared[test.Name] = n
	}
	read(t, "method", &test.Method, method)
	need(t, "url", &test.URL, sentence)
	for _, e := range list(t, "headers", headerLine) {
		test.Headers = append(test.Headers, e.value)
	}
	read(t, "listener", &test.Listener, identifier)
	read(t, "client", &test.Client, clientAddress)
	read(t, "upgrade", &test.Upgrade, upgradeToken)
	x := t.table("expect")
	read(x, "virtual_host", &test.Expect.VirtualHost, identifier)
	test.Expect.Routes = x.words("route")
	test.Expect.Clusters = x.words("cluster")
	read(x, "target", &test.Expect.Target, sentence)
	read(x, "host", &test.Expect.Host, sentence)
	read(x, "redirect", &test.Expect.Redirect, sentence)
	status := int64(0)
	x.integer("status", &status, 100, 599)
	test.Expect.Status = int(status)
	test.Expect.Filters = x.words("filters")
	read(x, "hash", &test.Expect.Hash, sentence)
	read(x, "mirror", &test.Expect.Mirror, sentence)
	if len(x.keys) == 0 {
		x.fail("missing; must be a table like { route = \"site:prefix=/\" }")
	}
	x.strict()
	t.strict()
	return test
}

// words reads a text or an array of texts.
func (t *table) words(key string) []string {
	n, ok := t.get(key)
	if _, array := n.raw.([]any); !ok || array {
		return values(list(t, key, sentence))
	}
	s, _ := understand(n, sentence)
	return []string{s}
}

func values[T any](entries []entry[T]) (v []T) {
	for _, e := range entries {
		v = append(v, e.value)
	}
	return v
}

// sentence is any text of a line.
var sentence = form[string]{"a text", func(s string) (string, error) {
	if s == "" || len(s) > 4096 || strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return "", errForm
	}
	return s, nil
}, asIs}

// ParseUpgrade reads the name of a protocol that a request may ask to change to.
func ParseUpgrade(s string) (protocol string, err error) { return upgradeToken.parse(s) }

// headerLine is a header field as requests have it.
var headerLine = form[string]{`a header like "Name: value"`, func(s string) (string, error) {
	_, _, err := SplitHeader(s)
	return s, err
}, asIs}

// SplitHeader takes "Name: value" apart.
func SplitHeader(s string) (name, value string, err error) {
	name, value, ok := strings.Cut(s, ":")
	value = strings.Trim(value, " \t")
	if !ok || !isToken(name) {
		return "", "", errors.New("a name, a colon and a value are needed")
	}
	if strings.EqualFold(name, "host") {
		return "", "", errors.New("the host stands in the URL")
	}
	return name, value, headerText(value)
}

var clientAddress = form[string]{`an address like "10.0.0.1"`, func(s string) (string, error) {
	if _, err := netip.ParseAddr(s); err != nil {
		return "", errForm
	}
	return s, nil
}, asIs}
