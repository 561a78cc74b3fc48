package tunnel_test

import (
	"bytes"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/tunnel"
)

// vanish makes a peer deaf: its kernel throws away all that comes for it, as if the
// network in between were gone. Nothing tells the other end.
func vanish(t testing.TB, c tcpConn) {
	t.Helper()
	drop := unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: 0}
	fd := second(t, c)
	if err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: 1, Filter: &drop}); err != nil {
		t.Fatal(err)
	}
}

// overfill writes until the receiver's kernel takes no more for a while, and returns
// what was written.
func overfill(t testing.TB, c tcpConn) (sent []byte) {
	t.Helper()
	for {
		c.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
		n, err := c.Write(pattern(len(sent), 64<<10))
		sent = append(sent, pattern(len(sent), n)...)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			c.SetWriteDeadline(time.Now().Add(2 * patience))
			return sent
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func TestAPeerThatHasVanishedIsFoundDead(t *testing.T) {
	onAllRelays(t, func(t *testing.T, r relay) {
		set, e := r.newSet(t)
		set.Hurry(5*time.Second, time.Second, 100*time.Millisecond)
		left := make(map[string]tcpConn) // the other ends
		for name, vanishes := range map[string]func(a, b tcpConn){
			"while nothing moves": func(_, b tcpConn) { vanish(t, b) },
			"with bytes on their way to it": func(a, b tcpConn) {
				vanish(t, b)
				write(t, a, []byte("is there anybody?"))
			},
			"with a FIN on its way to it": func(a, b tcpConn) {
				vanish(t, b)
				a.CloseWrite()
			},
			"after it had stopped reading": func(a, b tcpConn) {
				overfill(t, a)
				vanish(t, b)
			},
		} {
			if r.tls && strings.HasPrefix(name, "after") {
				continue // a write that has timed out is the last that TLS does
			}
			client, server := openSmall(t, set, "a client "+name)
			vanishes(server, client)
			left["a client "+name] = server
			client, server = openSmall(t, set, "a server "+name)
			vanishes(client, server)
			left["a server "+name] = client
		}
		waitEmpty(t, set)
		for _, record := range e.all() {
			if record.Reason != tunnel.DeadPeer {
				t.Errorf("%s: reason is %q", record.ID, record.Reason)
			}
			wantReset(t, left[record.ID])
		}
	})
}

// openSmall starts a tunnel with small kernel buffers whose peers are given up after
// two seconds without an answer.
func openSmall(t testing.TB, set *tunnel.Set, id string) (client, server tcpConn) {
	t.Helper()
	patience := tunnel.KeepAlive{Idle: time.Second, Interval: time.Second, Count: 2}
	return openOver(t, set, tunnel.Spec{ID: id, Origin: limited(tunnel.Limits{KeepAlive: patience})}, true)
}

// A peer that reads nothing answers: its window is closed, and probes are answered.
func TestAPeerThatReadsNothingIsNotDead(t *testing.T) {
	onBothRelays(t, func(t *testing.T, r relay) {
		set, e := r.newSet(t)
		set.Hurry(5*time.Second, time.Second, 100*time.Millisecond)
		client, server := openSmall(t, set, "")
		sent := overfill(t, client)
		eventually(t, "it has read nothing for much longer than one that is dead is waited for", func() bool {
			return tcpInfo(t, server).Last_data_recv > 6000
		})
		if n := len(e.all()); n != 0 {
			t.Fatalf("the tunnel has ended: %+v", e.all())
		}
		if got := readSlowly(t, server, len(sent)); !bytes.Equal(got, sent) {
			t.Error("what arrives is not what was sent")
		}
		client.Close()
		wantEOF(t, server)
		server.Close()
		wantEnd(t, set, e, tunnel.DownstreamClosed)
	})
}

func tcpInfo(t testing.TB, c tcpConn) (info *unix.TCPInfo) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(raw.Control(func(fd uintptr) {
		info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
	}), err); err != nil {
		t.Fatal(err)
	}
	return info
}
