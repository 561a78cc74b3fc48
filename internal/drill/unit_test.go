package drill

import (
	"bytes"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/config"
	"holdfast/internal/drill/canary"
)

func TestEachKindComesBeforeAnyComesAgain(t *testing.T) {
	t.Parallel()
	play := func(seed uint64) (order []int) {
		d := newDeck(rand.New(rand.NewPCG(seed, 0)), nil)
		for range 3 * len(kinds) {
			order = append(order, d.next())
		}
		return order
	}
	order := play(1)
	for turn := range slices.Chunk(order, len(kinds)) {
		if turn = slices.Sorted(slices.Values(turn)); len(slices.Compact(turn)) != len(kinds) {
			t.Errorf("a turn is %v", turn)
		}
	}
	if !slices.Equal(order, play(1)) || slices.Equal(order, play(2)) {
		t.Error("the order is not what the seed decides")
	}
}

func TestKindsComeAsOftenAsTheyAreNamed(t *testing.T) {
	t.Parallel()
	d := newDeck(rand.New(rand.NewPCG(1, 0)), []string{"upgrade", "reload", "upgrade"})
	for turns := range 3 {
		var turn []string
		for i := range 3 {
			if turns == 0 && d.through() {
				t.Errorf("every kind has come, after %d", i)
			}
			turn = append(turn, kinds[d.next()].name)
		}
		if !d.through() {
			t.Error("a kind has not come yet, after all")
		}
		if slices.Sort(turn); !slices.Equal(turn, []string{"reload", "upgrade", "upgrade"}) {
			t.Errorf("a turn is %q", turn)
		}
	}
}

func TestKillsAreToldApart(t *testing.T) {
	t.Parallel()
	var k Kills
	k.note("serving", syscall.SIGKILL, "", false)
	k.note("serving", syscall.SIGSEGV, "reload", false)
	k.note("draining", syscall.SIGKILL, "move", true)
	k.note("ready", syscall.SIGKILL, "reload", true)
	k.note("starting", syscall.SIGKILL, "", true)
	want := Kills{Serving: 2, Draining: 1, Starting: 2, Faults: 1, During: map[string]int{"reload": 2, "move": 1}, Bereft: 3}
	if !reflect.DeepEqual(k, want) || k.Generations() != 5 {
		t.Errorf("%+v, want %+v", k, want)
	}
}

func TestEveryConfigurationIsGoodAndAnother(t *testing.T) {
	t.Parallel()
	c := configuration{dir: "/tmp/drill", upstream: "127.0.0.1:4711", probation: "0s"}
	random := rand.New(rand.NewPCG(1, 0))
	known := make(map[string]bool)
	listeners, moves := make(map[int]bool), make(map[bool]bool)
	for range 300 {
		text := c.String()
		parsed, err := config.Parse("holdfast.toml", []byte(text))
		if err != nil {
			t.Fatalf("%v\n%s", err, text)
		}
		if known[text] {
			t.Fatalf("there was this one before:\n%s", text)
		}
		known[text] = true
		listeners[len(parsed.Listeners)] = true
		moves[c.moves] = true
		c.change(random)
	}
	if len(listeners) != extras+1 {
		t.Errorf("there were %v listeners", listeners)
	}
	if len(moves) != 2 {
		t.Errorf("tunnels are always moved, or never: %v", moves)
	}
}

func TestBrokenConfigurationsAreBroken(t *testing.T) {
	t.Parallel()
	c := configuration{dir: "/tmp/drill", upstream: "127.0.0.1:4711", probation: "0s"}
	broken := c.broken()
	for _, text := range broken[:len(broken)-1] { // the last one is, where somebody has the address
		if _, err := config.Parse("holdfast.toml", []byte(text)); err == nil {
			t.Errorf("this is good:\n%s", text)
		}
	}
}

func TestCountersThatDecrease(t *testing.T) {
	t.Parallel()
	read := func(text string) counters {
		c, err := readCounters(text)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	before := read(`
# TYPE holdfast_requests_total counter
holdfast_requests_total{a="1",b="2"} 5
holdfast_requests_total{a="2",b="2"} 5
# TYPE holdfast_open gauge
holdfast_open 5
# TYPE holdfast_seconds histogram
holdfast_seconds_bucket{le="1"} 2
holdfast_seconds_bucket{le="+Inf"} 3
holdfast_seconds_sum 4
holdfast_seconds_count 3
# TYPE process_cpu_seconds_total counter
process_cpu_seconds_total 5
`)
	if len(before) != 6 {
		t.Errorf("counters are %v", before)
	}
	if all := before.decreased(before); len(all) > 0 {
		t.Errorf("decreased: %q", all)
	}
	after := read(`
# TYPE holdfast_requests_total counter
holdfast_requests_total{a="1",b="2"} 4
holdfast_requests_total{a="3",b="2"} 1
# TYPE holdfast_seconds histogram
holdfast_seconds_bucket{le="1"} 1
holdfast_seconds_bucket{le="+Inf"} 4
holdfast_seconds_sum 3
holdfast_seconds_count 4
`)
	want := []string{
		`holdfast_requests_total{a="1",b="2"} was 5 and is 4`,
		`holdfast_requests_total{a="2",b="2"} was 5 and is not there any more`,
		`holdfast_seconds_bucket up to 1 was 2 and is 1`,
		`holdfast_seconds_sum was 4 and is 3`,
	}
	if all := before.decreased(after); !slices.Equal(all, want) {
		t.Errorf("decreased:\n%s\nwant:\n%s", strings.Join(all, "\n"), strings.Join(want, "\n"))
	}
}

func TestChangesAreCounted(t *testing.T) {
	t.Parallel()
	c, err := readCounters(`
# TYPE holdfast_tunnels_resumed_total counter
holdfast_tunnels_resumed_total 3
# TYPE holdfast_tunnels_moved_total counter
holdfast_tunnels_moved_total{direction="in"} 4
holdfast_tunnels_moved_total{direction="out"} 5
# TYPE holdfast_tunnel_recovered_flows_total counter
holdfast_tunnel_recovered_flows_total{found="nothing"} 10
holdfast_tunnel_recovered_flows_total{found="buffer"} 20
holdfast_tunnel_recovered_flows_total{found="pipe"} 30
holdfast_tunnel_recovered_flows_total{found="peeked"} 40
`)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := c.changes(), (Changes{Resumed: 3, Moved: 4, Flows: 100, Buffered: 20, Piped: 30, Peeked: 40}); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
}

func TestSocketsOfAProcess(t *testing.T) {
	t.Parallel()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	ours, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer ours.Close()
	theirs, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer theirs.Close()
	all, err := socketsOf(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []net.Conn{ours, theirs} {
		if want := c.LocalAddr().String() + " " + c.RemoteAddr().String(); !slices.Contains(all, want) {
			t.Errorf("%q is missing in %q", want, all)
		}
	}
	for _, s := range all {
		if strings.HasPrefix(s, listener.Addr().String()+" 0.0.0.0:") {
			t.Error("the listening socket is among them")
		}
	}
}

func TestSocketsOnTheirWayAreOfNobody(t *testing.T) {
	t.Parallel()
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	address := listener.Addr().String()
	var sent [2]string
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[0])
	defer unix.Close(pair[1])
	for i := range sent {
		ours, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		defer ours.Close()
		theirs, err := listener.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer theirs.Close()
		sent[i] = address + " " + ours.LocalAddr().String()
		if i > 0 {
			break // we keep it
		}
		f, err := theirs.(*net.TCPConn).File()
		if err != nil {
			t.Fatal(err)
		}
		err = errors.Join(unix.Sendmsg(pair[0], []byte{0}, unix.UnixRights(int(f.Fd())), nil, 0), f.Close(), theirs.Close())
		if err != nil {
			t.Fatal(err)
		}
	}
	if got := socketsOfNobody(address, []int{os.Getpid()}); !slices.Equal(got, sent[:1]) {
		t.Errorf("%q, not %q", got, sent[:1])
	}
}

func TestAProcessThatStandsStill(t *testing.T) {
	t.Parallel()
	cmd := exec.Command("cat")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer in.Close()
	if children := childrenOf(os.Getpid()); !slices.Contains(children, cmd.Process.Pid) {
		t.Errorf("children are %v, and %d is not among them", children, cmd.Process.Pid)
	}
	if children := childrenOf(cmd.Process.Pid); len(children) > 0 {
		t.Errorf("it has children: %v", children)
	}
	if stopped(cmd.Process.Pid) {
		t.Error("it runs")
	}
	cmd.Process.Signal(syscall.SIGSTOP)
	defer cmd.Process.Signal(syscall.SIGCONT)
	for deadline := time.Now().Add(time.Minute); !stopped(cmd.Process.Pid); time.Sleep(look) {
		if time.Now().After(deadline) {
			t.Fatal("it does not stand still")
		}
	}
}

func TestAResultSaysWhatWasBroken(t *testing.T) {
	t.Parallel()
	held := newResult(7)
	held.Rounds, held.Duration = 3, 1500*time.Millisecond
	held.Kinds[0].Rounds, held.Kinds[1].Rounds = 3, 1
	held.Changes = Changes{Moved: 7}
	held.Kills = Kills{Supervisors: 4, Serving: 5, During: map[string]int{"move": 6}}
	held.Kinds[0].Pauses = canary.Pauses{Connection: 31 * time.Millisecond}
	held.see("round 1", &canary.Report{Connections: 100, KilledRequests: 2})
	broken := newResult(8)
	broken.see("round 1", &canary.Report{Connections: 100})
	broken.see("round 2", &canary.Report{Connections: 200, Refused: 6, Failures: slices.Repeat([]string{"connect: refused"}, 6)})
	broken.wrong("round 3")
	silent := newResult(9)
	silent.see("round 1", &canary.Report{Dropped: 1})
	if !held.Held || broken.Held || silent.Held || len(broken.Broken) != mostAtOnce+1 {
		t.Errorf("held: %t and %t; broken: %q", held.Held, broken.Held, broken.Broken)
	}
	for _, want := range []struct {
		result *Result
		lines  []string
	}{
		{held, []string{"3 rounds in 2s, seed 7", "reload 3 31ms 0s 0s", "reload refused 1", "connections refused 0 100",
			"Killed: 4 supervisors; 5 generations that served", "6 while tunnels were moved", "and were moved 7 times", "2 requests", "The promise held."}},
		{broken, []string{"connections refused 6 200", "The promise did not hold:", "round 2: connect: refused", "round 2: and 2 more of this"}},
	} {
		var table bytes.Buffer
		if err := want.result.WriteTable(&table); err != nil {
			t.Fatal(err)
		}
		text := strings.Join(strings.Fields(table.String()), " ")
		for _, line := range want.lines {
			if !strings.Contains(text, line) {
				t.Errorf("%q is missing in\n%s", line, table.String())
			}
		}
		var written bytes.Buffer
		back := new(Result)
		if err := want.result.WriteJSON(&written); err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(written.Bytes(), back); err != nil || back.Held != want.result.Held || back.Seen.Refused != want.result.Seen.Refused {
			t.Errorf("as JSON it is %s, %v", written.Bytes(), err)
		}
	}
}
