package cli_test

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"

	"holdfast/internal/admin/admintest"
	"holdfast/internal/cli"
	"holdfast/internal/supervisor"
)

// left answers with a status in which generation 7 has one number of tunnels after the
// other, and in the end has ended.
func left(tunnels ...int) func(context.Context) (*supervisor.Status, error) {
	var asked atomic.Int32
	return func(context.Context) (*supervisor.Status, error) {
		status := &supervisor.Status{Generations: []supervisor.GenerationStatus{{Number: 8, Tunnels: 99}}}
		if n := int(asked.Add(1)) - 1; n < len(tunnels) {
			status.Generations = append(status.Generations, supervisor.GenerationStatus{Number: 7, Tunnels: tunnels[n]})
		}
		return status, nil
	}
}

func TestMove(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		flags  string
		err    error
		status func(context.Context) (*supervisor.Status, error)
		code   int
		stdout string
		stderr string
	}{
		"it has begun":                      {status: left(1204), stdout: "generation 7 moves its tunnels; it has 1,204 left\n"},
		"it is done already":                {status: left(0), stdout: "generation 7 has no tunnels left\n"},
		"the generation has ended":          {status: left(), stdout: "generation 7 has no tunnels left\n"},
		"how far it is cannot be learnt":    {status: silent, stdout: "generation 7 moves its tunnels\n"},
		"waited for until none is left":     {flags: " --wait", status: left(5000, 16, 0, 0), stdout: "generation 7 has no tunnels left\n"},
		"waited for until the process ends": {flags: " --wait", status: left(1), stdout: "generation 7 has no tunnels left\n"},
		"waited for, and nothing is heard of it": {flags: " --wait", status: silent, code: 3,
			stderr: "holdfast: how many tunnels generation 7 has left is not known: the service is stopping\n  try: `holdfast status`\n"},
		"refused": {err: errors.New("generation 7 serves: tunnels are moved from one that drains"), code: 1,
			stderr: "holdfast: generation 7 moves no tunnels: generation 7 serves: tunnels are moved from one that drains\n"},
		"told, and not answered": {err: fmt.Errorf("%w: generation 7: no answer to move within 5s", supervisor.ErrUnanswered), code: 3,
			stderr: "holdfast: whether generation 7 moves its tunnels is not known: it may do so yet: generation 7: no answer to move within 5s (unknown whether it was done)\n  try: `holdfast status`\n"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir, _ := serve(t, &admintest.Supervisor{OnMove: func(int) error { return test.err }, OnStatus: test.status})
			execute(&cli.Program{}, "move --generation 7"+test.flags+" --runtime-dir "+dir).want(t, test.code, test.stdout, test.stderr)
		})
	}
}

func silent(context.Context) (*supervisor.Status, error) { return nil, supervisor.ErrStopping }

// What cannot be moved stays, and the waiting for it ends.
func TestAMoveThatTakesTooLongGoesOn(t *testing.T) {
	t.Parallel()
	fake := &admintest.Supervisor{OnStatus: func(context.Context) (*supervisor.Status, error) {
		return &supervisor.Status{Generations: []supervisor.GenerationStatus{{Number: 7, Tunnels: 12}}}, nil
	}}
	dir, _ := serve(t, fake)
	execute(&cli.Program{}, "move --generation 7 --wait --timeout 500ms --runtime-dir "+dir).want(t, 3, "",
		"holdfast: generation 7 has 12 tunnels left, and goes on to move what can be moved: after 500ms\n  try: `holdfast status`\n")
	if calls := fake.Calls(); len(calls) != 1 || calls[0] != "move 7" {
		t.Errorf("the supervisor was told %q", calls)
	}
}
