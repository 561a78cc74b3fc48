package socket_test

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"holdfast/internal/config"
	"holdfast/internal/socket"
)

func tcp(name, addr string) config.Socket {
	return config.Socket{Name: name, Address: config.Address{Network: "tcp", IP: netip.MustParseAddrPort(addr)}}
}

func unixAt(name, path string, mode uint32) config.Socket {
	return config.Socket{Name: name, Address: config.Address{Network: "unix", Path: path}, Mode: mode}
}

func mustOpen(t *testing.T, cfg config.Socket, ours ...*socket.Socket) *socket.Socket {
	t.Helper()
	s, err := socket.Open(cfg, ours, nil)
	if err != nil {
		t.Fatalf("open %s: %v", cfg.Address.Key(), err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// wantAccepted connects to addr and expects the connection in s's queue.
func wantAccepted(t *testing.T, s *socket.Socket, network, addr string) {
	t.Helper()
	c, err := net.Dial(network, addr)
	if err != nil {
		t.Fatalf("connect to %s: %v", addr, err)
	}
	defer c.Close()
	fd, _, err := unix.Accept4(s.FD(), unix.SOCK_CLOEXEC)
	if err != nil {
		t.Fatalf("accept on %s: %v", s.Address(), err)
	}
	unix.Close(fd)
}

func port(t *testing.T, s *socket.Socket) string {
	t.Helper()
	_, p, err := net.SplitHostPort(s.Address())
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestSocketsAreNonBlockingCloseOnExecAndPlainTCP(t *testing.T) {
	s := mustOpen(t, tcp("a", "127.0.0.1:0"))
	fl, _ := unix.FcntlInt(uintptr(s.FD()), unix.F_GETFL, 0)
	fd, _ := unix.FcntlInt(uintptr(s.FD()), unix.F_GETFD, 0)
	proto, _ := unix.GetsockoptInt(s.FD(), unix.SOL_SOCKET, unix.SO_PROTOCOL)
	if fl&unix.O_NONBLOCK == 0 || fd&unix.FD_CLOEXEC == 0 || proto != unix.IPPROTO_TCP {
		t.Errorf("non-blocking %v, close-on-exec %v, protocol %d", fl&unix.O_NONBLOCK != 0, fd&unix.FD_CLOEXEC != 0, proto)
	}
	wantAccepted(t, s, "tcp", s.Address())
}

// A process that has a duplicate can shut the socket down for all of them.
func TestASocketThatWasShutDownListensAgain(t *testing.T) {
	s := mustOpen(t, tcp("a", "127.0.0.1:0"))
	taken := s.Address()
	if err := s.Listen(); err != nil || s.Address() != taken {
		t.Errorf("a socket that listens: %v, at %s, was at %s", err, s.Address(), taken)
	}
	wantAccepted(t, s, "tcp", s.Address())
	if err := unix.Shutdown(s.FD(), unix.SHUT_RDWR); err != nil {
		t.Fatal(err)
	}
	if err := s.Listen(); err != nil {
		t.Fatal(err)
	}
	wantAccepted(t, s, "tcp", s.Address()) // port 0 is another one each time
}

func TestPortOfAnotherProcessIsRefused(t *testing.T) {
	other, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	_, err = socket.Open(tcp("public", other.Addr().String()), nil, nil)
	if !errors.Is(err, unix.EADDRINUSE) {
		t.Fatalf("got %v, want EADDRINUSE", err)
	}
	want := `listener "public": ` + other.Addr().String() + ": another process has taken it (address already in use)"
	if err.Error() != want {
		t.Errorf("got  %s\nwant %s", err, want)
	}
}

func TestOwnOverlapsAreHandled(t *testing.T) {
	for _, c := range []struct{ name, first, second string }{
		{"specific beside wildcard", "0.0.0.0:", "127.0.0.1:"},
		{"wildcard beside specific", "127.0.0.1:", "0.0.0.0:"},
		{"IPv4 beside dual-stack", "[::]:", "127.0.0.1:"},
	} {
		t.Run(c.name, func(t *testing.T) {
			first := mustOpen(t, tcp("a", c.first+"0"))
			p := port(t, first)
			cfg := tcp("a", c.first+p)
			if err := first.Reconfigure(cfg); err != nil {
				t.Fatal(err)
			}
			second := mustOpen(t, tcp("b", c.second+p), first)
			specific := second
			if c.first == "127.0.0.1:" {
				specific = first
			}
			wantAccepted(t, specific, "tcp", "127.0.0.1:"+p)
			for _, s := range []*socket.Socket{first, second} {
				if on, _ := unix.GetsockoptInt(s.FD(), unix.SOL_SOCKET, unix.SO_REUSEPORT); on != 0 {
					t.Errorf("%s still shares its port with anybody of the same user", s.Address())
				}
			}
			if s, err := socket.Open(tcp("c", c.second+p), nil, nil); err == nil {
				s.Close()
				t.Errorf("a second supervisor could take %s", c.second+p)
			}
		})
	}
}

// Who writes down the port that the kernel chose was told that another process had
// taken it.
func TestThePortThatTheKernelChoseCanBeWrittenDown(t *testing.T) {
	for _, c := range []struct{ name, first, second string }{
		{"on the same address", "127.0.0.1:", "127.0.0.1:"},
		{"on a specific address", "0.0.0.0:", "127.0.0.1:"},
		{"on the wildcard", "127.0.0.1:", "0.0.0.0:"},
	} {
		t.Run(c.name, func(t *testing.T) {
			first := mustOpen(t, tcp("a", c.first+"0"))
			p := port(t, first)
			second := mustOpen(t, tcp("a", c.second+p), first)
			if err := first.Close(); err != nil {
				t.Fatal(err)
			}
			wantAccepted(t, second, "tcp", "127.0.0.1:"+p)
		})
	}
}

func TestUnixSocketHasItsModeWhateverTheUmask(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	s := mustOpen(t, unixAt("u", path, 0o666))
	wantMode(t, path, 0o666)
	wantAccepted(t, s, "unix", path)
	if err := s.Reconfigure(unixAt("renamed", path, 0o600)); err != nil {
		t.Fatal(err)
	}
	wantMode(t, path, 0o600)
}

func wantMode(t *testing.T, path string, want os.FileMode) {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode().Perm() != want {
		t.Errorf("mode of %s is %o, want %o", path, info.Mode().Perm(), want)
	}
}

func TestStaleUnixPathIsTakenOver(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	if _, err := socket.Open(unixAt("u", path, 0o600), nil, nil); !errors.Is(err, unix.EADDRINUSE) {
		t.Fatalf("took a path where somebody listens: %v", err)
	}
	l.Close()
	s := mustOpen(t, unixAt("u", path, 0o600))
	wantAccepted(t, s, "unix", path)
}

func TestUnixPathOfAFileIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := socket.Open(unixAt("u", path, 0o600), nil, nil); err == nil {
		t.Fatal("took over a file")
	}
	if b, _ := os.ReadFile(path); string(b) != "precious" {
		t.Error("the file is gone")
	}
}

func TestCloseRemovesItsOwnPathOnly(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	old := mustOpen(t, unixAt("u", path, 0o600))
	os.Remove(path)
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	old.Close()
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("removed another's path: %v", err)
	}
}

func TestChangeOfIPv6OnlyNeedsANewSocket(t *testing.T) {
	s := mustOpen(t, tcp("a", "[::1]:0"))
	cfg := s.Config()
	cfg.IPv6Only = true
	if err := s.CanBecome(cfg); !errors.Is(err, socket.ErrNeedsNewSocket) {
		t.Errorf("got %v", err)
	}
	cfg.IPv6Only, cfg.Name = false, "renamed"
	if err := s.CanBecome(cfg); err != nil {
		t.Errorf("renaming is refused: %v", err)
	}
}
