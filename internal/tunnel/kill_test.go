package tunnel_test

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/poller"
	"holdfast/internal/tunnel"
	"holdfast/internal/tunnel/inflight"
)

// The test kills processes that relay tunnels, at any moment, also while they find out
// what the last one has left. What the peers see is compared with the model of
// [TestRandomSchedules].

// killEnv tells such a process its tunnels: JSON, a [][]heir, by the loop.
const killEnv = "HOLDFAST_TEST_TUNNELS"

// heir is a tunnel, as the next process is told of it.
type heir struct {
	Number       uint64
	Slot         uint32
	Taken, Given [2]uint64
	FDs          [2]int
}

const (
	killLoops   = 2
	killPipes   = 2 // of each
	killBuffers = 6
	killTunnels = 10
	firstFile   = 3 // of each loop a memory file and its pipes, then sockets
)

// becomeRelay is what the test binary does instead of testing, if it was told tunnels.
func becomeRelay() {
	text, ok := os.LookupEnv(killEnv)
	if !ok {
		return
	}
	var heirs [killLoops][]heir
	if err := json.Unmarshal([]byte(text), &heirs); err != nil {
		panic(err)
	}
	next := firstFile
	fd := func() int { next++; return next - 1 }
	var loops []tunnel.Loop
	for range killLoops {
		file := fd()
		var pipes []inflight.Pipe
		for range killPipes {
			pipes = append(pipes, inflight.Pipe{R: fd(), W: fd()})
		}
		store, err := inflight.Reopen(file, pipes, true)
		if err != nil {
			panic(err)
		}
		loop, err := poller.New()
		if err != nil {
			panic(err)
		}
		go loop.Run()
		loops = append(loops, tunnel.Loop{Poller: loop, Store: store})
	}
	fmt.Println("begin")
	set := tunnel.NewSet(tunnel.Options{
		Log: slog.New(slog.NewTextHandler(os.Stderr, nil)), Loops: loops, Vault: teller{},
		OnEnd: func(r tunnel.Record) { fmt.Println("end", r.Number, uint8(r.Reason), r.ToUp, r.ToDown) },
	})
	set.Hurry(3*time.Second, 3*time.Second, 5*time.Millisecond)
	origin := lasting(tunnel.Limits{})
	for i, all := range heirs {
		var tunnels []tunnel.Resumed
		for _, h := range all {
			tunnels = append(tunnels, tunnel.Resumed{
				Record: tunnel.Record{Origin: origin, Number: h.Number, Started: time.Now()},
				FDs:    h.FDs,
				Place:  tunnel.Place{Loop: i, Slot: h.Slot, Taken: h.Taken, Given: h.Given},
			})
		}
		set.Resume(i, tunnels)
	}
	set.Resumed()
	io.Copy(io.Discard, os.Stdin) // until the test ends
	os.Exit(1)
}

// teller is the Vault of such a process.
type teller struct{}

func (teller) Deposit([]tunnel.Deposit) error            { panic("no tunnel is new") }
func (teller) Complete(tunnel.Ticket) error              { panic("nobody has asked") }
func (teller) Release([]tunnel.Standing) error           { panic("nobody has asked") }
func (teller) Taken(tunnel.Ticket, tunnel.Deposit) error { panic("nothing was offered") }
func (teller) Declined(tunnel.Ticket) error              { panic("nothing was offered") }
func (teller) Withdraw(numbers []uint64) error {
	for _, n := range numbers {
		fmt.Println("withdraw", n)
	}
	return nil
}

// estate is what remains when such a process dies.
type estate struct {
	t       *testing.T
	random  *rand.Rand
	stores  [killLoops]copies
	heirs   [killLoops][]heir
	records map[uint64]tunnel.Record
	left    int // tunnels that were not withdrawn
	kills   int
}

func TestKilledProcessesLoseNothing(t *testing.T) {
	t.Parallel()
	rounds := 3
	if testing.Short() {
		rounds = 1
	}
	kills := 0
	for range rounds {
		s := rand.Uint64()
		if *seed != 0 {
			s = *seed
		}
		kills += killAndCompare(t, s)
		if t.Failed() {
			t.Fatalf("again with -run '^%s$' -seed %d", t.Name(), s)
		}
	}
	t.Logf("%d kills", kills)
}

func killAndCompare(t *testing.T, seed uint64) (kills int) {
	aborts := abortsForMemory(t)
	e := &estate{t: t, random: rand.New(rand.NewPCG(seed, 3)), records: make(map[uint64]tunnel.Record)}
	e.makeStores()
	s := schedule{moves: true}
	saw := make([]struct{ client, server outcome }, killTunnels)
	var players sync.WaitGroup
	for i := range killTunnels {
		s.tunnels = append(s.tunnels, pair{e.script(), e.script()})
		p := &s.tunnels[i]
		client, server := e.connect(i, p)
		players.Go(func() { saw[i].client = p.down.play(client) })
		players.Go(func() { saw[i].server = p.up.play(server) })
	}
	for e.left > 0 && !t.Failed() {
		e.live()
	}
	players.Wait()
	for _, s := range e.stores {
		unix.Close(s.file)
		for _, p := range s.pipes {
			p.Close()
		}
	}
	var mistakes []string
	for i := range s.tunnels {
		m := model{schedule: &s, pair: &s.tunnels[i], client: saw[i].client, server: saw[i].server}
		r, reported := e.records[uint64(i)+1]
		if m.record = r; !reported { // the process was killed just before
			m.record = tunnel.Record{ToUp: uint64(saw[i].server.got), ToDown: uint64(saw[i].client.got)}
		}
		mistakes = append(mistakes, m.check()...)
	}
	if mistakes != nil && abortsForMemory(t) != aborts {
		t.Skip("the kernel has run out of memory for TCP and cut connections")
	}
	for _, m := range mistakes {
		t.Error(m)
	}
	return e.kills
}

func (e *estate) makeStores() {
	for i := range e.stores {
		fd, err := inflight.NewFile(2*killTunnels, killBuffers)
		if err != nil {
			e.t.Fatal(err)
		}
		pipes := inflight.NewPipes(killPipes, 1<<20)
		if len(pipes) != killPipes {
			e.t.Fatalf("only %d pipes are allowed", len(pipes))
		}
		e.stores[i] = copies{fd, pipes}
	}
}

// script returns one that takes so long that there are some kills in it.
func (e *estate) script() script {
	s := newScript(e.random, e.random.IntN(2) == 0)
	s.early, s.head, s.plain = 0, 0, false
	if e.random.IntN(3) > 0 {
		s.ending = fin
	}
	for i := range 10 + e.random.IntN(20) {
		s.writes = append(s.writes, 1+e.random.IntN(1<<(4+e.random.IntN(15))))
		s.pauses = append(s.pauses, time.Duration(e.random.IntN(1+i*10))*time.Millisecond)
	}
	return s
}

// connect makes the sockets of a tunnel, from which nothing was read so far.
func (e *estate) connect(i int, p *pair) (client, server tcpConn) {
	client, down := tcpPair(e.t, p.down.small)
	server, up := tcpPair(e.t, p.up.small)
	h := heir{Number: uint64(i) + 1, Slot: uint32(i), FDs: [2]int{dupOf(e.t, down), dupOf(e.t, up)}}
	down.Close()
	up.Close()
	for i, fd := range h.FDs {
		c, err := inflight.Look(fd)
		if err != nil {
			e.t.Fatal(err)
		}
		h.Taken[i], h.Given[1-i] = c.Taken, c.Given
	}
	loop := i % killLoops
	e.heirs[loop] = append(e.heirs[loop], h)
	e.left++
	return client, server
}

func dupOf(t testing.TB, c tcpConn) (fd int) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(first uintptr) { fd = dup(t, int(first)) })
	return fd
}

// live has a process relay what is left, kills it and notes what it has said.
func (e *estate) live() {
	cmd := exec.Command(os.Args[0], "-test.run=^$")
	var files []int
	for _, s := range e.stores {
		files = append(files, s.file)
		for _, p := range s.pipes {
			files = append(files, p.R, p.W)
		}
	}
	var told [killLoops][]heir
	for loop, all := range e.heirs {
		for _, h := range all {
			h := h
			for i, fd := range h.FDs {
				files = append(files, fd)
				h.FDs[i] = firstFile + len(files) - 1
			}
			told[loop] = append(told[loop], h)
		}
	}
	text, err := json.Marshal(told)
	if err != nil {
		e.t.Fatal(err)
	}
	cmd.Env = append(os.Environ(), killEnv+"="+string(text), "GORACE=atexit_sleep_ms=0", "GOMAXPROCS=4")
	for _, fd := range files {
		f := os.NewFile(uintptr(dup(e.t, fd)), "")
		defer f.Close()
		cmd.ExtraFiles = append(cmd.ExtraFiles, f)
	}
	cmd.Stderr = os.Stderr
	stdin, err1 := cmd.StdinPipe()
	stdout, err2 := cmd.StdoutPipe()
	if err := cmd.Start(); err1 != nil || err2 != nil || err != nil {
		e.t.Fatal(err1, err2, err)
	}
	defer stdin.Close()
	lines := bufio.NewScanner(stdout)
	if !lines.Scan() || lines.Text() != "begin" {
		e.t.Errorf("a relay said %q", lines.Text())
	}
	if e.random.IntN(4) > 0 {
		time.Sleep(time.Duration(e.random.IntN(60)) * time.Millisecond)
	}
	cmd.Process.Kill()
	e.kills++
	for lines.Scan() {
		e.hear(lines.Text())
	}
	if err := cmd.Wait(); cmd.ProcessState.Sys() == nil || cmd.ProcessState.ExitCode() != -1 {
		e.t.Errorf("a relay ended by itself: %v", err)
	}
}

// hear notes what a process has said.
func (e *estate) hear(line string) {
	var number, reason uint64
	var r tunnel.Record
	if n, _ := fmt.Sscanf(line, "end %d %d %d %d", &number, &reason, &r.ToUp, &r.ToDown); n == 4 {
		r.Number, r.Reason = number, tunnel.Reason(reason)
		if _, twice := e.records[number]; twice {
			e.t.Errorf("tunnel %d was reported twice", number)
		}
		e.records[number] = r
		return
	}
	if n, _ := fmt.Sscanf(line, "withdraw %d", &number); n != 1 {
		e.t.Errorf("a relay said %q", line)
	}
	for loop, all := range e.heirs {
		for i, h := range all {
			if h.Number == number {
				unix.Close(h.FDs[0])
				unix.Close(h.FDs[1])
				e.heirs[loop] = append(all[:i:i], all[i+1:]...)
				e.left--
			}
		}
	}
}
