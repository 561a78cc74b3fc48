package control_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"holdfast/internal/control"
)

// vaults returns both ends of a vault channel.
func vaults(t testing.TB) (a, b *control.Vault) {
	t.Helper()
	fdA, fdB, err := control.Ends()
	if err != nil {
		t.Fatal(err)
	}
	a, errA := control.NewVault(fdA)
	b, errB := control.NewVault(fdB)
	if err := errors.Join(errA, errB); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}

// rawVault returns an end and the descriptor of the other one, to send rubbish with.
func rawVault(t testing.TB) (*control.Vault, int) {
	t.Helper()
	a, b, err := control.Ends()
	if err != nil {
		t.Fatal(err)
	}
	v, err := control.NewVault(a)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { v.Close(); unix.Close(b) })
	return v, b
}

// full is a packet in which everything is set, with so many descriptors of a file.
func full(k *token) (p *control.VaultPacket, files int) {
	return &control.VaultPacket{
		Type: control.VaultTake, Flags: control.VaultKilled, Loop: 65535, Files: k.times(3),
		Entries: []control.VaultEntry{
			{Number: 1<<64 - 1, From: control.VaultTunnel{Generation: 1<<32 - 1, Number: 1 << 63}, Stand: 1<<64 - 2, Record: []byte("who"), State: []byte("how"), Files: k.times(4)},
			{Number: 7},
			{State: bytes.Repeat([]byte{1}, control.MaxVaultState), Record: bytes.Repeat([]byte{2}, control.MaxVaultRecord), Files: k.times(1)},
		},
	}, 8
}

// withoutFiles is the packet as its bytes alone have it.
func withoutFiles(p *control.VaultPacket) control.VaultPacket {
	c := *p
	c.Files, c.Entries = nil, slices.Clone(p.Entries)
	for i := range c.Entries {
		e := &c.Entries[i]
		e.Files, e.Record, e.State = nil, append([]byte(nil), e.Record...), append([]byte(nil), e.State...)
	}
	return c
}

// filesOf is how many descriptors belong to the packet and to each of its entries.
func filesOf(p *control.VaultPacket) (n []int) {
	n = append(n, len(p.Files))
	for i := range p.Entries {
		n = append(n, len(p.Entries[i].Files))
	}
	return n
}

func TestAVaultPacketArrivesAsItWasSent(t *testing.T) {
	t.Parallel()
	k := newToken(t)
	for name, send := range map[string]func(*control.Vault, *control.VaultPacket) error{
		"by a goroutine": func(v *control.Vault, p *control.VaultPacket) error { return v.Send(p, soon) },
		"by a loop":      (*control.Vault).TrySend,
	} {
		a, b := vaults(t)
		want, files := full(k)
		if err := send(a, want); err != nil {
			t.Fatal(name, err)
		}
		got, err := b.Receive(0)
		if err != nil {
			t.Fatal(name, err)
		}
		if g, w := withoutFiles(got), withoutFiles(want); !reflect.DeepEqual(g, w) {
			t.Errorf("%s\n got %.300v\nwant %.300v", name, g, w)
		}
		if !slices.Equal(filesOf(got), filesOf(want)) {
			t.Errorf("%s: descriptors are with %v, want %v", name, filesOf(got), filesOf(want))
		}
		k.wantOpen(t, 1+files)
		got.CloseFiles()
		k.wantOpen(t, 1)
	}
}

func TestAPacketMayHaveAsManyDescriptorsAsTheKernelPasses(t *testing.T) {
	t.Parallel()
	k := newToken(t)
	a, b := vaults(t)
	if err := a.TrySend(&control.VaultPacket{Type: control.VaultStore, Files: k.times(control.MaxFiles)}); err != nil {
		t.Fatal(err)
	}
	p, err := b.Receive(0)
	if err != nil || len(p.Files) != control.MaxFiles {
		t.Fatalf("got %v, %v", p, err)
	}
	p.CloseFiles()
	k.wantOpen(t, 1)
}

func TestWhatDoesNotFitIntoAVaultPacketIsNotSent(t *testing.T) {
	t.Parallel()
	k := newToken(t)
	entries := func(n int, e control.VaultEntry) control.VaultPacket {
		return control.VaultPacket{Type: control.VaultDeposit, Entries: slices.Repeat([]control.VaultEntry{e}, n)}
	}
	for name, p := range map[string]control.VaultPacket{
		"a record":    entries(1, control.VaultEntry{Record: make([]byte, control.MaxVaultRecord+1)}),
		"a state":     entries(1, control.VaultEntry{State: make([]byte, control.MaxVaultState+1)}),
		"descriptors": entries(1, control.VaultEntry{Files: k.times(5)}),
		"them of all": entries(64, control.VaultEntry{Files: k.times(4)}),
		"all bytes":   entries(2, control.VaultEntry{State: make([]byte, control.MaxVaultState)}),
		"numbers":     entries(control.MaxVaultNumbers+1, control.VaultEntry{}),
		"many more":   entries(70_000, control.VaultEntry{}),
		"a loop":      {Type: control.VaultStore, Loop: 1 << 16},
		"no loop":     {Type: control.VaultStore, Loop: -1},
	} {
		a, _ := vaults(t)
		if a.TrySend(&p) == nil || a.Send(&p, soon) == nil {
			t.Errorf("%s: it was sent", name)
		}
	}
}

// Whoever packs tunnels asks before each one; what is packed so is sent.
func TestAPacketSaysHowMuchItTakes(t *testing.T) {
	t.Parallel()
	k := newToken(t)
	for name, tt := range map[string]struct {
		e    control.VaultEntry
		want int
	}{
		"numbers":     {control.VaultEntry{}, control.MaxVaultNumbers},
		"descriptors": {control.VaultEntry{Files: k.times(4)}, control.MaxFiles / 4},
		"records":     {control.VaultEntry{Record: make([]byte, control.MaxVaultRecord)}, 41},
		"one state":   {control.VaultEntry{Record: make([]byte, control.MaxVaultRecord), State: make([]byte, control.MaxVaultState)}, 1},
	} {
		a, b := vaults(t)
		p := &control.VaultPacket{Type: control.VaultTake}
		for p.Takes(&tt.e) {
			p.Entries = append(p.Entries, tt.e)
		}
		if len(p.Entries) != tt.want {
			t.Errorf("%s: it takes %d, want %d", name, len(p.Entries), tt.want)
		}
		if err := a.TrySend(p); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		got, err := b.Receive(0)
		if err != nil {
			t.Fatal(name, err)
		}
		got.CloseFiles()
		p.Entries = append(p.Entries, tt.e)
		if a.TrySend(p) == nil {
			t.Errorf("%s: one more was sent as well", name)
		}
	}
	p := &control.VaultPacket{Type: control.VaultStore, Files: k.times(control.MaxFiles - 1)}
	if p.Takes(&control.VaultEntry{Files: k.times(2)}) || !p.Takes(&control.VaultEntry{Files: k.times(1)}) {
		t.Error("the packet's own descriptors are not counted")
	}
}

// A batch of tunnels with the largest records is one packet, so that nothing of it is
// sent without the rest.
func TestABatchOfTunnelsIsOnePacket(t *testing.T) {
	t.Parallel()
	k := newToken(t)
	p := &control.VaultPacket{Type: control.VaultDeposit}
	for range control.VaultBatch {
		e := control.VaultEntry{Record: make([]byte, control.MaxVaultRecord), Files: k.times(2)}
		if !p.Takes(&e) {
			t.Fatalf("only %d fit", len(p.Entries))
		}
		p.Entries = append(p.Entries, e)
	}
}

func TestALoopIsNotHeldUpByAFullVaultChannel(t *testing.T) {
	t.Parallel()
	a, b := vaults(t)
	p := &control.VaultPacket{Type: control.VaultDeposit, Entries: []control.VaultEntry{{Record: make([]byte, 4000)}}}
	sent := 0
	var err error
	for ; sent < 100_000; sent++ {
		if err = a.TrySend(p); err != nil {
			break
		}
	}
	if !errors.Is(err, control.ErrVaultBusy) {
		t.Fatalf("after %d packets: %v", sent, err)
	}
	if err := a.Send(p, 10*time.Millisecond); err == nil {
		t.Error("Send did not run out of time")
	}
	if _, err := b.Receive(0); err != nil {
		t.Fatal(err)
	}
	if err := a.Send(p, soon); err != nil {
		t.Error(err)
	}
	for range sent { // what had found room before is still there
		if _, err := b.Receive(0); err != nil {
			t.Fatal(err)
		}
	}
}

func TestTheEndOfAVaultChannelComesBehindAllThatWasSent(t *testing.T) {
	t.Parallel()
	k := newToken(t)
	for name, unread := range map[string]bool{"all was read at the other end": false, "the other end has not read what we sent": true} {
		a, b := vaults(t)
		if unread { // upon which the kernel says ECONNRESET first
			if err := b.TrySend(&control.VaultPacket{Type: control.VaultGone}); err != nil {
				t.Fatal(err)
			}
		}
		for n := range uint64(5) {
			if err := a.TrySend(&control.VaultPacket{Type: control.VaultDeposit, Entries: []control.VaultEntry{{Number: n, Files: k.times(2)}}}); err != nil {
				t.Fatal(err)
			}
		}
		a.Close()
		for n := range uint64(5) {
			p, err := b.Receive(0)
			if err != nil || len(p.Entries) != 1 || p.Entries[0].Number != n {
				t.Fatalf("%s: packet %d: %v, %v", name, n, p, err)
			}
			p.CloseFiles()
		}
		for range 2 {
			if _, err := b.Receive(0); err != io.EOF {
				t.Errorf("%s: behind the last packet: %v", name, err)
			}
		}
		k.wantOpen(t, 1)
		if err := b.TrySend(&control.VaultPacket{Type: control.VaultGone}); err == nil || errors.Is(err, control.ErrVaultBusy) {
			t.Errorf("%s: to nobody: %v", name, err)
		}
	}
}

// So it is known to the last packet what the other side has said.
func TestAVaultChannelThatReadsNoMoreHasReadAllThatWasSent(t *testing.T) {
	t.Parallel()
	a, b := vaults(t)
	p := &control.VaultPacket{Type: control.VaultWithdraw}
	var sent atomic.Int64
	var sending sync.WaitGroup
	sending.Go(func() {
		for {
			switch err := a.TrySend(p); {
			case err == nil:
				sent.Add(1)
			case !errors.Is(err, control.ErrVaultBusy):
				return
			}
		}
	})
	received := int64(0)
	for range 100 {
		if _, err := b.Receive(0); err != nil {
			t.Fatal(err)
		}
		received++
	}
	if err := b.CloseRead(); err != nil {
		t.Fatal(err)
	}
	sending.Wait()
	for {
		_, err := b.Receive(0)
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		received++
	}
	if received != sent.Load() {
		t.Errorf("%d packets were sent, and %d received", sent.Load(), received)
	}
}

func TestAClosedVaultChannelSendsNothing(t *testing.T) {
	t.Parallel()
	a, _ := vaults(t)
	var sending sync.WaitGroup
	for range 4 {
		sending.Go(func() { // until it is closed, and never into another descriptor
			for {
				err := a.TrySend(&control.VaultPacket{Type: control.VaultGone})
				if errors.Is(err, net.ErrClosed) {
					return
				}
				if err != nil && !errors.Is(err, control.ErrVaultBusy) {
					t.Error(err)
					return
				}
			}
		})
	}
	a.Close()
	sending.Wait()
	if err := a.Send(&control.VaultPacket{Type: control.VaultGone}, soon); !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
	if _, err := a.Receive(0); err == nil || err == io.EOF {
		t.Errorf("receive says %v", err)
	}
}

// packet is one as it travels: entries are what belongs to each behind its number.
func packet(kind byte, entries, files uint16, rest ...[]byte) []byte {
	b := []byte{kind, 0, 0, 0}
	b = binary.NativeEndian.AppendUint16(b, entries)
	b = binary.NativeEndian.AppendUint16(b, files)
	return append(b, bytes.Join(rest, nil)...)
}

func entry(files byte, record, state uint32, rest string) []byte {
	b := make([]byte, 32)
	b[21] = files
	binary.NativeEndian.PutUint32(b[24:], record)
	binary.NativeEndian.PutUint32(b[28:], state)
	return append(b, rest...)
}

func TestRubbishOnAVaultChannelIsRefusedAndItsDescriptorsAreClosed(t *testing.T) {
	t.Parallel()
	padded := entry(0, 0, 0, "")
	padded[22] = 1
	for name, data := range map[string][]byte{
		"a single byte":                   {1},
		"no type":                         packet(0, 0, 2),
		"a type that nobody knows":        packet(13, 0, 2),
		"more descriptors than have come": packet(1, 0, 3),
		"fewer descriptors than came":     packet(1, 0, 1),
		"an entry that is not there":      packet(2, 1, 2),
		"half an entry":                   packet(2, 1, 2, entry(0, 0, 0, "")[:31]),
		"a record that is not there":      packet(2, 1, 0, entry(2, 4, 0, "abc")),
		"a state that is not there":       packet(2, 1, 0, entry(2, 3, 1, "abc")),
		"lengths that overflow":           packet(2, 1, 0, entry(2, 1<<32-1, 1<<32-1, "abc")),
		"a record that is too long":       packet(2, 1, 0, entry(2, control.MaxVaultRecord+1, 0, strings.Repeat("x", control.MaxVaultRecord+1))),
		"a state that is too long":        packet(2, 1, 0, entry(2, 0, control.MaxVaultState+1, strings.Repeat("x", control.MaxVaultState+1))),
		"bytes behind the end":            packet(2, 1, 0, entry(2, 0, 0, "x")),
		"bytes where there are none":      packet(2, 1, 2, padded),
		"too many entries":                packet(2, control.MaxVaultNumbers+1, 2, bytes.Repeat(entry(0, 0, 0, ""), control.MaxVaultNumbers+1)),
		"too many bytes":                  append(packet(2, 1, 2), make([]byte, control.MaxVaultPacket)...),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			k := newToken(t)
			v, fd := rawVault(t)
			if err := unix.Sendmsg(fd, data, unix.UnixRights(k.times(2)...), nil, 0); err != nil {
				t.Fatal(err)
			}
			p, err := v.Receive(0)
			if !errors.Is(err, control.ErrProtocol) || p != nil {
				t.Errorf("got %v, %v", p, err)
			}
			k.wantOpen(t, 1)
			// It is of one packet.
			if err := unix.Sendmsg(fd, packet(1, 0, 0), nil, nil, 0); err != nil {
				t.Fatal(err)
			}
			if p, err := v.Receive(0); err != nil || p.Type != control.VaultStore {
				t.Errorf("the next packet: %v, %v", p, err)
			}
		})
	}
}

func TestAnEntryHasAtMostSoManyDescriptors(t *testing.T) {
	t.Parallel()
	k := newToken(t)
	v, fd := rawVault(t)
	if err := unix.Sendmsg(fd, packet(2, 1, 0, entry(5, 0, 0, "")), unix.UnixRights(k.times(5)...), nil, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := v.Receive(0); !errors.Is(err, control.ErrProtocol) {
		t.Error(err)
	}
	k.wantOpen(t, 1)
}

// An empty packet is what the end looks like. Its descriptors are closed all the same.
func TestAnEmptyPacketEndsAVaultChannelAndLeavesNothingOpen(t *testing.T) {
	t.Parallel()
	k := newToken(t)
	v, fd := rawVault(t)
	rights := unix.UnixRights(k.times(3)...)
	header := unix.Msghdr{Control: &rights[0]} // unix.Sendmsg would add a byte
	header.SetControllen(len(rights))
	if _, _, err := unix.Syscall(unix.SYS_SENDMSG, uintptr(fd), uintptr(unsafe.Pointer(&header)), 0); err != 0 {
		t.Fatal(err)
	}
	if _, err := v.Receive(0); err != io.EOF {
		t.Error(err)
	}
	k.wantOpen(t, 1)
}

// More control data than there is room for is what the kernel does with descriptors for
// which the process has none left: it passes on what fits and closes the others.
func TestWhatHasLostItsDescriptorsIsStillKnownByItsNumbers(t *testing.T) {
	t.Parallel()
	k := newToken(t)
	sent := &control.VaultPacket{Type: control.VaultTake, Files: k.times(1), Entries: []control.VaultEntry{
		{Number: 3, From: control.VaultTunnel{Generation: 2, Number: 9}, Record: []byte("r"), Files: k.times(2)}, {Number: 4, Files: k.times(4)},
	}}
	a, b := vaults(t)
	control.LimitOOB(b, 3)
	if err := a.TrySend(sent); err != nil {
		t.Fatal(err)
	}
	got, err := b.Receive(0)
	if !errors.Is(err, control.ErrProtocol) || got == nil {
		t.Fatalf("got %v, %v", got, err)
	}
	if g, w := withoutFiles(got), withoutFiles(sent); !reflect.DeepEqual(g, w) {
		t.Errorf("\n got %+v\nwant %+v", g, w)
	}
	if n := filesOf(got); slices.Max(n) != 0 {
		t.Errorf("it has descriptors: %v", n)
	}
	k.wantOpen(t, 1)
}

func TestOnlyASeqpacketSocketIsAVaultChannel(t *testing.T) {
	t.Parallel()
	k := newToken(t)
	fd, err := unix.FcntlInt(uintptr(k.fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := control.NewVault(fd); err == nil {
		t.Error("a file is one")
	}
	k.wantOpen(t, 1)
}

// FuzzVaultPacket: whatever comes is refused or is exactly what is sent for it.
func FuzzVaultPacket(f *testing.F) {
	f.Add(packet(1, 0, 0), uint8(0))
	f.Add(packet(1, 0, 2), uint8(2))
	f.Add(packet(2, 2, 1, entry(2, 3, 0, "who"), entry(0, 0, 3, "how")), uint8(3))
	f.Add(packet(7, 1, 0, entry(0, 1<<31, 1<<31, "")), uint8(0))
	f.Fuzz(func(t *testing.T, data []byte, files uint8) {
		fds := make([]int, files)
		for i := range fds {
			fds[i] = 1000 + i
		}
		lost, lostErr := control.DecodeVault(data, nil, true)
		p, err := control.DecodeVault(data, fds, false)
		if err != nil {
			return
		}
		if lostErr != nil || !reflect.DeepEqual(withoutFiles(p), withoutFiles(lost)) {
			t.Errorf("without descriptors it is %v, %v", lost, lostErr)
		}
		again, theirs, err := control.EncodeVault(p)
		if err != nil || !bytes.Equal(again, data) || !slices.Equal(theirs, fds) {
			t.Errorf("%x with %v\nbecame %x with %v, %v", data, fds, again, theirs, err)
		}
	})
}

// What a batch of deposits costs its sender, and who receives it.
func BenchmarkVaultDeposits(b *testing.B) {
	k := newToken(b)
	for _, n := range []int{1, control.VaultBatch} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			x, y := vaults(b)
			p := &control.VaultPacket{Type: control.VaultDeposit}
			for range n {
				p.Entries = append(p.Entries, control.VaultEntry{Record: make([]byte, 600), Files: k.times(2)})
			}
			b.ReportAllocs()
			for b.Loop() {
				if err := x.TrySend(p); err != nil {
					b.Fatal(err)
				}
				got, err := y.Receive(0)
				if err != nil {
					b.Fatal(err)
				}
				for i := range got.Entries {
					control.CloseAll(got.Entries[i].Files)
				}
			}
		})
	}
}
