package control_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/control"
)

// passages returns both ends of a passage.
func passages(t testing.TB) (gives, takes *control.Passage) {
	t.Helper()
	a, b, err := control.Ends()
	if err != nil {
		t.Fatal(err)
	}
	gives, errA := control.NewPassage(a)
	takes, errB := control.NewPassage(b)
	if err := errors.Join(errA, errB); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { gives.Close(); takes.Close() })
	return gives, takes
}

// rawPassage returns an end and the descriptor of the other one, to send rubbish with.
func rawPassage(t testing.TB) (*control.Passage, int) {
	t.Helper()
	a, b, err := control.Ends()
	if err != nil {
		t.Fatal(err)
	}
	p, err := control.NewPassage(a)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close(); unix.Close(b) })
	return p, b
}

// receiving calls receive and gives up in time.
func receiving[T any](t *testing.T, receive func() (T, error)) (got T, err error) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		got, err = receive()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(20 * time.Second):
		t.Fatal("nothing is received")
	}
	return got, err
}

// travellers are connections of all kinds, with a descriptor of a file each.
func travellers(k *token) []control.Passed {
	return []control.Passed{
		{Key: "0.0.0.0:443", Remote: netip.MustParseAddrPort("192.0.2.7:65535"), Early: []byte("GET / HT"), Idle: time.Hour, FD: k.fd},
		{Key: "[::]:443", Remote: netip.MustParseAddrPort("[fe80::1%eth0]:1"), Idle: 1, FD: k.fd},
		{Key: "unix:/run/x.sock", FD: k.fd},
		{Key: strings.Repeat("k", control.MaxPassageKey), Early: bytes.Repeat([]byte{1}, control.MaxPassageEarly), FD: k.fd},
	}
}

// withoutFD is what was received, or sent, without what is another number there.
func withoutFD(all []control.Passed) (them []control.Passed) {
	for _, c := range all {
		c.FD, c.Early = 0, append([]byte(nil), c.Early...)
		them = append(them, c)
	}
	return them
}

func fdsOf(all []control.Passed) (fds []int) {
	for _, c := range all {
		fds = append(fds, c.FD)
	}
	return fds
}

func TestConnectionsArriveAsTheyWereGiven(t *testing.T) {
	t.Parallel()
	k := newToken(t)
	gives, takes := passages(t)
	want := travellers(k)
	if err := gives.TrySend(want); err != nil {
		t.Fatal(err)
	}
	got, err := receiving(t, takes.Receive)
	if err != nil || !reflect.DeepEqual(withoutFD(got), withoutFD(want)) {
		t.Errorf("%v\n got %.300v\nwant %.300v", err, got, want)
	}
	k.wantOpen(t, 1+len(want))
	control.CloseAll(fdsOf(got))
	k.wantOpen(t, 1)
}

func TestWhoTakesSaysFirstWhatItHas(t *testing.T) {
	t.Parallel()
	for _, want := range [][]string{nil, {"0.0.0.0:80"}, slices.Repeat([]string{strings.Repeat("k", 100)}, 1000)} {
		gives, takes := passages(t)
		if err := takes.SendKeys(want); err != nil {
			t.Fatal(err)
		}
		if got, err := receiving(t, gives.ReceiveKeys); err != nil || !slices.Equal(got, want) {
			t.Errorf("got %d keys, %v; want %d", len(got), err, len(want))
		}
		takes.Close()
		if _, err := receiving(t, gives.ReceiveKeys); err != io.EOF {
			t.Errorf("behind them: %v", err)
		}
	}
}

func TestAPacketTakesWhatFits(t *testing.T) {
	t.Parallel()
	k := newToken(t)
	small := control.Passed{Key: "a", FD: k.fd}
	large := control.Passed{Key: "a", Early: make([]byte, 80<<10), FD: k.fd}
	for name, c := range map[string]struct {
		there   []control.Passed
		another control.Passed
		fits    bool
	}{
		"the first one":                {nil, small, true},
		"the last one":                 {slices.Repeat([]control.Passed{small}, control.PassageBatch-1), small, true},
		"one too many":                 {slices.Repeat([]control.Passed{small}, control.PassageBatch), small, false},
		"two that are large":           {[]control.Passed{large}, large, true},
		"three that are large":         {[]control.Passed{large, large}, large, false},
		"one with too many bytes":      {nil, control.Passed{Early: make([]byte, control.MaxPassageEarly+1)}, false},
		"one with a key that is large": {nil, control.Passed{Key: strings.Repeat("k", control.MaxPassageKey+1)}, false},
	} {
		if got := control.PassageTakes(c.there, &c.another); got != c.fits {
			t.Errorf("%s: %v", name, got)
		}
		gives, takes := passages(t)
		all := append(slices.Clone(c.there), c.another)
		if err := gives.TrySend(all); (err == nil) != c.fits {
			t.Errorf("%s: %v", name, err)
		}
		if c.fits {
			got, err := receiving(t, takes.Receive)
			if err != nil || len(got) != len(all) {
				t.Errorf("%s: %d have come, %v", name, len(got), err)
			}
			control.CloseAll(fdsOf(got))
		}
	}
	if err := new(control.Passage).SendKeys([]string{strings.Repeat("k", control.MaxPassageKey+1)}); err == nil {
		t.Error("a key that is too large is sent")
	}
}

// Who gives is told at once that there is no room, and nothing is lost by it.
func TestAFullPassageHoldsUpNobody(t *testing.T) {
	t.Parallel()
	k := newToken(t)
	gives, takes := passages(t)
	sent := 0
	var err error
	for ; sent < 100_000; sent++ {
		if err = gives.TrySend([]control.Passed{{Key: "a", Early: make([]byte, 4000), FD: k.fd}}); err != nil {
			break
		}
	}
	if !errors.Is(err, control.ErrPassageBusy) {
		t.Fatalf("after %d packets: %v", sent, err)
	}
	for range sent {
		got, err := receiving(t, takes.Receive)
		if err != nil || len(got) != 1 {
			t.Fatalf("%d, %v", len(got), err)
		}
		control.CloseAll(fdsOf(got))
	}
	if err := gives.TrySend([]control.Passed{{FD: k.fd}}); err != nil {
		t.Error(err)
	}
}

func TestWhatWasGivenBeforeTheEndIsTaken(t *testing.T) {
	t.Parallel()
	k := newToken(t)
	for name, end := range map[string]func(gives, takes *control.Passage){
		"who gives is gone":       func(gives, _ *control.Passage) { gives.Close() },
		"who takes wants no more": func(_, takes *control.Passage) { takes.End() },
		"who gives is gone, and has not heard which listeners there are": func(gives, takes *control.Passage) {
			if err := takes.SendKeys([]string{"a"}); err != nil { // the kernel says ECONNRESET first
				t.Error(err)
			}
			gives.Close()
		},
	} {
		gives, takes := passages(t)
		for range 3 {
			if err := gives.TrySend(travellers(k)); err != nil {
				t.Fatal(name, err)
			}
		}
		end(gives, takes)
		for range 3 {
			got, err := receiving(t, takes.Receive)
			if err != nil || len(got) != len(travellers(k)) {
				t.Fatalf("%s: %d have come, %v", name, len(got), err)
			}
			control.CloseAll(fdsOf(got))
		}
		if _, err := receiving(t, takes.Receive); err != io.EOF {
			t.Errorf("%s: behind them: %v", name, err)
		}
		if err := gives.TrySend(travellers(k)); err == nil || errors.Is(err, control.ErrPassageBusy) {
			t.Errorf("%s: more is sent: %v", name, err)
		}
		k.wantOpen(t, 1)
	}
}

// Who gives has given as many as are taken, at whatever moment the other side ends the
// passage.
func TestNothingIsLostWhenAPassageEnds(t *testing.T) {
	t.Parallel()
	k := newToken(t)
	gives, takes := passages(t)
	var sent atomic.Int64
	var giving sync.WaitGroup
	giving.Go(func() {
		for {
			switch err := gives.TrySend([]control.Passed{{Key: "a", FD: k.fd}}); {
			case err == nil:
				sent.Add(1)
			case !errors.Is(err, control.ErrPassageBusy):
				return
			}
		}
	})
	received := int64(0)
	for {
		got, err := receiving(t, takes.Receive)
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		control.CloseAll(fdsOf(got))
		if received += int64(len(got)); received == 100 {
			takes.End()
		}
	}
	giving.Wait()
	if received != sent.Load() {
		t.Errorf("%d were given, and %d taken", sent.Load(), received)
	}
	if _, err := receiving(t, gives.ReceiveKeys); err != io.EOF {
		t.Errorf("who gives hears %v", err)
	}
}

func TestAClosedPassageSendsNothing(t *testing.T) {
	t.Parallel()
	gives, takes := passages(t)
	var sending sync.WaitGroup
	for range 4 {
		sending.Go(func() { // until it is closed, and never into another descriptor
			for {
				err := gives.TrySend(nil)
				if errors.Is(err, net.ErrClosed) {
					return
				}
				if err != nil && !errors.Is(err, control.ErrPassageBusy) {
					t.Error(err)
					return
				}
			}
		})
	}
	received := make(chan error, 1)
	go func() {
		_, err := gives.ReceiveKeys()
		received <- err
	}()
	gives.Close()
	sending.Wait()
	if err := <-received; !errors.Is(err, net.ErrClosed) {
		t.Errorf("who waits hears %v", err)
	}
	takes.Close()
	gives.Close() // again
	gives.End()
}

// passed is a packet of connections as it travels.
func passed(kind byte, n uint16, rest ...[]byte) []byte {
	b := binary.NativeEndian.AppendUint16([]byte{kind, 0}, n)
	return append(b, bytes.Join(rest, nil)...)
}

// connection is one in a packet, with lengths that need not be right.
func connection(key, remote uint16, early uint32, rest string) []byte {
	return idleFor(0, key, remote, early, rest)
}

// idleFor is connection for one that has been idle.
func idleFor(idle uint64, key, remote uint16, early uint32, rest string) []byte {
	b := binary.NativeEndian.AppendUint16(nil, key)
	b = binary.NativeEndian.AppendUint16(b, remote)
	b = binary.NativeEndian.AppendUint32(b, early)
	b = binary.NativeEndian.AppendUint64(b, idle)
	return append(b, rest...)
}

func TestRubbishInAPassageIsRefusedAndItsDescriptorsAreClosed(t *testing.T) {
	t.Parallel()
	nobody := connection(0, 2, 0, "\x00\x00")
	for name, data := range map[string][]byte{
		"a single byte":                   {2},
		"half a header":                   {2, 0, 2},
		"no type":                         passed(0, 2, nobody, nobody),
		"keys":                            passed(1, 2, []byte{0, 0, 0, 0}),
		"a type that nobody knows":        passed(3, 2, nobody, nobody),
		"a byte where there is none":      append([]byte{2, 1, 2, 0}, bytes.Repeat(nobody, 2)...),
		"more descriptors than have come": passed(2, 3, nobody, nobody, nobody),
		"fewer descriptors than came":     passed(2, 1, nobody),
		"none of them":                    passed(2, 0),
		"a connection that is not there":  passed(2, 2, nobody),
		"half a connection":               passed(2, 2, nobody, nobody[:15]),
		"a key that is not there":         passed(2, 2, nobody, connection(3, 2, 0, "\x00\x00")),
		"bytes that are not there":        passed(2, 2, nobody, connection(0, 2, 1, "\x00\x00")),
		"lengths that overflow":           passed(2, 2, nobody, connection(1<<16-1, 1<<16-1, 1<<32-1, "\x00\x00")),
		"no address":                      passed(2, 2, nobody, connection(0, 0, 0, "")),
		"an address that is none":         passed(2, 2, nobody, connection(0, 5, 0, "12345")),
		"a long address":                  passed(2, 2, nobody, connection(0, 65, 0, strings.Repeat("x", 65))),
		"a long key":                      passed(2, 2, nobody, connection(control.MaxPassageKey+1, 2, 0, strings.Repeat("x", control.MaxPassageKey+1)+"\x00\x00")),
		"many bytes":                      passed(2, 2, nobody, connection(0, 2, control.MaxPassageEarly+1, "\x00\x00"+strings.Repeat("x", control.MaxPassageEarly+1))),
		"a time that is none":             passed(2, 2, nobody, idleFor(1<<63, 0, 2, 0, "\x00\x00")),
		"bytes behind the end":            passed(2, 2, nobody, nobody, []byte{0}),
		"too many connections":            passed(2, control.PassageBatch+1, bytes.Repeat(nobody, control.PassageBatch+1)),
		"a packet that is too large":      append(passed(2, 2, nobody, nobody), make([]byte, control.MaxPassagePacket)...),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			k := newToken(t)
			takes, fd := rawPassage(t)
			if err := unix.Sendmsg(fd, data, unix.UnixRights(k.times(2)...), nil, 0); err != nil {
				t.Fatal(err)
			}
			if all, err := receiving(t, takes.Receive); !errors.Is(err, control.ErrProtocol) || all != nil {
				t.Errorf("got %v, %v", all, err)
			}
			k.wantOpen(t, 1)
			// It is of one packet.
			if err := unix.Sendmsg(fd, passed(2, 1, nobody), unix.UnixRights(k.fd), nil, 0); err != nil {
				t.Fatal(err)
			}
			all, err := receiving(t, takes.Receive)
			if err != nil || len(all) != 1 {
				t.Errorf("the next packet: %v, %v", all, err)
			}
			control.CloseAll(fdsOf(all))
		})
	}
}

func TestKeysThatAreRubbishAreRefused(t *testing.T) {
	t.Parallel()
	for name, data := range map[string][]byte{
		"connections":               passed(2, 0),
		"a key that is not there":   passed(1, 1),
		"half a key":                passed(1, 1, []byte{2, 0, 'a'}),
		"a long key":                passed(1, 1, binary.NativeEndian.AppendUint16(nil, control.MaxPassageKey+1), make([]byte, control.MaxPassageKey+1)),
		"bytes behind the end":      passed(1, 1, []byte{1, 0, 'a', 'b'}),
		"a key that is no text":     nil, // with descriptors: see below
		"more keys than there are":  passed(1, 1<<16-1, []byte{0, 0}),
		"nothing but half a header": {1, 0, 0},
	} {
		k := newToken(t)
		gives, fd := rawPassage(t)
		var rights []byte
		if data == nil {
			data, rights = passed(1, 1, []byte{1, 0, 'a'}), unix.UnixRights(k.fd)
		}
		if err := unix.Sendmsg(fd, data, rights, nil, 0); err != nil {
			t.Fatal(err)
		}
		if keys, err := receiving(t, gives.ReceiveKeys); !errors.Is(err, control.ErrProtocol) {
			t.Errorf("%s: got %q, %v", name, keys, err)
		}
		k.wantOpen(t, 1)
	}
}

// See TestWhatHasLostItsDescriptorsIsStillKnownByItsNumbers. Those connections are taken
// for which there was room.
func TestAPacketForWhichDescriptorsAreShortBringsSome(t *testing.T) {
	t.Parallel()
	k := newToken(t)
	gives, takes := passages(t)
	control.LimitPassage(takes, 2)
	want := travellers(k)
	if err := gives.TrySend(want); err != nil {
		t.Fatal(err)
	}
	got, err := receiving(t, takes.Receive)
	if !errors.Is(err, control.ErrProtocol) || !errors.Is(err, unix.EMFILE) {
		t.Error(err)
	}
	if !reflect.DeepEqual(withoutFD(got), withoutFD(want[:2])) {
		t.Errorf("%d have come", len(got))
	}
	k.wantOpen(t, 1+2)
	control.CloseAll(fdsOf(got))
}

func TestOnlyASeqpacketSocketIsAPassage(t *testing.T) {
	t.Parallel()
	k := newToken(t)
	fd, err := unix.FcntlInt(uintptr(k.fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := control.NewPassage(fd); err == nil {
		t.Error("a file is one")
	}
	k.wantOpen(t, 1)
}

// FuzzPassage: whatever comes is refused, or has as much in it as it says and no more.
func FuzzPassage(f *testing.F) {
	f.Add(passed(2, 0))
	f.Add(passed(2, 1, connection(1, 6, 2, "k\x01\x02\x03\x04\x05\x06GE")))
	f.Add(passed(2, 2, connection(0, 2, 0, "\x00\x00"), connection(1<<15, 2, 1<<31, "")))
	f.Fuzz(func(t *testing.T, data []byte) {
		all, err := control.DecodePassed(data)
		if err != nil {
			return
		}
		again := passed(2, uint16(len(all)))
		for _, c := range all {
			remote, err := c.Remote.MarshalBinary()
			if err != nil {
				t.Fatal(err)
			}
			again = append(again, idleFor(uint64(c.Idle), uint16(len(c.Key)), uint16(len(remote)), uint32(len(c.Early)), fmt.Sprintf("%s%s%s", c.Key, remote, c.Early))...)
		}
		if !bytes.Equal(again, data) {
			t.Errorf("%x became %x", data, again)
		}
	})
}
