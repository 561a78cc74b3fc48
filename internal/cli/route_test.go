package cli_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"holdfast/internal/cli"
	"holdfast/internal/control"
	"holdfast/internal/supervisor"
)

// routes is a program that answers every question so, and notes it.
func routes(a control.RouteAnswer, err error, asked *control.RouteQuestion) *cli.Program {
	return &cli.Program{Route: func(_ context.Context, path string, q *control.RouteQuestion) (*control.RouteAnswer, error) {
		*asked = *q
		if path != "h.toml" {
			return nil, fmt.Errorf("asked for %s", path)
		}
		return &a, err
	}}
}

func TestRoute(t *testing.T) {
	t.Parallel()
	tests := filepath.Join(t.TempDir(), "tests.toml")
	if err := os.WriteFile(tests, []byte("content"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		line           string
		answer         control.RouteAnswer
		err            error
		code           int
		stdout, stderr string
		asked          control.RouteQuestion
	}{
		"a request": {
			line: "route -c h.toml GET /x -H A:1 -H B:2,3 --listener l --client ::1 --upgrade websocket --json", answer: control.RouteAnswer{Text: "text\n"}, stdout: "text\n",
			asked: control.RouteQuestion{Method: "GET", URL: "/x", Headers: []string{"A:1", "B:2,3"}, Listener: "l", Client: "::1", Upgrade: "websocket", JSON: true},
		},
		"a request that cannot be": {
			line: "route -c h.toml GET x", answer: control.RouteAnswer{Wrong: []string{"no URL"}}, code: 2, stderr: "holdfast: no URL\n" + usageHint,
			asked: control.RouteQuestion{Method: "GET", URL: "x"},
		},
		"a configuration with mistakes": {
			line: "route -c h.toml GET /", err: broken, code: 2,
			stderr: "holdfast: nothing can be said about the routes of h.toml (configuration)\n" + broken.Problems[0] + "\n" + broken.Problems[1] + "\n",
			asked:  control.RouteQuestion{Method: "GET", URL: "/"},
		},
		"a proxy that does not answer": {
			line: "route -c h.toml GET /", err: &supervisor.Refusal{Step: "proxy binary", Problems: []string{"too old"}}, code: 1,
			stderr: "holdfast: nothing can be said about the routes of h.toml (proxy binary)\ntoo old\n",
			asked:  control.RouteQuestion{Method: "GET", URL: "/"},
		},
		"expectations that are met": {
			line: "route -c h.toml --test " + tests, answer: control.RouteAnswer{Text: "2 of 2\n"}, stdout: "2 of 2\n",
			asked: control.RouteQuestion{Path: tests, Tests: []byte("content")},
		},
		"one that is not": {
			line: "route -c h.toml --test " + tests, answer: control.RouteAnswer{Text: "1 of 2\n", Unmet: 1}, code: 1, stdout: "1 of 2\n", stderr: "holdfast: an expectation is not met\n",
			asked: control.RouteQuestion{Path: tests, Tests: []byte("content")},
		},
		"a file of expectations with mistakes": {
			line: "route -c h.toml --test " + tests, answer: control.RouteAnswer{Wrong: []string{"f:1: a", "f:2: b"}}, code: 2, stderr: "holdfast: nothing was tried (configuration)\nf:1: a\nf:2: b\n",
			asked: control.RouteQuestion{Path: tests, Tests: []byte("content")},
		},
		"a file of expectations that is not there": {
			line: "route -c h.toml --test /nowhere/x", code: 2, stderr: "holdfast: nothing was tried: open /nowhere/x: no such file or directory\n" + usageHint,
		},
		"no URL":                 {line: "route -c h.toml GET", code: 2, stderr: "holdfast: a method and a URL are needed, or --test FILE\n" + usageHint},
		"both":                   {line: "route -c h.toml GET / --test x", code: 2, stderr: "holdfast: with --test requests stand in the file\n" + usageHint},
		"a header beside a file": {line: "route -c h.toml --test x -H A:1", code: 2, stderr: "holdfast: with --test all that belongs to a request stands in the file\n" + usageHint},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var asked control.RouteQuestion
			execute(routes(tt.answer, tt.err, &asked), tt.line).want(t, tt.code, tt.stdout, tt.stderr)
			if asked.Method != tt.asked.Method || asked.URL != tt.asked.URL || !slices.Equal(asked.Headers, tt.asked.Headers) || asked.Listener != tt.asked.Listener ||
				asked.Client != tt.asked.Client || asked.Upgrade != tt.asked.Upgrade || asked.JSON != tt.asked.JSON || asked.Path != tt.asked.Path || string(asked.Tests) != string(tt.asked.Tests) {
				t.Errorf("asked %+v, want %+v", asked, tt.asked)
			}
		})
	}
}
