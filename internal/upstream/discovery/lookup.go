package discovery

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/miekg/dns"

	"holdfast/internal/config"
)

const (
	mostLinks = 16  // of a chain of aliases
	mostHosts = 256 // of a service
	rounds    = 2   // in which each resolver is asked
)

// lookup asks for names as a cluster is configured.
type lookup struct {
	world *World
	cfg   *config.DNS
	both  bool // of the two families, where the family is "auto"
}

// addresses is what was found out of a name. Of each family there is an error or an answer,
// which may have no address.
type addresses struct {
	v4, v6     []netip.Addr
	err4, err6 error
	asked6     bool
	ttl        time.Duration
	leftOut    int // addresses
}

var (
	errLoop     = fmt.Errorf("a chain of aliases is a circle, or has more than %d links", mostLinks)
	errUnusable = errors.New("it has only addresses that an answer may not have: see dns.local_addresses")
)

// addressesOf finds the addresses of a name.
func (l *lookup) addressesOf(ctx context.Context, name string) (a addresses) {
	ctx, cancel := context.WithTimeoutCause(ctx, 2*l.cfg.Timeout, context.DeadlineExceeded) // of two questions
	defer cancel()
	if found := l.world.known(name); len(found) > 0 {
		a.ttl = l.cfg.MinTTL
		for _, addr := range found {
			if addr.Is4() {
				a.v4 = append(a.v4, addr)
			} else {
				a.v6 = append(a.v6, addr)
			}
		}
		a.asked6 = true
		l.restrict(&a)
		return a
	}
	servers, names := l.candidates(name)
	for _, fqdn := range names {
		a = l.families(ctx, servers, fqdn)
		if a.err4 != nil || a.err6 != nil || len(a.v4)+len(a.v6) > 0 || a.leftOut > 0 {
			break
		}
	}
	return a
}

// restrict leaves those of the families that are wanted.
func (l *lookup) restrict(a *addresses) {
	switch {
	case l.cfg.Family == "ipv4":
		a.v6 = nil
	case l.cfg.Family == "ipv6":
		a.v4 = nil
	}
}

// candidates returns who is asked for a name, and under which names it may be known.
func (l *lookup) candidates(name string) ([]netip.AddrPort, []string) {
	if len(l.cfg.Resolvers) > 0 {
		return l.cfg.Resolvers, []string{dns.Fqdn(name)}
	}
	host := l.world.ofHost()
	return resolvers(host), host.NameList(name)
}

// families asks for the addresses of one name, of the families that are wanted.
func (l *lookup) families(ctx context.Context, servers []netip.AddrPort, fqdn string) (a addresses) {
	a.ttl = maxTTL
	if l.cfg.Family != "ipv6" {
		var ttl time.Duration
		a.v4, ttl, a.err4 = l.family(ctx, servers, fqdn, dns.TypeA, &a.leftOut)
		a.ttl = min(a.ttl, ttl)
	}
	switch l.cfg.Family {
	case "ipv4":
		return a
	case "auto":
		if !l.both && len(a.v4) > 0 {
			return a
		}
	}
	var ttl time.Duration
	a.asked6 = true
	a.v6, ttl, a.err6 = l.family(ctx, servers, fqdn, dns.TypeAAAA, &a.leftOut)
	a.ttl = min(a.ttl, ttl)
	return a
}

func (l *lookup) family(ctx context.Context, servers []netip.AddrPort, fqdn string, kind uint16, leftOut *int) ([]netip.Addr, time.Duration, error) {
	records, ttl, err := l.ask(ctx, servers, fqdn, kind)
	if err != nil {
		return nil, ttl, err
	}
	var found []netip.Addr
	seen := make(map[netip.Addr]bool)
	for _, r := range records {
		a, ok := addressOf(r)
		if !ok || !l.usable(a) {
			*leftOut++
			continue
		}
		if !seen[a] {
			seen[a] = true
			found = append(found, a)
		}
	}
	if more := len(found) - config.MostDiscovered; more > 0 {
		slices.SortFunc(found, netip.Addr.Compare) // always the same ones
		found, *leftOut = found[:config.MostDiscovered], *leftOut+more
	}
	return found, ttl, nil
}

func addressOf(r dns.RR) (netip.Addr, bool) {
	var a netip.Addr
	var ok bool
	switch r := r.(type) {
	case *dns.A:
		a, ok = netip.AddrFromSlice(r.A.To4())
	case *dns.AAAA:
		a, ok = netip.AddrFromSlice(r.AAAA.To16())
	}
	return a.Unmap(), ok
}

var (
	broadcast = netip.AddrFrom4([4]byte{255, 255, 255, 255})
	thisHost  = netip.PrefixFrom(netip.AddrFrom4([4]byte{}), 8) // 0.0.0.0/8, RFC 6890
)

// usable says whether an answer may have this address: one that a connection can be made to, and
// no other host than whoever configured the name can have meant.
func (l *lookup) usable(a netip.Addr) bool {
	switch {
	case a.IsUnspecified(), a.IsMulticast(), a == broadcast, thisHost.Contains(a):
		return false
	case a.Is6() && a.IsLinkLocalUnicast():
		return false // without a zone it is nowhere
	case a.IsLoopback(), a.IsLinkLocalUnicast():
		return l.cfg.Local
	}
	return true
}

// host is one of a service.
type host struct {
	name     string
	port     uint16
	priority uint16
	weight   uint16
}

// hostsOf finds the hosts of a service, in the order of their priorities.
func (l *lookup) hostsOf(ctx context.Context, name string) (hosts []host, ttl time.Duration, leftOut int, err error) {
	servers, names := l.candidates(name)
	var records []dns.RR
	for _, fqdn := range names {
		records, ttl, err = l.ask(ctx, servers, fqdn, dns.TypeSRV)
		if err != nil || len(records) > 0 {
			break
		}
	}
	for _, r := range records {
		srv, ok := r.(*dns.SRV)
		if !ok || srv.Target == "." { // the service is decidedly not there, RFC 2782
			continue
		}
		target := strings.ToLower(strings.TrimSuffix(srv.Target, "."))
		if !isHost(target) || srv.Port == 0 {
			leftOut++
			continue
		}
		hosts = append(hosts, host{target, srv.Port, srv.Priority, srv.Weight})
	}
	slices.SortFunc(hosts, func(a, b host) int {
		return cmp.Or(cmp.Compare(a.priority, b.priority), cmp.Compare(a.name, b.name), cmp.Compare(a.port, b.port), cmp.Compare(a.weight, b.weight))
	})
	hosts = slices.CompactFunc(hosts, func(a, b host) bool { return a.name == b.name && a.port == b.port })
	if more := len(hosts) - mostHosts; more > 0 {
		hosts, leftOut = hosts[:mostHosts], leftOut+more
	}
	return hosts, ttl, leftOut, err
}

// isHost says whether a name can be one of a host: it gets into heads of requests.
func isHost(name string) bool {
	if name == "" || len(name) > 253 {
		return false
	}
	for label := range strings.SplitSeq(name, ".") {
		if label == "" || len(label) > 63 || strings.Trim(label, "abcdefghijklmnopqrstuvwxyz0123456789-_") != "" {
			return false
		}
	}
	return true
}

// ask returns the records of one kind that a name has, behind whatever aliases, and how long
// they hold, within the limits that are configured. There may be none.
func (l *lookup) ask(ctx context.Context, servers []netip.AddrPort, fqdn string, kind uint16) (records []dns.RR, ttl time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, l.cfg.Timeout)
	defer cancel()
	done, err := l.world.turn(ctx, servers)
	if err != nil {
		return nil, l.cfg.MinTTL, errors.New("too many questions wait for the resolvers")
	}
	defer done()
	least := l.cfg.MaxTTL
	for links := 0; links <= mostLinks; {
		r, err := l.send(ctx, servers, fqdn, kind)
		if err != nil {
			return nil, l.cfg.MinTTL, err
		}
		f := follow(r, fqdn, kind)
		least = min(least, f.ttl)
		if links += f.links; links > mostLinks || f.endless {
			break
		}
		if len(f.records) > 0 || f.last == strings.ToLower(fqdn) || r.Rcode != dns.RcodeSuccess {
			return f.records, max(least, l.cfg.MinTTL), nil
		}
		if negative(r) {
			return nil, max(least, l.cfg.MinTTL), nil
		}
		fqdn = f.last // whoever was asked has not followed it
	}
	return nil, l.cfg.MinTTL, errLoop
}

// negative says of an answer without records whether its sender knows that there are none.
func negative(r *dns.Msg) bool {
	return slices.ContainsFunc(r.Ns, func(rr dns.RR) bool { return rr.Header().Rrtype == dns.TypeSOA })
}

// followed is what an answer says of a name.
type followed struct {
	records []dns.RR
	last    string // the name at the end of the chain
	links   int
	endless bool
	ttl     time.Duration
}

// follow reads an answer. Records of names that are not in the chain do not count.
func follow(r *dns.Msg, fqdn string, kind uint16) (f followed) {
	f.last, f.ttl = strings.ToLower(fqdn), maxTTL
	alias := make(map[string]*dns.CNAME)
	for _, rr := range r.Answer {
		if c, ok := rr.(*dns.CNAME); ok && c.Hdr.Class == dns.ClassINET {
			if name := strings.ToLower(c.Hdr.Name); alias[name] == nil {
				alias[name] = c
			}
		}
	}
	for c := alias[f.last]; c != nil; c = alias[f.last] {
		if f.links++; f.links > mostLinks {
			f.endless = true
			return f
		}
		f.last, f.ttl = strings.ToLower(c.Target), min(f.ttl, seconds(c.Hdr.Ttl))
	}
	for _, rr := range r.Answer {
		h := rr.Header()
		if h.Rrtype == kind && h.Class == dns.ClassINET && strings.EqualFold(h.Name, f.last) {
			f.records = append(f.records, rr)
			f.ttl = min(f.ttl, seconds(h.Ttl))
		}
	}
	if len(f.records) == 0 {
		f.ttl = min(f.ttl, negativeTTL(r)) // RFC 2308 §5
	}
	return f
}

func negativeTTL(r *dns.Msg) time.Duration {
	for _, rr := range r.Ns {
		if soa, ok := rr.(*dns.SOA); ok {
			return min(seconds(soa.Hdr.Ttl), seconds(soa.Minttl))
		}
	}
	return 0
}

const maxTTL = 1 << 31 * time.Second

// seconds reads a TTL: one with the highest bit is 0 (RFC 2181 §8).
func seconds(ttl uint32) time.Duration {
	if ttl >= 1<<31 {
		return 0
	}
	return time.Duration(ttl) * time.Second
}

// send asks one server after the other until there is an answer, within the time of ctx.
func (l *lookup) send(ctx context.Context, servers []netip.AddrPort, fqdn string, kind uint16) (*dns.Msg, error) {
	each := l.cfg.Timeout / time.Duration(rounds*len(servers))
	var last error
	for range rounds {
		for _, server := range servers {
			r, err := l.sendTo(ctx, each, server, fqdn, kind)
			if err == nil {
				return r, nil
			}
			if last = err; ctx.Err() != nil {
				return nil, last
			}
		}
	}
	return nil, last
}

// sendTo asks one server, over TCP as well where the answer is too long for UDP, and without
// EDNS where that is not understood.
func (l *lookup) sendTo(ctx context.Context, timeout time.Duration, server netip.AddrPort, fqdn string, kind uint16) (*dns.Msg, error) {
	q := new(dns.Msg)
	q.SetQuestion(fqdn, kind)
	q.SetEdns0(payload, false)
	r, err := l.exchange(ctx, timeout, server, q)
	if err == nil && r.Rcode == dns.RcodeFormatError {
		q.Extra = nil
		r, err = l.exchange(ctx, timeout, server, q)
	}
	switch {
	case err != nil:
		return nil, fmt.Errorf("ask %s: %w", server, err)
	case r.Rcode != dns.RcodeSuccess && r.Rcode != dns.RcodeNameError:
		return nil, fmt.Errorf("%s answers %s", server, rcode(r.Rcode))
	}
	return r, nil
}

func rcode(code int) string {
	if s, ok := dns.RcodeToString[code]; ok {
		return s
	}
	return fmt.Sprintf("with the code %d", code)
}

func (l *lookup) exchange(ctx context.Context, timeout time.Duration, server netip.AddrPort, q *dns.Msg) (*dns.Msg, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	r, err := l.world.exchange(ctx, "udp", server, q)
	if err == nil && r.Truncated {
		r, err = l.world.exchange(ctx, "tcp", server, q)
	}
	if err != nil && ctx.Err() != nil {
		return nil, errors.New("no answer in time")
	}
	return r, err
}
