package balance

import (
	"math"
	"math/bits"
	"math/rand/v2"
)

// alias chooses at random in proportion to weights, in constant time (Walker, Vose): each host
// has a column of the same width, of which what its weight leaves belongs to another.
type alias struct {
	hosts   []*Host
	weights []int64
	columns []column
}

type column struct {
	own   uint64 // up to this of all numbers, the column is the host's
	other uint32
}

func newAlias(t *tier) *alias {
	n := len(t.hosts)
	a := &alias{t.hosts, t.weights, make([]column, n)}
	var sum uint64
	for _, w := range a.weights {
		sum += uint64(w)
	}
	left := make([]uint64, n) // of each weight, times n
	var small, large []uint32
	for i, w := range a.weights {
		a.columns[i] = column{math.MaxUint64, uint32(i)}
		if left[i] = uint64(w) * uint64(n); left[i] < sum {
			small = append(small, uint32(i))
		} else {
			large = append(large, uint32(i))
		}
	}
	for len(small) > 0 && len(large) > 0 {
		s, l := small[len(small)-1], large[len(large)-1]
		small = small[:len(small)-1]
		own, _ := bits.Div64(left[s], 0, sum)
		a.columns[s] = column{own, l}
		if left[l] -= sum - left[s]; left[l] < sum {
			large = large[:len(large)-1]
			small = append(small, l)
		}
	}
	return a
}

// at returns the index of the host that an evenly spread number is for.
func (a *alias) at(number uint64) int {
	i, within := bits.Mul64(number, uint64(len(a.columns)))
	if c := &a.columns[i]; within > c.own {
		return int(c.other)
	}
	return int(i)
}

func (a *alias) pick(Query) *Host { return a.hosts[a.at(rand.Uint64())] }

// twoChoices takes the one with less load by weight of two at random.
type twoChoices struct{ *alias }

func (t *twoChoices) pick(Query) *Host {
	i := t.at(rand.Uint64())
	if len(t.hosts) == 1 {
		return t.hosts[i]
	}
	j := i
	for range 3 {
		if j = t.at(rand.Uint64()); j != i {
			break
		}
	}
	if j == i { // nearly all of the weight
		if j = rand.IntN(len(t.hosts) - 1); j >= i {
			j++
		}
	}
	if t.hosts[j].Load()*t.weights[i] < t.hosts[i].Load()*t.weights[j] {
		return t.hosts[j]
	}
	return t.hosts[i]
}
