package exchange_test

import (
	"errors"
	"fmt"
	"slices"
	"testing"

	"holdfast/internal/exchange"
)

func fields(pairs ...string) exchange.Fields {
	var f exchange.Fields
	for i := 0; i < len(pairs); i += 2 {
		f.Add(pairs[i], pairs[i+1])
	}
	return f
}

func TestLookingUpFields(t *testing.T) {
	t.Parallel()
	f := fields("Accept", "a", "cookie", "x=1", "ACCEPT", "b")
	if v, ok := f.Get("accept"); v != "a" || !ok {
		t.Errorf("Get: %q, %v", v, ok)
	}
	if v, ok := f.Get("Host"); v != "" || ok {
		t.Errorf("Get of an absent field: %q, %v", v, ok)
	}
	if !f.Has("Cookie") || f.Has("Cook") {
		t.Error("Has")
	}
	if got := slices.Collect(f.Values("Accept")); !slices.Equal(got, []string{"a", "b"}) {
		t.Errorf("Values: %q", got)
	}
	for range f.Values("Accept") {
		break // a caller may stop early
	}
	var none exchange.Fields
	if none.Has("a") || none.HasToken("a", "b") {
		t.Error("the zero value is not empty")
	}
}

func TestHasToken(t *testing.T) {
	t.Parallel()
	tests := []struct {
		value, token string
		want         bool
	}{
		{"close", "close", true},
		{"Close", "cLOSE", true},
		{"keep-alive, Upgrade", "upgrade", true},
		{"\tupgrade\t,close", "upgrade", true},
		{",, ,close", "close", true},
		{"closed", "close", false},
		{"not close", "close", false},
		{"", "close", false},
	}
	for _, tt := range tests {
		if got := fields("A", "b", "Connection", tt.value).HasToken("connection", tt.token); got != tt.want {
			t.Errorf("%q in %q: %v", tt.token, tt.value, got)
		}
	}
	if !fields("Connection", "a", "Connection", "b").HasToken("Connection", "b") {
		t.Error("a token in the second line is not seen")
	}
}

func TestChangingFields(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name   string
		change func(*exchange.Fields)
		want   exchange.Fields
	}{
		{"Add appends", func(f *exchange.Fields) { f.Add("a", "4") }, fields("A", "1", "B", "2", "a", "3", "C", "x", "a", "4")},
		{"Set takes the place of the first and removes the others", func(f *exchange.Fields) { f.Set("a", "4") }, fields("A", "4", "B", "2", "C", "x")},
		{"Set of the last line", func(f *exchange.Fields) { f.Set("c", "4") }, fields("A", "1", "B", "2", "a", "3", "C", "4")},
		{"Set of an absent field appends", func(f *exchange.Fields) { f.Set("D", "4") }, fields("A", "1", "B", "2", "a", "3", "C", "x", "D", "4")},
		{"Del removes all lines", func(f *exchange.Fields) { f.Del("a") }, fields("B", "2", "C", "x")},
		{"Del of an absent field", func(f *exchange.Fields) { f.Del("D") }, fields("A", "1", "B", "2", "a", "3", "C", "x")},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			f := fields("A", "1", "B", "2", "a", "3", "C", "x")
			if tt.change(&f); !slices.Equal(f, tt.want) {
				t.Errorf("got %v, want %v", f, tt.want)
			}
		})
	}
}

func TestStatusOf(t *testing.T) {
	t.Parallel()
	wrapped := fmt.Errorf("read: %w", &exchange.StatusError{Status: 413, Text: "too large"})
	if got := exchange.StatusOf(wrapped, 500); got != 413 {
		t.Errorf("of a status error: %d", got)
	}
	if got := exchange.StatusOf(errors.New("reset"), 500); got != 500 {
		t.Errorf("of another error: %d", got)
	}
	if wrapped.Error() != "read: too large" {
		t.Error(wrapped)
	}
}
