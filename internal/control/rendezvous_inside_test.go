package control

import (
	"context"
	"testing"

	"golang.org/x/sys/unix"
)

// In-package: nobody but root can connect as another user.
func TestTheRendezvousIsForItsUserAndRoot(t *testing.T) {
	for _, test := range []struct {
		peer uint32
		self int
		want bool
	}{
		{peer: 1000, self: 1000, want: true}, {peer: 0, self: 1000, want: true}, {peer: 0, self: 0, want: true},
		{peer: 1001, self: 1000}, {peer: 1000, self: 0}, {peer: 65534, self: 1000}, {peer: ^uint32(0), self: 1000},
	} {
		if err := mayCommand(&unix.Ucred{Uid: test.peer}, test.self); (err == nil) != test.want {
			t.Errorf("user %d may meet user %d: %v", test.peer, test.self, err)
		}
	}
}

// In-package: many processes would have to come within a moment.
func TestHowManyStrangersThereMayBe(t *testing.T) {
	r := &Rendezvous{strangers: map[int]int{}}
	for n := range maxStrangers {
		if err := r.enter(n / maxPerProcess); err != nil {
			t.Fatalf("number %d: %v", n, err)
		}
		if err := r.enter(0); n >= maxPerProcess-1 && err == nil {
			t.Fatalf("after %d, another one of a process that has %d", n, maxPerProcess)
		} else if err == nil {
			r.leave(0)
		}
	}
	if r.enter(99) == nil {
		t.Error("another one where there are as many as there may be")
	}
	r.leave(1)
	if err := r.enter(99); err != nil {
		t.Errorf("one has left, and yet: %v", err)
	}
	r.leave(99)
	r.enter(1)
	for n := range maxStrangers {
		r.leave(n / maxPerProcess)
	}
	if r.all != 0 || len(r.strangers) != 0 {
		t.Errorf("all have left, and there are %d, %v", r.all, r.strangers)
	}
}

// In-package: it gives the handshake packets without a socket to listen at.
func FuzzHandshake(f *testing.F) {
	const hi = `{"type":"hello","hello":{"core":1,"core_min":1,"version":"x","pid":42,"generation":1},"nonce":"AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="}`
	for _, seed := range [][2]string{
		{hi, `{"type":"proof","proof":"AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="}`},
		{hi, `{"type":"proof"}`}, {hi, `{"type":"answer","re":1}`}, {hi, ""}, {hi, "\x00"},
		{`{"type":"hello"}`, ""}, {`{"type":"hello","hello":{"pid":-1,"generation":-1}}`, ""}, {`[]`, `{}`}, {"", ""},
	} {
		f.Add([]byte(seed[0]), []byte(seed[1]), 0)
		f.Add([]byte(seed[0]), []byte(seed[1]), 1)
	}
	key := GenerationKey([]byte("a secret that the other side does not know"), 1)
	f.Fuzz(func(t *testing.T, first, second []byte, fds int) {
		ours, theirs, err := Ends()
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(theirs)
		c, err := newConn(ours, nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		var oob []byte
		if fds&1 == 1 {
			oob = unix.UnixRights(theirs)
		}
		for _, packet := range [][]byte{first, second} {
			unix.Sendmsg(theirs, packet, oob, nil, 0) // the kernel may not take it
		}
		unix.Shutdown(theirs, unix.SHUT_WR)
		hello, err := greetWithin(context.Background(), c, 42, func(generation int) []byte {
			if generation != 1 {
				return nil
			}
			return key
		})
		if err == nil {
			t.Errorf("%+v was let in", hello)
		}
	})
}
