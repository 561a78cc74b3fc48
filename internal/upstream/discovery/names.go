package discovery

import (
	"context"
	"math"
	"net"
	"net/netip"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"holdfast/internal/config"
)

// names finds the endpoints of a cluster by DNS. All is done by the goroutine of run, but for
// the questions, which have one each.
type names struct {
	s       *Source
	lookup  lookup
	hosts   map[string]*nameState    // by name, those of services included
	service map[string]*serviceState // by name
	told    []Endpoint
	began   bool
	over    bool // too many addresses were found
	settled bool

	results chan func()
	resumed chan struct{} // has room for one
	asking  sync.WaitGroup
}

// question is when something is asked for.
type question struct {
	due      time.Time
	asking   bool
	failures int    // in a row
	known    bool   // there was an answer
	wrong    string // what the log says of it: the message; "": nothing, or that it is well again
}

// nameState is what is known of a name.
type nameState struct {
	question
	v4, v6 []netip.Addr // what each family's last answer was
	holds  []netip.Addr // what is used
}

// serviceState is what is known of a service.
type serviceState struct {
	question
	hosts []host
	last  []Endpoint // what somebody else knew, until all that is asked for here was answered
}

func newNames(s *Source) *names {
	n := &names{
		s: s, hosts: make(map[string]*nameState), service: make(map[string]*serviceState), results: make(chan func()), resumed: make(chan struct{}, 1),
		lookup: lookup{world: s.o.World, cfg: &s.o.Config.DNS, both: s.o.Config.By == config.ByLogicalDNS},
	}
	configured := make(map[string]bool)
	for _, e := range s.o.Endpoints {
		configured[e.Address] = true
	}
	var rest []Endpoint // which are hosts of services
	last := make(map[string][]netip.Addr)
	for _, e := range s.o.Last {
		if !configured[e.Address] {
			rest = append(rest, e)
			continue
		}
		if e.At.IsValid() {
			last[e.Address] = append(last[e.Address], e.At.Addr())
		}
		for _, a := range e.Addresses {
			last[e.Address] = append(last[e.Address], a.Addr())
		}
	}
	for _, e := range s.o.Endpoints {
		if e.SRV {
			if n.service[e.Address] == nil {
				n.service[e.Address] = &serviceState{last: rest}
				rest = nil // of several services nobody knows which was of which
			}
			continue
		}
		name, _, ok := named(e.Address)
		if !ok {
			continue
		}
		h := n.hosts[name]
		if h == nil {
			h = new(nameState)
			n.hosts[name] = h
		}
		for _, a := range last[e.Address] {
			if !slices.Contains(h.holds, a) {
				h.holds = append(h.holds, a)
			}
		}
	}
	for _, h := range n.hosts {
		for _, a := range h.holds {
			if a.Is4() {
				h.v4 = append(h.v4, a)
			} else {
				h.v6 = append(h.v6, a)
			}
		}
	}
	return n
}

// named takes an address apart that has a name.
func named(address string) (name string, port uint16, ok bool) {
	if strings.HasPrefix(address, "unix:") {
		return "", 0, false
	}
	name, digits, err := net.SplitHostPort(address)
	if err != nil {
		return "", 0, false
	}
	if _, err := netip.ParseAddr(name); err == nil {
		return "", 0, false
	}
	p, err := strconv.ParseUint(digits, 10, 16)
	return strings.ToLower(name), uint16(p), err == nil
}

func (n *names) begin() []Endpoint {
	n.told, n.began = n.endpoints(), true
	return n.told
}

func (n *names) resume() {
	select {
	case n.resumed <- struct{}{}:
	default:
	}
}

func (n *names) run(ctx context.Context) {
	if !n.began {
		n.begin()
	}
	defer n.asking.Wait()
	for {
		next := n.ask(ctx)
		n.settle()
		timer := time.NewTimer(time.Until(next))
		select {
		case apply := <-n.results:
			apply()
			n.tell()
		case <-timer.C:
		case <-n.resumed:
		case <-ctx.Done():
			timer.Stop()
			return
		}
		timer.Stop()
	}
}

// longest is until when nothing is due where nothing is asked for.
const longest = time.Hour

// ask asks all that is due, and returns when something will be.
func (n *names) ask(ctx context.Context) (next time.Time) {
	now := time.Now()
	next = now.Add(longest)
	if n.s.paused.Load() {
		return next
	}
	begin := func(q *question, ask func() func()) {
		switch {
		case q.asking:
		case q.due.After(now):
			if q.due.Before(next) {
				next = q.due
			}
		default:
			q.asking = true
			n.s.o.Counts.Attempts.Inc()
			n.asking.Go(func() {
				apply := ask()
				select {
				case n.results <- func() { q.asking = false; apply() }:
				case <-ctx.Done():
				}
			})
		}
	}
	for name, s := range n.service {
		begin(&s.question, func() func() {
			hosts, ttl, leftOut, err := n.lookup.hostsOf(ctx, name)
			return func() { n.takeHosts(name, s, hosts, ttl, leftOut, err) }
		})
	}
	for name, h := range n.hosts {
		begin(&h.question, func() func() {
			a := n.lookup.addressesOf(ctx, name)
			return func() { n.takeAddresses(name, h, a) }
		})
	}
	return next
}

// failed notes that a question had no answer.
func (n *names) failed(q *question) {
	n.s.o.Counts.Failures.Inc()
	cfg := &n.s.o.Config.DNS
	wait := cfg.BackoffBase << min(q.failures, 20)
	if wait <= 0 || wait > cfg.BackoffMax {
		wait = cfg.BackoffMax
	}
	q.failures++
	q.due = time.Now().Add(about(wait))
}

// answered notes an answer, and whether there was nothing in it.
func (n *names) answered(q *question, ttl time.Duration, empty bool) {
	n.s.o.Counts.Successes.Inc()
	if empty {
		n.s.o.Counts.Empty.Inc()
	}
	q.failures, q.known = 0, true
	q.due = time.Now().Add(later(ttl))
}

func (n *names) takeHosts(name string, s *serviceState, hosts []host, ttl time.Duration, leftOut int, err error) {
	n.s.o.Counts.LeftOut.Add(uint64(leftOut))
	switch {
	case err != nil:
		n.failed(&s.question)
		n.log(name, &s.question, notResolved, len(s.hosts)+len(s.last), err)
		return
	case len(hosts) == 0 && !n.s.o.Config.DNS.RemoveEmpty:
		n.answered(&s.question, ttl, true)
	default:
		n.answered(&s.question, ttl, len(hosts) == 0)
		if len(hosts) == 0 {
			s.last = nil
		}
		s.hosts = hosts
		n.keepHosts()
	}
	n.logAnswer(name, &s.question, len(hosts) == 0, len(s.hosts)+len(s.last))
}

// keepHosts has those names asked for that are configured, or are hosts of a service.
func (n *names) keepHosts() {
	wanted := make(map[string]bool)
	for _, e := range n.s.o.Endpoints {
		if name, _, ok := named(e.Address); ok && !e.SRV {
			wanted[name] = true
		}
	}
	for _, s := range n.service {
		for _, h := range s.hosts {
			wanted[h.name] = true
			if n.hosts[h.name] == nil {
				n.hosts[h.name] = n.newHost(h.name)
			}
		}
	}
	for name := range n.hosts {
		if !wanted[name] {
			delete(n.hosts, name) // what is being asked comes to nothing
		}
	}
}

// newHost returns the state of a host of a service. One may be an address already, which some
// servers send although it is no name.
func (n *names) newHost(name string) *nameState {
	h := new(nameState)
	if a, err := netip.ParseAddr(name); err == nil {
		h.known, h.due = true, time.Now().Add(math.MaxInt64) // never
		if n.lookup.usable(a) {
			h.holds = []netip.Addr{a}
		}
	}
	return h
}

func (n *names) takeAddresses(name string, h *nameState, a addresses) {
	if n.hosts[name] != h {
		return
	}
	n.s.o.Counts.LeftOut.Add(uint64(a.leftOut))
	err := a.err4
	if err == nil {
		err = a.err6
	}
	v4, v6 := a.v4, a.v6
	if a.err4 != nil {
		v4 = h.v4
	}
	if a.err6 != nil {
		v6 = h.v6
	}
	holds := n.choose(v4, v6)
	if err == nil && len(holds) == 0 && a.leftOut > 0 {
		v4, v6, holds, err = h.v4, h.v6, h.holds, errUnusable
	}
	switch {
	case err != nil:
		h.v4, h.v6, h.holds = v4, v6, holds
		n.failed(&h.question)
		if n.configured(name) {
			n.log(name, &h.question, notResolved, len(holds), err)
		}
		return
	case len(holds) == 0 && !n.s.o.Config.DNS.RemoveEmpty:
	default:
		h.v4, h.v6, h.holds = v4, v6, holds
	}
	n.answered(&h.question, a.ttl, len(holds) == 0)
	if n.configured(name) {
		n.logAnswer(name, &h.question, len(holds) == 0, len(h.holds))
	}
}

// choose returns those addresses of both families that are used.
func (n *names) choose(v4, v6 []netip.Addr) []netip.Addr {
	if n.lookup.cfg.Family == "auto" && !n.lookup.both && len(v4) > 0 {
		return v4
	}
	return slices.Concat(v4, v6)
}

// What the log says is wrong with a name.
const (
	notResolved      = "a name of a cluster cannot be resolved: what it stood for last is used"
	standsForNothing = "a name of a cluster stands for nothing: there is no such name, or it has no addresses"
)

// configured says whether the configuration has a name. Names that only an answer has are not
// logged.
func (n *names) configured(name string) bool {
	return slices.ContainsFunc(n.s.o.Endpoints, func(e config.Endpoint) bool {
		it, _, ok := named(e.Address)
		return ok && !e.SRV && it == name
	})
}

// log says once what is wrong with a name, and how many addresses, or hosts, are used for it all
// the same.
func (n *names) log(name string, q *question, wrong string, used int, err error) {
	if q.wrong == wrong {
		return
	}
	q.wrong = wrong
	attrs := []any{"name", name, "used", used}
	if err != nil {
		attrs = append(attrs, "err", err)
	}
	n.s.o.Log.Warn(wrong, attrs...)
}

// logAnswer says that there is nothing in the answer for a name, or that there is something again.
func (n *names) logAnswer(name string, q *question, empty bool, used int) {
	switch {
	case empty:
		n.log(name, q, standsForNothing, used, nil)
	case q.wrong != "":
		q.wrong = ""
		n.s.o.Log.Info("a name of a cluster is resolved again", "name", name)
	}
}

// settle tells once that everything has an answer, or stays what it was for want of one.
func (n *names) settle() {
	if n.settled {
		return
	}
	for _, s := range n.service {
		if !s.known && (s.failures == 0 || len(s.last) == 0) {
			return
		}
	}
	for _, h := range n.hosts {
		if !h.known && (h.failures == 0 || len(h.holds) == 0) {
			return
		}
	}
	n.settled = true
	n.s.o.Settled()
}

// tell tells what has changed.
func (n *names) tell() {
	now := n.endpoints()
	was := n.told
	if reflect.DeepEqual(now, was) {
		return
	}
	n.told = now
	if !slices.EqualFunc(now, was, func(a, b Endpoint) bool {
		a.Addresses, b.Addresses = nil, nil
		return reflect.DeepEqual(a, b)
	}) {
		n.s.o.Deliver(now)
		return
	}
	for i := range now {
		if !slices.Equal(now[i].Addresses, was[i].Addresses) {
			n.s.o.Moved(now[i].Address, now[i].Addresses)
		}
	}
}

// endpoints returns all that is known.
func (n *names) endpoints() []Endpoint {
	var all []Endpoint
	leftOut := 0
	for _, e := range n.s.o.Endpoints {
		name, port, isName := named(e.Address)
		switch {
		case e.SRV:
			found, more := n.ofService(n.service[e.Address], &e)
			all = append(all, found...)
			leftOut += more
		case !isName:
			all = append(all, fixed(e))
		case n.lookup.both:
			if h := n.hosts[name]; len(h.holds) > 0 {
				one := Endpoint{Address: e.Address, EndpointOptions: e.EndpointOptions}
				for _, a := range h.holds {
					one.Addresses = append(one.Addresses, netip.AddrPortFrom(a, port))
				}
				all = append(all, one)
			}
		default:
			for _, a := range sorted(n.hosts[name].holds) {
				all = append(all, Endpoint{Address: e.Address, At: netip.AddrPortFrom(a, port), EndpointOptions: e.EndpointOptions})
			}
		}
	}
	if more := len(all) - config.MostDiscovered; more > 0 {
		all, leftOut = all[:config.MostDiscovered], leftOut+more
	}
	over := leftOut > 0
	n.s.o.Counts.LeftOut.Add(uint64(leftOut))
	if over && !n.over {
		n.s.o.Log.Warn("a cluster has more endpoints than it can have: the rest is left out", "limit", config.MostDiscovered)
	}
	n.over = over
	return all
}

// sorted returns addresses in an order that does not depend on the answer's.
func sorted(all []netip.Addr) []netip.Addr {
	all = slices.Clone(all)
	slices.SortFunc(all, netip.Addr.Compare)
	return all
}

// fixed is an endpoint that is where it says.
func fixed(e config.Endpoint) Endpoint {
	if path, ok := strings.CutPrefix(e.Address, "unix:"); ok {
		return Endpoint{Address: e.Address, Path: path, EndpointOptions: e.EndpointOptions}
	}
	at, _ := netip.ParseAddrPort(e.Address)
	return Endpoint{Address: e.Address, At: at, EndpointOptions: e.EndpointOptions}
}

// ofService returns the endpoints of a service's hosts. What somebody else knew holds until all
// hosts were asked for. Each host may have as many addresses as a cluster has endpoints, so no more
// than these are made; leftOut is how many are not.
func (n *names) ofService(s *serviceState, e *config.Endpoint) (all []Endpoint, leftOut int) {
	complete := s.known
	tier, last := -1, -1
	for _, h := range s.hosts {
		if int(h.priority) != last {
			tier, last = tier+1, int(h.priority)
		}
		state := n.hosts[h.name]
		complete = complete && (state.known || state.failures > 0)
		o := e.EndpointOptions
		o.Priority += tier
		o.Weight = max(int64(h.weight), 1)
		some := state.holds
		if room := config.MostDiscovered - len(all); len(some) > room {
			some, leftOut = sorted(some)[:room], leftOut+len(some)-room
		}
		for _, a := range sorted(some) {
			at := netip.AddrPortFrom(a, h.port)
			all = append(all, Endpoint{Address: net.JoinHostPort(h.name, strconv.Itoa(int(h.port))), At: at, EndpointOptions: o})
		}
	}
	if s.last != nil && (!complete || len(all) == 0) {
		return s.last, 0
	}
	s.last = nil
	return all, leftOut
}
