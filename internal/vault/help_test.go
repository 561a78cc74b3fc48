package vault_test

import (
	"errors"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"holdfast/internal/control"
	"holdfast/internal/vault"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patient is far longer than anything here takes.
const patient = 30 * time.Second

// start returns a vault that is closed when the test ends.
func start(t testing.TB, o vault.Options) *vault.Vault {
	t.Helper()
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	v := vault.New(o)
	t.Cleanup(v.Close)
	return v
}

// player plays a generation at its end of a channel.
type player struct {
	t    testing.TB
	v    *vault.Vault
	n    int
	conn *control.Vault

	mu   sync.Mutex
	came []*control.VaultPacket // not asked for yet
	over bool                   // the channel has ended
	news chan struct{}          // closed and made anew when something has come
	done chan struct{}          // closed when it reads no more
}

// deaf returns a player that does not read. It has said nothing yet.
func deaf(t testing.TB, v *vault.Vault, n int) *player {
	t.Helper()
	a, b, err := control.Ends()
	if err != nil {
		t.Fatal(err)
	}
	ours, err := control.NewVault(a)
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := control.NewVault(b)
	if err != nil {
		t.Fatal(err)
	}
	p := &player{t: t, v: v, n: n, conn: theirs, news: make(chan struct{}), done: make(chan struct{})}
	v.Open(n, ours)
	t.Cleanup(func() { theirs.Close() })
	return p
}

// listening returns a player that reads. It has said nothing yet.
func listening(t testing.TB, v *vault.Vault, n int) *player {
	t.Helper()
	p := deaf(t, v, n)
	p.listen()
	return p
}

func (p *player) listen() {
	go p.read()
	p.t.Cleanup(func() {
		p.conn.Close()
		<-p.done
		for _, c := range p.came {
			c.CloseFiles()
		}
	})
}

// join returns a player that has deposited its store, and said that this is all.
func join(t testing.TB, v *vault.Vault, n int) *player {
	t.Helper()
	p := listening(t, v, n)
	p.store(0)
	p.send(control.VaultComplete)
	p.synced()
	return p
}

func (p *player) read() {
	defer close(p.done)
	for {
		c, err := p.conn.Receive(0)
		if err == nil {
			c = keep(c)
		} else if errors.Is(err, control.ErrProtocol) {
			p.t.Errorf("generation %d: %v", p.n, err)
			continue
		}
		p.mu.Lock()
		if err != nil {
			p.over = true
		} else {
			p.came = append(p.came, c)
		}
		close(p.news)
		p.news = make(chan struct{})
		p.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// keep returns a packet that stays good.
func keep(p *control.VaultPacket) *control.VaultPacket {
	for i := range p.Entries {
		e := &p.Entries[i]
		e.Record, e.State = slices.Clone(e.Record), slices.Clone(e.State)
	}
	return p
}

// next returns what came next; nil: the channel has ended.
func (p *player) next() *control.VaultPacket {
	p.t.Helper()
	limit := time.After(patient)
	for {
		p.mu.Lock()
		news, over := p.news, p.over
		if len(p.came) > 0 {
			c := p.came[0]
			p.came = p.came[1:]
			p.mu.Unlock()
			return c
		}
		p.mu.Unlock()
		if over {
			return nil
		}
		select {
		case <-news:
		case <-limit:
			p.t.Fatalf("generation %d was told nothing", p.n)
		}
	}
}

// want returns what came next, which must be of the type.
func (p *player) want(typ control.VaultType) *control.VaultPacket {
	p.t.Helper()
	c := p.next()
	if c == nil || c.Type != typ {
		p.t.Fatalf("generation %d was told %+v, want type %d", p.n, c, typ)
	}
	return c
}

// wantNumbers takes answers of a type until there were as many as these, in any order.
func (p *player) wantNumbers(typ control.VaultType, want ...uint64) {
	p.t.Helper()
	var got []uint64
	for len(got) < len(want) {
		for _, e := range p.want(typ).Entries {
			got = append(got, e.Number)
		}
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		p.t.Fatalf("generation %d was told type %d of %v, want %v", p.n, typ, got, want)
	}
}

// wantNothing fails if anything has come that nobody has asked for.
func (p *player) wantNothing() {
	p.t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.came {
		p.t.Errorf("generation %d was told type %d: %+v", p.n, c.Type, c.Entries)
	}
}

// wantEnd takes what comes until the channel ends.
func (p *player) wantEnd() {
	p.t.Helper()
	for c := p.next(); c != nil; c = p.next() {
		c.CloseFiles()
	}
}

// send sends a packet.
func (p *player) send(typ control.VaultType, entries ...control.VaultEntry) {
	p.t.Helper()
	if err := p.conn.Send(&control.VaultPacket{Type: typ, Entries: entries}, patient); err != nil {
		p.t.Fatalf("generation %d: %v", p.n, err)
	}
}

// store deposits a loop with one pipe, and returns what there is to see of them.
func (p *player) store(loop int) (inodes []uint64) {
	p.t.Helper()
	file, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC)
	if err != nil {
		p.t.Fatal(err)
	}
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		p.t.Fatal(err)
	}
	fds := []int{file, pipe[0], pipe[1]}
	defer control.CloseAll(fds)
	if err := p.conn.Send(&control.VaultPacket{Type: control.VaultStore, Loop: loop, Files: fds}, patient); err != nil {
		p.t.Fatalf("generation %d: %v", p.n, err)
	}
	return inodesOf(p.t, fds)
}

// die ends the player as the end of its process would: what it has not read is lost.
func (p *player) die() { p.conn.Close() }

// synced waits until all that was sent before has been done: a release of a tunnel that
// was never deposited is answered.
func (p *player) synced() {
	p.t.Helper()
	const nobody = 1 << 60
	p.send(control.VaultRelease, control.VaultEntry{Number: nobody})
	p.wantNumbers(control.VaultReturned, nobody)
}

// A line stands for the two sockets of a tunnel: they are pipes, whose other ends show
// when the last descriptor is closed.
type line struct {
	t      testing.TB
	number uint64
	fds    []int // ours; those who get duplicates do not close them
	ends   []int
}

func lines(t testing.TB, n int) []*line {
	t.Helper()
	all := make([]*line, n)
	for i := range all {
		all[i] = newLine(t, uint64(i+1))
	}
	return all
}

func newLine(t testing.TB, number uint64) *line {
	t.Helper()
	l := &line{t: t, number: number}
	for range 2 {
		var pipe [2]int
		if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
			t.Fatal(err)
		}
		l.ends, l.fds = append(l.ends, pipe[0]), append(l.fds, pipe[1])
	}
	t.Cleanup(func() {
		l.letGo()
		control.CloseAll(l.ends)
	})
	return l
}

// letGo closes the descriptors of the test.
func (l *line) letGo() {
	control.CloseAll(l.fds)
	l.fds = nil
}

// wantClosed waits until nobody has a descriptor. Those of the test are closed.
func (l *line) wantClosed() {
	l.t.Helper()
	l.letGo()
	for _, end := range l.ends {
		for {
			n, err := unix.Poll([]unix.PollFd{{Fd: int32(end)}}, int(patient/time.Millisecond)) // POLLHUP always counts
			if errors.Is(err, unix.EINTR) {
				continue
			}
			if n != 1 || err != nil {
				l.t.Fatalf("tunnel %d is still open: %v", l.number, err)
			}
			break
		}
	}
}

func (l *line) deposit() control.VaultEntry {
	return control.VaultEntry{Number: l.number, Record: []byte{byte(l.number), 'r'}, Files: l.fds}
}

func (l *line) released() control.VaultEntry {
	e := l.deposit()
	e.Stand = 1
	return e
}

func (l *line) from(p *player) control.VaultTunnel {
	return control.VaultTunnel{Generation: p.n, Number: l.number}
}

// is fails unless the descriptors are those of the line, and closes them.
func (l *line) is(fds []int) {
	l.t.Helper()
	if len(fds) < 2 || !slices.Equal(inodesOf(l.t, fds[:2]), inodesOf(l.t, l.ends)) {
		l.t.Fatalf("%d descriptors, which are not those of tunnel %d", len(fds), l.number)
	}
	control.CloseAll(fds)
}

func inodesOf(t testing.TB, fds []int) (inodes []uint64) {
	t.Helper()
	for _, fd := range fds {
		var s unix.Stat_t
		if err := unix.Fstat(fd, &s); err != nil {
			t.Fatal(err)
		}
		inodes = append(inodes, s.Ino)
	}
	return inodes
}

// eventually waits until is says true.
func eventually(t testing.TB, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(patient); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal(what)
		}
	}
}
