package admin_test

import (
	"errors"
	"io"
	"math"
	"reflect"
	"slices"
	"strings"
	"testing"

	"holdfast/internal/admin"
	"holdfast/internal/admin/admintest"
	"holdfast/internal/supervisor"
)

func TestRuntimeValuesOverTheSocket(t *testing.T) {
	t.Parallel()
	set := 0.1
	values := &supervisor.Runtime{File: "/f", Values: []supervisor.RuntimeValue{{Key: "a", Unit: "percent", Configured: []float64{0}, Command: &set, Generations: []int{8}}}}
	fake := &admintest.Supervisor{
		OnRuntime: func() (*supervisor.Runtime, error) { return values, nil },
		OnSet: func(map[string]float64) (*supervisor.OverrideResult, error) {
			return &supervisor.OverrideResult{Warnings: []string{"mind"}}, nil
		},
		OnReset: func(key string) (*supervisor.OverrideResult, error) {
			return nil, &supervisor.Refusal{Step: "runtime values", Problems: []string{key + " is not set"}}
		},
	}
	c := admin.Dial(begin(t, fake).dir)
	if got, err := c.Runtime(t.Context()); err != nil || !reflect.DeepEqual(got, values) {
		t.Errorf("got %+v, %v", got, err)
	}
	if r, err := c.Override(t.Context(), map[string]float64{"b": 1e-7, "a": -3}); err != nil || !slices.Equal(r.Warnings, []string{"mind"}) {
		t.Errorf("got %+v, %v", r, err)
	}
	for _, key := range []string{"", "a"} {
		if _, err := c.ResetOverrides(t.Context(), key); err == nil || err.Error() != "runtime values: "+key+" is not set" {
			t.Errorf("got %v", err)
		}
	}
	if want := []string{"set map[a:-3 b:1e-07]", "reset ", "reset a"}; !slices.Equal(fake.Calls(), want) {
		t.Errorf("the supervisor was told %q, want %q", fake.Calls(), want)
	}
}

func TestWhatIsNoOverride(t *testing.T) {
	t.Parallel()
	fake := &admintest.Supervisor{}
	s := begin(t, fake)
	for target, want := range map[string]string{
		"/runtime/set":                             "say ?key=KEY&value=NUMBER",
		"/runtime/set?key=a":                       "say ?key=KEY&value=NUMBER",
		"/runtime/set?value=1":                     "say ?key=KEY&value=NUMBER",
		"/runtime/set?key=a&key=b&value=1":         "say ?key=KEY&value=NUMBER",
		"/runtime/set?key=a&value=1&key=a&value=2": "has \"a\" twice",
		"/runtime/set?key=a&value=":                "takes a number",
		"/runtime/set?key=a&value=NaN":             "takes a number",
		"/runtime/set?key=a&value=-Inf":            "takes a number",
		"/runtime/set?key=a&value=1e300":           "takes a number",
		"/runtime/reset?key=":                      "or leave it out for all",
		"/runtime/reset?key=a&key=b":               "or leave it out for all",
	} {
		c := s.connect(t, "POST "+target+" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
		var answer strings.Builder
		if _, err := io.Copy(&answer, c); err != nil || !strings.HasPrefix(answer.String(), "HTTP/1.1 400 ") || !strings.Contains(answer.String(), want) {
			t.Errorf("%s: got %q, %v; want %q", target, answer.String(), err, want)
		}
	}
	if calls := fake.Calls(); len(calls) > 0 {
		t.Errorf("the supervisor was told %q", calls)
	}
}

// The client says what the supervisor would be told, so it does not send what is no number.
func TestNoNumberIsRefusedOverTheSocket(t *testing.T) {
	t.Parallel()
	c := admin.Dial(begin(t, &admintest.Supervisor{}).dir)
	if _, err := c.Override(t.Context(), map[string]float64{"a": math.NaN()}); err == nil || errors.Is(err, admin.ErrUnknown) {
		t.Errorf("got %v", err)
	}
}
