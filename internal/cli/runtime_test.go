package cli_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"

	"holdfast/internal/admin/admintest"
	"holdfast/internal/cli"
	"holdfast/internal/supervisor"
)

func TestRuntime(t *testing.T) {
	t.Parallel()
	three, ten := 3.0, 10.5
	all := &supervisor.Runtime{
		File: "/etc/holdfast/runtime.toml", FileError: "line 1: no number",
		Values: []supervisor.RuntimeValue{
			{Key: "site.green", Unit: "count", Configured: []float64{5, 1000000}, Effective: []float64{3}, File: &three, Places: []string{"routes[0]", "routes[1]"}},
			{Key: "site.share", Unit: "percent", Configured: []float64{0.25}, Effective: []float64{10.5}, Command: &ten, File: &three},
			{Key: "unheard", Command: &ten},
		},
		Warnings: []string{"no generation knows unheard: it holds for those to come"},
	}
	for name, test := range map[string]struct {
		shown  *supervisor.Runtime
		stdout string
	}{
		"nothing": {&supervisor.Runtime{}, "there are no runtime keys\n"},
		"all that there can be": {all, `KEY         CONFIGURED  FILE  SET   EFFECTIVE  UNIT     WHERE
site.green  5, 1000000  3     -     3          count    routes[0]
                                                        routes[1]
site.share  0.25        3     10.5  10.5       percent
unheard     -           -     10.5  -          -        no generation knows it

no generation knows unheard: it holds for those to come
the file is /etc/holdfast/runtime.toml
what the file says now is of no use, so what it said before holds: line 1: no number
`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir, _ := serve(t, &admintest.Supervisor{OnRuntime: func() (*supervisor.Runtime, error) { return test.shown, nil }})
			execute(&cli.Program{}, "runtime --runtime-dir "+dir).want(t, 0, test.stdout, "")
		})
	}
}

func TestRuntimeSetAndReset(t *testing.T) {
	t.Parallel()
	refusal := &supervisor.Refusal{Step: "runtime values", Problems: []string{"a: 7 is out of range: from 0 to 5"}}
	silent := fmt.Errorf("generation 3 has not confirmed it: %w", supervisor.ErrUnanswered)
	for name, test := range map[string]struct {
		args           string
		result         supervisor.OverrideResult
		err            error
		code           int
		stdout, stderr string
		told           string
	}{
		"one": {args: "set a 7", stdout: "a is 7 until `holdfast runtime reset a`\n", told: "set map[a:7]"},
		"several": {args: "set b 0.25 a 1e6", told: "set map[a:1e+06 b:0.25]",
			stdout: "b is 0.25 until `holdfast runtime reset b`\na is 1000000 until `holdfast runtime reset a`\n"},
		"with a warning": {args: "set a 7", result: supervisor.OverrideResult{Warnings: []string{"no generation knows a"}},
			stdout: "a is 7 until `holdfast runtime reset a`\n", stderr: "holdfast: no generation knows a\n", told: "set map[a:7]"},
		"refused": {args: "set a 7", err: refusal, code: 1, told: "set map[a:7]",
			stderr: "holdfast: no runtime value was set (runtime values)\na: 7 is out of range: from 0 to 5\n"},
		"not confirmed": {args: "set a 7", err: silent, code: 3, told: "set map[a:7]",
			stderr: "holdfast: whether the runtime values hold everywhere is not known: generation 3 has not confirmed it: it may do so yet (unknown whether it was done)\n  try: `holdfast status`\n"},
		"one is reset":     {args: "reset a", result: supervisor.OverrideResult{Reset: []string{"a"}}, stdout: "no longer set by command: a\n", told: "reset a"},
		"all are reset":    {args: "reset", result: supervisor.OverrideResult{Reset: []string{"a", "b"}}, stdout: "no longer set by command: a, b\n", told: "reset "},
		"nothing is reset": {args: "reset", stdout: "no runtime value was set by command\n", told: "reset "},
		"the file remains": {args: "reset a", result: supervisor.OverrideResult{Reset: []string{"a"}, Warnings: []string{"a is 3 now, as /f says"}},
			stdout: "no longer set by command: a\n", stderr: "holdfast: a is 3 now, as /f says\n", told: "reset a"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			fake := &admintest.Supervisor{
				OnSet:   func(map[string]float64) (*supervisor.OverrideResult, error) { return &test.result, test.err },
				OnReset: func(string) (*supervisor.OverrideResult, error) { return &test.result, test.err },
			}
			dir, _ := serve(t, fake)
			execute(&cli.Program{}, "runtime "+test.args+" --runtime-dir "+dir).want(t, test.code, test.stdout, test.stderr)
			if calls := fake.Calls(); !slices.Equal(calls, []string{test.told}) {
				t.Errorf("the supervisor was told %q", calls)
			}
		})
	}
}

func TestTheStatusSaysWhatIsOverridden(t *testing.T) {
	t.Parallel()
	for want, o := range map[string]supervisor.Overridden{
		"":                                {},
		"1 key overridden (1 by command)": {ByCommand: 1},
		"5 keys overridden (2 by command, 3 by the file)": {ByCommand: 2, ByFile: 3},
		"what the file says is of no use: line 1":         {FileError: "line 1"},
	} {
		dir, _ := serve(t, &admintest.Supervisor{OnStatus: func(context.Context) (*supervisor.Status, error) {
			return &supervisor.Status{Ready: true, Overridden: o}, nil
		}})
		done := execute(&cli.Program{}, "status --runtime-dir "+dir)
		_, line, there := strings.Cut(done.stdout, "runtime        ")
		if there != (want != "") || !strings.HasPrefix(line, want) {
			t.Errorf("%+v: got\n%s", o, done.stdout)
		}
	}
}
