package vault_test

import (
	"os"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/control"
	"holdfast/internal/vault"
)

// record is how large a generation's records are, about.
const record = 300

// batch returns deposits of n tunnels from a number on. All have the same sockets.
func batch(from, n int, fds []int) []control.VaultEntry {
	es := make([]control.VaultEntry, n)
	for i := range es {
		es[i] = control.VaultEntry{Number: uint64(from + i), Record: make([]byte, record), Files: fds}
	}
	return es
}

func socketPair(t testing.TB) []int {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { control.CloseAll(fds[:]) })
	return fds[:]
}

// Tunnels that begin and end, as many as the vault takes.
func BenchmarkDeposit(b *testing.B) {
	v := start(b, vault.Options{})
	a, fds := join(b, v, 1), socketPair(b)
	n := 0
	for b.Loop() {
		es := batch(n, control.VaultBatch, fds)
		a.send(control.VaultDeposit, es...)
		for i := range es {
			es[i] = control.VaultEntry{Number: es[i].Number}
		}
		a.send(control.VaultWithdraw, es...)
		n += control.VaultBatch
	}
	a.synced()
	b.ReportMetric(float64(n)/b.Elapsed().Seconds(), "tunnels/s")
}

// fill deposits n tunnels.
func fill(t testing.TB, a *player, n int, fds []int) {
	t.Helper()
	for from := 0; from < n; from += control.VaultBatch {
		a.send(control.VaultDeposit, batch(from, min(n-from, control.VaultBatch), fds)...)
	}
	a.synced()
}

func heap() uint64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

func TestADepositIsSmall(t *testing.T) { // not parallel: it looks at the heap
	v := start(t, vault.Options{})
	a, fds := join(t, v, 1), socketPair(t)
	const n = 4000
	before := heap()
	fill(t, a, n, fds)
	each := (int(heap()) - int(before)) / n
	t.Logf("%d bytes each, %d of them its record", each, record)
	if each > record+512 {
		t.Errorf("%d bytes for a tunnel whose record has %d", each, record)
	}
	v.Close()
	eventually(t, "the deposits are not closed", func() bool { // the next test counts descriptors
		open, err := os.ReadDir("/proc/self/fd")
		return err == nil && len(open) < 100
	})
}

// A dead generation's tunnels are handed to its successor.
func BenchmarkHandTunnels(b *testing.B) {
	const n = 5000
	v := start(b, vault.Options{})
	fds := socketPair(b)
	a := join(b, v, 1)
	fill(b, a, n, fds)
	a.die()
	if left := v.Died(1, true); left != n {
		b.Fatalf("%d tunnels are left", left)
	}
	dead := 1
	for b.Loop() {
		r := deaf(b, v, dead+1)
		done := make(chan int)
		go func() {
			got := 0
			for {
				p, err := r.conn.Receive(0)
				if err != nil || p.Type == control.VaultComplete {
					done <- got
					return
				}
				got += len(p.Entries)
				for _, e := range p.Entries {
					control.CloseAll(e.Files)
				}
				control.CloseAll(p.Files)
			}
		}()
		if err := v.HandTunnels(dead, dead+1); err != nil {
			b.Fatal(err)
		}
		if got := <-done; got != n {
			b.Fatalf("%d tunnels have come", got)
		}
		r.die()
		dead++
		if left := v.Died(dead, true); left != n {
			b.Fatalf("%d tunnels are left", left)
		}
	}
	b.ReportMetric(float64(n*(dead-1))/b.Elapsed().Seconds(), "tunnels/s")
}

// Tunnels that move from one generation to another, a batch at a time.
func BenchmarkMove(b *testing.B) {
	v := start(b, vault.Options{})
	fds := socketPair(b)
	x, y := join(b, v, 1), join(b, v, 2)
	v.Target(2)
	moved := 0
	for b.Loop() {
		b.StopTimer()
		es := batch(moved, control.VaultBatch, fds)
		x.send(control.VaultDeposit, es...)
		for i := range es {
			es[i] = control.VaultEntry{Number: es[i].Number, State: make([]byte, 64)}
		}
		b.StartTimer()
		x.send(control.VaultRelease, es...)
		p := y.want(control.VaultTake)
		for i, e := range p.Entries {
			es[i] = control.VaultEntry{From: e.From, Number: uint64(moved + i), Record: make([]byte, record)}
		}
		y.send(control.VaultTaken, es...)
		for got := 0; got < len(es); {
			got += len(x.want(control.VaultGone).Entries)
		}
		b.StopTimer()
		for i := range es {
			es[i] = control.VaultEntry{Number: uint64(moved + i)}
			control.CloseAll(p.Entries[i].Files)
		}
		y.send(control.VaultWithdraw, es...)
		moved += len(es)
		b.StartTimer()
	}
	b.ReportMetric(float64(moved)/b.Elapsed().Seconds(), "tunnels/s")
}

// Tunnels that begin and end one by one, nearly 10,000 a second, as in a generation that is not
// busy enough to have several together: what the vault's side of it costs.
func BenchmarkOneByOne(b *testing.B) {
	v := start(b, vault.Options{})
	a, fds := join(b, v, 1), socketPair(b)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	n := 0
	all, ours := cpu(b, unix.RUSAGE_SELF), cpu(b, unix.RUSAGE_THREAD)
	for b.Loop() {
		e := control.VaultEntry{Number: uint64(n), Record: make([]byte, record), Files: fds}
		a.try(packet(control.VaultDeposit, e))
		if n > 100 {
			a.try(packet(control.VaultWithdraw, control.VaultEntry{Number: uint64(n - 100)}))
		}
		n++
		for next := time.Now().Add(100 * time.Microsecond); time.Now().Before(next); {
			runtime.KeepAlive(n) // a pause would be far longer on a busy machine
		}
	}
	vaults := cpu(b, unix.RUSAGE_SELF) - all - (cpu(b, unix.RUSAGE_THREAD) - ours)
	b.ReportMetric(float64(vaults.Nanoseconds())/1000/float64(n), "cpu-µs/tunnel")
	a.synced()
}

// try sends p as a loop does.
func (p *player) try(packet *control.VaultPacket) {
	for {
		switch err := p.conn.TrySend(packet); err {
		case nil:
			return
		case control.ErrVaultBusy:
			time.Sleep(time.Millisecond)
		default:
			p.t.Fatal(err)
		}
	}
}

// cpu returns the time on processors of this process, or of this thread.
func cpu(t testing.TB, who int) time.Duration {
	var r unix.Rusage
	if err := unix.Getrusage(who, &r); err != nil {
		t.Fatal(err)
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}
