package cli_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"go.uber.org/goleak"

	"holdfast/internal/admin"
	"holdfast/internal/admin/admintest"
	"holdfast/internal/cli"
	"holdfast/internal/supervisor"
)

func TestMain(m *testing.M) {
	if !playRole() {
		goleak.VerifyTestMain(m)
	}
}

// result is what a command has done.
type result struct {
	code           int
	stdout, stderr string
}

// execute runs a command line; words in it are separated by spaces.
func execute(p *cli.Program, line string) result {
	var stdout, stderr bytes.Buffer
	code := p.Main(strings.Fields(line), &stdout, &stderr)
	return result{code, stdout.String(), stderr.String()}
}

func (got result) want(t *testing.T, code int, stdout, stderr string) {
	t.Helper()
	if want := (result{code, stdout, stderr}); got != want {
		t.Errorf("got exit code %d\n--- stdout\n%s--- stderr\n%swant %d\n--- stdout\n%s--- stderr\n%s",
			got.code, got.stdout, got.stderr, code, stdout, stderr)
	}
}

// serve has fake answer in a new runtime directory.
func serve(t *testing.T, fake *admintest.Supervisor) (dir string, end func()) {
	t.Helper()
	dir = shortDir(t)
	s := admin.New(slog.New(slog.DiscardHandler))
	if err := s.Start(dir, fake); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return dir, s.Close
}

// shortDir leaves room for a socket's name, whatever the test is called.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "hf-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

var broken = &supervisor.Refusal{Step: "configuration", Problems: []string{
	"h.toml:3: listeners[0].adress: unknown key; did you mean address?",
	"h.toml:9: clusters[0].endpoints: is empty",
}}

const usageHint = "  try: `holdfast --help`, or `holdfast COMMAND --help`\n"

func TestACommandLineThatIsNotUnderstood(t *testing.T) {
	t.Parallel()
	for line, stderr := range map[string]string{
		"relaod":                            "holdfast: there is no command \"relaod\"; did you mean reload?\n" + usageHint,
		"nonsense":                          "holdfast: there is no command \"nonsense\"\n" + usageHint,
		"run":                               "holdfast: required flag(s) \"config\" not set\n" + usageHint,
		"check":                             "holdfast: required flag(s) \"config\" not set\n" + usageHint,
		"kill":                              "holdfast: required flag(s) \"generation\" not set\n" + usageHint,
		"kill --generation x":               "holdfast: invalid argument \"x\" for \"--generation\" flag: strconv.ParseInt: parsing \"x\": invalid syntax\n" + usageHint,
		"move":                              "holdfast: required flag(s) \"generation\" not set\n" + usageHint,
		"drain --generation 3":              "holdfast: required flag(s) \"within\" not set\n" + usageHint,
		"drain --generation 3 --within -1s": "holdfast: --within takes a time from now\n" + usageHint,
		"move --generation 0":               "holdfast: there is no generation 0: the first is 1\n" + usageHint,
		"kill --generation 0":               "holdfast: there is no generation 0: the first is 1\n" + usageHint,
		"log-level":                         "holdfast: accepts 1 arg(s), received 0\n" + usageHint,
		"log-level loud":                    "holdfast: invalid argument \"loud\" for \"holdfast log-level\"\n" + usageHint,
		"profile":                           "holdfast: accepts 1 arg(s), received 0\n" + usageHint,
		"profile cpu --over 90s":            "holdfast: --over 1m30s: it takes whole seconds, from 1s to 1m\n" + usageHint,
		"profile cpu --over 1.5s":           "holdfast: --over 1.5s: it takes whole seconds, from 1s to 1m\n" + usageHint,
		"profile trace --over 0s":           "holdfast: --over 0s: it takes whole seconds, from 1s to 1m\n" + usageHint,
		"profile heap --over 5s":            "holdfast: heap is of a moment: --over is for cpu and trace\n" + usageHint,
		"profile heap --generation 0":       "holdfast: there is no generation 0: the first is 1\n" + usageHint,
		"status --yaml":                     "holdfast: unknown flag: --yaml\n" + usageHint,
		"status now":                        "holdfast: unknown command \"now\" for \"holdfast status\"\n" + usageHint,
		"ready":                             "holdfast: accepts 1 arg(s), received 0\n" + usageHint,
		"ready maybe":                       "holdfast: invalid argument \"maybe\" for \"holdfast ready\"\n" + usageHint,
		"reload --timeout forever":          "holdfast: invalid argument \"forever\" for \"--timeout\" flag: time: invalid duration \"forever\"\n" + usageHint,
	} {
		t.Run(line, func(t *testing.T) {
			execute(&cli.Program{}, line).want(t, 2, "", stderr)
		})
	}
	t.Run("no command at all shows what there is, where errors go", func(t *testing.T) {
		got := execute(&cli.Program{}, "")
		if got.code != 2 || got.stdout != "" || !strings.Contains(got.stderr, "Available Commands:") || !strings.Contains(got.stderr, "a command is missing") {
			t.Errorf("got %+v", got)
		}
	})
	t.Run("the flags in the help have words of their own", func(t *testing.T) {
		// What stands in backquotes is taken for the name of the flag's value.
		if got := execute(&cli.Program{}, "kill --help"); !strings.Contains(got.stdout, "--generation N ") {
			t.Errorf("got %s", got.stdout)
		}
	})
	t.Run("asking for help is no error", func(t *testing.T) {
		if got := execute(&cli.Program{}, "--help"); got.code != 0 || !strings.Contains(got.stdout, "Available Commands:") || got.stderr != "" {
			t.Errorf("got %+v", got)
		}
	})
}

func TestCommandsThatFindNoSupervisor(t *testing.T) {
	t.Parallel()
	dir := shortDir(t)
	for _, line := range []string{
		"reload", "status", "stop", "ready off", "kill --generation 3", "move --generation 3", "drain --generation 3 --within 1s", "rollback",
		"config", "diff", "metrics", "log-level debug", "reopen-logs", "tickets rotate", "profile heap",
	} {
		got := execute(&cli.Program{}, "--runtime-dir "+dir+" "+line)
		if got.code != 1 || got.stdout != "" || !strings.HasSuffix(got.stderr,
			": no supervisor runs with runtime directory "+dir+"\n  try: `holdfast run -c FILE` starts one; --runtime-dir DIR finds one that runs elsewhere\n") {
			t.Errorf("%s: got %+v", line, got)
		}
	}
}

func TestCommandsWhoseAnswerIsLost(t *testing.T) {
	t.Parallel()
	dir := shortDir(t)
	l, err := net.Listen("unix", filepath.Join(dir, "admin.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			conn.Read(make([]byte, 1))
			conn.Close()
		}
	}()
	for line, what := range map[string]string{
		"reload":               "the outcome of the reload is not known",
		"stop --timeout 100ms": "the service was told to stop and its end was not seen",
		"ready off":            "whether readiness was set is not known",
		"kill --generation 3":  "whether generation 3 was killed is not known",
		"move --generation 3":  "whether generation 3 moves its tunnels is not known",
		"log-level debug":      "whether the log level was set is not known",
		"tickets rotate":       "whether the keys of session tickets are rotated everywhere is not known",
		"reopen-logs":          "whether the access logs were opened again is not known",
	} {
		got := execute(&cli.Program{}, "--runtime-dir "+dir+" "+line)
		if got.code != 3 || !strings.HasPrefix(got.stderr, "holdfast: "+what+": ") || !strings.HasSuffix(got.stderr, "\n  try: `holdfast status`\n") {
			t.Errorf("%s: got %+v", line, got)
		}
	}
}

func TestReload(t *testing.T) {
	t.Parallel()
	draining := func(g ...supervisor.GenerationStatus) func(context.Context) (*supervisor.Status, error) {
		return func(context.Context) (*supervisor.Status, error) { return &supervisor.Status{Generations: g}, nil }
	}
	for name, test := range map[string]struct {
		flags  string
		result *supervisor.ReloadResult
		err    error
		status func(context.Context) (*supervisor.Status, error)
		code   int
		stdout string
		stderr string
	}{
		"the old generation keeps tunnels": {
			result: &supervisor.ReloadResult{Generation: 8, Previous: 7, Duration: 31 * time.Millisecond, Probation: "pending"},
			status: draining(supervisor.GenerationStatus{Number: 8}, supervisor.GenerationStatus{Number: 7, Tunnels: 1204, Requests: 1}),
			stdout: "generation 8 serves after 31ms, generation 7 drains 1,204 tunnels and 1 request\n",
		},
		"the old generation has nothing": {
			result: &supervisor.ReloadResult{Generation: 8, Previous: 7, Duration: time.Second, Probation: "pending"},
			status: draining(supervisor.GenerationStatus{Number: 7}),
			stdout: "generation 8 serves after 1s, generation 7 drains and has nothing left to finish\n",
		},
		"the old generation hangs": {
			result: &supervisor.ReloadResult{Generation: 8, Previous: 7, Duration: time.Second, Probation: "pending"},
			status: draining(supervisor.GenerationStatus{Number: 7, NotAnswering: true}),
			stdout: "generation 8 serves after 1s, generation 7 does not answer\n",
		},
		"the old generation has ended": {
			result: &supervisor.ReloadResult{Generation: 8, Previous: 7, Duration: time.Second, Probation: "pending"},
			stdout: "generation 8 serves after 1s, generation 7 had nothing left and has ended\n",
		},
		"what the old generation does cannot be learnt": {
			result: &supervisor.ReloadResult{Generation: 8, Previous: 7, Duration: time.Second, Probation: "pending"},
			status: func(context.Context) (*supervisor.Status, error) { return nil, supervisor.ErrStopping },
			stdout: "generation 8 serves after 1s, generation 7 drains\n",
		},
		"everything that there is to tell": {
			flags: "--wait",
			result: &supervisor.ReloadResult{
				Generation: 2, Duration: time.Second, Probation: "passed",
				Added: []string{"0.0.0.0:81", "unix:/run/a"}, Removed: []string{"0.0.0.0:80"}, Warnings: []string{"generation 1 may still accept"},
			},
			stdout: "generation 2 serves after 1s\nopened: 0.0.0.0:81, unix:/run/a\nclosed: 0.0.0.0:80\n" +
				"warning: generation 1 may still accept\nit has passed its probation\n",
		},
		"superseded": {
			flags:  "--wait",
			result: &supervisor.ReloadResult{Generation: 2, Duration: time.Second, Probation: "superseded"},
			stdout: "generation 2 serves after 1s\nits probation was not waited out: something newer took its place\n",
		},
		"crashed in probation": {
			flags:  "--wait",
			result: &supervisor.ReloadResult{Generation: 2, Duration: time.Second, Probation: "crashed"},
			code:   1,
			stderr: "holdfast: the new configuration is not in service: generation 2 crashed in its probation, and another was put in its place\n" +
				"  try: the log of the service, which says how it ended; `holdfast status` shows what serves\n",
		},
		"refused for the configuration": {
			err:  broken,
			code: 2,
			stderr: "holdfast: the reload was refused and nothing has changed (configuration)\n" +
				"h.toml:3: listeners[0].adress: unknown key; did you mean address?\nh.toml:9: clusters[0].endpoints: is empty\n",
		},
		"refused for something else": {
			err:    &supervisor.Refusal{Step: "listeners", Problems: []string{"0.0.0.0:80: address already in use"}},
			code:   1,
			stderr: "holdfast: the reload was refused and nothing has changed (listeners)\n0.0.0.0:80: address already in use\n",
		},
		"stopping": {
			err:    supervisor.ErrStopping,
			code:   1,
			stderr: "holdfast: the reload was refused and nothing has changed: the service is stopping\n",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			fake := &admintest.Supervisor{
				OnReload: func(context.Context, bool) (*supervisor.ReloadResult, error) { return test.result, test.err },
				OnStatus: test.status,
			}
			dir, _ := serve(t, fake)
			execute(&cli.Program{}, "reload --runtime-dir "+dir+" "+test.flags).want(t, test.code, test.stdout, test.stderr)
			want := "reload"
			if test.flags != "" {
				want = "reload and wait"
			}
			if calls := fake.Calls(); !slices.Equal(calls, []string{want}) {
				t.Errorf("the supervisor was told %q", calls)
			}
		})
	}
}

func TestAReloadThatTakesTooLongIsUnknown(t *testing.T) {
	t.Parallel()
	dir, _ := serve(t, &admintest.Supervisor{OnReload: func(ctx context.Context, _ bool) (*supervisor.ReloadResult, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	}})
	execute(&cli.Program{}, "reload --wait --timeout 20ms --runtime-dir "+dir).want(t, 3, "",
		"holdfast: the outcome of the reload is not known: no answer from the supervisor in time (after 20ms): unknown whether it was done\n"+
			"  try: `holdfast status`\n")
}

func TestSmallCommands(t *testing.T) {
	t.Parallel()
	reopened := false
	fake := &admintest.Supervisor{
		OnKill: func(n int) error {
			if n == 9 {
				return errors.New("no living generation 9")
			}
			return nil
		},
		OnLevel: func(level string) error {
			if level == "warn" {
				return errors.New("generation 7 hangs")
			}
			return nil
		},
		OnReopen: func() error {
			if reopened {
				return errors.New("/var/log/a: permission denied")
			}
			reopened = true
			return nil
		},
	}
	dir, _ := serve(t, fake)
	at := " --runtime-dir " + dir
	execute(&cli.Program{}, "ready off"+at).want(t, 0, "readiness is off: /readyz answers 503 until `holdfast ready on`\n", "")
	execute(&cli.Program{}, "ready on"+at).want(t, 0, "readiness is on: /readyz says whether a generation serves\n", "")
	execute(&cli.Program{}, "kill --generation 3"+at).want(t, 0, "generation 3 is killed\n", "")
	execute(&cli.Program{}, "kill --generation 9"+at).want(t, 1, "", "holdfast: generation 9 was not killed: no living generation 9\n")
	execute(&cli.Program{}, "log-level debug"+at).want(t, 0, "the log level is debug until `holdfast log-level config`\n", "")
	execute(&cli.Program{}, "log-level config"+at).want(t, 0, "the log level is that of the configuration\n", "")
	execute(&cli.Program{}, "log-level warn"+at).want(t, 1, "", "holdfast: the log level was not set everywhere: generation 7 hangs\n")
	execute(&cli.Program{}, "reopen-logs"+at).want(t, 0, "the access logs are open again\n", "")
	execute(&cli.Program{}, "reopen-logs"+at).want(t, 1, "", "holdfast: the access logs were not all opened again: /var/log/a: permission denied\n")
	if want := []string{
		"ready false", "ready true", "kill 3", "kill 9",
		"log level debug", "log level config", "log level warn", "reopen logs", "reopen logs",
	}; !slices.Equal(fake.Calls(), want) {
		t.Errorf("the supervisor was told %q, want %q", fake.Calls(), want)
	}
	if got := execute(&cli.Program{}, "version"); got.code != 0 || !strings.HasPrefix(got.stdout, "holdfast ") {
		t.Errorf("version: got %+v", got)
	}
}

func TestStopWaitsForTheEnd(t *testing.T) {
	t.Parallel()
	told := make(chan struct{}, 2)
	fake := &admintest.Supervisor{OnStop: func() { told <- struct{}{} }}
	dir, end := serve(t, fake)
	go func() {
		<-told
		<-told
		end()
	}()
	execute(&cli.Program{}, "stop --now --runtime-dir "+dir).want(t, 0, "the service has ended\n", "")
}

// Whoever is told that the service has ended finds its process gone.
func TestStopWaitsForTheEndOfTheProcess(t *testing.T) {
	t.Parallel()
	process := orphan(t, 1, "orphan")
	told := make(chan struct{})
	fake := &admintest.Supervisor{
		OnStatus: func(context.Context) (*supervisor.Status, error) { return &supervisor.Status{PID: process.PID}, nil },
		OnStop:   func() { close(told) },
	}
	dir, end := serve(t, fake)
	stopped := make(chan result, 1)
	go func() { stopped <- execute(&cli.Program{}, "stop --runtime-dir "+dir) }()
	<-told
	end()
	select {
	case got := <-stopped:
		t.Fatalf("it has not waited: %+v", got)
	case <-time.After(100 * time.Millisecond): // it has no reason to go on
	}
	if err := syscall.Kill(process.PID, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	(<-stopped).want(t, 0, "the service has ended\n", "")
}

func TestRun(t *testing.T) {
	t.Parallel()
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		err    error
		code   int
		stderr string
	}{
		"ends well":                      {nil, 0, ""},
		"is refused for its file":        {broken, 2, "holdfast: the service did not start (configuration)\n" + strings.Join(broken.Problems, "\n") + "\n"},
		"is refused for something else":  {&supervisor.Refusal{Step: "start", Problems: []string{"no such file"}}, 1, "holdfast: the service did not start (start)\nno such file\n"},
		"finds another supervisor":       {errors.New("another supervisor (pid 7) runs"), 1, "holdfast: the service did not start: another supervisor (pid 7) runs\n"},
		"may not write to its directory": {os.ErrPermission, 1, "holdfast: the service did not start: permission denied\n  try: the same as the user of the service, or as root\n"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var got []string
			p := &cli.Program{Run: func(configPath, runtimeDir string, log io.Writer) error {
				got = []string{configPath, runtimeDir}
				io.WriteString(log, "a line of the log\n")
				return test.err
			}}
			execute(p, "run -c h.toml --runtime-dir run").want(t, test.code, "", "a line of the log\n"+test.stderr)
			if want := []string{filepath.Join(here, "h.toml"), filepath.Join(here, "run")}; !slices.Equal(got, want) {
				t.Errorf("ran with %q, want %q", got, want)
			}
		})
	}
}

func TestCheck(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		err            error
		code           int
		stdout, stderr string
	}{
		"a good file":           {nil, 0, "h.toml is good\n", ""},
		"a broken file":         {broken, 2, "", "holdfast: h.toml would not start (configuration)\n" + strings.Join(broken.Problems, "\n") + "\n"},
		"no proxy to ask":       {&supervisor.Refusal{Step: "proxy binary", Problems: []string{"no such file"}}, 1, "", "holdfast: h.toml would not start (proxy binary)\nno such file\n"},
		"an error of any other": {errors.New("out of luck"), 1, "", "holdfast: h.toml would not start: out of luck\n"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := &cli.Program{Check: func(_ context.Context, path string) error {
				if path != "h.toml" {
					t.Errorf("checked %q", path)
				}
				return test.err
			}}
			execute(p, "check -c h.toml").want(t, test.code, test.stdout, test.stderr)
		})
	}
}

func TestTools(t *testing.T) {
	t.Parallel()
	p := &cli.Program{Tools: []*cobra.Command{{
		Use: "drill", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return errors.New("3 tunnels were lost") },
	}}}
	execute(p, "drill").want(t, 1, "", "holdfast: 3 tunnels were lost\n")
}

func TestStatus(t *testing.T) {
	t.Parallel()
	// Half a unit more than is shown, so that it does not change while the test runs.
	ago := func(d time.Duration) time.Time { return time.Now().Add(-d - 30*time.Second) }
	const hour, day = time.Hour, 24 * time.Hour
	quiet := supervisor.Status{
		Version: "1.2.0", PID: 4242, Started: ago(hour), ConfigPath: "/etc/holdfast/holdfast.toml", ConfigHash: "3f2a9c1b7d00", Ready: true,
	}
	busy := quiet
	busy.Started = ago(3*day + 4*hour)
	busy.FileDiffers = true
	busy.LogsDropped = 1300
	busy.Vault = supervisor.VaultStatus{Deposits: 1187, Resuming: 1, Bereft: 9000, Refused: 17, Resumed: 3, Moved: 12}
	busy.LastReload = &supervisor.LastReload{Time: ago(2 * hour), Error: "configuration: h.toml:3: a\nh.toml:4: b"}
	busy.Listeners = []supervisor.ListenerStatus{
		{Name: "public", Key: "0.0.0.0:443", Address: "0.0.0.0:443"},
		{Name: "any", Key: "any@127.0.0.1:0", Address: "127.0.0.1:40123"},
	}
	busy.Generations = []supervisor.GenerationStatus{
		{Number: 1208, State: "serving", PID: 4250, Version: "1.2.0", ConfigHash: "3f2a9c1b7d00", Started: ago(2 * hour), Requests: 12, Tunnels: 1204, Deposits: 1187, OldestTunnel: ago(hour), RSS: 38 << 20},
		{Number: 7, State: "draining", NotAnswering: true, PID: 433, Version: "1.1.10", ConfigHash: "00ff00ff0000", Started: ago(3 * day), Tunnels: 3, OldestTunnel: ago(2 * day), RSS: 900 << 10},
	}
	off := quiet
	off.Ready, off.ReadyOff, off.Reloading, off.FileError = false, true, true, "open /etc/holdfast/holdfast.toml: no such file or directory"
	crashing := quiet
	crashing.Ready, crashing.Crashes, crashing.LastCrash = false, 7, "the serving generation has died: signal: killed"
	stopping := quiet
	stopping.Ready, stopping.Stopping, stopping.ConfigHash = false, true, ""

	for name, test := range map[string]struct {
		status supervisor.Status
		want   string
	}{
		"much to tell": {busy, `holdfast 1.2.0, pid 4242, up 3d 4h

configuration  /etc/holdfast/holdfast.toml (3f2a9c1b)
               the file on disk differs from what runs: ` + "`holdfast diff`" + ` says how, ` + "`holdfast reload`" + ` puts it into service
ready          yes
last reload    2h 0m ago: refused: configuration: h.toml:3: a
               h.toml:4: b
listeners      public on 0.0.0.0:443
               any on 127.0.0.1:40123
vault          9,000 tunnels of 1 dead generation to be resumed
               17 deposits found no room so far: the supervisor has too few descriptors
log            1,300 lines dropped: the reader of the log is gone or too slow, or its disk is full

GENERATION  STATE                    VERSION  CONFIG     PID    AGE  REQUESTS  TUNNELS  DEPOSITED  OLDEST      RSS
1208        serving                  1.2.0    3f2a9c1b  4250  2h 0m        12    1,204      1,187   1h 0m   38 MiB
7           draining, not answering  1.1.10   00ff00ff   433  3d 0h         0        3          0   2d 0h  900 KiB

generation 7 does not answer; its figures are the last ones.
` + "`holdfast kill --generation 7`" + ` ends it: its requests are cut, and another process goes on with its deposited tunnels.
`},
		"turned off, with a file that cannot be read": {off, `holdfast 1.2.0, pid 4242, up 1h 0m

configuration  /etc/holdfast/holdfast.toml (3f2a9c1b)
               the file on disk cannot be read: open /etc/holdfast/holdfast.toml: no such file or directory
ready          no: turned off; ` + "`holdfast ready on`" + ` turns it on
last reload    running

GENERATION  STATE  VERSION  CONFIG  PID  AGE  REQUESTS  TUNNELS  DEPOSITED  OLDEST  RSS
`},
		"nothing serves because it crashes": {crashing, `holdfast 1.2.0, pid 4242, up 1h 0m

configuration  /etc/holdfast/holdfast.toml (3f2a9c1b)
ready          no: crashed
last reload    none
crashes        7 in a row; the last: the serving generation has died: signal: killed

GENERATION  STATE  VERSION  CONFIG  PID  AGE  REQUESTS  TUNNELS  DEPOSITED  OLDEST  RSS
`},
		"stopping": {stopping, `holdfast 1.2.0, pid 4242, up 1h 0m

configuration  /etc/holdfast/holdfast.toml (-)
ready          no: stopping
last reload    none

GENERATION  STATE  VERSION  CONFIG  PID  AGE  REQUESTS  TUNNELS  DEPOSITED  OLDEST  RSS
`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir, _ := serve(t, &admintest.Supervisor{OnStatus: func(context.Context) (*supervisor.Status, error) { return &test.status, nil }})
			execute(&cli.Program{}, "status --runtime-dir "+dir).want(t, 0, test.want, "")
			var decoded supervisor.Status
			got := execute(&cli.Program{}, "status --json --runtime-dir "+dir)
			if err := json.Unmarshal([]byte(got.stdout), &decoded); err != nil || decoded.ConfigPath != test.status.ConfigPath || got.code != 0 {
				t.Errorf("--json: got %+v (%v)", got, err)
			}
		})
	}
}
