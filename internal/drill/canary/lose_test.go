package canary

import (
	"errors"
	"io"
	"net"
	"testing"

	"golang.org/x/sys/unix"
)

// What is lost is sent again, so that nobody but the sender's kernel notices.
func TestSegmentsAreLost(t *testing.T) {
	t.Parallel()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	sender, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer sender.Close()
	receiver, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer receiver.Close()
	if err := lose(receiver.(*net.TCPConn)); errors.Is(err, unix.EPERM) {
		t.Skip("this kernel wants CAP_NET_ADMIN for that")
	} else if err != nil {
		t.Fatal(err)
	}
	s := streamOf(1)
	check := checker{stream: s}
	for buf := make([]byte, 2000); retransmitted(t, sender) < 3; {
		s.fill(buf, check.at)
		if _, err := sender.Write(buf); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(receiver, buf); err != nil {
			t.Fatal(err)
		}
		check.feed(buf)
	}
	if d := check.end(check.at); d != (Damage{}) {
		t.Errorf("damage is %+v", d)
	}
}

// retransmitted is how many segments were sent again.
func retransmitted(t *testing.T, c net.Conn) uint32 {
	t.Helper()
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var info *unix.TCPInfo
	outer := raw.Control(func(fd uintptr) { info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO) })
	if outer != nil || err != nil {
		t.Fatal(outer, err)
	}
	return info.Total_retrans
}
