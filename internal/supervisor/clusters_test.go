package supervisor

import (
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"holdfast/internal/control"
)

// fakeClusters is the version of what is told of clusters that this process says it knows.
var fakeClusters int

// fakeClustered is the part of a fake generation that has clusters: one endpoint, with as many
// tunnels as the generation's number says. It notes what it begins with and what it hears.
type fakeClustered struct {
	b         *control.Bundle
	note      func(file, format string, args ...any)
	inherited string
	coming    map[string]int64
	hears     string
}

func (c *fakeClustered) take(conn *control.Conn, m *control.Message, fds []int) bool {
	answer := func(file *os.File) {
		a := &control.Message{Type: control.TypeAnswer, Re: m.ID}
		if told(*c.b, "clusters are no memory file") {
			conn.Send(a, time.Second, 2)
		} else {
			conn.Send(a, time.Second, int(file.Fd()))
		}
		file.Close()
	}
	switch m.Type {
	case control.TypeBundle:
		c.inherited = "nothing"
		if len(fds) > 2 {
			if states, err := control.ReadClusterStates(fds[2]); err != nil {
				c.inherited = "what cannot be read"
			} else {
				c.inherited = fmt.Sprint("what ", states.Clusters[0].Endpoints[0].Tunnels, " knew")
			}
		}
		return false
	case control.TypeListeners:
		if fakeClusters != 0 && c.inherited != "" {
			c.note("clusters", "%d begins with %s, urgent: %v", c.b.Generation, c.inherited, c.b.Urgent)
			c.inherited = ""
		}
		return false
	case control.TypeServe:
		if fakeClusters != 0 {
			c.note("clusters", "%d serves", c.b.Generation)
		}
		return false
	case control.TypeClusters, control.TypeLoads:
		if told(*c.b, "hangs about clusters") {
			return true
		}
		n := int64(c.b.Generation)
		var payload any = control.Loads{Clusters: []control.ClusterLoad{{Name: "app", Endpoints: []control.EndpointLoad{{Address: "a", Load: n}}}}}
		if m.Type == control.TypeClusters {
			payload = control.ClusterStates{Clusters: []control.ClusterState{
				{
					Name: "app", Policy: fmt.Sprint("policy of ", n),
					Endpoints: []control.EndpointState{{
						Address: "a", Name: "a\x1b[2J", Healthy: true, Tunnels: n, Requests: 1, RequestsSum: 10, Connections: 2, Connects: 3, ConnectSum: 0.5, ConnectFails: 1,
						Reason: "b\x1b", Conditions: []string{"c\n"}, Metadata: map[string]string{"d\r": "e\x00"},
					}},
					Breakers: []control.BreakerState{{Priority: "default", Limits: map[string]control.BreakerUsed{
						"tunnels": {Limit: 5, Here: n, Open: n == 1, Overflows: 1}, "requests": {Here: 1},
					}}},
				},
				{Name: fmt.Sprint("only in ", n)},
			}}
		}
		file, _ := control.Payload(payload)
		switch {
		case told(*c.b, "clusters are rubbish"):
			file, _ = control.Bytes([]byte("rubbish"))
		case told(*c.b, "clusters are huge"):
			file, _ = control.Bytes(make([]byte, control.MaxClusters+1))
		}
		answer(file)
	case control.TypeElsewhere:
		if c.coming == nil {
			c.coming = make(map[string]int64)
		}
		for i, key := range m.Keys {
			c.coming[key] = -1
			if loads, err := control.ReadLoads(fds[i]); err == nil {
				c.coming[key] = loads.Clusters[0].Endpoints[0].Load
			}
		}
		if told(*c.b, "hangs about clusters") {
			return true
		}
		if !m.More {
			if hears := fmt.Sprint(c.coming); hears != c.hears {
				c.hears = hears
				c.note("clusters", "%d hears %s", c.b.Generation, hears)
			}
			c.coming = nil
		}
		conn.Send(&control.Message{Type: control.TypeAnswer, Re: m.ID}, time.Second)
	default:
		return false
	}
	return true
}

func (w *world) startClustered(file string) {
	w.mood("knows clusters")
	w.write(file)
	w.run()
	w.wantServing(1)
}

// heard returns what generations have noted of clusters, in order.
func (w *world) heard() []string {
	text, _ := os.ReadFile(filepath.Join(w.dir, "clusters"))
	return strings.Split(strings.TrimSuffix(string(text), "\n"), "\n")
}

// wantHeard waits until a generation has heard something last.
func (w *world) wantHeard(generation int, what string) {
	w.t.Helper()
	last := ""
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		for _, line := range w.heard() {
			if strings.HasPrefix(line, fmt.Sprint(generation, " hears ")) {
				last = line
			}
		}
		if last == fmt.Sprint(generation, " hears ", what) {
			return
		}
	}
	w.t.Fatalf("generation %d has heard %q last, want %q", generation, last, what)
}

func (w *world) wantNoted(line string) {
	w.t.Helper()
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if slices.Contains(w.heard(), line) {
			return
		}
	}
	w.t.Fatalf("%q is not among %q", line, w.heard())
}

const clustered = base + "#! holds tunnels\n"

func TestGenerationsHearWhatOthersHaveAsLongAsSeveralLive(t *testing.T) {
	w := prepare(t, "")
	w.startClustered(clustered)
	w.mustReload(clustered + "# 2\n")
	w.wantHeard(1, "map[2:2]")
	w.wantHeard(2, "map[1:1]")
	w.mustReload(clustered + "# 3\n")
	w.wantHeard(1, "map[2:2 3:3]")
	w.wantHeard(3, "map[1:1 2:2]")
	all := w.heard()
	for _, n := range []int{2, 3} { // its limits hold from the first request on
		first := slices.IndexFunc(all, func(line string) bool { return strings.HasPrefix(line, fmt.Sprint(n, " hears map[1:1")) })
		if serves := slices.Index(all, fmt.Sprint(n, " serves")); first < 0 || first > serves {
			t.Errorf("generation %d has not heard of the others before it served: %q", n, all)
		}
	}
	for _, n := range []int{1, 2} {
		if err := w.s.Kill(t.Context(), n); err != nil {
			t.Fatal(err)
		}
	}
	w.wantHeard(3, "map[]")
}

func TestAGenerationThatHangsHoldsUpNoOther(t *testing.T) {
	w := prepare(t, "")
	w.startClustered(clustered + "#! hangs about clusters\n")
	for n := range 3 {
		began := time.Now()
		w.mustReload(clustered + fmt.Sprint("# ", n, "\n"))
		if took := time.Since(began); took > 15*time.Second {
			t.Errorf("a reload took %s", took)
		}
	}
	w.wantHeard(3, "map[2:2 4:4]")
	w.wantHeard(4, "map[2:2 3:3]")
}

// A process that stands still has what it had.
func TestWhatAGenerationHadCountsWhileItDoesNotAnswer(t *testing.T) {
	w := prepare(t, "")
	w.startClustered(clustered)
	w.mustReload(clustered + "# 2\n")
	w.wantHeard(2, "map[1:1]")
	pid := w.generation(1).proc.PID()
	freeze(t, pid)
	defer syscall.Kill(pid, syscall.SIGCONT)
	w.s.askLoads(w.generation(1)) // in vain
	w.mustReload(clustered + "# 3\n")
	w.wantHeard(3, "map[1:1 2:2]")
}

func TestClustersThatAreNoneHarmNobody(t *testing.T) {
	for _, how := range []string{"clusters are rubbish", "clusters are huge", "clusters are no memory file"} {
		t.Run(how, func(t *testing.T) {
			w := prepare(t, "")
			w.startClustered(clustered + "#! " + how + "\n")
			if c, err := w.s.Clusters(t.Context(), ""); err == nil {
				t.Errorf("shown are %+v", c)
			}
			w.mustReload(clustered + "# 2\n")
			w.mustReload(clustered + "# 3\n")
			passedOn := map[string]string{"clusters are rubbish": "map[1:-1 2:2]"} // whoever reads it sees what it is
			want := passedOn[how]
			if want == "" {
				want = "map[2:2]"
			}
			w.wantHeard(3, want)
			if c, err := w.s.Clusters(t.Context(), ""); err != nil || !slices.Equal(c.Generations, []int{3, 2}) || len(c.Warnings) != 1 {
				t.Errorf("shown are %+v, %v", c, err)
			}
		})
	}
}

func TestABuildThatTellsOfClustersInAnotherWayIsLeftAlone(t *testing.T) {
	w := prepare(t, "")
	w.mood("knows clusters in its own way")
	w.write(clustered)
	w.run()
	w.wantServing(1)
	w.mustReload(clustered + "# 2\n")
	w.wantNoted("2 begins with nothing, urgent: false")
	if c, err := w.s.Clusters(t.Context(), ""); err == nil {
		t.Errorf("shown are %+v", c)
	}
	w.s.shareLoads()
	if slices.ContainsFunc(w.heard(), func(line string) bool { return strings.Contains(line, "hears") }) {
		t.Errorf("it was told %q", w.heard())
	}
}

func TestTheNextGenerationBeginsWithWhatTheLastOneKnew(t *testing.T) {
	w := prepare(t, "")
	w.startClustered(clustered)
	w.wantNoted("1 begins with nothing, urgent: false")
	w.mustReload(clustered + "# 2\n")
	w.wantNoted("2 begins with what 1 knew, urgent: false")
	w.mustReload(clustered + "# 3\n")
	w.wantNoted("3 begins with what 2 knew, urgent: false")
}

func TestAReplacementBeginsWithWhatTheDeadOneKnew(t *testing.T) {
	w := prepare(t, "")
	w.startClustered(clustered)
	for deadline := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		kept := false
		w.s.do(func() { kept = w.s.sharing.states >= 0 })
		if kept {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("nobody has asked it")
		}
	}
	if err := w.s.Kill(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	w.wantServing(2)
	w.wantNoted("2 begins with what 1 knew, urgent: true")
}

// What it begins with may be what it dies of.
func TestReplacementsThatDieGetNothingMoreToBeginWith(t *testing.T) {
	w := prepare(t, "")
	w.startClustered(clustered)
	var first, later int
	w.s.do(func() {
		s := w.s
		file, _ := control.Bytes([]byte("{}"))
		fd, _ := control.Duplicate(int(file.Fd()))
		file.Close()
		s.sharing.keep(fd)
	})
	p := &plan{}
	w.s.do(func() { w.s.crashes = 1 })
	first, _ = w.s.statesFor(p)
	w.s.do(func() { w.s.crashes = 2 })
	later, _ = w.s.statesFor(p)
	w.s.do(func() { w.s.crashes = 0 })
	if first < 0 || later >= 0 {
		t.Errorf("after one crash descriptor %d, after two %d", first, later)
	}
	control.CloseAll([]int{first})
}

func TestClustersAreShownOfAllGenerationsTogether(t *testing.T) {
	w := prepare(t, "")
	w.startClustered(clustered)
	w.mustReload(clustered + "# 2\n")
	got, err := w.s.Clusters(t.Context(), "app")
	if err != nil {
		t.Fatal(err)
	}
	want := &Clusters{Generations: []int{2, 1}, Clusters: []Cluster{{
		Name: "app", Policy: "policy of 2", Generations: []int{2, 1},
		Endpoints: []Endpoint{{
			EndpointState: control.EndpointState{
				Address: "a", Name: "a\uFFFD[2J", Healthy: true, Tunnels: 3, Requests: 2, RequestsSum: 20, Connections: 4, Connects: 6, ConnectSum: 1, ConnectFails: 2,
				Reason: "b\uFFFD", Conditions: []string{"c\uFFFD"}, Metadata: map[string]string{"d\uFFFD": "e\uFFFD"},
			},
			Generations: []EndpointHeld{{2, 1, 2}, {1, 1, 1}},
		}},
		Breakers: []Breaker{{Priority: "default", Limits: []BreakerLimit{
			{Limit: "requests", Used: 2}, {Limit: "tunnels", Most: 5, Used: 3, Overflows: 2},
		}}},
	}}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	all, err := w.s.Clusters(t.Context(), "")
	var names []string
	for _, c := range all.Clusters {
		names = append(names, c.Name)
	}
	if !slices.Equal(names, []string{"app", "only in 1", "only in 2"}) {
		t.Errorf("there are %q, %v", names, err)
	}
}

func TestWhatIsShownOfClustersIsBounded(t *testing.T) {
	t.Parallel()
	v := newClustersView("")
	for n := range 3 {
		c := &control.ClusterState{Name: strings.Repeat("n", 10_000) + "x"}
		for i := range mostShown {
			c.Endpoints = append(c.Endpoints, control.EndpointState{Name: fmt.Sprint(i)})
		}
		v.addCluster(n, clean(c.Name), c)
		v.addCluster(n, fmt.Sprint("another ", n), c)
	}
	shown := v.show()
	endpoints := 0
	for _, c := range shown.Clusters {
		endpoints += len(c.Endpoints)
		if len(c.Name) > mostWord {
			t.Errorf("a name of %d bytes", len(c.Name))
		}
	}
	if endpoints+len(shown.Clusters) > mostShown || shown.More == 0 {
		t.Errorf("%d endpoints of %d clusters are shown, and %d more said to be", endpoints, len(shown.Clusters), shown.More)
	}
}

// It keeps nothing of what its predecessor had, and asks again.
func TestASuccessorAsksWhatGenerationsKnow(t *testing.T) {
	w := prepare(t, "")
	w.mood("knows clusters")
	w.write(clustered)
	w.lasting()
	w.run()
	w.wantServing(1)
	w.mustReload(clustered + "# 2\n")
	w.wantHeard(2, "map[1:1]")
	pid := w.generation(1).proc.PID()
	w.vanish()
	syscall.Kill(pid, syscall.SIGKILL)
	w.newSupervisor()
	w.run()
	<-w.s.begun
	w.wantServing(2)
	w.wantHeard(2, "map[]") // its predecessor has not said so any more
	w.mustReload(clustered + "# 3\n")
	w.wantNoted("3 begins with what 2 knew, urgent: false")
	w.wantHeard(3, "map[2:2]")
}

// What only older generations have of a cluster that serves was taken out of it: it must not look
// as if it got work.
func TestAnEndpointThatOnlyOlderGenerationsHaveIsShownAsLeft(t *testing.T) {
	t.Parallel()
	v := newClustersView("")
	state := func(address string, tunnels int64) control.EndpointState {
		return control.EndpointState{Address: address, Name: address, Healthy: true, Tunnels: tunnels}
	}
	v.generations = []int{2, 1}
	v.addCluster(2, "app", &control.ClusterState{Endpoints: []control.EndpointState{state("a", 1)}})
	v.addCluster(1, "app", &control.ClusterState{Endpoints: []control.EndpointState{state("a", 1), state("b", 1), state("c", 0)}})
	v.addCluster(1, "old", &control.ClusterState{Endpoints: []control.EndpointState{state("d", 0)}})
	var got []string
	for _, c := range v.show().Clusters {
		for _, e := range c.Endpoints {
			got = append(got, fmt.Sprintf("%s %s %t%v", c.Name, e.Address, e.Healthy, e.Conditions))
		}
	}
	if want := []string{"app a true[]", "app b false[left]", "old d true[]"}; !slices.Equal(got, want) {
		t.Errorf("shown are %q, want %q", got, want)
	}
}
