package canary

import (
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if os.Getenv(relayEnv) != "" {
		relay()
		return
	}
	goleak.VerifyTestMain(m)
}

// tunnels is how many of each kind a canary of the tests keeps, all is how many of all.
const (
	tunnels = 2
	all     = int64(tunnels * Kinds)
)

// begin starts a canary in this process. It uses the proxy at the address that proxied
// returns, which is told where the canary's upstream is.
func begin(t *testing.T, proxied func(upstream string) string) *Client {
	t.Helper()
	commands, in := io.Pipe()
	out, answers := io.Pipe()
	served := make(chan error, 1)
	go func() { served <- Serve(commands, answers) }()
	c, err := NewClient(in, out)
	if err != nil {
		t.Fatal(err)
	}
	address := proxied(c.Upstream)
	t.Cleanup(func() { // before the proxy is
		c.must(t, Command{Do: "end"})
		in.Close()
		if err := <-served; err != nil {
			t.Error(err)
		}
		answers.Close()
	})
	c.must(t, Command{Do: "start", Address: address, Tunnels: tunnels})
	return c
}

// without is for a canary that speaks to its upstream itself.
func without(upstream string) string { return upstream }

func (c *Client) must(t *testing.T, cmd Command) *Report {
	t.Helper()
	r, err := c.Do(cmd)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func (c *Client) wait(t *testing.T, what string, is func(*Report) bool) *Report {
	t.Helper()
	var failures []string
	var pauses Pauses
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		r := c.must(t, Command{Do: "report"})
		failures = append(failures, r.Failures...)
		pauses = pauses.Longest(r.Pauses)
		if is(r) {
			r.Pauses = pauses
			return r
		}
		if time.Now().After(deadline) {
			t.Fatalf("waited for %s; now: %+v\n%s", what, r, strings.Join(failures, "\n"))
		}
	}
}

func (c *Client) waitForTunnels(t *testing.T) {
	t.Helper()
	c.wait(t, "all tunnels", func(r *Report) bool { return r.Tunnels >= all })
}

// A canary takes a good part of the machine, so there is one at a time.
func TestTheCanary(t *testing.T) {
	t.Run("finds nothing broken where there is no proxy", func(t *testing.T) {
		c := begin(t, without)
		c.waitForTunnels(t)
		r := c.wait(t, "tunnels that end, and others in their place", func(r *Report) bool {
			return r.Tunnels > all+5 && r.Requests > 100 && r.Connections > 100
		})
		if p := r.Pauses; r.Bytes < 1<<20 || p.Connection == 0 || p.Request == 0 || p.Tunnel == 0 {
			t.Errorf("not all was measured: %+v", r)
		}
		r = c.must(t, Command{Do: "end"})
		if r.Broken() > 0 || r.KilledRequests > 0 || r.Open > 0 {
			t.Errorf("%+v", r)
		}
	})
	t.Run("notices a byte that is changed", func(t *testing.T) {
		c := begin(t, without)
		c.must(t, Command{Do: "spoil", How: "byte"})
		r := c.wait(t, "a byte that is changed", func(r *Report) bool { return r.Damage.Changed > 0 })
		if r.Damage.Changed != 1 || r.Broken() != 1 {
			t.Errorf("%+v", r)
		}
	})
	t.Run("notices a tunnel that is cut", func(t *testing.T) {
		c := begin(t, without)
		c.must(t, Command{Do: "spoil", How: "tunnel"})
		r := c.wait(t, "a tunnel that is cut", func(r *Report) bool { return r.Dropped > 0 })
		if r.Dropped != 1 || r.Broken() != 1 {
			t.Errorf("%+v", r)
		}
	})
	most := all / 2 // tunnels; some may have been between two lives
	for name, announced := range map[string]bool{
		"counts apart the requests of who is killed as announced": true, "notices what is killed without a word": false,
	} {
		t.Run(name, func(t *testing.T) {
			c, p := beginForwarded(t)
			sockets := p.pause()
			if announced {
				c.must(t, Command{Do: "killed", Sockets: sockets})
			}
			p.cut()
			r := c.wait(t, "other tunnels", func(r *Report) bool {
				return r.Dropped >= most && r.Failed+r.KilledRequests > 0 && r.Open >= most
			})
			if announced && r.Broken() > r.Dropped || !announced && r.KilledRequests > 0 {
				t.Errorf("%+v", r)
			}
		})
	}
	t.Run("has nothing but tunnels under way in a storm", func(t *testing.T) {
		c, p := beginForwarded(t)
		c.must(t, Command{Do: "storm"})
		before := c.must(t, Command{Do: "report"})
		p.pause()
		p.cut()
		r := c.wait(t, "other tunnels", func(r *Report) bool { return r.Dropped >= most && r.Open >= most })
		if r.Broken() > r.Dropped || r.Requests > before.Requests {
			t.Errorf("before: %+v, in the storm: %+v", before, r)
		}
		c.must(t, Command{Do: "calm"})
		r = c.wait(t, "requests", func(r *Report) bool { return r.Requests > before.Requests+100 })
		if r.Refused+r.Failed > 0 {
			t.Errorf("%+v", r)
		}
	})
}

// beginForwarded starts a canary whose tunnels lead through a forwarder.
func beginForwarded(t *testing.T) (*Client, *forwarder) {
	t.Helper()
	var p *forwarder
	c := begin(t, func(upstream string) string {
		p = forward(t, upstream)
		return p.listener.Addr().String()
	})
	c.waitForTunnels(t)
	c.wait(t, "bytes", func(r *Report) bool { return r.Bytes > 1<<20 })
	return c, p
}

func TestAProxyThatIsNotThereIsNoticed(t *testing.T) {
	t.Parallel()
	// On this address nobody else is given a port that is free now.
	listener, err := net.Listen("tcp", "127.0.0.8:0")
	if err != nil {
		t.Fatal(err)
	}
	listener.Close()
	c := newCanary()
	defer c.end()
	c.address = listener.Addr().String()
	c.oneRequest()
	c.tunnel(c.address, &kinds[0], longLife)
	if r := c.tally.take(); r.Refused != 2 || r.Connections != 2 || r.Broken() != 2 {
		t.Errorf("%+v", r)
	}
}

func TestWrongAnswersAreNoticed(t *testing.T) {
	t.Parallel()
	for name, answer := range map[string]http.HandlerFunc{
		"an error":          func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "no", http.StatusBadGateway) },
		"what nobody asked": func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "something else") },
		"a part": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "100")
			io.WriteString(w, "not that much")
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := httptest.NewServer(answer)
			defer server.Close()
			c := newCanary()
			defer c.end()
			c.address = server.Listener.Addr().String()
			c.oneRequest()
			c.tunnel(c.address, &kinds[0], longLife)
			conn, _ := c.dial(c.address)
			c.converse(conn, 0)
			conn.Close()
			if r := c.tally.take(); r.Failed != 3 || r.Broken() != 3 || r.Tunnels > 0 {
				t.Errorf("%+v", r)
			}
		})
	}
}

// forwarder is a proxy that knows nothing of HTTP.
type forwarder struct {
	listener net.Listener
	work     sync.WaitGroup
	resets   atomic.Bool

	mu    sync.Mutex // held while nothing new is accepted
	conns map[net.Conn]bool
}

func forward(t *testing.T, to string) *forwarder {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f := &forwarder{listener: listener, conns: make(map[net.Conn]bool)}
	f.work.Go(func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			f.relay(client, to)
		}
	})
	t.Cleanup(func() {
		listener.Close()
		f.work.Wait()
	})
	return f
}

func (f *forwarder) relay(client net.Conn, to string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	server, err := net.Dial("tcp", to)
	if err != nil {
		client.Close()
		return
	}
	f.conns[client], f.conns[server] = true, true
	f.work.Go(func() {
		var back sync.WaitGroup
		back.Go(func() { f.copyHalf(client, server) })
		f.copyHalf(server, client)
		back.Wait()
		client.Close()
		server.Close()
		f.mu.Lock()
		defer f.mu.Unlock()
		delete(f.conns, client)
		delete(f.conns, server)
	})
}

func (f *forwarder) copyHalf(to, from net.Conn) {
	io.Copy(to, from)
	if !f.resets.Load() {
		to.(*net.TCPConn).CloseWrite()
	}
}

// pause has nothing come or go until cut, and returns what there is.
func (f *forwarder) pause() (sockets []string) {
	f.mu.Lock()
	for c := range f.conns {
		sockets = append(sockets, c.LocalAddr().String()+" "+c.RemoteAddr().String())
	}
	return sockets
}

// cut resets everything, and nothing ends in order because another end was cut before.
func (f *forwarder) cut() {
	f.resets.Store(true)
	for c := range f.conns {
		c.(*net.TCPConn).SetLinger(0)
	}
	for c := range f.conns {
		c.Close()
	}
	f.resets.Store(false)
	f.mu.Unlock()
}
