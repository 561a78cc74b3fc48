package flags_test

import (
	"strings"
	"testing"

	"holdfast/internal/accesslog/flags"
)

func TestEveryFlagHasANameOfItsOwn(t *testing.T) {
	t.Parallel()
	var all flags.Set
	seen := map[string]bool{}
	for i, f := range flags.All {
		if f.Flag != 1<<i || all&f.Flag != 0 {
			t.Errorf("flag %s is %b, in place %d", f.Name, f.Flag, i)
		}
		if f.Name == "" || strings.ToUpper(f.Name) != f.Name || seen[f.Name] || f.Meaning == "" {
			t.Errorf("flag %d is called %q and means %q", i, f.Name, f.Meaning)
		}
		if parsed, ok := flags.Parse(f.Name); !ok || parsed != f.Flag || f.Flag.String() != f.Name {
			t.Errorf("%s is read as %v, %v, and written as %s", f.Name, parsed, ok, f.Flag)
		}
		seen[f.Name] = true
		all |= f.Flag
	}
	if all != flags.Known {
		t.Errorf("%b have a name, %b are known", all, flags.Known)
	}
}

func TestASetIsWrittenInItsOrder(t *testing.T) { // not parallel: it counts allocations
	for want, s := range map[string]flags.Set{
		"":          0,
		"UH":        flags.NoHealthyUpstream,
		"UF,URX,DI": flags.DelayInjected | flags.UpstreamFailure | flags.RetryLimit,
		"UMSDR":     flags.MaxUpstreamDurationReached | (flags.Known + 1), // no flag
	} {
		if s.String() != want {
			t.Errorf("%b is written as %q, want %q", s, s, want)
		}
	}
	if n := testing.AllocsPerRun(10, func() { flags.Known.Append(make([]byte, 0, 256)) }); n > 0 {
		t.Errorf("%v allocations", n)
	}
}

func TestNamesOfNoFlag(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"", "uh", "UH,", "XX", "UH UF"} {
		if s, ok := flags.Parse(name); ok {
			t.Errorf("%q is %b", name, s)
		}
	}
}
