package proxy_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/control"
	"holdfast/internal/proxy"
)

// adopter is a supervisor that the generation does not obey yet, or not any more.
type adopter struct {
	t      *testing.T
	conn   *control.Conn
	heard  chan heard
	lastID uint64
}

type heard struct {
	m   *control.Message
	fds []int
}

// adopt takes over a supervisor's end.
func adopt(t *testing.T, conn *control.Conn) *adopter {
	a := &adopter{t: t, conn: conn, heard: make(chan heard, 1024)}
	var receiving sync.WaitGroup
	receiving.Go(func() {
		defer close(a.heard)
		for {
			m, fds, err := conn.Receive()
			if err != nil {
				return
			}
			a.heard <- heard{m, fds}
		}
	})
	t.Cleanup(func() {
		conn.Close()
		receiving.Wait()
		for h := range a.heard {
			control.CloseAll(h.fds)
		}
	})
	return a
}

// ends makes a channel: the end of a supervisor, and that of a generation.
func ends(t *testing.T) (*control.Conn, int) {
	t.Helper()
	a, b, err := control.Ends()
	if err != nil {
		t.Fatal(err)
	}
	conn, err := control.NewSupervisorConn(a)
	if err != nil {
		t.Fatal(err)
	}
	return conn, b
}

// prepare has the supervisor bring another one.
func (c *commander) prepare(epoch uint64) *adopter {
	c.t.Helper()
	a, m := c.bring(epoch)
	if m.Error != "" {
		c.t.Fatalf("prepare is answered by %+v", m)
	}
	return a
}

func (c *commander) bring(epoch uint64) (*adopter, *control.Message) {
	c.t.Helper()
	conn, fd := ends(c.t)
	defer unix.Close(fd)
	return adopt(c.t, conn), c.question(control.Message{Type: control.TypePrepare, Epoch: epoch}, fd)
}

// obeyed makes an adopter the supervisor that commands.
func (c *commander) obeyed(a *adopter, epoch uint64) *control.Report {
	c.t.Helper()
	m, _ := a.ask(control.Message{Type: control.TypeObey, Epoch: epoch})
	if m.Error != "" || m.Report == nil || m.Report.Epoch != epoch {
		c.t.Fatalf("obey is answered by %+v", m)
	}
	c.conn = a.conn
	c.received.Go(func() {
		for h := range a.heard {
			c.sort(h.m, h.fds)
		}
	})
	return m.Report
}

func (a *adopter) say(m control.Message, fds ...int) {
	a.t.Helper()
	if err := a.conn.Send(&m, bound, fds...); err != nil {
		a.t.Fatal(err)
	}
}

// ask returns the answer, and what came before it.
func (a *adopter) ask(m control.Message, fds ...int) (answer *control.Message, before []heard) {
	a.t.Helper()
	a.lastID++
	m.ID = a.lastID
	a.say(m, fds...)
	for {
		h := await(a.t, "the answer to "+string(m.Type), a.heard)
		if h.m == nil {
			a.t.Fatalf("the channel ends before %s is answered", m.Type)
		}
		if h.m.Type == control.TypeAnswer && h.m.Re == m.ID {
			return h.m, before
		}
		before = append(before, h)
	}
}

// ended waits for the end of the channel.
func (a *adopter) ended() {
	a.t.Helper()
	for {
		if h := await(a.t, "the end of the channel", a.heard); h.m == nil {
			return
		}
	}
}

// estate is what a generation hands back.
type estate struct {
	report          *control.Report
	listeners, kept map[string]int
	messages        int
}

func (a *adopter) adopt() estate {
	a.t.Helper()
	m, before := a.ask(control.Message{Type: control.TypeAdopt})
	if m.Error != "" || m.Report == nil {
		a.t.Fatalf("adopt is answered by %+v", m)
	}
	e := estate{m.Report, make(map[string]int), make(map[string]int), len(before)}
	var complete []control.Type
	for _, h := range before {
		into := e.listeners
		if h.m.Type == control.TypeKept {
			into = e.kept
		}
		for i, key := range h.m.Keys {
			into[key] = h.fds[i]
			a.t.Cleanup(func() { unix.Close(h.fds[i]) })
		}
		if !h.m.More {
			complete = append(complete, h.m.Type)
		}
	}
	if !slices.Equal(complete, []control.Type{control.TypeListeners, control.TypeKept}) {
		a.t.Errorf("complete before the answer: %v", complete)
	}
	return e
}

// meeting is a rendezvous at which nobody is until the test comes.
type meeting struct {
	t        *testing.T
	open     atomic.Bool
	attempts atomic.Int64
	hellos   chan control.Hello
	conns    chan *control.Conn
}

// away has the generation look for supervisors at a meeting.
func away(m *meeting) func(*commander) {
	m.hellos, m.conns = make(chan control.Hello, 16), make(chan *control.Conn, 16)
	return func(c *commander) {
		m.t = c.t
		c.rendezvous = "/run/holdfast/control.sock"
		c.reunite = m.reunite
	}
}

func (m *meeting) reunite(_ context.Context, path string, key []byte, hello control.Hello) (*control.Conn, error) {
	m.attempts.Add(1)
	if path != "/run/holdfast/control.sock" || string(key) != "key" {
		return nil, fmt.Errorf("got the path %q and the key %q", path, key)
	}
	if !m.open.Load() {
		return nil, errors.New("nobody is there")
	}
	a, b, err := control.Ends()
	if err != nil {
		return nil, err
	}
	ours, err := control.NewSupervisorConn(a)
	if err != nil {
		unix.Close(b)
		return nil, err
	}
	m.hellos <- hello
	m.conns <- ours
	return control.NewConn(b)
}

// meet waits for the generation at the rendezvous.
func (m *meeting) meet() (*adopter, control.Hello) {
	m.t.Helper()
	m.open.Store(true)
	defer m.open.Store(false)
	hello := await(m.t, "the generation at the rendezvous", m.hellos)
	return adopt(m.t, <-m.conns), hello
}

// works has the generation accept and answer.
func (c *commander) works() {
	c.t.Helper()
	w := c.dial()
	if head := c.exchange(w); !strings.Contains(head, "200 OK") {
		c.t.Errorf("got %s", head)
	}
	w.Close()
}

// sameFile says whether two descriptors are of one socket.
func sameFile(t *testing.T, a, b int) bool {
	t.Helper()
	var x, y unix.Stat_t
	if err := errors.Join(unix.Fstat(a, &x), unix.Fstat(b, &y)); err != nil {
		t.Fatal(err)
	}
	return x.Dev == y.Dev && x.Ino == y.Ino
}

// withSocket calls f with the descriptor of our listening socket.
func (c *commander) withSocket(f func(fd int)) {
	c.t.Helper()
	raw, err := c.socket.(*net.TCPListener).SyscallConn()
	if err != nil {
		c.t.Fatal(err)
	}
	raw.Control(func(fd uintptr) { f(int(fd)) })
}

// memoryFile is a descriptor of a file of its own.
func memoryFile(t *testing.T) int {
	t.Helper()
	fd, err := unix.MemfdCreate("a file of a test", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// heldOnlyByUs waits until nobody else has a descriptor.
func heldOnlyByUs(t *testing.T, what string, fd int) {
	t.Helper()
	eventually(t, what+" is closed", func() bool { return holders(t, fd) == 1 })
}

func TestAPreparedSupervisorCommandsNothingBeforeItIsObeyed(t *testing.T) {
	t.Parallel()
	c := command(t, "", "")
	began := time.Now()
	c.serve()
	a := c.prepare(2)
	e := a.adopt()
	if r := e.report; r.Generation != 1 || r.Epoch != 1 || r.Phase != control.PhaseServing || r.Served.Before(began) || r.Started.After(r.Served) {
		t.Errorf("the report is %+v", r)
	}
	file := memoryFile(t)
	conn, spare := ends(t)
	defer conn.Close()
	defer unix.Close(spare)
	for _, tt := range []struct {
		m   control.Message
		fds []int
	}{
		{control.Message{Type: control.TypeDrain}, nil},
		{control.Message{Type: control.TypeServe}, nil},
		{control.Message{Type: control.TypeStop, Within: time.Second}, nil},
		{control.Message{Type: control.TypeLevel, Level: "debug"}, nil},
		{control.Message{Type: control.TypeProfile, Profile: "goroutine"}, nil},
		{control.Message{Type: control.TypeKeep, Keys: []string{"a"}}, []int{file}},
		{control.Message{Type: control.TypeLogs, Keys: []string{"a"}}, []int{file}},
		{control.Message{Type: control.TypeListeners, Keys: []string{"a"}}, []int{file}},
		{control.Message{Type: control.TypeBundle}, []int{file}},
		{control.Message{Type: control.TypePrepare, Epoch: 9}, []int{spare}},
		{control.Message{Type: control.TypeObey, Epoch: 1}, nil},
		{control.Message{Type: "riddle"}, nil},
	} {
		if m, _ := a.ask(tt.m, tt.fds...); m.Error == "" {
			t.Errorf("%s was not refused", tt.m.Type)
		}
		tt.m.ID = 0 // wants no answer
		a.say(tt.m, tt.fds...)
	}
	if m, before := a.ask(control.Message{Type: control.TypeStatus}); m.Status == nil || m.Status.Draining || len(before) > 0 {
		t.Errorf("got %+v after %d messages", m, len(before))
	}
	heldOnlyByUs(t, "a file of what was refused", file)
	if got := strings.Count(c.log.String(), "refused what a supervisor says"); got != 1 {
		t.Errorf("%d lines about one channel", got)
	}
	c.works()
	c.ask(control.Message{Type: control.TypeLevel, Level: "debug"})
	c.lives()
}

// All that a supervisor says is done when it comes over the channel that commands now.
func TestASupervisorThatIsObeyedCommandsEverythingAndTheFormerOneNothing(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "access.log")
	c := command(t, "", fmt.Sprintf("[[access_logs]]\npath = %q\n", path))
	c.say(&control.Message{Type: control.TypeLogs, Keys: []string{path}}, logFile(t, path))
	c.serve()
	client, server := c.tunnel()
	former := c.conn
	a := c.prepare(2)
	a.adopt()
	c.obeyed(a, 2)
	if err := former.Send(&control.Message{Type: control.TypeDrain}, bound); !errors.Is(err, unix.EPIPE) {
		t.Errorf("the former supervisor can still speak: %v", err)
	}
	c.works()
	c.drain(time.Hour)
	c.handOver()
	c.serve() // reinstated
	c.works()
	c.ask(control.Message{Type: control.TypeLevel, Level: "debug"})
	if err := os.Rename(path, path+".1"); err != nil {
		t.Fatal(err)
	}
	c.ask(control.Message{Type: control.TypeLogs})
	c.question(control.Message{Type: control.TypeLogs, Keys: []string{path}}, logFile(t, path))
	c.works()
	eventually(t, "a record in the new file", func() bool { return targets(t, path) != "" })
	c.ask(control.Message{Type: control.TypeProfile, Profile: "goroutine"})
	if data, err := control.ReadBytes(await(t, "the profile", c.payloads), 1<<24); err != nil || len(data) == 0 {
		t.Errorf("%d bytes, %v", len(data), err)
	}
	if st := c.status(); st.Tunnels != 1 || st.Draining {
		t.Errorf("got %+v", st)
	}
	carries(client, server)
	client.Close()
	server.Close()
	c.say(&control.Message{Type: control.TypeStop, Within: time.Hour})
	if err := c.wait(); err != nil {
		t.Error(err)
	}
	await(t, "the last word", c.done)
}

func TestASupervisorThatGoesAwayBeforeItIsObeyedChangesNothing(t *testing.T) {
	t.Parallel()
	m := new(meeting)
	c := command(t, "", "", away(m))
	c.serve()
	for range 3 {
		a := c.prepare(2) // a number that nobody was obeyed with can come again
		a.adopt()
		a.conn.Close()
	}
	c.works()
	c.drain(time.Hour)
	if st := c.status(); !st.Draining || m.attempts.Load() > 0 {
		t.Errorf("got %+v after %d looks at the rendezvous", st, m.attempts.Load())
	}
}

// It dies between the last two steps of an upgrade: the one that is prepared may
// still be obeyed. When that one dies too, there is the rendezvous.
func TestAPreparedSupervisorIsWaitedForWhenTheFormerOneIsGone(t *testing.T) {
	t.Parallel()
	m := new(meeting)
	c := command(t, "", "", away(m))
	c.serve()
	a := c.prepare(2)
	c.conn.Close()
	eventually(t, "it has noticed", func() bool { return strings.Contains(c.log.String(), "the supervisor is gone") })
	c.works()
	if e := a.adopt(); e.report.Epoch != 1 {
		t.Errorf("the report is %+v", e.report)
	}
	c.obeyed(a, 2)
	c.lives()
	if n := m.attempts.Load(); n > 0 {
		t.Errorf("it looked at the rendezvous %d times", n)
	}
	c.conn.Close()
	b, hello := m.meet()
	if hello.Epoch != 2 {
		t.Errorf("it comes with %+v", hello)
	}
	c.obeyed(b, 3)
	c.lives()
}

func TestWhenTheFormerAndThePreparedSupervisorAreGoneThereIsTheRendezvous(t *testing.T) {
	t.Parallel()
	m := new(meeting)
	c := command(t, "", "", away(m))
	c.serve()
	a := c.prepare(2)
	c.conn.Close()
	a.adopt()
	a.conn.Close()
	b, hello := m.meet()
	if hello.Epoch != 1 {
		t.Errorf("it comes with %+v", hello)
	}
	b.conn.Close() // and one that looks away
	b, _ = m.meet()
	c.obeyed(b, 2)
	c.works()
	c.lives()
}

// The socket that comes back is the one that everybody is connected to, and nobody is
// refused while there is no supervisor.
func TestAGenerationIsAdoptedAtTheRendezvousAndNobodyNotices(t *testing.T) {
	t.Parallel()
	m := new(meeting)
	c := command(t, "", "", away(m))
	c.serve()
	client, server := c.tunnel()
	counts, ledger := memoryFile(t), memoryFile(t)
	c.say(&control.Message{Type: control.TypeKeep, Keys: []string{control.KeptCounts, control.KeptLedger}, More: true}, memoryFile(t), ledger)
	c.ask(control.Message{Type: control.TypeKeep})
	c.say(&control.Message{Type: control.TypeKeep, Keys: []string{control.KeptCounts}}, counts)
	key := c.socket.Addr().String()
	same := -1
	c.withSocket(func(fd int) {
		var err error
		if same, err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0); err != nil {
			t.Fatal(err)
		}
	})
	defer func() { unix.Close(same) }()
	c.status()

	c.conn.Close()
	for m.attempts.Load() < 3 {
		c.works()
		carries(client, server)
	}
	a, hello := m.meet()
	if hello.PID != os.Getpid() || hello.Generation != 1 || hello.Epoch != 1 || hello.Core != control.Core || hello.Version == "" {
		t.Errorf("it comes with %+v", hello)
	}
	c.works() // while it is asked
	e := a.adopt()
	if !slices.Equal(slices.Collect(maps.Keys(e.listeners)), []string{key}) || !sameFile(t, e.listeners[key], same) {
		t.Errorf("the listeners %v came back", e.listeners)
	}
	if len(e.kept) != 2 || !sameFile(t, e.kept[control.KeptCounts], counts) || !sameFile(t, e.kept[control.KeptLedger], ledger) {
		t.Errorf("%v was kept", e.kept)
	}
	c.obeyed(a, 2)
	c.works()

	// What the former supervisor had is closed; the socket that came back is enough.
	c.socket.Close()
	unix.Close(same)
	same = -1
	c.drain(time.Hour)
	late := c.dial()
	f := os.NewFile(uintptr(dup(t, e.listeners[key])), key)
	back, err := net.FileListener(f)
	f.Close()
	if err != nil {
		t.Fatal(err)
	}
	defer back.Close()
	conn, err := back.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if got, want := conn.RemoteAddr().String(), late.LocalAddr().String(); got != want {
		t.Errorf("accepted %s, want %s", got, want)
	}
	carries(client, server)
}

func dup(t *testing.T, fd int) int {
	t.Helper()
	n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// A supervisor that has died meanwhile, or has been replaced, is not heard any more.
func TestAnEpochThatIsNotAboveTheOneThatCommandsIsRefused(t *testing.T) {
	t.Parallel()
	m := new(meeting)
	c := command(t, "", "", away(m))
	c.serve()
	refused := func(a *control.Message) {
		t.Helper()
		if !strings.Contains(a.Error, "not above") {
			t.Errorf("got %+v", a)
		}
	}
	a := c.prepare(5)
	c.obeyed(a, 5)
	for _, epoch := range []uint64{0, 4, 5} {
		b, answer := c.bring(epoch)
		refused(answer)
		b.ended()
		refused(c.question(control.Message{Type: control.TypeObey, Epoch: epoch}))
	}
	// After an upgrade that failed the supervisor takes the next number itself.
	failed := c.prepare(6)
	if r := c.ask(control.Message{Type: control.TypeObey, Epoch: 7}).Report; r == nil || r.Epoch != 7 {
		t.Errorf("the report is %+v", r)
	}
	failed.ended()
	b := c.prepare(8)
	answer, _ := b.ask(control.Message{Type: control.TypeObey, Epoch: 6})
	refused(answer)
	b.conn.Close()
	c.conn.Close()
	late, hello := m.meet()
	if hello.Epoch != 7 {
		t.Errorf("it comes with %+v", hello)
	}
	answer, _ = late.ask(control.Message{Type: control.TypeObey, Epoch: 7})
	refused(answer)
	c.obeyed(late, 8)
	c.lives()
}

func TestAnotherPreparedSupervisorTakesThePlaceOfTheFirst(t *testing.T) {
	t.Parallel()
	c := command(t, "", "")
	c.serve()
	a := c.prepare(2)
	b := c.prepare(3)
	a.ended()
	b.adopt()
	c.obeyed(b, 3)
	c.lives()
}

func TestAChannelThatIsNoneIsRefused(t *testing.T) {
	t.Parallel()
	m := new(meeting)
	c := command(t, "", "", away(m))
	c.serve()
	a := c.prepare(2)
	file := memoryFile(t)
	if m := c.question(control.Message{Type: control.TypePrepare, Epoch: 2}, file); !strings.Contains(m.Error, "control channel") {
		t.Errorf("got %+v", m)
	}
	a.ended() // another was to come
	heldOnlyByUs(t, "what is no channel", file)
	if m := c.question(control.Message{Type: control.TypePrepare, Epoch: 2}); m.Error == "" {
		t.Error("prepare without a channel was accepted")
	}
	c.conn.Close()
	b, _ := m.meet() // nobody else is waited for
	c.obeyed(b, 2)
	c.lives()
}

func TestWhoDoesNotServeYetIsNotAdopted(t *testing.T) {
	t.Parallel()
	m := new(meeting)
	m.open.Store(true)
	c := command(t, "", "", away(m))
	if _, answer := c.bring(2); answer.Error == "" {
		t.Error("prepare was accepted")
	}
	if answer := c.question(control.Message{Type: control.TypeAdopt}); answer.Error == "" {
		t.Errorf("adopt was answered by %+v", answer)
	}
	c.conn.Close()
	if err := c.wait(); !errors.Is(err, proxy.ErrAbandoned) {
		t.Errorf("got %v", err)
	}
	if n := m.attempts.Load(); n > 0 {
		t.Errorf("it looked at the rendezvous %d times", n)
	}
}

// What the supervisor would have been told at once its successor sees in the report.
func TestWhatIsTerminatedWithoutASupervisorSaysSoWhenItIsAdopted(t *testing.T) {
	t.Parallel()
	m := new(meeting)
	c := command(t, "", "", away(m))
	c.serve()
	client, server := c.tunnel()
	c.conn.Close()
	eventually(t, "it looks for another supervisor", func() bool { return m.attempts.Load() > 0 })
	c.terminate <- syscall.SIGTERM
	eventually(t, "it drains", func() bool { return strings.Contains(c.log.String(), "terminated by signal") })
	a, _ := m.meet()
	e := a.adopt()
	if e.report.Phase != control.PhaseStopping || len(e.listeners) > 0 || e.messages != 2 {
		t.Errorf("the report is %+v, %d listeners in %d messages", e.report, len(e.listeners), e.messages)
	}
	if r := c.obeyed(a, 2); r.Phase != control.PhaseStopping {
		t.Errorf("the report is %+v", r)
	}
	carries(client, server)
	client.Close()
	server.Close()
	if err := c.wait(); err != nil {
		t.Error(err)
	}
	await(t, "the last word", c.done)
}

// A signal may come between what is asked and what is commanded.
func TestWhoIsObeyedHearsWhatHasChangedSinceItAsked(t *testing.T) {
	t.Parallel()
	c := command(t, "", "")
	c.serve()
	client, server := c.tunnel()
	a := c.prepare(2)
	if e := a.adopt(); e.report.Phase != control.PhaseServing {
		t.Errorf("the report is %+v", e.report)
	}
	c.terminate <- syscall.SIGTERM
	await(t, "it tells the supervisor that commands", c.leaving)
	if r := c.obeyed(a, 2); r.Phase != control.PhaseStopping {
		t.Errorf("the report is %+v", r)
	}
	client.Close()
	server.Close()
	if err := c.wait(); err != nil {
		t.Error(err)
	}
}

// With its process would go what it has counted: the next supervisor gets that first.
func TestAGenerationThatHasNothingLeftStaysForTheNextSupervisor(t *testing.T) {
	t.Parallel()
	m := new(meeting)
	c := command(t, "", "", away(m))
	c.serve()
	counts := memoryFile(t)
	c.say(&control.Message{Type: control.TypeKeep, Keys: []string{control.KeptCounts}}, counts)
	client, server := c.tunnel()
	c.drain(0)
	c.conn.Close()
	eventually(t, "it looks for another supervisor", func() bool { return m.attempts.Load() > 1 })
	carries(client, server)
	client.Close()
	server.Close()
	eventually(t, "the tunnel has ended", func() bool { return c.figures()["tunnels_active"] == 0 })
	a, _ := m.meet()
	if e := a.adopt(); !sameFile(t, e.kept[control.KeptCounts], counts) {
		t.Errorf("%v was kept", e.kept)
	}
	c.obeyed(a, 2)
	if err := c.wait(); err != nil {
		t.Error(err)
	}
	await(t, "the last word", c.done)
}

func TestAGenerationWithoutASupervisorEndsAtOnceWhenItIsTerminated(t *testing.T) {
	t.Parallel()
	m := new(meeting)
	c := command(t, "", "", away(m))
	c.serve()
	client, server := c.tunnel()
	c.drain(0)
	c.conn.Close()
	eventually(t, "it looks for another supervisor", func() bool { return m.attempts.Load() > 1 })
	client.Close()
	server.Close()
	c.terminate <- syscall.SIGTERM
	if err := c.wait(); err != nil {
		t.Error(err)
	}
}

func TestADrainingGenerationIsAdoptedAsWhatItIs(t *testing.T) {
	t.Parallel()
	m := new(meeting)
	c := command(t, "", "", away(m))
	c.serve()
	c.drain(time.Hour)
	c.conn.Close()
	a, _ := m.meet()
	if e := a.adopt(); e.report.Phase != control.PhaseDraining || len(e.listeners) > 0 {
		t.Errorf("the report is %+v, %d listeners", e.report, len(e.listeners))
	}
	c.obeyed(a, 2)
	c.handOver()
	c.conn.Close() // before it says serve: nobody else may have this socket
	a, _ = m.meet()
	e := a.adopt()
	c.withSocket(func(fd int) {
		if got, ok := e.listeners[c.socket.Addr().String()]; !ok || !sameFile(t, got, fd) {
			t.Errorf("the listeners %v came back", e.listeners)
		}
	})
	c.obeyed(a, 3)
	c.serve()
	c.works()
}

// Messages have room for so many descriptors and keys.
func TestHoweverMuchIsKeptComesBack(t *testing.T) {
	t.Parallel()
	c := command(t, "", "")
	c.serve()
	file := memoryFile(t)
	want := make(map[string]bool)
	keep := func(keys ...string) {
		t.Helper()
		for _, key := range keys {
			want[key] = true
		}
		c.say(&control.Message{Type: control.TypeKeep, Keys: keys}, slices.Repeat([]int{file}, len(keys))...)
	}
	for i := range 10 {
		var keys []string
		for j := range control.FilesPerMessage {
			keys = append(keys, fmt.Sprint(i, " ", j))
		}
		keep(keys...)
	}
	for i := range 4 {
		keep(strings.Repeat("\x01", control.KeysPerMessage-1) + fmt.Sprint(i)) // six bytes each in JSON
	}
	keep()
	e := c.prepare(2).adopt()
	for key := range e.kept {
		delete(want, key)
	}
	if len(want) > 0 || len(e.kept) != 10*control.FilesPerMessage+4 {
		t.Errorf("%d came back, %d are missing", len(e.kept), len(want))
	}
}

func TestWhatIsKeptIsClosedWhenItIsReplacedAndAtTheEnd(t *testing.T) {
	t.Parallel()
	c := command(t, "", "")
	c.serve()
	replaced, kept, odd := memoryFile(t), memoryFile(t), memoryFile(t)
	c.say(&control.Message{Type: control.TypeKeep, Keys: []string{"a", "b"}}, replaced, kept)
	if n := c.status(); n == nil || holders(t, replaced) != 2 || holders(t, kept) != 2 {
		t.Fatalf("%d and %d descriptors are kept, want 1 each", holders(t, replaced)-1, holders(t, kept)-1)
	}
	c.say(&control.Message{Type: control.TypeKeep, Keys: []string{"a"}}, kept)
	if m := c.question(control.Message{Type: control.TypeKeep, Keys: []string{"c", "d"}}, odd); !strings.Contains(m.Error, "do not match") {
		t.Errorf("got %+v", m)
	}
	if holders(t, replaced) != 1 || holders(t, odd) != 1 || holders(t, kept) != 3 {
		t.Errorf("%d, %d and %d descriptors are kept, want 0, 0 and 2", holders(t, replaced)-1, holders(t, odd)-1, holders(t, kept)-1)
	}
	e := c.prepare(2).adopt()
	if len(e.kept) != 2 || len(e.listeners) != 1 {
		t.Errorf("got %v and %v", e.kept, e.listeners)
	}
	c.say(&control.Message{Type: control.TypeStop})
	if err := c.wait(); err != nil {
		t.Error(err)
	}
	if n := holders(t, kept); n != 3 { // ours: the file, and what came back
		t.Errorf("%d descriptors are left", n)
	}
	c.withSocket(func(fd int) {
		if n := holders(t, fd); n != 2 {
			t.Errorf("%d descriptors of the socket are left", n)
		}
	})
}

// However often the supervisor changes, nothing of the former ones stays open.
func TestSupervisorsThatComeAndGoLeaveNothingBehind(t *testing.T) {
	t.Parallel()
	m := new(meeting)
	c := command(t, "", "", away(m))
	c.serve()
	file := memoryFile(t)
	for i := range 20 {
		c.say(&control.Message{Type: control.TypeKeep, Keys: []string{"a", "b"}}, file, file)
		var a *adopter
		if i%2 == 0 {
			a = c.prepare(uint64(2*i + 2))
		} else {
			c.conn.Close()
			a, _ = m.meet()
		}
		_, before := a.ask(control.Message{Type: control.TypeAdopt})
		for _, h := range before {
			control.CloseAll(h.fds)
		}
		c.obeyed(a, uint64(2*i+2))
	}
	c.status()
	if n := holders(t, file); n != 3 {
		t.Errorf("%d descriptors of a file that is kept twice, want 3 with ours", n)
	}
	c.withSocket(func(fd int) {
		if n := holders(t, fd); n != 1+1 { // ours and the generation's
			t.Errorf("%d descriptors of the socket, want 2", n)
		}
	})
	c.works()
}

// A supervisor that does not command may say what it likes as often as it likes.
func TestAFloodFromWhoDoesNotCommandHoldsNothingUp(t *testing.T) {
	t.Parallel()
	c := command(t, "", "")
	c.serve()
	a := c.prepare(2)
	file := memoryFile(t)
	stop := make(chan struct{})
	var flood sync.WaitGroup
	flood.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			for _, m := range []control.Message{{Type: "riddle"}, {Type: control.TypeDrain, ID: 7}, {Type: control.TypeObey}} {
				if a.conn.Send(&m, bound) != nil {
					return
				}
			}
			if a.conn.Send(&control.Message{Type: control.TypeKeep, Keys: []string{"a"}}, bound, file) != nil {
				return
			}
		}
	})
	flood.Go(func() { // answers are read
		for {
			select {
			case <-a.heard:
			case <-stop:
				return
			}
		}
	})
	for range 20 {
		c.works()
		if st := c.status(); st.Draining {
			t.Fatalf("got %+v", st)
		}
	}
	close(stop)
	flood.Wait()
	heldOnlyByUs(t, "a file of the flood", file)
	if n := strings.Count(c.log.String(), "\n"); n > 10 {
		t.Errorf("%d lines in the log", n)
	}
}

// Who breaks the protocol is cut off, and only that one.
func TestRubbishFromWhoDoesNotCommandEndsItsChannelOnly(t *testing.T) {
	t.Parallel()
	c := command(t, "", "")
	c.serve()
	theirs, ours, err := control.Ends()
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(ours)
	c.question(control.Message{Type: control.TypePrepare, Epoch: 2}, theirs)
	unix.Close(theirs)
	if _, err := unix.Write(ours, []byte("\x00 no message")); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is noticed", func() bool { return strings.Contains(c.log.String(), "cannot be read") })
	for range 3 { // the loop takes one after the other
		c.status()
	}
	if _, err := unix.Write(ours, []byte("x")); !errors.Is(err, unix.EPIPE) {
		t.Errorf("the channel is still open: %v", err)
	}
	c.works()
	c.lives()
}

// Who asks and does not listen is given up; the loop waits for it once.
func TestWhoDoesNotTakeTheAnswersIsGivenUp(t *testing.T) {
	t.Parallel()
	c := command(t, "", "")
	c.serve()
	conn, fd := ends(t)
	defer conn.Close()
	if m := c.question(control.Message{Type: control.TypePrepare, Epoch: 2}, fd); m.Error != "" {
		t.Fatalf("got %+v", m)
	}
	unix.Close(fd)
	var err error
	for err == nil {
		err = conn.Send(&control.Message{Type: "riddle", ID: 7}, bound)
	}
	if !errors.Is(err, unix.EPIPE) && !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("got %v", err)
	}
	c.works()
	c.lives()
}

func TestTheLastWordSaysThatAGenerationEndedAsItShould(t *testing.T) {
	t.Parallel()
	c := command(t, "", "")
	c.serve()
	a := c.prepare(2)
	c.drain(0)
	if err := c.wait(); err != nil {
		t.Error(err)
	}
	await(t, "the last word to the supervisor", c.done)
	// One that is about to adopt hears it too.
	h := await(t, "the last word to the one that is prepared", a.heard)
	if h.m == nil || h.m.Type != control.TypeDone {
		t.Errorf("got %+v", h.m)
	}
	a.ended()
}
