package e2e

import (
	"fmt"
	"net"
	"syscall"
	"testing"
	"time"
)

// simple is a configuration in front of a backend; more is added to it.
func simple(backend, more string) string {
	return fmt.Sprintf(`
[[listeners]]
name = "public"
address = "127.0.0.1:0"
[[virtual_hosts]]
name = "all"
domains = ["*"]
[[virtual_hosts.routes]]
match = { prefix = "/ws" }
websocket = true
cluster = "backend"
[[virtual_hosts.routes]]
match = { prefix = "/" }
cluster = "backend"
[[clusters]]
name = "backend"
endpoints = [%q]
%s`, backend, more)
}

// A killed generation takes its own connections along, and nothing else: nobody is
// refused, the next request is answered, and who drains goes on draining.
func TestKillOfTheServingGenerationUnderLoad(t *testing.T) {
	t.Parallel()
	backend := newBackend(t)
	i := serve(t, simple(backend, ""))
	address := i.address("public")
	old := startLoad(t, address, 10) // its tunnels stay in generation 1
	i.reload(simple(backend, "# second\n[reload]\nprobation = \"1ms\"\n"))
	i.wait("probation", func(s *status) bool { return s.states() == "2 serving, 1 draining" })

	// Whoever connects, at any moment, is let in and served at last.
	stop, connected := make(chan struct{}), make(chan int)
	go func() {
		n := 0
		for {
			select {
			case <-stop:
				connected <- n
				return
			default:
			}
			c, err := net.DialTimeout("tcp", address, patience)
			if err != nil {
				t.Errorf("connection refused: %v", err)
			} else {
				n++
				c.Close()
			}
			time.Sleep(time.Millisecond)
		}
	}()
	for range 3 {
		killed := i.wait("a serving generation", func(s *status) bool { return s.serving() != nil }).serving()
		syscall.Kill(killed.PID, syscall.SIGKILL)
		wantAnswer(t, address) // waits in the queue, and is served by the replacement
		i.wait("another one, and the draining one", func(s *status) bool {
			g := s.serving()
			return g != nil && g.Number > killed.Number && s.Generations[len(s.Generations)-1].Number == 1
		})
	}
	close(stop)
	if n := <-connected; n == 0 {
		t.Error("nobody connected")
	}
	for n := range old.faultsOfTunnels() {
		t.Errorf("a tunnel: %s", n)
	}
	old.stop()
	i.wait("the serving one alone", func(s *status) bool { return len(s.Generations) == 1 && s.serving() != nil })
}

func wantAnswer(t *testing.T, address string) {
	t.Helper()
	eventually(t, func() bool {
		c := dial(t, address)
		defer c.Close()
		fmt.Fprintf(c, "GET /x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
		b := make([]byte, 12)
		n, err := c.Read(b) // a connection that the killed process had accepted is cut
		return err == nil && string(b[:n]) == "HTTP/1.1 200"
	}, func() string { return "an answer" })
}
