package discovery

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/miekg/dns"

	"holdfast/internal/filewatch"
)

// World is the outside as sources reach it. What is zero is the host's own.
type World struct {
	// Exchange sends a question to a resolver over network, "udp" or "tcp", and returns the
	// answer with its id and question.
	Exchange func(ctx context.Context, network string, resolver netip.AddrPort, q *dns.Msg) (*dns.Msg, error)

	// Watch is [filewatch.Options.Watch].
	Watch func(ctx context.Context, directories []string, tell func())

	ResolvConf, Hosts string // paths

	mu       sync.Mutex
	turns    map[string]chan struct{} // by those who are asked
	resolver kept[*dns.ClientConfig]
	hosts    kept[map[string][]netip.Addr]
}

const (
	// mostQuestions is how many questions the same resolvers are asked at a time.
	mostQuestions = 32

	// Bounds of the host's files, and of how many resolvers and search domains of them count.
	mostFile      = 1 << 20
	mostOfHost    = 8
	payload       = 1232 // bytes of an answer over UDP: what passes everywhere without fragments (dnsflagday.net/2020)
	mostOfAddress = 64   // addresses of a name in the file of hosts
)

// turn waits until those who are asked may be asked once more.
func (w *World) turn(ctx context.Context, resolvers []netip.AddrPort) (done func(), err error) {
	var key strings.Builder
	for _, r := range resolvers {
		key.WriteString(r.String() + " ")
	}
	w.mu.Lock()
	turns := w.turns[key.String()]
	if turns == nil {
		if w.turns == nil {
			w.turns = make(map[string]chan struct{})
		}
		turns = make(chan struct{}, mostQuestions)
		w.turns[key.String()] = turns
	}
	w.mu.Unlock()
	select {
	case turns <- struct{}{}:
		return func() { <-turns }, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (w *World) exchange(ctx context.Context, network string, resolver netip.AddrPort, q *dns.Msg) (*dns.Msg, error) {
	if w.Exchange != nil {
		return w.Exchange(ctx, network, resolver, q)
	}
	return exchange(ctx, network, resolver, q)
}

// exchange asks from a socket of its own, whose port the kernel chooses: whoever wants to answer
// in the resolver's place has to guess that and the id.
func exchange(ctx context.Context, network string, resolver netip.AddrPort, q *dns.Msg) (*dns.Msg, error) {
	question, err := q.Pack()
	if err != nil {
		return nil, err
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, network, resolver.String())
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })()
	if network == "tcp" {
		question = append(binary.BigEndian.AppendUint16(nil, uint16(len(question))), question...)
	}
	if _, err := conn.Write(question); err != nil {
		return nil, err
	}
	if network == "tcp" {
		return readTCP(conn, q)
	}
	b := make([]byte, 4096)
	for { // ctx has an end
		n, err := conn.Read(b)
		if err != nil {
			return nil, err
		}
		if r, ok := answerTo(q, b[:n]); ok {
			return r, nil
		}
	}
}

var errNonsense = errors.New("what came is no answer to the question")

func readTCP(conn net.Conn, q *dns.Msg) (*dns.Msg, error) {
	var size [2]byte
	if _, err := io.ReadFull(conn, size[:]); err != nil {
		return nil, err
	}
	b := make([]byte, binary.BigEndian.Uint16(size[:]))
	if _, err := io.ReadFull(conn, b); err != nil {
		return nil, err
	}
	if r, ok := answerTo(q, b); ok {
		return r, nil
	}
	return nil, errNonsense
}

// answerTo returns the answer to q that the bytes are, if they are one.
func answerTo(q *dns.Msg, b []byte) (*dns.Msg, bool) {
	r := new(dns.Msg)
	err := r.Unpack(b)
	if r.Id != q.Id || !r.Response || r.Opcode != dns.OpcodeQuery {
		return nil, false
	}
	if len(r.Question) == 0 && r.Rcode == dns.RcodeFormatError {
		return r, true // from one that knows no EDNS, and has not read on
	}
	if len(r.Question) != 1 || !strings.EqualFold(r.Question[0].Name, q.Question[0].Name) ||
		r.Question[0].Qtype != q.Question[0].Qtype || r.Question[0].Qclass != q.Question[0].Qclass {
		return nil, false
	}
	return r, err == nil || r.Truncated // which may be cut anywhere
}

// kept is what a file of the host comes to, as long as that stays the same.
type kept[T any] struct {
	signature filewatch.Signature
	value     T
}

// get reads the file again if it has changed. One that cannot be read is empty.
func (k *kept[T]) get(path string, parse func([]byte) T) T {
	now := filewatch.SignatureOf(path)
	if k.signature != now {
		k.signature = now
		data, _ := readBounded(path)
		k.value = parse(data)
	}
	return k.value
}

func readBounded(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, mostFile))
}

// ofHost returns whom the host asks for names, and how.
func (w *World) ofHost() *dns.ClientConfig {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.resolver.get(or(w.ResolvConf, "/etc/resolv.conf"), parseResolvConf)
}

// known returns what the host's own file says of a name.
func (w *World) known(name string) []netip.Addr {
	w.mu.Lock()
	defer w.mu.Unlock()
	if found := w.hosts.get(or(w.Hosts, "/etc/hosts"), parseHosts)[name]; len(found) > 0 {
		return found
	}
	if name == "localhost" || strings.HasSuffix(name, ".localhost") { // RFC 6761 §6.3
		return []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()}
	}
	return nil
}

func or(path, other string) string {
	if path == "" {
		return other
	}
	return path
}

func parseResolvConf(data []byte) *dns.ClientConfig {
	c, err := dns.ClientConfigFromReader(bytes.NewReader(data))
	if err != nil {
		c = &dns.ClientConfig{Ndots: 1}
	}
	c.Servers = c.Servers[:min(len(c.Servers), mostOfHost)]
	c.Search = c.Search[:min(len(c.Search), mostOfHost)]
	return c
}

// resolvers returns those of the configuration whose addresses are addresses; none: the one
// on the host itself (resolv.conf(5)).
func resolvers(c *dns.ClientConfig) (all []netip.AddrPort) {
	for _, s := range c.Servers {
		if a, err := netip.ParseAddr(s); err == nil {
			all = append(all, netip.AddrPortFrom(a, 53))
		}
	}
	if len(all) == 0 {
		all = append(all, netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), 53))
	}
	return all
}

func parseHosts(data []byte) map[string][]netip.Addr {
	hosts := make(map[string][]netip.Addr)
	lines := bufio.NewScanner(bytes.NewReader(data))
	for lines.Scan() {
		line, _, _ := strings.Cut(lines.Text(), "#")
		fields := strings.Fields(line)
		if len(fields) == 0 {
			continue
		}
		a, err := netip.ParseAddr(fields[0])
		if err != nil {
			continue
		}
		for _, name := range fields[1:] {
			name = strings.ToLower(strings.TrimSuffix(name, "."))
			if a := a.Unmap(); a.Zone() == "" && len(hosts[name]) < mostOfAddress && !slices.Contains(hosts[name], a) {
				hosts[name] = append(hosts[name], a)
			}
		}
	}
	return hosts
}
