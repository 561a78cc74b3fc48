package canary

import (
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"
)

// A relay that keeps in memory of its own what it has read and not yet written loses it
// when it is killed, although its tunnels go on in the next one. That is what the canary
// must see.
func TestWhatARelayTakesAlongIsNoticed(t *testing.T) {
	r := beginRelayed(t)
	damage := func() Damage { return r.canary.tally.take().Damage }
	const mostKills = 500
	for kills := 0; damage() == (Damage{}); kills++ {
		if kills == mostKills {
			t.Fatalf("after %d kills nothing is damaged", kills)
		}
		time.Sleep(rand.N(20 * time.Millisecond))
		r.kill()
		r.start()
	}
	r.end()
	if seen := r.canary.tally.take(); seen.Damage.Lost == 0 {
		t.Errorf("%+v", seen)
	}
}

// The same relay does no harm for as long as it lives.
func TestARelayThatIsNotKilledDoesNoHarm(t *testing.T) {
	r := beginRelayed(t)
	for r.canary.tally.take().Bytes < 16<<20 {
		time.Sleep(10 * time.Millisecond)
	}
	r.end()
	if seen := r.canary.tally.take(); seen.Broken() > 0 || seen.Dropped > 0 {
		t.Errorf("%+v", seen)
	}
}

// relayed is a canary with one tunnel of each kind, and a process that relays them. All
// their sockets stay open when that one is killed.
type relayed struct {
	t       *testing.T
	canary  *canary
	sockets []*os.File // two for each tunnel
	process *exec.Cmd
}

func beginRelayed(t *testing.T) *relayed {
	t.Helper()
	r := &relayed{t: t, canary: newCanary()}
	upstream, closeUpstream, err := r.canary.serveUpstream()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(closeUpstream)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	r.canary.address = listener.Addr().String()
	r.canary.start(1, 0)
	for range kinds {
		client, err := listener.Accept()
		r.keep(client, err)
		server, err := net.Dial("tcp", upstream)
		r.keep(server, err)
	}
	r.start()
	t.Cleanup(func() { // also when the test has failed
		r.kill()
		for _, f := range r.sockets {
			syscall.Shutdown(int(f.Fd()), syscall.SHUT_RDWR)
			f.Close()
		}
		r.canary.end()
		r.canary.work.Wait()
	})
	return r
}

func (r *relayed) keep(c net.Conn, err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatal(err)
	}
	defer c.Close()
	f, err := c.(*net.TCPConn).File()
	if err != nil {
		r.t.Fatal(err)
	}
	r.sockets = append(r.sockets, f)
}

// end lets all tunnels come to their ends.
func (r *relayed) end() {
	r.canary.end()
	r.canary.work.Wait()
}

// relayEnv says that this process is a relay, of so many sockets.
const relayEnv = "CANARY_TEST_RELAY"

func (r *relayed) start() {
	r.t.Helper()
	self, err := os.Executable()
	if err != nil {
		r.t.Fatal(err)
	}
	r.process = exec.Command(self)
	r.process.Env = append(os.Environ(), relayEnv+"="+strconv.Itoa(len(r.sockets)))
	r.process.ExtraFiles = r.sockets
	r.process.Stderr = os.Stderr
	r.process.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := r.process.Start(); err != nil {
		r.t.Fatal(err)
	}
}

// kill returns when nothing of the process is left.
func (r *relayed) kill() {
	r.process.Process.Kill()
	r.process.Wait() // says that it was killed
}

// relay relays the sockets that it was started with, each pair both ways.
func relay() {
	n, _ := strconv.Atoi(os.Getenv(relayEnv))
	var conns []*net.TCPConn
	for i := range n {
		f := os.NewFile(uintptr(3+i), "socket")
		c, err := net.FileConn(f)
		if err != nil {
			panic(err)
		}
		f.Close()
		conns = append(conns, c.(*net.TCPConn))
	}
	var ways sync.WaitGroup
	for i := range conns {
		ways.Go(func() { relayOneWay(conns[i^1], conns[i]) })
	}
	ways.Wait()
}

func relayOneWay(to, from *net.TCPConn) {
	for buf := make([]byte, 64<<10); ; {
		n, err := from.Read(buf)
		if _, err := to.Write(buf[:n]); err != nil {
			return
		}
		if errors.Is(err, io.EOF) {
			to.CloseWrite()
		}
		if err != nil {
			return
		}
	}
}
