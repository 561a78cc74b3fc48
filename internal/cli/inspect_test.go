package cli_test

// What shows the insides: config, diff, metrics and profile.

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"

	"holdfast/internal/admin/admintest"
	"holdfast/internal/cli"
	"holdfast/internal/supervisor"
)

const (
	running = "[log]\nlevel = \"info\"\n"
	edited  = "[log]\nlevel = \"debug\"\n"
)

// configured serves one configuration, and has another in its file.
func configured(t *testing.T, serves, file string, err error) (at string) {
	t.Helper()
	dir, _ := serve(t, &admintest.Supervisor{OnConfig: func(f bool) (string, error) {
		if f {
			return file, err
		}
		return serves, nil
	}})
	return " --runtime-dir " + dir
}

func TestConfig(t *testing.T) {
	t.Parallel()
	at := configured(t, running, edited, nil)
	execute(&cli.Program{}, "config"+at).want(t, 0, running, "")
	execute(&cli.Program{}, "config --file"+at).want(t, 0, edited, "")

	at = configured(t, running, "", broken)
	execute(&cli.Program{}, "config"+at).want(t, 0, running, "")
	execute(&cli.Program{}, "config --file"+at).want(t, 2, "",
		"holdfast: nothing can be shown (configuration)\n"+strings.Join(broken.Problems, "\n")+"\n")
}

func TestDiff(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		flags          string
		serves, file   string
		err            error
		code           int
		stdout, stderr string
	}{
		"nothing differs":                 {serves: running, file: running, stdout: "nothing differs in what is configured\n"},
		"nothing differs, for a script":   {flags: " --exit-code", serves: running, file: running, stdout: "nothing differs in what is configured\n"},
		"something differs":               {serves: running, file: edited, stdout: "log.level is now \"debug\", was \"info\"\n"},
		"something differs, for a script": {flags: " --exit-code", serves: running, file: edited, code: 4, stdout: "log.level is now \"debug\", was \"info\"\n"},
		"the file is refused":             {flags: " --exit-code", serves: running, err: broken, code: 2, stderr: "holdfast: nothing can be compared (configuration)\n" + strings.Join(broken.Problems, "\n") + "\n"},
		"the file cannot be read":         {serves: running, err: &supervisor.Refusal{Step: "proxy binary", Problems: []string{"no such file"}}, code: 1, stderr: "holdfast: nothing can be compared (proxy binary)\nno such file\n"},
		"the supervisor is stopping":      {serves: running, err: supervisor.ErrStopping, code: 1, stderr: "holdfast: nothing can be compared: the service is stopping\n"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			at := configured(t, test.serves, test.file, test.err)
			execute(&cli.Program{}, "diff"+test.flags+at).want(t, test.code, test.stdout, test.stderr)
		})
	}
}

func TestMetrics(t *testing.T) {
	t.Parallel()
	dir, _ := serve(t, &admintest.Supervisor{OnMetrics: func(context.Context) ([]*dto.MetricFamily, error) {
		return []*dto.MetricFamily{{
			Name: new("holdfast_reloads_total"), Help: new("Reloads."), Type: dto.MetricType_COUNTER.Enum(),
			Metric: []*dto.Metric{{Counter: &dto.Counter{Value: new(3.0)}}},
		}}, nil
	}})
	got := execute(&cli.Program{}, "metrics --runtime-dir "+dir)
	if got.code != 0 || !strings.Contains(got.stdout, "\nholdfast_reloads_total 3\n") || got.stderr != "" {
		t.Errorf("got %+v", got)
	}
}

func TestProfile(t *testing.T) {
	t.Parallel()
	dir, _ := serve(t, &admintest.Supervisor{OnProfile: func(_ context.Context, generation int, name string, over time.Duration) ([]byte, error) {
		if generation == 9 {
			return nil, errors.New("no living generation 9")
		}
		return fmt.Appendf(nil, "\x00%s of %d over %s", name, generation, over), nil
	}})
	at := " --runtime-dir " + dir
	execute(&cli.Program{}, "profile heap --generation 7"+at).want(t, 0, "\x00heap of 7 over 0s", "")
	execute(&cli.Program{}, "profile cpu --generation 7"+at).want(t, 0, "\x00cpu of 7 over 10s", "")
	execute(&cli.Program{}, "profile trace --generation 7 --over 1m"+at).want(t, 0, "\x00trace of 7 over 1m0s", "")
	execute(&cli.Program{}, "profile heap --generation 9"+at).want(t, 1, "", "holdfast: nothing was written: no living generation 9\n")
	execute(&cli.Program{}, "profile none"+at).want(t, 1, "", "holdfast: nothing was written: Unknown profile\n")
	if got := execute(&cli.Program{}, "profile heap"+at); got.code != 0 || !strings.HasPrefix(got.stdout, "\x1f\x8b") {
		t.Errorf("of the supervisor: got %+v", got)
	}
}

func TestAProfileIsWrittenWhenItIsThere(t *testing.T) {
	t.Parallel()
	dir, _ := serve(t, &admintest.Supervisor{OnProfile: func(_ context.Context, generation int, name string, _ time.Duration) ([]byte, error) {
		if generation == 9 {
			return nil, errors.New("no living generation 9")
		}
		return []byte(name), nil
	}})
	out := filepath.Join(dir, "out")
	at := " --runtime-dir " + dir + " -o " + out
	execute(&cli.Program{}, "profile cpu --generation 7"+at).want(t, 0, out+" is written: `go tool pprof "+out+"` reads it\n", "")
	execute(&cli.Program{}, "profile trace --generation 7"+at).want(t, 0, out+" is written: `go tool trace "+out+"` reads it\n", "")
	execute(&cli.Program{}, "profile heap --generation 9"+at).want(t, 1, "", "holdfast: nothing was written: no living generation 9\n")
	if data, err := os.ReadFile(out); err != nil || string(data) != "trace" {
		t.Errorf("the file has %q (%v), although the last profile failed", data, err)
	}
}

func TestNoProfileGoesToATerminal(t *testing.T) {
	t.Parallel()
	terminal, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Skip("no terminal can be made here:", err)
	}
	defer terminal.Close()
	asked := false
	dir, _ := serve(t, &admintest.Supervisor{OnProfile: func(context.Context, int, string, time.Duration) ([]byte, error) {
		asked = true
		return nil, nil
	}})
	var stderr strings.Builder
	line := strings.Fields("profile heap --generation 7 --runtime-dir " + dir)
	if code := new(cli.Program).Main(line, terminal, &stderr); code != 2 || asked || !strings.Contains(stderr.String(), "-o FILE") {
		t.Errorf("got %d, asked %t, %q", code, asked, stderr.String())
	}
	line = append(line, "-o", filepath.Join(dir, "out"))
	if code := new(cli.Program).Main(line, terminal, io.Discard); code != 0 || !asked {
		t.Errorf("with -o: got %d, asked %t", code, asked)
	}
}
