package e2e

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"holdfast/internal/pidfd"
)

// kill ends a generation by a signal.
func (i *instance) kill(number int, sig syscall.Signal) {
	i.t.Helper()
	p := i.process(number)
	if err := p.Signal(sig); err != nil {
		i.t.Fatal(err)
	}
	if err := p.Wait(); err != nil {
		i.t.Fatal(err)
	}
}

// process returns a generation's process, until the test ends. Whether it is that of the
// generation that the status shows is looked at again once it cannot become another one.
func (i *instance) process(number int) *pidfd.Process {
	i.t.Helper()
	pid := func() int {
		s := i.status()
		n := slices.IndexFunc(s.Generations, func(g generation) bool { return g.Number == number })
		if n < 0 {
			i.t.Fatalf("generation %d is not there: %s", number, s.states())
		}
		return s.Generations[n].PID
	}
	id, err := pidfd.Of(pid())
	if err != nil {
		i.t.Fatal(err)
	}
	p, err := pidfd.Open(id)
	if err != nil {
		i.t.Fatal(err)
	}
	i.t.Cleanup(func() { p.Close() })
	if pid() != id.PID {
		i.t.Fatalf("generation %d is not process %d", number, id.PID)
	}
	return p
}

// serving is the generation that serves, or nil. Others may be newer.
func (s *status) serving() *generation {
	n := slices.IndexFunc(s.Generations, func(g generation) bool { return g.State == "serving" })
	if n < 0 {
		return nil
	}
	return &s.Generations[n]
}

// carrier is the number of the generation that has the most tunnels.
func (s *status) carrier() int {
	return slices.MaxFunc(s.Generations, func(a, b generation) int { return a.Tunnels - b.Tunnels }).Number
}

// wantKept waits until something serves, and so many tunnels have a process and outlive
// it.
func (i *instance) wantKept(n int) *status {
	i.t.Helper()
	var tunnels, deposits int
	return i.wait(fmt.Sprintf("%d tunnels that outlive their processes", n), func(s *status) bool {
		tunnels, deposits = 0, 0
		for _, g := range s.Generations {
			tunnels += g.Tunnels
			deposits += g.Deposits
		}
		return s.Vault.Resuming == 0 && tunnels == n && deposits == n && s.serving() != nil
	})
}

// cargo is bytes of which each place has its own.
type cargo struct{ *rand.ChaCha8 }

func newCargo(seed byte) cargo { return cargo{rand.NewChaCha8([32]byte{seed})} }

// take returns the next n bytes.
func (c cargo) take(n int) []byte {
	b := make([]byte, n)
	c.Read(b)
	return b
}

// stuff sends cargo that nobody reads, until nothing more is taken, and returns how much
// was.
func (w *wire) stuff(c cargo) (sent int) {
	w.t.Helper()
	for rest := c.take(1 << 20); ; {
		w.conn.SetWriteDeadline(time.Now().Add(moment))
		n, err := w.conn.Write(rest)
		sent += n
		if err != nil {
			return sent
		}
		rest = c.take(1 << 20)
	}
}

// wantCargo wants the next n bytes.
func (w *wire) wantCargo(c cargo, n int) {
	w.t.Helper()
	w.conn.SetDeadline(time.Now().Add(patience))
	for n > 0 {
		want := c.take(min(n, 64<<10))
		got := make([]byte, len(want))
		if _, err := io.ReadFull(w.r, got); err != nil {
			w.t.Fatalf("%d bytes are missing: %v", n, err)
		}
		if !bytes.Equal(got, want) {
			w.t.Fatalf("other bytes come, %d before the end", n)
		}
		n -= len(want)
	}
}

// voyage is a tunnel in the middle of something.
type voyage struct {
	name           string
	client, server *wire
	received, sent int // bytes, as its record shows in the end
	reason         string
	finish         func(*voyage)
}

// talk has something pass both ways.
func (v *voyage) talk() {
	v.client.conn.SetDeadline(time.Now().Add(patience)) // the one from the beginning may be over
	v.server.conn.SetDeadline(time.Now().Add(patience))
	v.client.send("hello")
	v.server.wantBytes("hello")
	v.server.send("you")
	v.client.wantBytes("you")
	v.received += len("hello")
	v.sent += len("you")
}

// voyages opens tunnels of which each is in another state, all with bytes under way that
// can be.
func (s *stage) voyages() []*voyage {
	s.Helper()
	open := func(name string) *voyage {
		v := &voyage{name: name, reason: "downstream closed"}
		v.client, v.server, _ = s.tunnel("/ws/" + name)
		v.talk()
		return v
	}
	idle := open("idle")
	idle.finish = func(v *voyage) {
		v.talk()
		v.client.close()
		v.server.wantEOF()
		v.server.close()
	}
	stuffed := open("stuffed")
	up, down := stuffed.client.stuff(newCargo(1)), stuffed.server.stuff(newCargo(2))
	stuffed.received, stuffed.sent = stuffed.received+up, stuffed.sent+down
	stuffed.finish = func(v *voyage) {
		v.server.wantCargo(newCargo(1), up)
		v.client.wantCargo(newCargo(2), down)
		v.client.close()
		v.server.wantEOF()
		v.server.close()
	}
	client := open("closed-by-client")
	client.client.sendFIN()
	client.server.wantEOF()
	client.finish = func(v *voyage) {
		v.server.send("behind")
		v.client.wantBytes("behind")
		v.sent += len("behind")
		v.server.close()
		v.client.wantEOF()
		v.client.close()
	}
	server := open("closed-by-server")
	server.reason = "upstream closed"
	server.server.sendFIN()
	server.client.wantEOF()
	server.finish = func(v *voyage) {
		v.client.send("behind")
		v.server.wantBytes("behind")
		v.received += len("behind")
		v.client.close()
		v.server.wantEOF()
		v.server.close()
	}
	both := open("stuffed-and-closed") // the FIN is behind what nobody has read yet
	more := both.client.stuff(newCargo(3))
	both.client.sendFIN()
	both.received += more
	both.finish = func(v *voyage) {
		v.server.wantCargo(newCargo(3), more)
		v.server.wantEOF()
		v.server.send("behind")
		v.client.wantBytes("behind")
		v.sent += len("behind")
		v.server.close()
		v.client.wantEOF()
		v.client.close()
	}
	return []*voyage{idle, stuffed, client, server, both}
}

// wantArrival lets the tunnels go on to their ends, and compares what was recorded and
// counted of them with what they were from the beginning.
func (s *stage) wantArrival(voyages []*voyage, log string) {
	s.Helper()
	opened := make(map[string]access)
	for _, a := range s.service.wantRecords(log, len(voyages)) {
		opened[a.Target] = a
	}
	var received, sent int
	for n, v := range voyages {
		for _, w := range []*wire{v.client, v.server} {
			w.conn.SetDeadline(time.Now().Add(patience))
		}
		v.finish(v)
		received, sent = received+v.received, sent+v.sent
		records := s.service.wantRecords(log, len(voyages)+n+1)
		got, was := records[len(records)-1], opened["/ws/"+v.name]
		want := was
		want.Event, want.Received, want.Sent, want.Reason = "tunnel_close", v.received, v.sent, v.reason
		want.Duration, want.Generation, want.UserAgent = got.Duration, got.Generation, got.UserAgent
		if got != want || got.Duration <= 0 {
			s.Errorf("%s: the record of its end: %+v\nwant %+v", v.name, got, want)
		}
	}
	s.service.wantSeries(series{
		"holdfast_tunnels_started_total":                     float64(len(voyages)),
		"holdfast_tunnels_active":                            0,
		"holdfast_tunnels_lost_total":                        0,
		"holdfast_tunnel_relayed_bytes_total{to=upstream}":   float64(received),
		"holdfast_tunnel_relayed_bytes_total{to=downstream}": float64(sent),
	})
}

// sailing is a service with an access log, and more, in which tunnels are under way.
//
// One of the tunnels fills a pipe. Who is to take that over while both live needs another
// one, and all instances of a user share what he may have in pipes: tests in which these
// tunnels move are not parallel, for others would leave them none.
func sailing(t *testing.T, more string) (*stage, []*voyage) {
	t.Helper()
	up := newUpstream(t)
	i := newInstance(t, "")
	i.write(i.withLogs(up.addr, "access.log") + more)
	i.start(nil)
	s := &stage{T: t, service: i, addresses: i.addresses(), host: "a.test", up: up}
	voyages := s.voyages()
	i.wantKept(len(voyages))
	return s, voyages
}

const noProbation = "[reload]\nprobation = \"1ms\"\n"

// Whatever ends the process that relays it, a tunnel goes on in another one, to the byte,
// and is the same one to all who have recorded or counted it.
func TestATunnelOutlivesItsProcess(t *testing.T) {
	t.Parallel()
	for name, sig := range map[string]syscall.Signal{
		"killed": syscall.SIGKILL, "by a fault": syscall.SIGSEGV, "as by a panic": syscall.SIGABRT,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, voyages := sailing(t, noProbation)
			before := s.service.status().Generations[0]
			s.service.kill(before.Number, sig)
			after := s.service.wantKept(len(voyages))
			for _, g := range after.Generations {
				if g.Tunnels > 0 && (g.State != "draining" || !g.OldestTunnel.Equal(before.OldestTunnel)) {
					t.Errorf("the tunnels were in %+v and are in %+v", before, g)
				}
			}
			s.wantArrival(voyages, "access.log")
			s.service.wantStates(fmt.Sprintf("%d serving", after.serving().Number)) // nothing is left to resume
		})
	}
}

// It goes on through one thing after the other, as long as the supervisor and the
// generation do not end at once.
func TestATunnelOutlivesOneProcessAfterTheOther(t *testing.T) { // not parallel: see sailing
	s, voyages := sailing(t, noProbation)
	i := s.service
	killed := func() { i.kill(i.status().carrier(), syscall.SIGKILL) }
	crashed := func() {
		i.crash()
		i.launch(nil)
	}
	upgraded := func() { i.upgrade() }
	reloaded := func() {
		if code, _, errs := i.holdfast("reload"); code != 0 {
			t.Fatal(errs)
		}
	}
	moved := func() {
		before := i.status()
		i.wait("its probation to be over", func(s *status) bool {
			code, _, _ := i.holdfast("move", "--generation", fmt.Sprint(before.carrier()))
			return code == 0
		})
		i.wait("the tunnels to be where requests are", func(s *status) bool { return s.serving() != nil && s.serving().Tunnels == len(voyages) })
	}
	for n, step := range []func(){killed, killed, crashed, killed, upgraded, killed, moved, killed, reloaded, killed, moved, reloaded, crashed, upgraded, killed} {
		step()
		s := i.wantKept(len(voyages))
		t.Logf("%d: %s", n, s.states())
		if n%3 == 0 {
			voyages[0].talk()
		}
	}
	s.wantArrival(voyages, "access.log")
	i.wait("nothing but what serves", func(s *status) bool { return len(s.Generations) == 1 })
}

// A supervisor that is not there is not waited for. The next one is given what has
// begun meanwhile.
func TestATunnelThatBeginsWithoutASupervisor(t *testing.T) {
	t.Parallel()
	s := staged(t, func(up string) string { return simple(up, "") })
	i := s.service
	i.crash()
	client, server, _ := s.tunnel("/ws")
	wantTunnel(client, server)
	i.launch(nil)
	i.wantKept(1)
	i.kill(1, syscall.SIGKILL)
	i.wantKept(1)
	wantTunnel(client, server)
}

// Who does not want it has tunnels end with their process, as ever.
func TestTunnelsThatAreNotToOutliveTheirProcess(t *testing.T) {
	t.Parallel()
	s := staged(t, func(up string) string {
		return simple(up, "") + `
[[virtual_hosts]]
name = "mortal"
domains = ["mortal.test"]
[[virtual_hosts.routes]]
match = { prefix = "/" }
websocket = true
cluster = "backend"
tunnels = { survive_crash = false }
`
	})
	i := s.service
	client, server, _ := s.tunnel("/ws")
	mortal := *s
	mortal.host = "mortal.test"
	deadClient, deadServer, _ := mortal.tunnel("/")
	i.wait("both tunnels, of which one is kept", func(s *status) bool {
		return s.Generations[0].Tunnels == 2 && s.Generations[0].Deposits == 1
	})
	i.kill(1, syscall.SIGKILL)
	deadClient.wantClosed()
	deadServer.wantClosed()
	i.wantKept(1)
	wantTunnel(client, server)
	i.wantSeries(series{"holdfast_tunnels_lost_total": 1, "holdfast_tunnels_active": 1})
}

// A stop ends tunnels whose process has just died, too.
func TestAStopEndsTunnelsThatHaveNoProcess(t *testing.T) {
	t.Parallel()
	for n := range 3 {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			t.Parallel()
			s, voyages := sailing(t, "[stop]\ntimeout = \"1s\"\n")
			i := s.service
			i.kill(1, syscall.SIGKILL)
			time.Sleep(time.Duration(n) * 10 * time.Millisecond) // at different moments
			if code, _, errs := i.holdfast("stop"); code != 0 {
				t.Errorf("exit code %d: %s", code, errs)
			}
			i.awaitEnd()
			for _, v := range voyages {
				for _, w := range []*wire{v.client, v.server} {
					w.conn.SetDeadline(time.Now().Add(patience))
					if _, err := io.Copy(io.Discard, w.r); isTimeout(err) {
						t.Errorf("%s: it is still open", v.name)
					}
				}
			}
		})
	}
}

// What the supervisor has kept of tunnels is given back when they end.
func TestAVaultIsEmptyInTheEnd(t *testing.T) {
	t.Parallel()
	s := staged(t, func(up string) string { return simple(up, noProbation) })
	i := s.service
	client, server, _ := s.tunnel("/ws") // what is made once is made
	i.wantKept(1)
	before := besidesPipes(t, i.pid)
	var more []*wire
	for range 50 {
		client, server, _ := s.tunnel("/ws")
		more = append(more, client, server)
	}
	i.wantKept(51)
	if got := besidesPipes(t, i.pid); got < before+2*50 {
		t.Errorf("the supervisor has %d descriptors, before the tunnels it had %d", got, before)
	}
	i.kill(1, syscall.SIGKILL)
	i.wantKept(51)
	for _, w := range more {
		w.close()
	}
	i.wantKept(1)
	wantTunnel(client, server)
	client.close()
	server.wantEOF()
	server.close()
	last := i.wait("one generation", func(s *status) bool { return len(s.Generations) == 1 })
	eventually(t, func() bool { return besidesPipes(t, i.pid) <= before }, func() string {
		return fmt.Sprintf("the descriptors to be given back: %d before, %d now", before, besidesPipes(t, i.pid))
	})
	if held, has := pipes(t, i.pid), pipes(t, last.Generations[0].PID); held > has {
		t.Errorf("the supervisor keeps %d ends of pipes, the only generation has %d", held, has)
	}
}

func isTimeout(err error) bool { return errors.Is(err, os.ErrDeadlineExceeded) }

// As many tunnels as the descriptors of one process allow are resumed as well as one is.
// It runs alone; see TestNineThousandTunnels.
func TestNineThousandTunnelsOutliveTheirProcess(t *testing.T) {
	const n = 9000
	needDescriptors(t, 2*n+1000)
	t.Setenv(binEnv, program("plain"))
	servers := startActor(t, "servers")
	i := serve(t, simple(servers.ask("listen"), ""))
	clients := startActor(t, "clients")
	clients.ask("open", strconv.Itoa(n), i.address("public"))
	i.wantKept(n)
	clients.ask("say") // so that there is something under way in each
	i.kill(1, syscall.SIGKILL)
	began := time.Now()
	servers.ask("echo")
	clients.ask("hear")
	t.Logf("%v until all of them had carried something again", time.Since(began).Round(time.Millisecond))
	i.wantKept(n)
	clients.ask("end", string(clientCloses), string(clientResets))
	servers.ask("end", string(serverCloses))
	clients.ask("wait")
	servers.ask("wait")
	i.wait("one generation", func(s *status) bool { return len(s.Generations) == 1 })
	i.wantSeries(series{
		"holdfast_tunnels_started_total":                         n,
		"holdfast_tunnels_active":                                0,
		"holdfast_tunnels_lost_total":                            0,
		"holdfast_tunnels_ended_total{reason=downstream closed}": n / 3,
		"holdfast_tunnels_ended_total{reason=downstream reset}":  n / 3,
		"holdfast_tunnels_ended_total{reason=upstream closed}":   n / 3,
	})
}

// blame has a generation die by a fault of its own while it works on a tunnel, as far as
// anybody can find out afterwards: it is stopped, what its loops say that they work on is
// changed, and then it dies. The format is that of package inflight.
func (i *instance) blame(number int, slot uint32, tunnel uint64) {
	i.t.Helper()
	p := i.process(number)
	if err := p.Signal(syscall.SIGSTOP); err != nil {
		i.t.Fatal(err)
	}
	eventually(i.t, func() bool { return state(p.PID()) == 'T' }, func() string { return "the process to stand still" })
	word := binary.NativeEndian.AppendUint64(nil, tunnel<<32|uint64(slot+1))
	for _, f := range opened(i.t, p.PID()) {
		path := fmt.Sprintf("/proc/%d/fd/%s", p.PID(), f.Name())
		if to, _ := os.Readlink(path); !strings.HasPrefix(to, "/memfd:holdfast in flight") {
			continue
		}
		file, err := os.OpenFile(path, os.O_RDWR, 0)
		if err == nil {
			_, err = file.WriteAt(word, 64)
			err = errors.Join(err, file.Close())
		}
		if err != nil {
			i.t.Fatal(err)
		}
	}
	if err := errors.Join(p.Signal(syscall.SIGSEGV), p.Signal(syscall.SIGCONT), p.Wait()); err != nil {
		i.t.Fatal(err)
	}
}

// state is what a process does, as proc_pid_stat(5) has it.
func state(pid int) byte {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if _, rest, ok := strings.Cut(string(text), ") "); err == nil && ok {
		return rest[0]
	}
	return 0
}

// A tunnel with which two processes in a row have died is closed, and no other.
func TestATunnelThatMayBeDeadlyIsPutInQuarantine(t *testing.T) {
	t.Parallel()
	s := staged(t, func(up string) string { return simple(up, noProbation) })
	i := s.service
	all := s.tunnels(5)
	i.wantKept(5)
	i.blame(1, 0, 1)
	wantTunnels(all) // once is no proof
	i.blame(i.wantKept(5).carrier(), 0, 1)
	all[0][0].wantClosed()
	all[0][1].wantClosed()
	i.wantKept(4)
	wantTunnels(all[1:])
	i.wantSeries(series{"holdfast_tunnels_ended_total{reason=quarantined}": 1, "holdfast_tunnels_lost_total": 0})
}
