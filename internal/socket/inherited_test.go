package socket_test

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"holdfast/internal/config"
	"holdfast/internal/socket"
)

func systemd(listener, name string) config.Socket {
	return config.Socket{Name: listener, Address: config.Address{Network: "systemd", Name: name}}
}

// passed makes a socket as systemd passes it: blocking, and without close-on-exec.
func passed(t *testing.T, name, network, addr string) *os.File {
	t.Helper()
	var c interface{ File() (*os.File, error) }
	switch network {
	case "udp":
		p, err := net.ListenPacket(network, addr)
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		c = p.(*net.UDPConn)
	default:
		l, err := net.Listen(network, addr)
		if err != nil {
			t.Fatal(err)
		}
		if u, ok := l.(*net.UnixListener); ok {
			u.SetUnlinkOnClose(false)
		}
		defer l.Close()
		c = l.(interface{ File() (*os.File, error) })
	}
	f, err := c.File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	return duplicate(t, f, name)
}

func duplicate(t *testing.T, f *os.File, name string) *os.File {
	t.Helper()
	fd, err := unix.Dup(int(f.Fd()))
	if err == nil {
		err = unix.SetNonblock(fd, false)
	}
	if err != nil {
		t.Fatal(err)
	}
	return os.NewFile(uintptr(fd), name)
}

func inherit(t *testing.T, files ...*os.File) *socket.Inherited {
	t.Helper()
	i, err := socket.Inherit(files)
	if err != nil {
		t.Fatal(err)
	}
	return i
}

func TestASocketOfSystemdIsUsedByItsName(t *testing.T) {
	i := inherit(t, passed(t, "other", "tcp", "127.0.0.1:0"), passed(t, "web", "tcp", "127.0.0.1:0"))
	s, err := socket.Open(systemd("public", "web"), nil, i)
	if err != nil {
		t.Fatal(err)
	}
	fl, _ := unix.FcntlInt(uintptr(s.FD()), unix.F_GETFL, 0)
	fd, _ := unix.FcntlInt(uintptr(s.FD()), unix.F_GETFD, 0)
	if fl&unix.O_NONBLOCK == 0 || fd&unix.FD_CLOEXEC == 0 {
		t.Errorf("non-blocking %v, close-on-exec %v", fl&unix.O_NONBLOCK != 0, fd&unix.FD_CLOEXEC != 0)
	}
	if port(t, s) == "0" {
		t.Errorf("address is %s", s.Address())
	}
	at := s.Address()
	wantAccepted(t, s, "tcp", at)

	// A configuration drops the listener, and a later one names it again.
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	c, err := net.Dial("tcp", at)
	if err != nil {
		t.Fatalf("the socket went with its listener: %v", err)
	}
	c.Close()
	again, err := socket.Open(systemd("public", "web"), nil, i)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	wantAccepted(t, again, "tcp", at)
}

func TestAUnixSocketOfSystemdKeepsItsPath(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	s, err := socket.Open(systemd("public", "web"), nil, inherit(t, passed(t, "web", "unix", path)))
	if err != nil {
		t.Fatal(err)
	}
	if s.Address() != "unix:"+path {
		t.Errorf("address is %s", s.Address())
	}
	wantAccepted(t, s, "unix", path)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("systemd's path: %v", err)
	}
}

func TestASocketThatSystemdHasNotPassedIsRefused(t *testing.T) {
	two := func() []*os.File {
		return []*os.File{passed(t, "web", "tcp", "127.0.0.1:0"), passed(t, "web", "tcp", "127.0.0.1:0")}
	}
	connected := func() *os.File {
		pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(pair[1]) })
		return os.NewFile(uintptr(pair[0]), "web")
	}
	file := func() *os.File {
		f, err := os.Open(os.DevNull)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		return duplicate(t, f, "web")
	}
	for _, c := range []struct {
		name      string
		inherited *socket.Inherited
		want      string
	}{
		{"without systemd", nil, `listener "public": systemd:web: systemd has passed no socket;`},
		{"without any", inherit(t), "systemd has passed no socket;"},
		{"under another name", inherit(t, passed(t, "b", "tcp", "127.0.0.1:0"), passed(t, "a", "tcp", "127.0.0.1:0")), `of this name, only "a", "b"`},
		{"beside another of the name", inherit(t, two()...), "systemd has passed 2 sockets of this name (127.0.0.1:"},
		{"for datagrams", inherit(t, passed(t, "web", "udp", "127.0.0.1:0")), "no listening stream socket"},
		{"with Accept=yes", inherit(t, connected()), "no listening stream socket"},
		{"but a file", inherit(t, file()), "no listening stream socket"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s, err := socket.Open(systemd("public", "web"), nil, c.inherited)
			if err == nil {
				s.Close()
			}
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}

func TestAnAddressThatSystemdHasIsTaken(t *testing.T) {
	i := inherit(t, passed(t, "web", "tcp", "127.0.0.1:0"))
	s, err := socket.Open(systemd("public", "web"), nil, i)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for _, host := range []string{"127.0.0.1:", "0.0.0.0:"} {
		other, err := socket.Open(tcp("b", host+port(t, s)), []*socket.Socket{s}, i)
		if err == nil {
			other.Close()
		}
		if !errors.Is(err, unix.EADDRINUSE) {
			t.Errorf("%s: got %v", host, err)
		}
	}
}

// Listen is called at each reload, and the socket unit says how long the queue is.
func TestTheQueueOfASocketOfSystemdKeepsItsLength(t *testing.T) {
	f := passed(t, "web", "tcp", "127.0.0.1:0")
	if err := unix.Listen(int(f.Fd()), 3); err != nil {
		t.Fatal(err)
	}
	s, err := socket.Open(systemd("public", "web"), nil, inherit(t, f))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := s.Listen(); err != nil {
		t.Fatal(err)
	}
	// Of a listening socket this is the length of its queue (tcp_diag(7) says it so too).
	if info, err := unix.GetsockoptTCPInfo(s.FD(), unix.IPPROTO_TCP, unix.TCP_INFO); err != nil || info.Sacked != 3 {
		t.Errorf("the queue has %d places (%v), want 3", info.Sacked, err)
	}
	if err := unix.Shutdown(s.FD(), unix.SHUT_RDWR); err != nil {
		t.Fatal(err)
	}
	if err := s.Listen(); err != nil {
		t.Fatal(err)
	}
	wantAccepted(t, s, "tcp", s.Address())
}
