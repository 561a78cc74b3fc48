package config

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path"
	"regexp"
	"strconv"
	"strings"
)

// Address is where a listener listens. The value is comparable, and equal for
// equal places: it is the identity of a listening socket over reloads, whatever
// the listener is called.
type Address struct {
	Network string         // "tcp", "unix" or "systemd"
	IP      netip.AddrPort // of "tcp", IPv4-mapped addresses unmapped
	Path    string         // of "unix", cleaned and absolute
	Name    string         // of "systemd": FileDescriptorName= of the socket unit
}

// Key returns the address in its canonical form, as files and messages name it:
// "0.0.0.0:443", "[::]:443", "unix:/run/app.sock", "systemd:web".
func (a Address) Key() string {
	switch a.Network {
	case "unix":
		return "unix:" + a.Path
	case "systemd":
		return "systemd:" + a.Name
	}
	return a.IP.String()
}

// listenAddress is what a listener's "address" may say.
var listenAddress = form[Address]{`"IP:port", "[IPv6]:port", "unix:/path" or "systemd:NAME"`, parseListenAddress, Address.Key}

func parseListenAddress(s string) (Address, error) {
	if name, ok := strings.CutPrefix(s, "systemd:"); ok {
		return Address{Network: "systemd", Name: name}, checkDescriptorName(name)
	}
	if p, ok := strings.CutPrefix(s, "unix:"); ok {
		p, err := parseUnixPath(p)
		return Address{Network: "unix", Path: p}, err
	}
	ip, err := parseAddrPort(s)
	return Address{Network: "tcp", IP: ip}, err
}

// checkDescriptorName refuses what systemd does not take as FileDescriptorName= of
// a socket unit; see systemd.socket(5).
func checkDescriptorName(name string) error {
	const most = 255
	switch {
	case name == "":
		return errors.New("the name is missing; it is the FileDescriptorName= of a socket unit")
	case len(name) > most:
		return fmt.Errorf("systemd takes names of at most %d characters, this one has %d", most, len(name))
	case strings.Contains(name, ":"):
		return errors.New("a colon separates names in what systemd passes on, so none can hold one")
	case strings.ContainsFunc(name, func(r rune) bool { return r < ' ' || r >= 0x7f }):
		return errors.New("systemd takes names of ASCII characters without control characters only")
	}
	return nil
}

// The sizes of the kernel's buffers for paths, without the closing NUL: sun_path
// (unix(7)) and PATH_MAX.
const (
	maxUnixPath = 107
	maxPath     = 4095
)

func parseUnixPath(p string) (string, error) { return parseFilePath(p, maxUnixPath) }

// checkAbstract checks the name of a unix socket that is no file (unix(7), abstract).
func checkAbstract(name string) error {
	switch {
	case name == "":
		return errors.New("the name of the socket is missing")
	case hasControl(name):
		return errControl
	case len(name) > maxUnixPath:
		return fmt.Errorf("the kernel takes names of at most %d bytes, this one has %d", maxUnixPath, len(name))
	}
	return nil
}

// parseFilePath returns an absolute path of at most so many bytes in its shortest
// form.
func parseFilePath(p string, most int) (string, error) {
	if !path.IsAbs(p) {
		return "", errors.New("the path must begin with /")
	}
	if hasControl(p) {
		return "", errControl
	}
	p = path.Clean(p)
	if p == "/" {
		return "", errors.New("the path names no file")
	}
	if len(p) > most {
		return "", fmt.Errorf("the kernel takes paths of at most %d bytes, this one has %d", most, len(p))
	}
	return p, nil
}

// parseAddrPort reads the address of a TCP socket, to the point about what is missing.
func parseAddrPort(s string) (netip.AddrPort, error) {
	if strings.Contains(s, "%") {
		return netip.AddrPort{}, errors.New("a zone is not supported")
	}
	if a, err := netip.ParseAddrPort(s); err == nil {
		return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()), nil
	}
	if a, err := netip.ParseAddr(strings.Trim(s, "[]")); err == nil {
		return netip.AddrPort{}, fmt.Errorf("the port is missing, as in %q", netip.AddrPortFrom(a, 80))
	}
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return netip.AddrPort{}, errForm
	}
	if host == "" {
		return netip.AddrPort{}, fmt.Errorf("the IP address is missing; for all of them write %q, or %q for IPv4 only", "[::]:"+port, "0.0.0.0:"+port)
	}
	if _, err := netip.ParseAddr(host); err != nil {
		return netip.AddrPort{}, errors.New("a host name or a malformed address is nothing to listen on; an IP address is")
	}
	return netip.AddrPort{}, errPort
}

var errPort = errors.New("the port must be a number up to 65535")

// endpointAddress is where an upstream is reached. Its value is as written: it
// names the upstream in rewritten hosts and in messages.
var endpointAddress = form[string]{`"host:port" or "unix:/path"`, func(s string) (string, error) {
	_, err := canonicalEndpoint(s)
	return s, err
}, asIs}

// canonicalEndpoint is equal for equal endpoints, as far as that can be told
// without resolving names.
func canonicalEndpoint(s string) (string, error) {
	if p, ok := strings.CutPrefix(s, "unix:"); ok {
		if name, ok := strings.CutPrefix(p, "@"); ok {
			return s, checkAbstract(name)
		}
		p, err := parseUnixPath(p)
		return "unix:" + p, err
	}
	host, port, err := splitAuthority(s)
	if err != nil {
		return "", err
	}
	if port == "" {
		return "", errors.New("the port is missing")
	}
	return host + ":" + port, nil
}

// authority is a host with or without a port, as a Host field carries it.
var authority = form[string]{`a host like "example.com" or "example.com:8080"`, func(s string) (string, error) {
	_, _, err := splitAuthority(s)
	return s, err
}, asIs}

// splitAuthority takes "host", "host:port" or "[IPv6]:port" apart, the host in
// its canonical form.
func splitAuthority(s string) (host, port string, err error) {
	if strings.Contains(s, "://") {
		return "", "", errors.New("it is a URL; only the host and the port of it are needed")
	}
	host = s
	if i := strings.LastIndexByte(s, ':'); i >= 0 && i > strings.LastIndexByte(s, ']') {
		host, port = s[:i], s[i+1:]
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 || strconv.Itoa(int(n)) != port {
			return "", "", errors.New("the port must be a number from 1 to 65535")
		}
	}
	host, err = parseHost(host)
	return host, port, err
}

var label = regexp.MustCompile(`^[a-z0-9_-]{1,63}$`)

// parseHost returns a host name, an IPv4 address or an IPv6 address in brackets
// in canonical form: lower case, the shortest way to write IPv6.
func parseHost(s string) (string, error) {
	if inner, ok := strings.CutPrefix(s, "["); ok {
		inner, closed := strings.CutSuffix(inner, "]")
		a, err := netip.ParseAddr(inner)
		if !closed || err != nil || !a.Is6() || a.Zone() != "" {
			return "", errors.New("brackets hold an IPv6 address, without a zone")
		}
		return "[" + a.String() + "]", nil
	}
	if strings.Contains(s, ":") {
		return "", errors.New("an IPv6 address stands in brackets")
	}
	if s == "" {
		return "", errors.New("the host is missing")
	}
	if len(s) > 253 { // RFC 1035 §2.3.4: 255 octets with the length bytes of its ends
		return "", errors.New("a host name has at most 253 characters")
	}
	s = strings.ToLower(s)
	for l := range strings.SplitSeq(s, ".") {
		switch {
		case l == "":
			return "", errors.New("a part between two dots is empty")
		case len(l) > 63:
			return "", errors.New("a part between two dots has at most 63 characters")
		case !label.MatchString(l):
			return "", errors.New("a host name has only letters, digits, dashes, underscores and dots (other scripts in their xn-- form)")
		}
	}
	return s, nil
}
