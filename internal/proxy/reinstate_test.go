package proxy_test

import (
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/control"
)

// The limit of the streams closed the servers for good: reinstated, the generation
// accepted connections and closed each at once.
func TestAReinstatedGenerationServesAlthoughItsStreamsWereCut(t *testing.T) {
	c := command(t, "", "[drain]\nstream_timeout = \"50ms\"\n")
	c.serve()
	reader := c.dial()
	reader.say(askPage)
	stream := c.endpoint()
	stream.head()
	stream.say("HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n1\nx\n")
	reader.wantHead("200 OK")
	c.drain(time.Hour)
	reader.rest() // cut
	c.handOver()
	c.serve()
	if head := c.exchange(c.dial()); !strings.Contains(head, "200 OK") {
		t.Errorf("got %q", head)
	}
}

// Sockets of a reinstatement that did not come stayed open for as long as the
// generation lived: nobody accepted, and nobody was refused.
func TestADrainGivesUpSocketsThatWereHandedOverForNothing(t *testing.T) {
	c := command(t, "", "")
	c.serve()
	c.drain(time.Hour)
	c.handOver()
	c.drain(time.Hour)
	address := c.socket.Addr().String()
	c.socket.Close()
	if conn, err := net.Dial("tcp", address); err == nil {
		conn.Close()
		t.Error("the socket is still open")
	}
	c.lives()
}

func TestADrainThatComesAfterTheStopDelaysNothing(t *testing.T) {
	c := command(t, "", "")
	c.serve()
	client, server := c.tunnel()
	c.say(&control.Message{Type: control.TypeStop, Within: time.Hour})
	c.drain(time.Hour)
	client.Close()
	server.rest()
	server.Close()
	if err := c.wait(); err != nil {
		t.Error(err)
	}
}

// The supervisor took a generation that was draining by signal for the serving one.
func TestATerminatedGenerationTellsTheSupervisor(t *testing.T) {
	c := command(t, "", "")
	c.serve()
	client, server := c.tunnel()
	c.terminate <- syscall.SIGTERM
	select {
	case <-c.leaving:
	case <-time.After(bound):
		t.Fatal("it says nothing")
	}
	carries(client, server)
	client.Close()
	server.rest()
	server.Close()
	if err := c.wait(); err != nil {
		t.Error(err)
	}
}

func TestAnOrphanEndsWhenItIsTerminated(t *testing.T) {
	c := command(t, "", "")
	c.serve()
	c.conn.Close()
	c.terminate <- syscall.SIGTERM
	if err := c.wait(); err != nil {
		t.Error(err)
	}
}

// All processes share the flag: a socket that blocks would hang each of them.
func TestTheSharedSocketStaysNonBlocking(t *testing.T) {
	c := command(t, "", "")
	c.serve()
	c.exchange(c.dial())
	c.drain(time.Hour)
	raw, err := c.socket.(*net.TCPListener).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) {
		if flags, err := unix.FcntlInt(fd, unix.F_GETFL, 0); err != nil || flags&unix.O_NONBLOCK == 0 {
			t.Errorf("flags %#x, %v", flags, err)
		}
	})
}
