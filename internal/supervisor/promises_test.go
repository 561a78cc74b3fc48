package supervisor

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/control"
)

// spy is a control channel that notes what is said to a generation.
type spy struct {
	channel
	mu   sync.Mutex
	said []control.Message
}

func (s *spy) Send(m *control.Message, within time.Duration, fds ...int) error {
	s.mu.Lock()
	s.said = append(s.said, *m)
	s.mu.Unlock()
	return s.channel.Send(m, within, fds...)
}

func TestTheOldGenerationHearsWhichListenersAreGone(t *testing.T) {
	addr := freeAddress(t)
	w := prepare(t, base+fmt.Sprintf("[[listeners]]\nname = \"b\"\naddress = %q\n", addr))
	spies := make(chan *spy, 2)
	w.s.kernel.start = func(r *release) (process, channel, error) {
		p, ch, err := startChild(r)
		s := &spy{channel: ch}
		spies <- s
		return p, s, err
	}
	w.run()
	w.wantServing(1)
	w.mustReload(base)
	first := <-spies
	first.mu.Lock()
	defer first.mu.Unlock()
	if !slices.ContainsFunc(first.said, func(m control.Message) bool {
		return m.Type == control.TypeDrain && slices.Equal(m.Keys, []string{addr})
	}) {
		t.Errorf("it was told %+v", first.said)
	}
}

// countingAdmin can refuse, and knows how many of its changes are not settled.
type countingAdmin struct {
	mu      sync.Mutex
	refuses bool
	pending int
	commits int
}

func (a *countingAdmin) Prepare(config.Admin) (commit, abort func(), err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.refuses {
		return nil, nil, errors.New("admin address taken")
	}
	a.pending++
	settle := func(commits int) func() {
		return func() {
			a.mu.Lock()
			defer a.mu.Unlock()
			a.pending--
			a.commits += commits
		}
	}
	return settle(1), settle(0), nil
}

func (a *countingAdmin) refuse(refuses bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.refuses = refuses
}

func TestARefusedReloadClosesWhatItHasOpened(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { taken.Close() })
	for _, c := range []struct {
		name, more, step string
		admin            bool
	}{
		{"another listener cannot be opened", "[[listeners]]\nname = \"c\"\naddress = \"" + taken.Addr().String() + "\"\n", "listeners", false},
		{"the admin address cannot be opened", "", "admin", true},
		{"the proxy cannot be ready", "#! cannot be ready\n", "start", false},
		{"the proxy will not serve", "#! refuses to serve\n", "serve", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := prepare(t, base)
			admin := new(countingAdmin)
			w.s.opts.Admin = admin
			w.run()
			w.wantServing(1)
			admin.refuse(c.admin)
			addr := freeAddress(t)
			w.wantRefused(base+fmt.Sprintf("[[listeners]]\nname = \"b\"\naddress = %q\n", addr)+c.more, c.step, "")
			w.wantClosed(addr)
			admin.mu.Lock()
			defer admin.mu.Unlock()
			if admin.pending != 0 || admin.commits != 1 {
				t.Errorf("%d changes of the admin address are pending, %d were made", admin.pending, admin.commits)
			}
		})
	}
}

func TestAGenerationStartsWithTheAllowedEnvironment(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "/run/systemd/notify")
	t.Setenv("TZ", "UTC")
	me, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "a.toml")
	if err := os.WriteFile(path, []byte(base), 0o600); err != nil {
		t.Fatal(err)
	}
	r, err := loadRelease(t.Context(), path, me)
	if err != nil {
		t.Fatal(err)
	}
	defer r.binary.Close()
	env := r.command(t.Context(), "run").Env
	if !slices.Contains(env, "TZ=UTC") || slices.ContainsFunc(env, func(kv string) bool { return strings.HasPrefix(kv, "NOTIFY_SOCKET=") }) {
		t.Errorf("got %v", env)
	}
}

func TestReplacementsThatDieAreWaitedFor(t *testing.T) {
	w := start(t, base)
	w.mood("crash")
	began := time.Now()
	syscall.Kill(w.status().Generations[0].PID, syscall.SIGKILL)
	w.wait("the fifth generation", func(*Status) bool {
		started := 0
		w.s.do(func() { started = w.s.numbers })
		return started >= 5
	})
	// The second came at once, the others after 100, 200 and 400 ms.
	if took := time.Since(began); took < 700*time.Millisecond {
		t.Errorf("four replacements within %s", took)
	}
}

// deaf is a process that takes its time after SIGTERM: it has something to drain.
type deaf struct{ process }

func (d deaf) Signal(sig os.Signal) error {
	if sig == syscall.SIGTERM {
		return nil
	}
	return d.process.Signal(sig)
}

func TestWhatIsCutOffIsReplacedWhileItDrains(t *testing.T) {
	w := prepare(t, base)
	w.s.kernel.start = func(r *release) (process, channel, error) {
		p, ch, err := startChild(r)
		return deaf{p}, ch, err
	}
	w.run()
	w.wantServing(1)
	w.s.do(func() { w.s.onCutOff(w.s.serving, errors.New("test")) })
	w.wantStates("2 serving, 1 stopping")
}
