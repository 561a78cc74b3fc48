package proxy_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/control"
	"holdfast/internal/tunnel/inflight"
)

// keeper is a supervisor's end of a vault channel, with what a supervisor keeps.
type keeper struct {
	t         *testing.T
	conn      *control.Vault
	completes chan uint8 // flags
	released  chan control.VaultEntry
	verdicts  chan verdict
	ended     chan struct{} // closed: the generation has ended the channel
	reading   sync.WaitGroup

	mu       sync.Mutex
	stores   map[int][]int // descriptors by the loop
	deposits map[uint64]control.VaultEntry
}

// verdict is what a generation says of a tunnel that it was offered.
type verdict struct {
	taken bool
	control.VaultEntry
}

// keeping returns a keeper that has nothing yet, and the other end of its channel.
func keeping(t *testing.T) (k *keeper, fd int) {
	t.Helper()
	a, b, err := control.Ends()
	if err != nil {
		t.Fatal(err)
	}
	conn, err := control.NewVault(a)
	if err != nil {
		t.Fatal(err)
	}
	k = &keeper{
		t: t, conn: conn, completes: make(chan uint8, 64), released: make(chan control.VaultEntry, 1024), verdicts: make(chan verdict, 1024), ended: make(chan struct{}),
		stores: make(map[int][]int), deposits: make(map[uint64]control.VaultEntry),
	}
	t.Cleanup(func() {
		conn.Close()
		k.reading.Wait()
		for _, files := range k.stores {
			control.CloseAll(files)
		}
		for _, d := range k.deposits {
			control.CloseAll(d.Files)
		}
	})
	return k, b
}

// read begins to keep what comes.
func (k *keeper) read() {
	k.reading.Go(func() {
		defer close(k.ended)
		for {
			p, err := k.conn.Receive(0)
			if err != nil {
				if err != io.EOF && !errors.Is(err, net.ErrClosed) {
					k.t.Error(err)
				}
				return
			}
			k.take(p)
		}
	})
}

func (k *keeper) take(p *control.VaultPacket) {
	k.mu.Lock()
	defer k.mu.Unlock()
	switch p.Type {
	case control.VaultStore:
		k.stores[p.Loop] = p.Files
	case control.VaultComplete:
		k.completes <- p.Flags
	}
	for _, e := range p.Entries {
		e.Record, e.State = slices.Clone(e.Record), slices.Clone(e.State)
		switch p.Type {
		case control.VaultDeposit:
			control.CloseAll(k.deposits[e.Number].Files)
			k.deposits[e.Number] = e
		case control.VaultWithdraw:
			control.CloseAll(k.deposits[e.Number].Files)
			delete(k.deposits, e.Number)
		case control.VaultRelease:
			k.released <- e
		case control.VaultTaken, control.VaultDeclined:
			k.verdicts <- verdict{p.Type == control.VaultTaken, e}
		}
	}
}

func (k *keeper) send(p *control.VaultPacket) {
	k.t.Helper()
	if err := k.conn.Send(p, bound); err != nil {
		k.t.Fatal(err)
	}
}

// answer says what has become of a released tunnel.
func (k *keeper) answer(t control.VaultType, number uint64) {
	k.t.Helper()
	k.send(&control.VaultPacket{Type: t, Entries: []control.VaultEntry{{Number: number}}})
}

// completed waits until all was deposited.
func (k *keeper) completed(want uint8) {
	k.t.Helper()
	if flags := await(k.t, "all is deposited", k.completes); flags != want {
		k.t.Errorf("all is deposited with the flags %b, want %b", flags, want)
	}
}

// has waits for so many deposits and returns them, in the order of their numbers.
func (k *keeper) has(n int) (deposits []control.VaultEntry) {
	k.t.Helper()
	eventually(k.t, fmt.Sprintf("%d tunnels are deposited", n), func() bool {
		k.mu.Lock()
		defer k.mu.Unlock()
		return len(k.deposits) == n
	})
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, d := range k.deposits {
		deposits = append(deposits, d)
	}
	slices.SortFunc(deposits, func(a, b control.VaultEntry) int { return int(a.Number) - int(b.Number) })
	return deposits
}

// keep gives the generation a vault channel, and waits until it is at home there.
func (c *commander) keep() *keeper {
	c.t.Helper()
	k := c.vault()
	k.completed(0)
	return k
}

func (c *commander) vault() *keeper {
	c.t.Helper()
	k, fd := keeping(c.t)
	defer unix.Close(fd)
	k.read()
	if a := c.question(control.Message{Type: control.TypeVault}, fd); a.Error != "" {
		c.t.Fatal(a.Error)
	}
	return k
}

// bereaved kills a generation that has one tunnel, which k keeps.
func bereaved(t *testing.T) (c *commander, k *keeper, client, server *wire) {
	t.Helper()
	a := new(apart)
	c = command(t, "", "", a.option)
	c.serve()
	k = c.keep()
	client, server = c.tunnel()
	carries(client, server)
	k.has(1)
	a.kill()
	return c, k, client, server
}

// heir starts a generation that has the loops of a dead one, whose channel has ended.
func (c *commander) heir(dead *keeper, options ...func(*commander)) (*commander, *keeper) {
	c.t.Helper()
	await(c.t, "the end of the dead generation's channel", dead.ended)
	k, fd := keeping(c.t)
	defer unix.Close(fd)
	k.stores, k.deposits = dead.stores, dead.deposits
	dead.stores, dead.deposits = nil, nil
	k.read()
	next := c.another(append(options, func(next *commander) {
		next.stores = len(k.stores)
		next.beforeReady = func() {
			next.say(&control.Message{Type: control.TypeVault}, fd)
			for loop, files := range k.stores {
				k.send(&control.VaultPacket{Type: control.VaultStore, Flags: control.VaultKilled, Loop: loop, Files: files})
			}
		}
	})...)
	return next, k
}

// resume has it go on with the tunnels.
func (c *commander) resume(k *keeper) {
	c.t.Helper()
	c.ask(control.Message{Type: control.TypeResume})
	for _, d := range k.has(len(k.deposits)) {
		k.send(&control.VaultPacket{Type: control.VaultResume, Entries: []control.VaultEntry{d}})
	}
	k.send(&control.VaultPacket{Type: control.VaultComplete})
}

// offer has the tunnel that a generation releases next go on in another one, if that
// takes it.
func (k *keeper) offer(generation int, to *keeper) (released control.VaultEntry, v verdict) {
	k.t.Helper()
	released = await(k.t, "a tunnel that is released", k.released)
	k.mu.Lock()
	d := k.deposits[released.Number]
	k.mu.Unlock()
	take := control.VaultEntry{
		From: control.VaultTunnel{Generation: generation, Number: released.Number}, Record: d.Record, State: released.State, Files: slices.Concat(d.Files, released.Files),
	}
	to.send(&control.VaultPacket{Type: control.VaultTake, Entries: []control.VaultEntry{take}})
	control.CloseAll(released.Files)
	v = await(k.t, "what became of the tunnel", to.verdicts)
	if v.From != take.From {
		k.t.Errorf("the verdict is on %v, want %v", v.From, take.From)
	}
	return released, v
}

// pass is offer and the answer to who has released it.
func (k *keeper) pass(generation int, to *keeper) (number uint64) {
	k.t.Helper()
	released, v := k.offer(generation, to)
	if !v.taken {
		k.t.Fatalf("generation %d declines", generation+1)
	}
	k.handOver(released.Number, to, v)
	k.answer(control.VaultGone, released.Number)
	return v.Number
}

// handOver makes a deposit that of another generation.
func (k *keeper) handOver(number uint64, to *keeper, v verdict) {
	k.mu.Lock()
	d := k.deposits[number]
	delete(k.deposits, number)
	k.mu.Unlock()
	to.mu.Lock()
	defer to.mu.Unlock()
	d.Number, d.From, d.Record = v.Number, v.From, v.Record
	to.deposits[v.Number] = d
}

// recorded is a line of an access log.
type recorded struct {
	Event      string
	Reason     string
	Generation int
	Received   uint64  `json:"received_bytes"`
	Sent       uint64  `json:"sent_bytes"`
	ID         string  `json:"request_id"`
	Duration   float64 `json:"duration_seconds"`
	Route      string
}

// tunnelsIn are the records of tunnels in a file.
func tunnelsIn(t *testing.T, path string) (all []recorded) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		var r recorded
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			t.Fatal(err)
		}
		if r.Event != "request" {
			all = append(all, r)
		}
	}
	return all
}

// logged has a configuration name an access log, and a generation be given it.
func logged(t *testing.T) (path, config string, give func(*commander)) {
	path = filepath.Join(t.TempDir(), "access.log")
	return path, fmt.Sprintf("[[access_logs]]\npath = %q\n", path), func(c *commander) {
		c.say(&control.Message{Type: control.TypeLogs, Keys: []string{path}}, logFile(t, path))
	}
}

// wantOneEnd checks that of each tunnel there is one opening and one end.
func wantOneEnd(t *testing.T, path string, want ...recorded) {
	t.Helper()
	eventually(t, "the ends are recorded", func() bool { return len(tunnelsIn(t, path)) >= 2*len(want) })
	opened, closed := map[string]int{}, map[string]recorded{}
	for _, r := range tunnelsIn(t, path) {
		if r.Event == "tunnel_open" {
			opened[r.ID]++
			continue
		}
		if _, twice := closed[r.ID]; twice {
			t.Errorf("recorded twice: %+v", r)
		}
		closed[r.ID] = r
	}
	var got []recorded
	for id, r := range closed {
		if opened[id] != 1 {
			t.Errorf("opened %d times: %+v", opened[id], r)
		}
		if r.Duration <= 0 || r.Duration > time.Hour.Seconds() {
			t.Errorf("it lasted %v seconds", r.Duration)
		}
		got = append(got, recorded{Reason: r.Reason, Generation: r.Generation, Received: r.Received, Sent: r.Sent})
	}
	order := func(a, b recorded) int { return strings.Compare(fmt.Sprint(a), fmt.Sprint(b)) }
	slices.SortFunc(got, order)
	slices.SortFunc(want, order)
	if !slices.Equal(got, want) {
		t.Errorf("\n got %+v\nwant %+v", got, want)
	}
}

// peerOf is the address at the other end of a socket.
func peerOf(t *testing.T, fd int) string {
	t.Helper()
	sa, err := unix.Getpeername(fd)
	if err != nil {
		t.Fatal(err)
	}
	in, ok := sa.(*unix.SockaddrInet4)
	if !ok {
		t.Fatalf("%T is no IPv4 address", sa)
	}
	return fmt.Sprintf("127.0.0.1:%d", in.Port)
}

// tunnelFigures are the gauges of tunnels.
func (c *commander) wantTunnels(n int64) {
	c.t.Helper()
	c.wantTunnelsOf("all,all:prefix=/socket", n)
}

func (c *commander) wantTunnelsOf(route string, n int64) {
	c.t.Helper()
	endpoint := ""
	if _, after, ok := strings.Cut(c.file, "endpoints = [\""); ok {
		endpoint, _, _ = strings.Cut(after, "\"")
	}
	for _, name := range []string{"route_tunnels_active{" + route + "}", "endpoint_tunnels_active{web," + endpoint + "}", "cluster_tunnels_active{web}", "tunnels_active"} {
		c.wantCounted(name, n)
	}
	eventually(c.t, fmt.Sprintf("generation %d: the status has %d tunnels", c.number, n), func() bool { return c.status().Tunnels == int(n) })
}

const moves = "[tunnels]\non_reload = \"move\"\n"

func TestATunnelIsDepositedWithItsSocketsAndWithdrawnWhenItHasEnded(t *testing.T) {
	t.Parallel()
	c := command(t, "", "")
	c.serve()
	k := c.keep()
	client, server := c.tunnel()
	carries(client, server)
	d := k.has(1)[0]
	if d.Number == 0 || d.From != (control.VaultTunnel{}) || d.Stand != 0 || len(d.Record) == 0 || len(d.Files) != 2 {
		t.Fatalf("the deposit is %+v", d)
	}
	if got, want := peerOf(t, d.Files[0]), client.LocalAddr().String(); got != want {
		t.Errorf("the first socket is that of %s, want the client, %s", got, want)
	}
	if got, want := peerOf(t, d.Files[1]), server.LocalAddr().String(); got != want {
		t.Errorf("the second socket is that of %s, want the endpoint, %s", got, want)
	}
	k.mu.Lock()
	if len(k.stores) != 1 || len(k.stores[0])%2 != 1 {
		t.Errorf("the loops are %v", k.stores)
	}
	k.mu.Unlock()
	client.Close()
	server.Close()
	k.has(0)
}

func TestATunnelThatIsNotToSurviveIsNotDeposited(t *testing.T) {
	t.Parallel()
	c := command(t, "", "[tunnels]\nsurvive_crash = false\n")
	c.serve()
	k := c.keep()
	client, server := c.tunnel()
	carries(client, server)
	again := c.keep()
	k.has(0)
	again.has(0)
	carries(client, server)
}

// Without a supervisor a tunnel starts at once. Whoever comes gets all of them.
func TestWhoeverKeepsTheTunnelsNextGetsAllOfThem(t *testing.T) {
	t.Parallel()
	c := command(t, "", "")
	c.serve()
	client, server := c.tunnel()
	carries(client, server)
	first := c.keep()
	before := first.has(1)[0]
	otherClient, otherServer := c.tunnel()
	carries(otherClient, otherServer)
	first.has(2)
	second := c.vault()
	await(t, "the end of the channel that was replaced", first.ended)
	second.completed(0)
	after := second.has(2)[0]
	if after.Number != before.Number || string(after.Record) != string(before.Record) || !sameFile(t, after.Files[0], before.Files[0]) {
		t.Errorf("deposited as %+v, and then as %+v", before, after)
	}
	client.Close()
	server.Close()
	second.has(1)
	second.conn.Close() // and nobody comes
	late, lateServer := c.tunnel()
	carries(late, lateServer)
	carries(otherClient, otherServer)
	c.keep().has(2)
}

func TestTheTunnelsOfAKilledGenerationGoOnWhereTheyWere(t *testing.T) {
	t.Parallel()
	path, log, give := logged(t)
	a := new(apart)
	c := command(t, "", log, a.option)
	give(c)
	c.serve()
	k := c.keep()
	client, server := c.tunnel()
	carries(client, server)
	halfClient, halfServer := c.tunnel()
	carries(halfClient, halfServer)
	halfClient.closeWrite()
	if got := halfServer.rest(); got != "" {
		t.Errorf("the server got %q", got)
	}
	pressed, presser := c.tunnel()
	stream := pour(t, presser)
	k.has(3)
	a.kill()

	r, heirs := c.heir(k)
	give(r)
	r.resume(heirs)
	carries(client, server)
	halfServer.say("down\n")
	halfClient.want("down\n")
	r.wantTunnels(3)
	r.wantCounted("route_tunnels_total{all,all:prefix=/socket}", 0) // they were opened elsewhere
	r.wantCounted("cluster_tunnels_total{web}", 0)
	sent := stream.drain(pressed)
	presser.Close()
	pressed.Close()
	halfServer.Close()
	halfClient.rest()
	client.closeWrite()
	server.rest()
	server.Close()
	client.rest()
	heirs.has(0)
	if err := r.wait(); err != nil {
		t.Error(err)
	}
	wantOneEnd(t, path,
		recorded{Reason: "downstream closed", Generation: 2, Received: 8, Sent: 12},
		recorded{Reason: "downstream closed", Generation: 2, Received: 4, Sent: 12},
		recorded{Reason: "upstream closed", Generation: 2, Sent: sent},
	)
	for _, gauge := range []string{"route_tunnels_active{all,all:prefix=/socket}", "cluster_tunnels_active{web}", "tunnels_active"} {
		r.wantCounted(gauge, 0)
	}
}

// flow is what was written without end. It repeats itself, but not in any step that
// something else has.
type flow struct {
	t      *testing.T
	period []byte // twice
	sent   chan uint64
	stop   chan struct{}
}

// next are the bytes behind the first n.
func (f *flow) next(n uint64) []byte {
	half := len(f.period) / 2
	at := int(n % uint64(half))
	return f.period[at : at+half]
}

// pour writes until nothing goes any more, and goes on when something does, until it is
// drained.
func pour(t *testing.T, w *wire) *flow {
	period := make([]byte, 65521) // a prime
	rand.NewChaCha8([32]byte{1}).Read(period)
	f := &flow{t: t, period: append(period, period...), sent: make(chan uint64, 1), stop: make(chan struct{})}
	full := make(chan struct{})
	go func() {
		var once sync.Once
		sent := uint64(0)
		defer func() { f.sent <- sent }()
		for {
			select {
			case <-f.stop:
				w.Conn.(*net.TCPConn).CloseWrite()
				return
			default:
			}
			w.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
			n, err := w.Write(f.next(sent))
			sent += uint64(n)
			if err != nil {
				once.Do(func() { close(full) })
			}
			if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Error(err)
				return
			}
		}
	}()
	await(t, "nothing goes any more", full)
	return f
}

// drain ends the flow, reads all of it at the other end and returns how much it was.
func (f *flow) drain(w *wire) uint64 {
	f.t.Helper()
	close(f.stop)
	w.SetReadDeadline(time.Now().Add(bound))
	n := uint64(0)
	buffer := make([]byte, 64<<10)
	for {
		got, err := w.in.Read(buffer[:min(len(buffer), len(f.period)/2)])
		if !bytes.Equal(buffer[:got], f.next(n)[:got]) {
			f.t.Fatalf("the bytes behind the first %d are wrong", n)
		}
		n += uint64(got)
		if err == io.EOF {
			break
		}
		if err != nil {
			f.t.Fatalf("after %d bytes: %v", n, err)
		}
	}
	if sent := await(f.t, "the end of the flow", f.sent); n != sent {
		f.t.Errorf("%d bytes have come of %d", n, sent)
	}
	return n
}

func TestAGenerationThatResumesTunnelsServesNobodyElse(t *testing.T) {
	t.Parallel()
	c, k, client, server := bereaved(t)
	r, heirs := c.heir(k)
	if answer := r.question(control.Message{Type: control.TypeMove}); answer.Error == "" {
		t.Error("it gives away tunnels that have not come")
	}
	r.ask(control.Message{Type: control.TypeResume})
	for range 3 {
		r.lives() // although it has nothing yet
	}
	if e := r.prepare(2).adopt(); e.report.Phase != control.PhaseDraining || e.report.Vault != control.VaultVersion || !e.report.Served.IsZero() {
		t.Errorf("it says of itself %+v", e.report)
	}
	if answer := r.question(control.Message{Type: control.TypeServe}); answer.Error == "" {
		t.Error("it serves")
	}
	if answer := r.question(control.Message{Type: control.TypeResume}); answer.Error == "" {
		t.Error("it resumes twice")
	}
	d := heirs.has(1)[0]
	heirs.send(&control.VaultPacket{Type: control.VaultResume, Entries: []control.VaultEntry{d}})
	carries(client, server)
	heirs.send(&control.VaultPacket{Type: control.VaultComplete})
	r.lives()
	client.Close()
	server.Close()
	if err := r.wait(); err != nil {
		t.Error(err)
	}
}

// What is resumed is deposited with the supervisor's next one, as all else.
func TestResumedTunnelsAreDepositedAgainWithTheNextSupervisor(t *testing.T) {
	t.Parallel()
	a := new(apart)
	c := command(t, "", "", a.option)
	c.serve()
	k := c.keep()
	client, server := c.tunnel()
	carries(client, server)
	first := k.has(1)[0]
	a.kill()
	r, heirs := c.heir(k)
	first.From = control.VaultTunnel{Generation: 7, Number: 8} // as if it had been there before
	heirs.deposits[first.Number] = first
	r.resume(heirs)
	carries(client, server)
	next := r.keep()
	d := next.has(1)[0]
	if string(d.Record) != string(first.Record) || d.Number != first.Number || d.From != first.From {
		t.Errorf("it is another one:\n%+v\n%+v", d, first)
	}
	if !sameFile(t, d.Files[0], first.Files[0]) || !sameFile(t, next.stores[0][0], heirs.stores[0][0]) {
		t.Error("its socket, or its loop, is another one")
	}
	carries(client, server)
}

// When the supervisor dies in the middle of it, what has come goes on, and nothing more is
// waited for.
func TestAGenerationThatResumesTunnelsEndsAlthoughNotAllHaveCome(t *testing.T) {
	t.Parallel()
	c, k, client, server := bereaved(t)
	r, heirs := c.heir(k)
	r.ask(control.Message{Type: control.TypeResume})
	d := heirs.has(1)[0]
	heirs.send(&control.VaultPacket{Type: control.VaultResume, Entries: []control.VaultEntry{d}})
	heirs.conn.Close()
	carries(client, server)
	r.keep().has(1)
	client.Close()
	server.Close()
	if err := r.wait(); err != nil {
		t.Error(err)
	}
}

// A channel may be replaced in the middle of it: what is on its way is not lost.
func TestTunnelsComeOverTheChannelThatIsReplaced(t *testing.T) {
	t.Parallel()
	c, k, client, server := bereaved(t)
	r, heirs := c.heir(k)
	r.ask(control.Message{Type: control.TypeResume})
	d := heirs.has(1)[0]
	heirs.send(&control.VaultPacket{Type: control.VaultResume, Entries: []control.VaultEntry{d}})
	r.keep().has(1)
	carries(client, server)
	r.wantTunnels(1)
}

func TestATunnelOfWhichNothingIsUnderstoodIsClosed(t *testing.T) {
	t.Parallel()
	a := new(apart)
	c := command(t, "", "", a.option)
	c.serve()
	k := c.keep()
	lost, lostServer := c.tunnel()
	carries(lost, lostServer)
	client, server := c.tunnel()
	carries(client, server)
	k.has(2)
	a.kill()
	r, heirs := c.heir(k)
	d := heirs.deposits[1]
	d.Record = []byte("rubbish")
	heirs.deposits[1] = d
	r.resume(heirs)
	heirs.has(1) // and with it the last descriptors of the lost one are closed
	if up, down := lostServer.rest(), lost.rest(); up != "" || down != "" {
		t.Errorf("the server got %q, the client %q", up, down)
	}
	carries(client, server)
	r.wantTunnels(1)
}

func TestATunnelMovesToAnotherGenerationAndNobodyNotices(t *testing.T) {
	t.Parallel()
	path, log, give := logged(t)
	a := command(t, "", log+moves)
	give(a)
	a.serve()
	from := a.keep()
	client, server := a.tunnel()
	carries(client, server)
	slow, fast := a.tunnel()
	stream := pour(t, fast)
	a.wantTunnels(2)
	b := a.another()
	give(b)
	b.serve()
	to := b.keep()
	a.drain(0)
	a.ask(control.Message{Type: control.TypeMove})
	from.pass(1, to)
	from.pass(1, to)
	if err := a.wait(); err != nil { // which has nothing left
		t.Error(err)
	}
	carries(client, server)
	b.wantTunnels(2)
	b.wantCounted("route_tunnels_total{all,all:prefix=/socket}", 0)
	a.wantCounted("tunnels_active", 0)
	a.wantCounted("route_tunnels_active{all,all:prefix=/socket}", 0)
	a.wantCounted("cluster_tunnels_active{web}", 0)
	for name, n := range a.figures() {
		if strings.HasPrefix(name, "tunnels_ended_total") && n > 0 {
			t.Errorf("%s is %d", name, n)
		}
	}
	sent := stream.drain(slow)
	slow.Close()
	fast.Close()
	client.closeWrite()
	server.rest()
	server.Close()
	to.has(0)
	wantOneEnd(t, path,
		recorded{Reason: "downstream closed", Generation: 2, Received: 8, Sent: 12},
		recorded{Reason: "upstream closed", Generation: 2, Sent: sent},
	)
	b.wantTunnels(0)
}

// A tunnel counts as a connection of its listener where it is.
func TestATunnelThatHasMovedTakesItsPlaceAlong(t *testing.T) {
	t.Parallel()
	a := command(t, "limits = { connections = 1 }", moves)
	a.serve()
	from := a.keep()
	client, server := a.tunnel()
	carries(client, server)
	b := a.another()
	b.serve()
	to := b.keep()
	a.drain(time.Hour)
	a.ask(control.Message{Type: control.TypeMove})
	from.pass(1, to)
	carries(client, server)
	late := b.dial()
	late.say(askPage)
	for range 3 { // who accepted before it came does not do so again
		if n := b.status().Connections; n > 1 {
			t.Errorf("%d connections beside the tunnel", n)
		}
	}
	client.Close()
	server.Close()
	if head := b.answer(late); !strings.Contains(head, "200 OK") {
		t.Errorf("got %s", head)
	}
	late.Close()
	b.drain(time.Hour)
	a.handOver()
	a.serve() // which has room again
	a.works()
}

func TestTunnelsThatAreToStayMoveOnlyWhenAllDo(t *testing.T) {
	t.Parallel()
	a := command(t, "", "")
	a.serve()
	from := a.keep()
	client, server := a.tunnel()
	carries(client, server)
	b := a.another()
	b.serve()
	to := b.keep()
	if answer := a.question(control.Message{Type: control.TypeMove, All: true}); answer.Error == "" {
		t.Error("a generation that serves gives its tunnels away")
	}
	a.drain(0)
	a.ask(control.Message{Type: control.TypeMove})
	carries(client, server)
	if len(from.released) > 0 {
		t.Error("a tunnel that is to stay was released")
	}
	a.ask(control.Message{Type: control.TypeMove, All: true})
	from.pass(1, to)
	carries(client, server)
	if err := a.wait(); err != nil {
		t.Error(err)
	}
}

// Who does not serve takes nothing: the next one would have to move it on.
func TestAGenerationThatDoesNotServeDeclinesTunnels(t *testing.T) {
	t.Parallel()
	a := command(t, "", moves)
	a.serve()
	from := a.keep()
	client, server := a.tunnel()
	carries(client, server)
	b := a.another()
	to := b.keep() // does not serve yet
	a.drain(time.Hour)
	a.ask(control.Message{Type: control.TypeMove})
	for range 2 { // it is tried again
		released, v := from.offer(1, to)
		if v.taken {
			t.Fatal("it was taken")
		}
		from.answer(control.VaultReturned, released.Number)
		carries(client, server)
		b.serve()
		b.drain(time.Hour)
	}
	b.handOver()
	b.serve() // reinstated
	from.pass(1, to)
	carries(client, server)
	b.wantTunnels(1)
	a.wantTunnels(0)
}

// A generation that serves again keeps what it has.
func TestAReinstatedGenerationReleasesNothingMore(t *testing.T) {
	t.Parallel()
	a := command(t, "", moves)
	a.serve()
	from := a.keep()
	client, server := a.tunnel()
	carries(client, server)
	a.drain(time.Hour)
	a.ask(control.Message{Type: control.TypeMove})
	released := await(t, "a tunnel that is released", from.released)
	control.CloseAll(released.Files)
	a.handOver()
	a.serve()
	from.answer(control.VaultReturned, released.Number)
	carries(client, server)
	second, secondServer := a.tunnel()
	carries(second, secondServer)
	candidate, prepared := a.prepareVault(2) // who does not come
	prepared.completed(control.VaultCandidate)
	candidate.conn.Close()
	await(t, "the end of the candidate's vault channel", prepared.ended)
	for range 3 { // its loop has looked then
		for _, d := range a.keep().has(2) {
			if d.Stand != 0 {
				t.Errorf("tunnel %d is deposited as one that stands: %d", d.Number, d.Stand)
			}
		}
	}
}

// A generation that is to be gone soon closes what it has: nobody else gets any of that.
func TestAGenerationThatIsToldToStopReleasesNothingMore(t *testing.T) {
	t.Parallel()
	c := command(t, "", moves)
	c.serve()
	c.keep()
	client, server := c.tunnel()
	carries(client, server)
	c.drain(time.Hour)
	candidate, prepared := c.prepareVault(2) // so that what is to move waits
	prepared.completed(control.VaultCandidate)
	c.ask(control.Message{Type: control.TypeMove})
	c.say(&control.Message{Type: control.TypeStop, Within: time.Hour})
	c.ask(control.Message{Type: control.TypeStatus}) // it has heard that, before the candidate goes
	candidate.conn.Close()
	await(t, "the end of the candidate's vault channel", prepared.ended)
	for range 3 {
		if d := c.keep().has(1)[0]; d.Stand != 0 {
			t.Errorf("it is deposited as one that stands: %d", d.Stand)
		}
	}
	carries(client, server)
}

// What was released and not answered is told to the next supervisor as such, and what has
// come from elsewhere as what it was there. So that one knows who has it.
func TestTheNextSupervisorLearnsWhatIsOnItsWay(t *testing.T) {
	t.Parallel()
	a := command(t, "", moves)
	a.serve()
	from := a.keep()
	client, server := a.tunnel()
	carries(client, server)
	stays, staysServer := a.tunnel()
	carries(stays, staysServer)
	b := a.another()
	b.serve()
	to := b.keep()
	a.drain(0)
	a.ask(control.Message{Type: control.TypeMove})
	first, v := from.offer(1, to)
	if !v.taken {
		t.Fatal("it was declined")
	}
	// The supervisor dies before it has told the one that has released it.
	fromNext, toNext := a.keep(), b.keep()
	for _, d := range fromNext.has(2) {
		if d.Stand == 0 {
			t.Errorf("tunnel %d is deposited as one that does not stand", d.Number)
		}
	}
	taken := toNext.has(1)[0]
	if taken.Number != v.Number || taken.From != (control.VaultTunnel{Generation: 1, Number: first.Number}) {
		t.Errorf("the tunnel that has moved is deposited as %+v", taken)
	}
	for _, d := range fromNext.has(2) {
		verdict := control.VaultReturned
		if d.Number == first.Number {
			verdict = control.VaultGone
		}
		fromNext.answer(verdict, d.Number)
	}
	carries(client, server)
	carries(stays, staysServer)
	a.wantTunnels(1)
	b.wantTunnels(1)
}

// A verdict belongs to the channel over which it was asked for. When that has ended, the
// tunnel was not taken.
func TestATunnelIsNotTakenForASupervisorThatIsGone(t *testing.T) {
	t.Parallel()
	a := command(t, "", moves)
	a.serve()
	from := a.keep()
	client, server := a.tunnel()
	carries(client, server)
	b := a.another()
	b.serve()
	to := b.keep()
	a.drain(0)
	a.ask(control.Message{Type: control.TypeMove})
	released := await(t, "a tunnel that is released", from.released)
	d := from.has(1)[0]
	take := control.VaultEntry{From: control.VaultTunnel{Generation: 1, Number: d.Number}, Record: d.Record, State: released.State, Files: d.Files}
	// Both are in its queue before it looks at either.
	to.conn.CloseRead()
	to.send(&control.VaultPacket{Type: control.VaultTake, Entries: []control.VaultEntry{take}})
	b.keep().has(0)
	b.wantTunnels(0)
	from.answer(control.VaultReturned, d.Number)
	carries(client, server)
}

var endpoints = regexp.MustCompile(`endpoints = .*`)

func TestTunnelsOfARouteThatIsGone(t *testing.T) {
	t.Parallel()
	const otherRoute, otherCluster, noWebSocket = `prefix = "/socket"`, `name = "web"`, "websocket = true\n"
	for name, tt := range map[string]struct {
		tunnels string
		change  func(file string) string
		closes  bool
		limits  bool // the new ones
	}{
		"the route is gone":                     {`on_route_removed = "keep"`, func(f string) string { return strings.ReplaceAll(f, otherRoute, `prefix = "/elsewhere"`) }, false, false},
		"it is gone and its tunnels are closed": {`on_route_removed = "close"`, func(f string) string { return strings.ReplaceAll(f, otherRoute, `prefix = "/elsewhere"`) }, true, false},
		"its cluster is gone": {`on_route_removed = "close"`, func(f string) string {
			return strings.NewReplacer(`cluster = "web"`, `cluster = "other"`, otherCluster, `name = "other"`).Replace(f)
		}, true, false},
		"its cluster is gone, which is no reason": {`on_route_removed = "keep"`, func(f string) string {
			return strings.NewReplacer(`cluster = "web"`, `cluster = "other"`, otherCluster, `name = "other"`).Replace(f)
		}, false, false},
		"it is for WebSocket no more": {`on_route_removed = "close"`, func(f string) string { return strings.ReplaceAll(f, noWebSocket, "") }, true, false},
		"its endpoint is gone":        {`on_route_removed = "close"`, func(f string) string { return endpoints.ReplaceAllString(f, `endpoints = ["127.0.0.1:9"]`) }, false, true},
		"nothing is gone":             {`on_route_removed = "close"`, func(f string) string { return f }, false, true},
		"its listener is gone":        {`on_route_removed = "close"`, func(f string) string { return strings.ReplaceAll(f, `name = "public"`, `name = "private"`) }, false, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path, log, give := logged(t)
			// Which limit ends a tunnel that nobody uses shows whose configuration holds.
			a := command(t, "", log+"[drain]\nclose_spread = \"0s\"\n"+moves+"max_age = \"6s\"\n"+tt.tunnels+"\n")
			give(a)
			a.serve()
			from := a.keep()
			client, server := a.tunnel()
			carries(client, server)
			b := a.another(func(b *commander) {
				b.file = tt.change(strings.Replace(a.file, `max_age = "6s"`, `idle_timeout = "1s"`, 1))
			})
			give(b)
			b.serve()
			to := b.keep()
			a.drain(0)
			a.ask(control.Message{Type: control.TypeMove})
			from.pass(1, to)
			if err := a.wait(); err != nil {
				t.Error(err)
			}
			want := recorded{Reason: "route removed", Generation: 2, Received: 4, Sent: 6}
			if !tt.closes {
				carries(client, server)
				want.Reason, want.Received, want.Sent = "max age", 8, 12
			}
			if tt.limits {
				want.Reason = "idle timeout"
			} else if !tt.closes {
				b.wantTunnels(1) // under the names that it had
			}
			if got := server.rest(); got != "" {
				t.Errorf("the server got %q", got)
			}
			server.Close()
			client.Close()
			to.has(0)
			wantOneEnd(t, path, want)
			b.wantTunnels(0)
		})
	}
}

// prepareVault is prepare with a vault channel.
func (c *commander) prepareVault(epoch uint64) (*adopter, *keeper) {
	c.t.Helper()
	k, vault := keeping(c.t)
	k.read()
	conn, fd := ends(c.t)
	defer control.CloseAll([]int{fd, vault})
	a := adopt(c.t, conn)
	if m := c.question(control.Message{Type: control.TypePrepare, Epoch: epoch}, fd, vault); m.Error != "" {
		c.t.Fatal(m.Error)
	}
	return a, k
}

// There is no moment in an upgrade in which a tunnel is not deposited with whoever
// commands next.
func TestWhileASupervisorIsToComeBothKeepAllTunnels(t *testing.T) {
	t.Parallel()
	c := command(t, "", "")
	c.serve()
	k := c.keep()
	client, server := c.tunnel()
	carries(client, server)
	k.has(1)
	a, next := c.prepareVault(2)
	next.completed(control.VaultCandidate)
	next.has(1)
	second, secondServer := c.tunnel()
	carries(second, secondServer)
	k.has(2)
	next.has(2)
	client.Close()
	server.Close()
	k.has(1)
	next.has(1)
	c.obeyed(a, 2)
	next.completed(0)
	await(t, "the end of the former channel", k.ended)
	third, thirdServer := c.tunnel()
	carries(third, thirdServer)
	next.has(2)
	if len(next.stores) != 1 {
		t.Errorf("the loops are %v", next.stores)
	}
}

// A supervisor may be slow to take the first that it is told.
func TestASupervisorThatIsSlowIsToldAllTheSame(t *testing.T) {
	t.Parallel()
	c := command(t, "", "")
	c.serve()
	client, server := c.tunnel()
	carries(client, server)
	k, fd := keeping(t)
	ours, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	full, err := control.NewVault(ours)
	if err != nil {
		t.Fatal(err)
	}
	for err == nil {
		err = full.TrySend(&control.VaultPacket{Type: control.VaultWithdraw})
	}
	unix.Close(ours) // full.Close would end it for fd, too
	if a := c.question(control.Message{Type: control.TypeVault}, fd); a.Error != "" {
		t.Fatal(a.Error)
	}
	unix.Close(fd)
	eventually(t, "that is noticed", func() bool { return strings.Contains(c.log.String(), "trying again") })
	k.read()
	k.completed(0)
	k.has(1)
}

// Each hears that it has everything, however soon another one comes.
func TestSupervisorsThatComeTogetherAllHearThatTheyHaveEverything(t *testing.T) {
	t.Parallel()
	c := command(t, "", "")
	c.serve()
	for range 20 {
		client, server := c.tunnel()
		carries(client, server)
	}
	for epoch := range uint64(20) {
		k := c.vault()
		_, next := c.prepareVault(2 + epoch)
		k.completed(0)
		next.completed(control.VaultCandidate)
		k.has(20)
		next.has(20)
	}
}

func TestASupervisorThatDoesNotComeTakesNothingAlong(t *testing.T) {
	t.Parallel()
	for name, give := range map[string]func(c *commander, epoch uint64, a *adopter, k *keeper){
		"the former one commands on": func(c *commander, epoch uint64, _ *adopter, _ *keeper) {
			c.ask(control.Message{Type: control.TypeObey, Epoch: epoch})
		},
		"its channel ends":       func(_ *commander, _ uint64, a *adopter, _ *keeper) { a.conn.Close() },
		"another one is to come": func(c *commander, epoch uint64, _ *adopter, _ *keeper) { c.prepare(epoch) },
		"it keeps nothing more":  func(_ *commander, _ uint64, _ *adopter, k *keeper) { k.conn.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := command(t, "", moves)
			c.serve()
			k := c.keep()
			a, next := c.prepareVault(2)
			next.completed(control.VaultCandidate)
			give(c, 3, a, next)
			await(t, "the end of the candidate's vault channel", next.ended)
			client, server := c.tunnel()
			carries(client, server)
			k.has(1)
			next.has(0)
			// What is to move waits while there is one.
			c.drain(time.Hour)
			a, next = c.prepareVault(4)
			next.completed(control.VaultCandidate)
			c.ask(control.Message{Type: control.TypeMove})
			carries(client, server)
			if len(k.released) > 0 {
				t.Error("a tunnel was released")
			}
			give(c, 5, a, next)
			released := await(t, "a tunnel that is released", k.released)
			control.CloseAll(released.Files)
		})
	}
}

// A supervisor that is to come and takes no deposits costs those who open tunnels a
// moment, and itself its channel.
func TestASupervisorThatTakesNoDepositsIsGivenUp(t *testing.T) {
	t.Parallel()
	c := command(t, "", "")
	c.serve()
	k := c.keep()
	stuck, vault := keeping(t) // which does not read
	conn, fd := ends(t)
	adopt(t, conn)
	if m := c.question(control.Message{Type: control.TypePrepare, Epoch: 2}, fd, vault); m.Error != "" {
		t.Fatal(m.Error)
	}
	for unix.Sendto(vault, []byte("x"), unix.MSG_DONTWAIT, nil) == nil { // it would take hundreds of deposits
	}
	control.CloseAll([]int{fd, vault})
	opened := 0
	eventually(t, "the channel is given up", func() bool {
		client, server := c.tunnel()
		carries(client, server)
		opened++
		return errors.Is(stuck.conn.Send(&control.VaultPacket{Type: control.VaultRefused}, bound), unix.EPIPE)
	})
	k.has(opened)
	client, server := c.tunnel()
	carries(client, server)
	k.has(opened + 1)
}

func TestNothingMovesWhileASupervisorIsToCome(t *testing.T) {
	t.Parallel()
	a := command(t, "", moves)
	a.serve()
	from := a.keep()
	client, server := a.tunnel()
	carries(client, server)
	b := a.another()
	b.serve()
	to := b.keep()
	a.drain(time.Hour)
	a.ask(control.Message{Type: control.TypeMove})
	released := await(t, "a tunnel that is released", from.released)
	_, candidate := b.prepareVault(2)
	candidate.completed(control.VaultCandidate)
	d := from.has(1)[0]
	take := control.VaultEntry{From: control.VaultTunnel{Generation: 1, Number: d.Number}, Record: d.Record, State: released.State, Files: d.Files}
	to.send(&control.VaultPacket{Type: control.VaultTake, Entries: []control.VaultEntry{take}})
	if v := await(t, "what became of it", to.verdicts); v.taken {
		t.Error("it was taken")
	}
	next, keeps := a.prepareVault(2)
	keeps.completed(control.VaultCandidate)
	from.answer(control.VaultReturned, d.Number)
	carries(client, server)
	a.obeyed(next, 2)
	keeps.completed(0)
	if d := keeps.has(1)[0]; d.Stand != 0 || len(from.released)+len(keeps.released) > 0 {
		t.Errorf("the tunnel stands: %d; %d and %d were released", d.Stand, len(from.released), len(keeps.released))
	}
	// It is for the new one to say that tunnels are to move.
	a.ask(control.Message{Type: control.TypeMove})
	control.CloseAll(await(t, "a tunnel that is released", keeps.released).Files)
}

// What was on its way before is settled by the supervisor that it was given to.
func TestASupervisorThatIsToComeKeepsNoTunnelThatHasMoved(t *testing.T) {
	t.Parallel()
	a := command(t, "", moves)
	a.serve()
	from := a.keep()
	client, server := a.tunnel()
	carries(client, server)
	b := a.another()
	b.serve()
	to := b.keep()
	a.drain(time.Hour)
	a.ask(control.Message{Type: control.TypeMove})
	released, v := from.offer(1, to)
	if !v.taken {
		t.Fatal("it was declined")
	}
	_, next := a.prepareVault(2)
	next.completed(control.VaultCandidate)
	if d := next.has(1)[0]; d.Stand == 0 {
		t.Error("it does not stand")
	}
	from.answer(control.VaultGone, released.Number)
	next.has(0)
	carries(client, server)
	a.wantTunnels(0)
}

func TestRubbishAboutTunnelsHurtsNobody(t *testing.T) {
	t.Parallel()
	c := command(t, "", moves)
	c.serve()
	k := c.keep()
	client, server := c.tunnel()
	carries(client, server)
	d := k.has(1)[0]
	file := memoryFile(t)
	entry := func(e control.VaultEntry) []control.VaultEntry { return []control.VaultEntry{e} }
	from := control.VaultTunnel{Generation: 9, Number: 9}
	for _, p := range []control.VaultPacket{
		{Type: control.VaultStore, Files: []int{file}},
		{Type: control.VaultComplete},
		{Type: control.VaultDeposit, Entries: entry(control.VaultEntry{Number: 1, Files: []int{file, file}})},
		{Type: control.VaultResume, Entries: entry(control.VaultEntry{Number: 1, Record: d.Record, Files: d.Files})},
		{Type: control.VaultResume, Entries: entry(control.VaultEntry{Number: 1, Files: []int{file}})},
		{Type: control.VaultGone, Entries: make([]control.VaultEntry, control.MaxVaultNumbers)},
		{Type: control.VaultGone, Entries: entry(control.VaultEntry{Number: d.Number, Files: []int{file}})},
		{Type: control.VaultReturned, Entries: entry(control.VaultEntry{Number: d.Number})},
		{Type: control.VaultRefused, Entries: entry(control.VaultEntry{Number: 1 << 63})},
		{Type: control.VaultTake, Files: []int{file}},
	} {
		k.send(&p)
	}
	offers := []control.VaultEntry{
		{From: from},
		{From: from, Record: d.Record, Files: []int{file, file}},
		{From: from, Record: []byte("rubbish"), State: d.Record, Files: []int{file, file, file, file}},
	}
	k.send(&control.VaultPacket{Type: control.VaultTake, Entries: offers})
	for range offers {
		if v := await(t, "what became of it", k.verdicts); v.taken || v.From != from {
			t.Errorf("the verdict is %+v", v)
		}
	}
	carries(client, server)
	heldOnlyByUs(t, "what came with it", file)
	c.wantTunnels(1)
	if n := strings.Count(c.log.String(), "what the supervisor says about tunnels is not understood"); n != 1 {
		t.Errorf("that is logged %d times", n)
	}
	k.has(1)
}

// What has no room is declined, and the connections with it are left to who has them.
func TestATunnelWhoseSocketsAreNoneIsDeclined(t *testing.T) {
	t.Parallel()
	a := command(t, "", moves)
	a.serve()
	from := a.keep()
	client, server := a.tunnel()
	carries(client, server)
	b := a.another()
	b.serve()
	to := b.keep()
	a.drain(time.Hour)
	a.ask(control.Message{Type: control.TypeMove})
	released := await(t, "a tunnel that is released", from.released)
	d := from.has(1)[0]
	file := memoryFile(t)
	take := control.VaultEntry{From: control.VaultTunnel{Generation: 1, Number: d.Number}, Record: d.Record, State: released.State, Files: []int{file, file}}
	to.send(&control.VaultPacket{Type: control.VaultTake, Entries: []control.VaultEntry{take}})
	if v := await(t, "what became of it", to.verdicts); v.taken {
		t.Error("it was taken")
	}
	heldOnlyByUs(t, "what came with it", file)
	b.wantTunnels(0)
	from.answer(control.VaultReturned, d.Number)
	carries(client, server)
}

func TestAGenerationSaysThatItKnowsTheVault(t *testing.T) {
	t.Parallel()
	c := command(t, "", "")
	if c.hello.Vault != control.VaultVersion {
		t.Errorf("it says hello with %+v", c.hello)
	}
	c.serve()
	if r := c.prepare(2).adopt().report; r.Vault != control.VaultVersion {
		t.Errorf("it says of itself %+v", r)
	}
	conn, fd := ends(t)
	defer conn.Close()
	defer unix.Close(fd)
	if a := c.question(control.Message{Type: control.TypeVault}); a.Error == "" {
		t.Error("a vault channel that is not there is one")
	}
	if a := c.question(control.Message{Type: control.TypeVault}, memoryFile(t)); a.Error == "" {
		t.Error("a file is a vault channel")
	}
	if a := c.question(control.Message{Type: control.TypeResume}); a.Error == "" {
		t.Error("a generation that serves resumes tunnels")
	}
	c.works()
}

// store is the memory file of a loop.
func store(t *testing.T) int {
	t.Helper()
	fd, err := inflight.NewFile(64, 16)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// Loops that are none are a reason not to be ready, and not to die without a word.
func TestLoopsOfADeadGenerationThatAreNone(t *testing.T) {
	t.Parallel()
	file := memoryFile(t)
	for name, packets := range map[string][]control.VaultPacket{
		"one end of a pipe":        {{Type: control.VaultStore, Files: []int{file, file}}, {Type: control.VaultStore, Loop: 1, Files: []int{file}}},
		"nothing":                  {{Type: control.VaultStore}, {Type: control.VaultStore, Loop: 1}},
		"a loop twice":             {{Type: control.VaultStore, Files: []int{store(t)}}, {Type: control.VaultStore, Files: []int{store(t)}}},
		"a loop that is not there": {{Type: control.VaultStore, Loop: 2, Files: []int{file}}, {Type: control.VaultStore, Files: []int{file}}},
	} {
		k, fd := keeping(t)
		k.read()
		c := command(t, "", "")
		next := c.another(func(next *commander) {
			next.stores, next.fails = 2, true
			next.beforeReady = func() {
				next.say(&control.Message{Type: control.TypeVault}, fd)
				unix.Close(fd)
				for _, p := range packets {
					k.send(&p)
				}
			}
		})
		if !strings.Contains(next.failure, "the loops of a dead generation") {
			t.Errorf("%s: it says %q", name, next.failure)
		}
		if err := next.wait(); err == nil {
			t.Errorf("%s: it ends without an error", name)
		}
		await(t, "the end of its channel", k.ended)
	}
	heldOnlyByUs(t, "what came", file)
}

// What is damaged of one loop costs its own tunnels, and says so; the generation goes on
// with whatever else there is.
func TestADamagedMemoryFileCostsItsTunnelsAlone(t *testing.T) {
	t.Parallel()
	c, k, client, server := bereaved(t)
	for _, files := range k.stores {
		if _, err := unix.Pwrite(files[0], make([]byte, 512), 0); err != nil {
			t.Fatal(err)
		}
	}
	r, heirs := c.heir(k)
	r.resume(heirs)
	for _, conn := range []*wire{client, server} {
		conn.SetReadDeadline(time.Now().Add(bound))
		if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("the peer sees %v", err)
		}
	}
	heirs.has(0) // it was withdrawn: nobody else is to try it
	if err := r.wait(); err != nil {
		t.Error(err)
	}
	if !strings.Contains(r.log.String(), "is damaged") {
		t.Error("nobody is told")
	}
}

// What an operator has asked for is known to every supervisor that comes.
func TestTheNextSupervisorLearnsThatAllTunnelsAreToMove(t *testing.T) {
	t.Parallel()
	c := command(t, "", "")
	c.serve()
	k := c.keep()
	client, server := c.tunnel()
	carries(client, server)
	k.has(1)
	c.drain(time.Hour)
	for epoch := uint64(2); epoch < 6; epoch++ {
		want := epoch > 3
		a := c.prepare(epoch)
		if e := a.adopt(); e.report.MovesAll != want {
			t.Errorf("epoch %d: it says %v, want %v", epoch, e.report.MovesAll, want)
		}
		c.obeyed(a, epoch)
		k = c.keep()
		k.has(1)
		if epoch == 3 {
			c.ask(control.Message{Type: control.TypeMove, All: true})
		}
	}
}
