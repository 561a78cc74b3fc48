package scavenge

import (
	"slices"
	"testing"
	"time"
)

func TestMemoryIsGivenBackWhenManyHaveComeOrGoneAndItIsQuiet(t *testing.T) {
	t.Parallel()
	steady := func(each uint64, seconds int) []uint64 { return slices.Repeat([]uint64{each}, seconds) }
	idle := func(seconds int) []uint64 { return steady(0, seconds) }
	burst := []uint64{20_000}
	for name, tt := range map[string]struct {
		changes []uint64 // of each second
		want    []int    // seconds in which memory is given back
		wanted  bool     // at the beginning
	}{
		"nothing happens":                   {changes: idle(300)},
		"too little happens":                {changes: slices.Concat(steady(calm, 19), idle(300))},
		"a burst":                           {changes: slices.Concat(idle(20), burst, idle(300)), want: []int{24}},
		"a burst that takes its time":       {changes: slices.Concat(idle(20), burst, burst, burst, idle(300)), want: []int{26}},
		"a burst right at the beginning":    {changes: slices.Concat(burst, idle(300)), want: []int{4}},
		"many come and go":                  {changes: slices.Concat(idle(20), burst, idle(29), burst, idle(300)), want: []int{24, 54}},
		"many come and go at once":          {changes: slices.Concat(idle(20), burst, idle(4), burst, idle(300)), want: []int{24, 29}},
		"it is quiet for too short a time":  {changes: slices.Concat(idle(20), burst, idle(1), burst, idle(1), burst, idle(300)), want: []int{28}},
		"a burst, and then a trickle":       {changes: slices.Concat(idle(20), burst, steady(10, 300)), want: []int{24, 124, 224}},
		"it was wanted, and is quiet":       {changes: idle(300), want: []int{4}, wanted: true},
		"it was wanted, and is never quiet": {changes: steady(100, 100), want: []int{59}, wanted: true},
		"it is never quiet":                 {changes: steady(200, 200), want: []int{59, 119, 179}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			now := time.Unix(1_700_000_000, 0)
			m := New(now)
			if tt.wanted {
				m.Want()
			}
			var got []int
			var sum uint64
			for second, n := range tt.changes {
				now = now.Add(time.Second)
				if sum += n; m.Due(now, sum) {
					got = append(got, second)
				}
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("given back in the seconds %v, want %v", got, tt.want)
			}
		})
	}
}
