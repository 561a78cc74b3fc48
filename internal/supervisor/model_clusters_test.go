package supervisor

import (
	"fmt"
	"maps"
	"slices"
	"strconv"

	"holdfast/internal/control"
	"holdfast/internal/fence"
)

// What generations of the model tell each other of their clusters. The supervisor asks for it again
// and again, and nothing else depends on it: so these messages are answered at once and are no
// moves, or nothing would ever come to rest.

// clustersVersion is what generations say of themselves.
func (w *simWorld) clustersVersion() int {
	if w.scenario.clusters {
		return control.ClustersVersion
	}
	return 0
}

// talkingOfClusters is the part of a generation that has clusters.
type talkingOfClusters struct {
	hears  []int // generations of which it has heard last what they have
	coming []int
}

// talksOfClusters answers a message about clusters. It says whether m is one. Called with mu held.
func (l *link) talksOfClusters(m *control.Message, fds []int) bool {
	g := l.g
	var file func() (int, error)
	switch m.Type {
	case control.TypeElsewhere:
	case control.TypeClusters, control.TypeLoads:
		file = func() (int, error) {
			f, err := control.Payload(control.Loads{Clusters: []control.ClusterLoad{{Name: fmt.Sprint(g.bundle.Generation)}}})
			if err != nil {
				return -1, err
			}
			defer f.Close()
			return control.Duplicate(int(f.Fd()))
		}
	default:
		return false
	}
	if g.fence == nil || !l.w.scenario.clusters {
		l.w.fail("6: %s is asked about clusters and has not heard of any", g)
		return true
	}
	a := &control.Message{Type: control.TypeAnswer, Re: m.ID}
	var sent []int
	switch verdict, err := g.fence.Message(l.id, m.Type, m.Epoch); {
	case verdict != fence.Do:
		a.Error = fmt.Sprint("refused: ", err)
	case file == nil:
		g.hear(m, fds)
	default:
		fd, err := file()
		if err != nil {
			panic(err)
		}
		sent = append(sent, fd)
	}
	l.inbox <- packet{a, sent}
	return true
}

// hear takes what others have.
func (g *simGeneration) hear(m *control.Message, fds []int) {
	for i, key := range m.Keys {
		number, err := strconv.Atoi(key)
		if err != nil || number == g.bundle.Generation {
			g.w.fail("6: %s hears of %q", g, key)
		}
		dup, err := control.Duplicate(fds[i])
		if err != nil {
			panic(err)
		}
		if loads, err := control.ReadLoads(dup); err != nil || loads.Clusters[0].Name != key {
			g.w.fail("6: %s hears of generation %s what is not that one's: %v", g, key, err)
		}
		g.coming = append(g.coming, number)
	}
	if !m.More {
		slices.Sort(g.coming)
		g.hears, g.coming = g.coming, nil
	}
}

// checkClusters is invariant 6, at the end: each has heard of all others, and of nobody else.
// Called with mu held.
func (w *simWorld) checkClusters() {
	if !w.scenario.clusters || w.facts.stopped {
		return
	}
	living := make(map[int]*simGeneration)
	for _, g := range w.generations {
		if !g.dead {
			living[g.bundle.Generation] = g
		}
	}
	for number, g := range living {
		want := slices.DeleteFunc(slices.Sorted(maps.Keys(living)), func(n int) bool { return n == number })
		if !slices.Equal(g.hears, want) {
			w.fail("6: %s has heard of generations %v, and the others are %v", g, g.hears, want)
		}
	}
}
