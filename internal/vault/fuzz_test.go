package vault_test

import (
	"log/slog"
	"testing"

	"golang.org/x/sys/unix"

	"holdfast/internal/control"
	"holdfast/internal/vault"
)

// script reads packets from what a fuzzer has made up.
type script []byte

func (s *script) next() int {
	if len(*s) == 0 {
		return 0
	}
	b := (*s)[0]
	*s = (*s)[1:]
	return int(b)
}

func (s *script) files(l *line, most int) []int {
	var fds []int
	for range s.next() % (most + 1) {
		fds = append(fds, l.fds[len(fds)%2])
	}
	return fds
}

func (s *script) packet(l *line) *control.VaultPacket {
	p := &control.VaultPacket{Type: control.VaultType(s.next() % 16), Flags: uint8(s.next()), Loop: s.next() % 4}
	p.Files = s.files(l, 3)
	for range s.next() % 20 {
		p.Entries = append(p.Entries, control.VaultEntry{
			Number: uint64(s.next() % 8),
			From:   control.VaultTunnel{Generation: s.next() % 4, Number: uint64(s.next() % 8)},
			Stand:  uint64(s.next()),
			Record: make([]byte, s.next()),
			State:  make([]byte, s.next()),
			Files:  s.files(l, 4),
		})
	}
	return p
}

// FuzzGeneration has generation 3 say anything. Generations 1 and 2 and what is between
// them are as if it were not there, and of what it was asked to take 1 hears one answer.
func FuzzGeneration(f *testing.F) {
	store := []byte{1, 0, 0, 1, 0}
	deposit := []byte{2, 0, 0, 0, 1, 5, 0, 0, 0, 2, 0, 2}
	take := []byte{9, 0, 0, 0, 1, 5, 1, 3, 0, 2, 0, 0}
	f.Add(store)
	f.Add(append(store, deposit...))
	f.Add(append(append(store, deposit...), take...))
	f.Add([]byte{10, 0, 0, 0, 1, 0, 1, 3, 0, 0, 0, 0})
	f.Add([]byte{9, 0, 0, 0, 1, 5, 1, 2, 0, 2, 0, 0})                            // not its own
	f.Add(append(store, 2, 0, 0, 0, 1, 5, 1, 1, 1, 2, 0, 2, 4, 0, 0, 0, 0))      // restated, from elsewhere
	f.Add(append(append(store, deposit...), 7, 0, 0, 0, 1, 5, 0, 0, 0, 0, 9, 2)) // released
	f.Add(append(append(store, deposit...), 3, 0, 0, 0, 1, 5, 0, 0, 0, 0, 0, 0)) // withdrawn
	f.Add(append(append(take, store...), 7, 0, 0, 0, 1, 5, 0, 0, 0, 0, 9, 0))    // taken, and released
	f.Add(append(append(take, store...), 2, 0, 0, 0, 1, 5, 0, 0, 1, 2, 0, 2))    // taken, and restated
	f.Add(append(append(take, store...), append(take, 4, 4, 0, 0, 0)...))        // taken twice
	f.Fuzz(func(t *testing.T, data []byte) {
		v := vault.New(vault.Options{Log: slog.New(slog.DiscardHandler)})
		defer v.Close()
		a, b := join(t, v, 1), join(t, v, 2)
		ls := lines(t, 3)
		a.send(control.VaultDeposit, deposits(ls)...)
		v.Target(2)
		a.send(control.VaultRelease, released(ls[1])...)
		ls[1].is(b.want(control.VaultTake).Entries[0].Files)

		c, theirs := listening(t, v, 3), newLine(t, 0)
		c.send(control.VaultComplete)
		if err := v.Await(t.Context(), 3); err != nil {
			t.Fatal(err)
		}
		v.Target(3)
		a.send(control.VaultRelease, released(ls[2])...)
		ls[2].is(c.want(control.VaultTake).Entries[0].Files)
		v.Target(4) // which declines what 3 releases
		d := join(t, v, 4)
		go func() {
			for p := d.next(); p != nil; p = d.next() {
				for _, e := range p.Entries {
					control.CloseAll(e.Files)
					_ = d.conn.Send(packet(control.VaultDeclined, control.VaultEntry{From: e.From}), patient)
				}
			}
		}()
		for s := script(data); len(s) > 0; {
			_ = c.conn.Send(s.packet(theirs), patient)
		}
		c.die()
		v.Died(3, false)
		v.Drop(3)
		theirs.wantClosed()

		gone, back := 0, 0
		for gone+back < 1 {
			switch p := a.next(); p.Type {
			case control.VaultGone:
				gone += len(p.Entries)
			case control.VaultReturned:
				back += len(p.Entries)
			default:
				t.Fatalf("generation 1 is told type %d", p.Type)
			}
		}
		if v.Deposits(1) != 2+back || v.Deposits(2) != 0 {
			t.Errorf("%d and %d deposits; %d gone, %d returned", v.Deposits(1), v.Deposits(2), gone, back)
		}
		b.send(control.VaultTaken, taken(ls[1], a, 9))
		for gone+back < 2 {
			p := a.next()
			if p.Type != control.VaultGone || len(p.Entries) != 1 || p.Entries[0].Number != 2 {
				t.Fatalf("generation 1 is told %+v", p)
			}
			gone++
		}
		b.synced()
		if v.Deposits(2) != 1 {
			t.Errorf("%d deposits", v.Deposits(2))
		}
		if !v.Has(1) || !v.Has(2) || !v.Has(4) {
			t.Error("another generation has lost its channel")
		}
	})
}

// FuzzBytes has a generation send bytes that may be no packet at all.
func FuzzBytes(f *testing.F) {
	f.Add([]byte{}, 0)
	f.Add([]byte{1, 0, 0, 0, 0, 0, 1, 0}, 1)
	f.Add([]byte{2, 0, 0, 0, 1, 0, 0, 0}, 2)
	f.Fuzz(func(t *testing.T, data []byte, files int) {
		v := vault.New(vault.Options{Log: slog.New(slog.DiscardHandler)})
		defer v.Close()
		a := join(t, v, 1)
		ours, theirs, err := control.Ends()
		if err != nil {
			t.Fatal(err)
		}
		conn, err := control.NewVault(ours)
		if err != nil {
			t.Fatal(err)
		}
		v.Open(2, conn)
		l := newLine(t, 1)
		var fds []int
		for range uint(files) % 254 {
			fds = append(fds, l.fds[0])
		}
		var oob []byte
		if len(fds) > 0 {
			oob = unix.UnixRights(fds...)
		}
		_ = unix.Sendmsg(theirs, data, oob, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		unix.Close(theirs)
		v.Died(2, false)
		v.Drop(2)
		l.wantClosed()
		a.synced()
	})
}
