package peer

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"holdfast/bench/proc"
	"holdfast/internal/child"
)

// commanded is an instance of which nothing runs but the socket for commands.
func commanded(t *testing.T, handle http.HandlerFunc) *Instance {
	t.Helper()
	dir, err := os.MkdirTemp("", "hf-") // short: it holds a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	i := &Instance{Kind: vault, site: Site{Dir: dir}}
	if err := os.Mkdir(i.runtimeDir(), 0o700); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(i.runtimeDir(), "admin.sock"))
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: handle}
	served := make(chan struct{})
	go func() {
		defer close(served)
		server.Serve(l)
	}()
	t.Cleanup(func() {
		server.Close()
		<-served
	})
	return i
}

// Most tunnels have gone before the last one has, and then the process that had them
// ends.
func TestAMoveIsOverWhenTheProcessHasEnded(t *testing.T) {
	t.Parallel()
	old, err := child.Start(exec.Command("sleep", "1000"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { old.Stop() })
	var asked []string
	var most time.Time
	left := []int{200, 200, 3, 2, 1}
	i := commanded(t, func(w http.ResponseWriter, r *http.Request) {
		asked = append(asked, r.Method+" "+r.RequestURI)
		if r.Method == "POST" {
			return
		}
		fmt.Fprintf(w, `{"generations": [{"generation": 8, "state": "serving", "pid": %d}, {"generation": 7, "state": "draining", "pid": %d, "tunnels": %d}]}`, os.Getpid(), old.PID(), left[0])
		switch left[0] {
		case 2:
			most = time.Now()
		case 1:
			old.Kill()
			return
		}
		left = left[1:]
	})
	m, err := i.Move()
	if err != nil || m.Tunnels != 200 || m.Most.Before(most) || !m.Most.Before(m.Over) {
		t.Errorf("%+v, %v", m, err)
	}
	if p, ok := proc.Find(old.PID()); ok && !p.Ended {
		t.Error("the old process runs on")
	}
	if got := strings.Join(asked, ", "); !strings.HasPrefix(got, "GET /status, POST /move?generation=7, GET /status, GET /status, ") {
		t.Errorf("the supervisor was asked: %s", got)
	}
}

func TestAMoveThatDoesNotBegin(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct{ status, refusal, want string }{
		"nothing drains": {`{"generations": [{"generation": 8, "state": "serving"}]}`, "", "one generation should drain"},
		"it is refused":  {fmt.Sprintf(`{"generations": [{"generation": 7, "state": "draining", "pid": %d}]}`, os.Getpid()), "on probation", "on probation"},
		"it has ended":   {`{"generations": [{"generation": 7, "state": "draining", "pid": 0}]}`, "", "has ended"},
	} {
		i := commanded(t, func(w http.ResponseWriter, r *http.Request) {
			if r.Method == "POST" {
				http.Error(w, test.refusal, http.StatusInternalServerError)
				return
			}
			fmt.Fprint(w, test.status)
		})
		if _, err := i.Move(); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
