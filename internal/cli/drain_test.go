package cli_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"holdfast/internal/admin/admintest"
	"holdfast/internal/cli"
	"holdfast/internal/supervisor"
)

func TestDrain(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		flags  string
		err    error
		status func(context.Context) (*supervisor.Status, error)
		code   int
		stdout string
		stderr string
	}{
		"it has begun":         {status: left(1204), stdout: "generation 7 closes what it has within 10m0s; it has 1,204 tunnels and 0 requests\n"},
		"it has ended already": {status: left(), stdout: "generation 7 closes what it has within 10m0s; it has nothing left\n"},
		"waited for":           {flags: " --wait", status: left(5000, 16, 0), stdout: "generation 7 has ended\n"},
		"waited for, and nothing is heard of it": {flags: " --wait", status: silent, code: 3,
			stderr: "holdfast: what generation 7 has left is not known: the service is stopping\n  try: `holdfast status`\n"},
		"refused": {err: errors.New("generation 7 serves"), code: 1,
			stderr: "holdfast: generation 7 goes on to drain as it did: generation 7 serves\n"},
		"told, and not answered": {err: fmt.Errorf("%w: no answer", supervisor.ErrUnanswered), code: 3,
			stderr: "holdfast: whether generation 7 was told is not known: it may do so yet: no answer (unknown whether it was done)\n  try: `holdfast status`\n"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir, _ := serve(t, &admintest.Supervisor{OnClear: func(int, time.Duration) error { return test.err }, OnStatus: test.status})
			execute(&cli.Program{}, "drain --generation 7 --within 10m"+test.flags+" --runtime-dir "+dir).want(t, test.code, test.stdout, test.stderr)
		})
	}
}
