// Package walls holds rules of the code base that the compiler does not know.
package walls

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

type pkg struct {
	ImportPath string
	Doc        string
	Imports    []string
	Deps       []string // all, also indirect ones
	GoFiles    []string
}

func packages(t *testing.T) map[string]pkg {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,Doc,Imports,Deps,GoFiles", "holdfast/...")
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	all := map[string]pkg{}
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all[strings.TrimPrefix(p.ImportPath, "holdfast/")] = p
	}
}

// A wall says which packages must not be reached from a package, and why.
var wallsOf = []struct{ from, to, why string }{
	{"internal/supervisor", "net/http", "the process that stays is small and dull; HTTP is the admin package's"},
	{"internal/supervisor", "holdfast/internal/proxy", "the two sides meet in config, control, logs, metrics and version alone"},
	{"internal/supervisor", "holdfast/internal/http1", "the supervisor touches no byte of a client"},
	{"internal/supervisor", "holdfast/internal/tunnel", "the supervisor touches no byte of a client"},
	{"internal/supervisor", "holdfast/internal/exchange", "the supervisor touches no byte of a client"},
	{"internal/supervisor", "holdfast/internal/admin", "commands reach the supervisor, not the other way round"},
	{"cmd/proxy", "holdfast/internal/supervisor", "the two sides meet in config, control, logs, metrics and version alone"},
	{"cmd/proxy", "holdfast/internal/socket", "a generation opens no listening socket"},
	{"cmd/proxy", "holdfast/internal/admin", "a generation is commanded over its control channel only"},
	{"internal/http1", "net/http", "the codec is our own: net/http repairs what must be refused"},
	{"internal/route", "net/http", "what is decided of a request does not depend on who has read it"},
	{"internal/service", "holdfast/internal/demo", "what serves does not carry a demonstration"},
	{"internal/service", "holdfast/internal/cli", "the commands call the service, not the other way round"},
	{"internal/exchange", "holdfast/internal/http1", "the exchange knows no protocol"},
	{"internal/route", "holdfast/internal/upstream", "routing is a pure function over a table"},
	{"internal/route", "holdfast/internal/exchange", "routing is a pure function over a table"},
	{"internal/headers", "holdfast/internal/exchange", "the configuration reads it, on both sides"},
	{"internal/routecheck", "holdfast/internal/upstream", "it explains a table, and asks nobody"},
	{"internal/tunnel", "holdfast/internal/http1", "a tunnel is bytes"},
	{"internal/tunnel", "holdfast/internal/config", "a tunnel is told its limits"},
	{"cmd/proxy", "holdfast/internal/runtimedir", "what a generation needs of the runtime directory it is told"},
	{"cmd/proxy", "holdfast/internal/pidfd", "a generation is concerned with no other process"},
	{"internal/service", "holdfast/internal/drill", "what serves does not carry a drill"},
	{"cmd/proxy", "holdfast/internal/metrics/merge", "a generation counts; the supervisor adds up"},
	{"cmd/proxy", "google.golang.org/protobuf/proto", "what is exposed to Prometheus is the supervisor's business"},
	{"cmd/proxy", "holdfast/internal/systemd", "only the supervisor speaks to the service manager"},
	{"internal/supervisor", "holdfast/internal/systemd", "the supervisor runs without systemd as well"},
	{"internal/tunnel", "holdfast/internal/accesslog", "a tunnel is bytes"},
	{"internal/poller", "holdfast/internal/tunnel", "a loop does not know what it runs"},
	{"internal/poller", "holdfast/internal/metrics", "a loop does not know what it runs"},
	{"internal/tunnel/inflight", "holdfast/internal/tunnel", "what is in flight is bytes and numbers"},
	{"internal/tunnel/inflight", "holdfast/internal/poller", "another process reads it, which has no loop"},
	{"internal/supervisor", "holdfast/internal/poller", "the supervisor has no loops"},
	{"internal/http1", "holdfast/internal/accesslog", "a codec tells what happens; who writes it down is not its business"},
}

func TestNobodyClimbsOverAWall(t *testing.T) {
	all := packages(t)
	for _, w := range wallsOf {
		p, ok := all[w.from]
		if !ok {
			t.Errorf("a rule is about %s, which is not there", w.from)
			continue
		}
		for _, d := range p.Deps {
			if d == w.to {
				t.Errorf("%s reaches %s: %s", w.from, w.to, w.why)
			}
		}
	}
}

// What stands at the bottom, and what each may stand on.
var bottom = map[string]struct {
	on  []string
	why string
}{
	"internal/control":    {nil, "both sides speak it, of whatever build they are"},
	"internal/pidfd":      {nil, "a process is a process"},
	"internal/runtimedir": {[]string{"holdfast/internal/pidfd"}, "supervisors and commands meet there, of whatever build they are"},
	"internal/fence":      {[]string{"holdfast/internal/control"}, "it decides and does nothing"},
	"internal/ledger":     {nil, "it is bytes in a memory file"},
	"internal/filewatch":  {nil, "it is paths and times"},
	"internal/tickets":    {nil, "it is keys and times"},
	"internal/vault":      {[]string{"holdfast/internal/control", "holdfast/internal/scavenge"}, "it knows channels and descriptors, no processes and no tunnels"},
}

func TestWhatStandsAtTheBottomStandsOnLittle(t *testing.T) {
	all := packages(t)
	for from, may := range bottom {
		p, ok := all[from]
		if !ok {
			t.Errorf("a rule is about %s, which is not there", from)
		}
		for _, d := range p.Deps {
			if strings.HasPrefix(d, "holdfast/") && !slices.Contains(may.on, d) {
				t.Errorf("%s reaches %s: %s", from, d, may.why)
			}
		}
	}
}

// What both sides may share.
var shared = map[string]bool{
	"holdfast/internal/config": true, "holdfast/internal/control": true, "holdfast/internal/logs": true, "holdfast/internal/metrics": true, "holdfast/internal/scavenge": true,
	"holdfast/internal/dynamic": true, "holdfast/internal/headers": true, "holdfast/internal/version": true, "holdfast/internal/accesslog/flags": true, "holdfast/internal/accesslog/format": true,
	"holdfast/internal/urlpath": true, "holdfast/internal/filewatch": true,
}

func TestTheTwoSidesMeetOnlyWhereTheyMay(t *testing.T) {
	all := packages(t)
	ofSupervisor := map[string]bool{}
	for _, d := range all["cmd/supervisor"].Deps {
		ofSupervisor[d] = strings.HasPrefix(d, "holdfast/")
	}
	for _, d := range all["cmd/proxy"].Deps {
		if ofSupervisor[d] && !shared[d] {
			t.Errorf("both programs contain %s", d)
		}
	}
}

func TestEveryPackageSaysWhatItIsFor(t *testing.T) {
	for name, p := range packages(t) {
		if len(p.GoFiles) > 0 && len(p.Doc) < 20 {
			t.Errorf("package %s has no documentation", name)
		}
	}
}
