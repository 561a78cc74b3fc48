package dynamic_test

import (
	"fmt"
	"testing"

	"holdfast/internal/dynamic"
)

func TestOverrides(t *testing.T) {
	t.Parallel()
	var s dynamic.Set
	s.Apply(map[string]float64{"weight": 7})
	weight := s.New("weight", dynamic.Count, 1, 0, 10)
	twin := s.New("weight", dynamic.Count, 2, 0, 5)
	share := s.New("share", dynamic.Percent, dynamic.Whole/4, 0, dynamic.Whole)
	own := s.New("", dynamic.Count, 3, 0, 10)
	steps := []struct {
		name                     string
		overrides                map[string]float64
		weight, twin, share, own int64
	}{
		{"what was told before they were made holds, within their bounds", map[string]float64{"weight": 7}, 7, 5, dynamic.Whole / 4, 3},
		{"a percentage has parts", map[string]float64{"share": 0.5, "": 9}, 1, 2, dynamic.Whole / 200, 3},
		{"bounds", map[string]float64{"weight": -1, "share": 101}, 0, 0, dynamic.Whole, 3},
		{"what nobody overrides is as configured", nil, 1, 2, dynamic.Whole / 4, 3},
	}
	for i, st := range steps {
		if i > 0 {
			s.Apply(st.overrides)
		}
		got := [...]int64{weight.Load(), twin.Load(), share.Load(), own.Load()}
		if want := [...]int64{st.weight, st.twin, st.share, st.own}; got != want {
			t.Errorf("%s: %v, want %v", st.name, got, want)
		}
	}
}

func TestWhoWatchesHearsOfChanges(t *testing.T) {
	t.Parallel()
	var s dynamic.Set
	v := s.New("limit", dynamic.Count, 3, -1, 10)
	var heard []int64
	v.OnChange(func() { heard = append(heard, v.Load()) })
	for _, overrides := range []map[string]float64{{"other": 1}, {"limit": 3}, {"limit": 5}, {"limit": 5, "other": 2}, {"limit": -7}, nil} {
		s.Apply(overrides)
	}
	if got := fmt.Sprint(heard); got != "[5 -1 3]" {
		t.Errorf("heard of %s", got)
	}
}

func TestAPercentageHitsItsShare(t *testing.T) {
	t.Parallel()
	v := (*dynamic.Set)(nil).New("share", dynamic.Percent, dynamic.Whole/8, 0, dynamic.Whole)
	hits := 0
	for random := range uint64(dynamic.Whole) {
		if v.Hits(random + 3*dynamic.Whole) {
			hits++
		}
	}
	if hits != dynamic.Whole/8 {
		t.Errorf("%d of %d", hits, dynamic.Whole)
	}
	if dynamic.Fixed(0).Hits(0) || !dynamic.Fixed(dynamic.Whole).Hits(dynamic.Whole-1) {
		t.Error("none and all")
	}
}

func TestWhatAKeyIsOverriddenTo(t *testing.T) {
	t.Parallel()
	var s dynamic.Set
	s.New("share", dynamic.Percent, dynamic.Whole/8, 0, dynamic.Whole)
	s.New("", dynamic.Count, 3, 0, 10)
	for n := range int64(4) {
		s.New("weight", dynamic.Count, n%3, -n, 10)
	}
	s.Apply(map[string]float64{"share": 0.25, "other": 3})
	got := fmt.Sprint(s.Values(2))
	if want := "[{share percent [12.5] [0.25] 0 100} {weight count [0 1] [0 1] -3 10}]"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}
