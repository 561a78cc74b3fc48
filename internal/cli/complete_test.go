package cli_test

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"

	"holdfast/internal/admin/admintest"
	"holdfast/internal/cli"
	"holdfast/internal/supervisor"
)

// completed is what a shell is told, word by word, and how it is to go on.
func completed(args ...string) string {
	var stdout, stderr bytes.Buffer
	(&cli.Program{}).Main(append([]string{"__complete"}, args...), &stdout, &stderr)
	return strings.ReplaceAll(strings.TrimSpace(stdout.String()), "\n", " | ")
}

func TestWhatAShellCompletes(t *testing.T) {
	t.Parallel()
	clusters := &supervisor.Clusters{Clusters: []supervisor.Cluster{{Name: "chat"}, {Name: "web"}}}
	dir, end := serve(t, &admintest.Supervisor{
		OnStatus: func(context.Context) (*supervisor.Status, error) {
			return &supervisor.Status{Generations: []supervisor.GenerationStatus{{Number: 9, State: "serving", Tunnels: 2}, {Number: 7, State: "draining", Tunnels: 1}}}, nil
		},
		OnShow: func(string) (*supervisor.Clusters, error) { return clusters, nil },
		OnRuntime: func() (*supervisor.Runtime, error) {
			return &supervisor.Runtime{Values: []supervisor.RuntimeValue{{Key: "a.weight"}, {Key: "b.weight"}}}, nil
		},
	})
	defer end()
	const nothing, file = ":4", ":0"
	for line, want := range map[string]string{
		"kill --generation=":             "9\tserving, 2 tunnels | 7\tdraining, 1 tunnel | :36",
		"move --generation ":             "9\tserving, 2 tunnels | 7\tdraining, 1 tunnel | :36",
		"clusters ":                      "chat | web | " + nothing,
		"clusters c":                     "chat | web | " + nothing, // shells choose by what is typed
		"clusters chat ":                 nothing,
		"runtime set ":                   "a.weight | b.weight | " + nothing,
		"runtime set a.weight ":          nothing,
		"runtime set a.weight 1 ":        "a.weight | b.weight | " + nothing,
		"runtime reset ":                 "a.weight | b.weight | " + nothing,
		"runtime reset a.weight x ":      nothing,
		"ready o":                        "on | off | " + nothing,
		"reload ":                        nothing,
		"check --config ":                "toml | :8",
		"route -c holdfast.toml --test ": file,
		"rel":                            "reload\tPut the configuration file, as it is now, into service | " + nothing,
	} {
		args := append([]string{"--runtime-dir", dir}, strings.Split(line, " ")...)
		if got := completed(args...); got != want {
			t.Errorf("%q:\n got %q\nwant %q", line, got, want)
		}
	}
}

func TestNothingIsCompletedWhereNobodyAnswers(t *testing.T) {
	t.Parallel()
	refused := errors.New("no")
	dir, end := serve(t, &admintest.Supervisor{OnShow: func(string) (*supervisor.Clusters, error) { return nil, refused }})
	defer end()
	for _, dir := range []string{dir, t.TempDir()} {
		if got, want := completed("--runtime-dir", dir, "clusters", ""), ":4"; got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	if got, want := completed("--runtime-dir", t.TempDir(), "kill", "--generation", ""), ":36"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}
