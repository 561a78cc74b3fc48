package config

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"
)

// Discovery is where a cluster's endpoints come from.
type Discovery struct {
	By   DiscoveryKind
	File string // absolute path; of ByFile alone
	DNS  DNS    // of ByStrictDNS and ByLogicalDNS alone
}

// DiscoveryKind is how endpoints are found.
type DiscoveryKind uint8

// The kinds.
const (
	Static       DiscoveryKind = iota // as configured; names are looked up once
	ByStrictDNS                       // every address that a name has at the moment
	ByLogicalDNS                      // one for each name, whatever addresses that has
	ByFile                            // what a file lists
)

// discoveryWords are what a file calls the kinds, in their order.
var discoveryWords = []string{"static", "strict_dns", "logical_dns", "file"}

// String returns the word of a configuration.
func (k DiscoveryKind) String() string { return discoveryWords[k] }

// DNS is how names are asked for.
type DNS struct {
	Resolvers []netip.AddrPort // empty: those of the host
	Family    string           // "auto", "ipv4", "ipv6" or "all"

	MinTTL, MaxTTL time.Duration // between them is the time after which a name is asked for again
	Timeout        time.Duration // of one question, whoever is asked

	RemoveEmpty bool // a name without an address has none; false: it keeps those that it had
	Local       bool // answers may have loopback and link-local addresses

	BackoffBase, BackoffMax time.Duration // until a name is asked for again that nobody has answered for
}

// MostDiscovered is how many endpoints a cluster can have that are found, in a file or by DNS.
const MostDiscovered = 4096

// mostResolvers is how many a cluster can have.
const mostResolvers = 8

func readDiscovery(cluster *table) Discovery {
	word := discoveryWords[Static]
	read(cluster, "discovery", &word, oneOf(discoveryWords...))
	var d Discovery
	for kind, w := range discoveryWords {
		if w == word {
			d.By = DiscoveryKind(kind)
		}
	}
	switch {
	case d.By != ByFile:
		needEndpoints(cluster)
		if cluster.asked("endpoints_file") {
			cluster.at("endpoints_file").fail(`is read with discovery = "file" alone`)
		}
	default:
		cluster.unset("endpoints")
		if cluster.has("endpoints") {
			cluster.at("endpoints").fail("stand in endpoints_file")
		}
		need(cluster, "endpoints_file", &d.File, endpointsPath)
	}
	if d.By == ByStrictDNS || d.By == ByLogicalDNS {
		d.DNS = readDNS(cluster.table("dns"))
	} else if cluster.asked("dns") {
		cluster.at("dns").fail(`is for discovery = "strict_dns" or "logical_dns"`)
	}
	elements, _ := cluster.at("endpoints").elements()
	for _, n := range elements {
		if t, _ := n.raw.(map[string]any); t["srv"] != nil && (d.By == Static || d.By == ByLogicalDNS) {
			n.fail(`a service (srv) needs discovery = "strict_dns"`)
		}
	}
	return d
}

// needEndpoints notes that there are none.
func needEndpoints(t *table) {
	if t.empty("endpoints") {
		t.at("endpoints").fail("missing; must be an array with at least one %s", endpointAddress.is)
	}
}

var endpointsPath = form[string]{`an absolute path that ends in .toml or .json, like "/etc/holdfast/web.toml"`, func(s string) (string, error) {
	p, err := parseFilePath(s, maxPath)
	if err == nil && !strings.HasSuffix(p, ".toml") && !strings.HasSuffix(p, ".json") {
		return "", errForm
	}
	return p, err
}, asIs}

func readDNS(t *table) DNS {
	d := DNS{
		Family: "auto", MinTTL: 5 * time.Second, MaxTTL: 5 * time.Minute, Timeout: 5 * time.Second,
		BackoffBase: time.Second, BackoffMax: 30 * time.Second,
	}
	seen := map[netip.AddrPort]node{}
	for _, e := range list(t, "resolvers", resolverAddress) {
		if first, twice := seen[e.value]; twice {
			e.fail("%s is listed twice (%s)", e.value, first)
			continue
		}
		seen[e.value] = e.node
		d.Resolvers = append(d.Resolvers, e.value)
	}
	if len(d.Resolvers) > mostResolvers {
		t.at("resolvers").fail("has %d elements; at most %d are asked", len(d.Resolvers), mostResolvers)
	}
	read(t, "family", &d.Family, oneOf("auto", "ipv4", "ipv6", "all"))
	read(t, "min_ttl", &d.MinTTL, secondOrMore)
	d.MaxTTL = max(d.MaxTTL, d.MinTTL)
	read(t, "max_ttl", &d.MaxTTL, duration)
	if t.has("max_ttl") && d.MaxTTL < d.MinTTL {
		t.at("max_ttl").fail("is shorter than min_ttl, %s", writeDuration(d.MinTTL))
	}
	read(t, "timeout", &d.Timeout, duration)
	read(t, "empty", &d.RemoveEmpty, either("keep", "remove"))
	t.boolean("local_addresses", &d.Local)
	backoff := t.table("backoff")
	read(backoff, "base", &d.BackoffBase, duration)
	d.BackoffMax = max(d.BackoffMax, d.BackoffBase)
	read(backoff, "max", &d.BackoffMax, duration)
	if backoff.has("max") && d.BackoffMax < d.BackoffBase {
		backoff.at("max").fail("is shorter than base, %s", writeDuration(d.BackoffBase))
	}
	backoff.strict()
	t.strict()
	return d
}

// secondOrMore keeps those who answer from floods.
var secondOrMore = form[time.Duration]{`a duration from "1s" on`, func(s string) (time.Duration, error) {
	d, err := parseDuration(s)
	if err == nil && d < time.Second {
		err = errForm
	}
	return d, err
}, writeDuration}

var resolverAddress = form[netip.AddrPort]{`an IP address with or without a port, like "10.0.0.53" or "127.0.0.1:5353"`, func(s string) (netip.AddrPort, error) {
	if a, err := netip.ParseAddr(s); err == nil && a.Zone() == "" {
		return netip.AddrPortFrom(a.Unmap(), 53), nil
	}
	a, err := netip.ParseAddrPort(s)
	if err != nil || a.Port() == 0 || a.Addr().Zone() != "" {
		return a, errForm
	}
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()), nil
}, netip.AddrPort.String}

// serviceName is the name that SRV records are asked for.
var serviceName = form[string]{`the name of a service like "_chat._tcp.example.com"`, func(s string) (string, error) {
	host, err := parseHost(s)
	if err != nil {
		return "", err
	}
	labels := strings.Split(host, ".")
	if len(labels) < 3 || !strings.HasPrefix(labels[0], "_") || !strings.HasPrefix(labels[1], "_") {
		return "", errForm
	}
	return host, nil
}, asIs}

// readService reads t as { srv = "_chat._tcp.example.com" }.
func readService(t *table, n *node) (name string, ok bool) {
	*n, _ = t.get("srv")
	if name, ok = understand(*n, serviceName); ok {
		t.set("srv", strconv.Quote(name))
	}
	if t.asked("address") {
		t.at("address").fail("there is an srv, whose addresses are found")
	}
	return name, ok
}

var errNameInFile = errors.New("a file lists IP addresses and unix sockets, no names; for those there is strict_dns")

// checkListed says whether an endpoint may stand in a file.
func checkListed(e *Endpoint) error {
	if e.SRV {
		return errNameInFile
	}
	if strings.HasPrefix(e.Address, "unix:") {
		return nil
	}
	if _, err := netip.ParseAddrPort(e.Address); err != nil {
		return errNameInFile
	}
	return nil
}

// tooManyEndpoints says that a file lists more than a cluster can have.
func tooManyEndpoints(n int) string {
	return fmt.Sprintf("has %d elements; a cluster can have %d", n, MostDiscovered)
}
