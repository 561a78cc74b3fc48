package socket_test

import (
	"errors"
	"io/fs"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"holdfast/internal/config"
	"holdfast/internal/socket"
)

// again is a duplicate of s as it may come back: blocking, and without close-on-exec.
func again(t *testing.T, s *socket.Socket) int {
	t.Helper()
	fd, err := unix.Dup(s.FD())
	if err == nil {
		err = unix.SetNonblock(fd, false)
	}
	if err != nil {
		t.Fatal(err)
	}
	return fd
}

func mustAdopt(t *testing.T, cfg config.Socket, fd int) *socket.Socket {
	t.Helper()
	s, err := socket.Adopt(cfg, fd)
	if err != nil {
		t.Fatalf("adopt %s: %v", cfg.Address.Key(), err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func at(s *socket.Socket) netip.AddrPort { return netip.MustParseAddrPort(s.Address()) }

func TestASocketThatComesBackIsAsItWasOpened(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	for _, c := range []struct {
		name string
		cfg  config.Socket
	}{
		{"IPv4", tcp("a", "127.0.0.1:0")},
		{"IPv6", tcp("a", "[::1]:0")},
		{"dual-stack", tcp("a", "[::]:0")},
		{"unix", unixAt("a", path, 0o600)},
	} {
		t.Run(c.name, func(t *testing.T) {
			first := mustOpen(t, c.cfg)
			s := mustAdopt(t, c.cfg, again(t, first))
			fl, _ := unix.FcntlInt(uintptr(s.FD()), unix.F_GETFL, 0)
			fd, _ := unix.FcntlInt(uintptr(s.FD()), unix.F_GETFD, 0)
			if fl&unix.O_NONBLOCK == 0 || fd&unix.FD_CLOEXEC == 0 {
				t.Errorf("non-blocking %v, close-on-exec %v", fl&unix.O_NONBLOCK != 0, fd&unix.FD_CLOEXEC != 0)
			}
			if s.Address() != first.Address() {
				t.Errorf("is at %s, was at %s", s.Address(), first.Address())
			}
			if c.cfg.Address.Network == "unix" {
				drain(t, s)
				wantAccepted(t, s, "unix", path)
				return
			}
			wantAccepted(t, s, "tcp", s.Address())
			cfg := c.cfg
			cfg.Address.IP = at(s)
			wantAccepted(t, mustAdopt(t, cfg, again(t, first)), "tcp", s.Address())
		})
	}
}

// drain takes what waits in the queue of a unix socket.
func drain(t *testing.T, s *socket.Socket) {
	t.Helper()
	for {
		fd, _, err := unix.Accept4(s.FD(), unix.SOCK_CLOEXEC)
		if errors.Is(err, unix.EAGAIN) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		unix.Close(fd)
	}
}

func TestASocketThatComesBackShutDownListensAgain(t *testing.T) {
	first := mustOpen(t, tcp("a", "127.0.0.1:0"))
	cfg := tcp("a", first.Address())
	if err := unix.Shutdown(first.FD(), unix.SHUT_RDWR); err != nil {
		t.Fatal(err)
	}
	s := mustAdopt(t, cfg, again(t, first))
	if s.Address() != first.Address() {
		t.Errorf("is at %s, was at %s", s.Address(), first.Address())
	}
	wantAccepted(t, s, "tcp", s.Address())
}

// Who was killed while it bound beside one of its own has left this on.
func TestASocketThatComesBackSharesItsPortWithNobody(t *testing.T) {
	first := mustOpen(t, tcp("a", "127.0.0.1:0"))
	if err := unix.SetsockoptInt(first.FD(), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1); err != nil {
		t.Fatal(err)
	}
	s := mustAdopt(t, tcp("a", first.Address()), again(t, first))
	if on, err := unix.GetsockoptInt(s.FD(), unix.SOL_SOCKET, unix.SO_REUSEPORT); err != nil || on != 0 {
		t.Errorf("SO_REUSEPORT is %d (%v)", on, err)
	}
}

func TestAUnixSocketThatComesBackGetsItsModeAndOwnsItsPath(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	first := mustOpen(t, unixAt("a", path, 0o600))
	s, err := socket.Adopt(unixAt("a", path, 0o666), again(t, first))
	if err != nil {
		t.Fatal(err)
	}
	wantMode(t, path, 0o666)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the path outlives the socket: %v", err)
	}
}

// How full the queue is says nothing about whose the socket is.
func TestAUnixSocketWithAFullQueueComesBack(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	first := mustOpen(t, unixAt("a", path, 0o600))
	for {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		if err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err != nil {
			break
		}
	}
	mustAdopt(t, unixAt("a", path, 0o600), again(t, first))
}

func TestASocketOfSystemdComesBack(t *testing.T) {
	s, err := socket.Open(systemd("a", "web"), nil, inherit(t, passed(t, "web", "tcp", "127.0.0.1:0")))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	back := mustAdopt(t, systemd("a", "web"), again(t, s))
	wantAccepted(t, back, "tcp", back.Address())
}

func TestWhatComesBackIsLookedAt(t *testing.T) {
	open := func(cfg config.Socket) func(*testing.T) int {
		return func(t *testing.T) int { return again(t, mustOpen(t, cfg)) }
	}
	made := func(family, kind, protocol int) func(*testing.T) int {
		return func(t *testing.T) int {
			fd, err := unix.Socket(family, kind|unix.SOCK_CLOEXEC, protocol)
			if err != nil {
				t.Fatal(err)
			}
			return fd
		}
	}
	dir := t.TempDir()
	path := filepath.Join(dir, "s")
	only := tcp("a", "[::]:0")
	only.IPv6Only = true
	for _, c := range []struct {
		name string
		cfg  config.Socket
		fd   func(*testing.T) int
		want string
	}{
		{"another address", tcp("a", "127.0.0.2:0"), open(tcp("b", "127.0.0.1:0")), "a socket at 127.0.0.1:"},
		{"another port", tcp("a", "127.0.0.1:1"), open(tcp("b", "127.0.0.1:0")), "a socket at 127.0.0.1:"},
		{"another family", tcp("a", "[::1]:0"), open(tcp("b", "127.0.0.1:0")), "a socket at 127.0.0.1:"},
		{"another ipv6_only", only, open(tcp("b", "[::]:0")), "another ipv6_only needs a new socket"},
		{"a unix socket for a TCP one", tcp("a", "127.0.0.1:0"), open(unixAt("b", filepath.Join(dir, "b"), 0o600)), "no TCP socket"},
		{"a TCP socket for a unix one", unixAt("a", path, 0o600), open(tcp("b", "127.0.0.1:0")), "a socket at 127.0.0.1:"},
		{"another path", unixAt("a", path, 0o600), open(unixAt("b", filepath.Join(dir, "c"), 0o600)), "a socket at unix:" + dir + "/c"},
		{"an unbound socket", tcp("a", "127.0.0.1:0"), made(unix.AF_INET, unix.SOCK_STREAM, 0), "a socket at 0.0.0.0:0"},
		{"an unbound socket for any address", tcp("a", "0.0.0.0:0"), made(unix.AF_INET, unix.SOCK_STREAM, 0), "a socket at 0.0.0.0:0"},
		{"an unbound unix socket", unixAt("a", path, 0o600), made(unix.AF_UNIX, unix.SOCK_STREAM, 0), "a socket at unix:"},
		{"a socket of datagrams", tcp("a", "127.0.0.1:0"), made(unix.AF_INET, unix.SOCK_DGRAM, 0), "no stream socket"},
		{"a file", tcp("a", "127.0.0.1:0"), func(t *testing.T) int {
			fd, err := unix.MemfdCreate("x", unix.MFD_CLOEXEC)
			if err != nil {
				t.Fatal(err)
			}
			return fd
		}, "no stream socket"},
		{"a connection", tcp("a", "127.0.0.1:0"), func(t *testing.T) int {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			c, err := net.Dial("tcp", l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			f, err := c.(*net.TCPConn).File()
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			fd, err := unix.Dup(int(f.Fd()))
			if err != nil {
				t.Fatal(err)
			}
			return fd
		}, "invalid argument"},
		{"a connection for systemd's", systemd("a", "web"), made(unix.AF_INET, unix.SOCK_STREAM, 0), "no listening stream socket"},
	} {
		t.Run(c.name, func(t *testing.T) {
			fd := c.fd(t)
			var was unix.Stat_t
			if err := unix.Fstat(fd, &was); err != nil {
				t.Fatal(err)
			}
			s, err := socket.Adopt(c.cfg, fd)
			if err == nil {
				s.Close()
			}
			if err == nil || !strings.Contains(err.Error(), c.want) || !strings.HasPrefix(err.Error(), `listener "a": `+c.cfg.Address.Key()+": what came back: ") {
				t.Errorf("got %v, want %q", err, c.want)
			}
			var now unix.Stat_t
			if unix.Fstat(fd, &now) == nil && now.Ino == was.Ino && now.Dev == was.Dev {
				t.Error("it is still open")
			}
		})
	}
}

// A unix socket is worth nothing without its path.
func TestAUnixSocketWithoutItsPathIsRefused(t *testing.T) {
	for _, c := range []struct {
		name  string
		after func(t *testing.T, path string)
		want  string
	}{
		{"gone", func(*testing.T, string) {}, "that nobody reaches: lstat"},
		{"a file", func(t *testing.T, path string) {
			if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
				t.Fatal(err)
			}
		}, "that nobody reaches: connection refused"},
		{"a dead socket", func(t *testing.T, path string) {
			l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
			if err != nil {
				t.Fatal(err)
			}
			l.SetUnlinkOnClose(false)
			l.Close()
		}, "that nobody reaches: connection refused"},
		{"another process's", listenElsewhere, "that nobody reaches: process "},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "s")
			first := mustOpen(t, unixAt("a", path, 0o600))
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
			c.after(t, path)
			was, _ := os.Lstat(path)
			s, err := socket.Adopt(unixAt("a", path, 0o666), again(t, first))
			if err == nil {
				s.Close()
			}
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
			if now, _ := os.Lstat(path); was != nil && (now == nil || !os.SameFile(was, now) || was.Mode() != now.Mode()) {
				t.Error("the path is not as it was")
			}
		})
	}
}

func TestASuccessorHasTheSocketsOfSystemd(t *testing.T) {
	old := inherit(t, passed(t, "a", "tcp", "127.0.0.1:0"), passed(t, "b", "tcp", "127.0.0.1:0"), passed(t, "b", "tcp", "127.0.0.1:0"))
	all := old.All()
	if names := slices.Sorted(maps.Keys(all)); !slices.Equal(names, old.Names()) || len(all["b"]) != 2 {
		t.Fatalf("%v of %q", all, old.Names())
	}
	over := make(map[string][]int)
	for name, fds := range all {
		for _, fd := range fds {
			dup, err := unix.Dup(fd)
			if err != nil {
				t.Fatal(err)
			}
			over[name] = append(over[name], dup)
		}
	}
	s, err := socket.Open(systemd("public", "a"), nil, socket.InheritDescriptors(over))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	wantAccepted(t, s, "tcp", s.Address())
	if none := (*socket.Inherited)(nil).All(); len(none) != 0 {
		t.Errorf("without systemd there are %v", none)
	}
}
