package tickets_test

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"holdfast/internal/tickets"
)

const rotation = 12 * time.Hour

// Each key is the next one first, then the current one, then a former one, and then gone.
func TestEachKeyGoesItsWay(t *testing.T) {
	t.Parallel()
	k := tickets.New(0)
	for n := range 10 {
		now := time.Duration(n+1) * rotation
		if rotate, _ := k.Wait(now-time.Second, rotation); rotate != time.Second {
			t.Fatalf("a second before rotation %d it is due in %s", n+1, rotate)
		}
		if rotate, _ := k.Wait(now, rotation); rotate != 0 {
			t.Fatalf("rotation %d is due in %s", n+1, rotate)
		}
		before := k.All()
		k, _ = k.Rotate(now).Expire(now, rotation)
		after := k.All()
		if want := min(n+3, tickets.Used+1); len(after) != want {
			t.Fatalf("%d keys after %d rotations, want %d", len(after), n+1, want)
		}
		if after[0] != before[len(before)-1] {
			t.Fatal("the current key is not the one that was the next")
		}
		if slices.Contains(before, after[len(after)-1]) {
			t.Fatal("the next key was there before")
		}
		if !slices.Equal(after[1:len(after)-1], before[:len(after)-2]) {
			t.Fatal("the former keys are not those that were in use, the newest first")
		}
		if k.Rotations() != uint64(n+1) || k.Age(now+time.Minute) != time.Minute {
			t.Fatalf("%d rotations, the last one %s ago", k.Rotations(), k.Age(now+time.Minute))
		}
	}
}

// A ticket is understood for two rotations, and not much longer than three.
func TestATicketIsUnderstoodForTwoRotationsAndNotForLong(t *testing.T) {
	t.Parallel()
	const tick = rotation / 8
	k := tickets.New(0)
	made := make(map[[32]byte]time.Duration) // when a ticket was made with it first
	last := make(map[[32]byte]time.Duration) // and last
	for now := time.Duration(0); now < 20*rotation; now += tick {
		rotate, expire := k.Wait(now, rotation)
		if rotate == 0 {
			k = k.Rotate(now)
		}
		if expire == 0 {
			k, _ = k.Expire(now, rotation)
		}
		all := k.All()
		if _, there := made[all[0]]; !there {
			made[all[0]] = now
		}
		last[all[0]] = now
		for key, at := range last {
			if now-at < 2*rotation && !slices.Contains(all, key) {
				t.Fatalf("a ticket of %s is not understood any more at %s", at, now)
			}
		}
		for key, at := range made {
			if now-at >= 3*rotation && slices.Contains(all, key) {
				t.Fatalf("a ticket of %s is still understood at %s", at, now)
			}
		}
	}
}

// Nobody was there to rotate: old keys are gone all the same, and one rotation is enough.
func TestAfterALongAbsence(t *testing.T) {
	t.Parallel()
	k := tickets.New(0).Rotate(rotation).Rotate(2 * rotation)
	now := 50 * rotation
	if rotate, expire := k.Wait(now, rotation); rotate != 0 || expire != 0 {
		t.Errorf("due in %s, %s", rotate, expire)
	}
	k, changed := k.Expire(now, rotation)
	if n := len(k.All()); !changed || n != 2 {
		t.Errorf("%d keys are left, changed: %v", n, changed)
	}
	before := k.All()
	k = k.Rotate(now)
	if all := k.All(); len(all) != 3 || all[1] != before[0] {
		t.Error("who has got a ticket last is not understood")
	}
	if rotate, expire := k.Wait(now, rotation); rotate != rotation || expire != rotation {
		t.Errorf("due in %s, %s", rotate, expire)
	}
	if _, changed := k.Expire(now, rotation); changed {
		t.Error("something expires at once")
	}
}

func TestAnotherRotationHoldsForKeysThatAreThere(t *testing.T) {
	t.Parallel()
	k := tickets.New(0).Rotate(rotation)
	now := rotation + time.Hour
	if rotate, expire := k.Wait(now, time.Hour); rotate != 0 || expire != time.Hour {
		t.Errorf("due in %s, %s", rotate, expire)
	}
	if rotate, _ := k.Wait(now, 24*time.Hour); rotate != 23*time.Hour {
		t.Errorf("due in %s", rotate)
	}
}

func TestCondemnedKeysAreGoneWithTheNextRotation(t *testing.T) {
	t.Parallel()
	k := tickets.New(0).Rotate(rotation).Rotate(2 * rotation)
	bad := k.All()
	k = k.Condemn()
	if all := k.All(); !k.Condemned() || all[0] != bad[0] || slices.Contains(bad, all[len(all)-1]) {
		t.Error("condemned keys are to be used until others have the next one, which is another than before")
	}
	if rotate, _ := k.Wait(2*rotation, rotation); rotate != 0 {
		t.Errorf("it is due in %s", rotate)
	}
	k = k.Rotate(2 * rotation)
	for _, key := range k.All() {
		if slices.Contains(bad, key) {
			t.Error("a condemned key is left")
		}
	}
	if len(k.All()) != 2 || k.Condemned() {
		t.Errorf("%d keys, condemned: %v", len(k.All()), k.Condemned())
	}
}

func TestKeysAreReplacedAndNotChanged(t *testing.T) {
	t.Parallel()
	k := tickets.New(0).Rotate(1).Rotate(2)
	was := k.Record()
	k.Rotate(3)
	k.Condemn()
	k.Expire(100*rotation, rotation)
	k.All()[0] = [32]byte{}
	if !bytes.Equal(k.Record(), was) {
		t.Error("they were changed")
	}
}

func TestNothingShowsKeys(t *testing.T) {
	t.Parallel()
	k := tickets.New(0).Rotate(1)
	inside := struct {
		hidden tickets.Keys
		Shown  tickets.Keys
	}{k, k}
	var log bytes.Buffer
	slog.New(slog.NewJSONHandler(&log, nil)).Info("keys", "keys", k, "inside", inside)
	asJSON, err := json.Marshal(inside)
	if err != nil {
		t.Fatal(err)
	}
	text := log.String() + string(asJSON)
	for _, verb := range []string{"%v", "%+v", "%#v"} {
		text += fmt.Sprintf(verb+verb+verb, k, inside, &inside)
	}
	for _, verb := range []string{"%s", "%x", "%d", "%q"} {
		text += fmt.Sprintf(verb, k)
	}
	for _, key := range k.All() {
		for _, form := range []string{fmt.Sprintf("%x", key[:4]), fmt.Sprintf("%X", key[:4]), strings.Trim(fmt.Sprint(key[:4]), "[]"), string(key[:4]), fmt.Sprintf("%#v", key[:3])[len("[]byte{"):17]} {
			if strings.Contains(text, form) {
				t.Errorf("%q is in %q", form, text)
			}
		}
	}
}

func TestKeysAreReadAsTheyWereWritten(t *testing.T) {
	t.Parallel()
	k := tickets.New(3)
	for n := range 6 {
		for _, k := range []tickets.Keys{k, k.Condemn()} {
			b := k.Record()
			got, err := tickets.Parse(b, time.Hour)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got.Record(), b) || !slices.Equal(got.All(), k.All()) || got.Condemned() != k.Condemned() || got.Age(time.Hour) != k.Age(time.Hour) || got.Rotations() != uint64(n) {
				t.Errorf("after %d rotations something else was read", n)
			}
		}
		k = k.Rotate(time.Duration(n+10) * time.Second)
	}
}

// A record has always the same size: what is written over another leaves nothing of that.
func TestAllRecordsHaveTheSameSize(t *testing.T) {
	t.Parallel()
	k := tickets.New(0)
	want := len(k.Record())
	for range 5 {
		if k = k.Rotate(1); len(k.Record()) != want {
			t.Fatalf("%d and %d bytes", want, len(k.Record()))
		}
	}
}

// The clock has another beginning than the one that the keys were kept by.
func TestTimesThatAreNotOverAreTakenForNow(t *testing.T) {
	t.Parallel()
	b := tickets.New(100 * time.Hour).Rotate(200 * time.Hour).Record()
	k, err := tickets.Parse(b, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if rotate, expire := k.Wait(time.Hour, rotation); rotate != rotation || expire != rotation {
		t.Errorf("due in %s, %s", rotate, expire)
	}
	binary.BigEndian.PutUint64(b[16:], 1<<63+5)
	if k, err = tickets.Parse(b, time.Hour); err != nil || k.Age(time.Hour) != 0 {
		t.Errorf("%v", err)
	}
}

func TestNonsenseIsRefused(t *testing.T) {
	t.Parallel()
	good := tickets.New(0).Rotate(1).Record()
	change := func(at int, to ...byte) []byte {
		b := bytes.Clone(good)
		copy(b[at:], to)
		return b
	}
	for name, c := range map[string]struct {
		b    []byte
		want string
	}{
		"nothing":                   {nil, "nothing"},
		"one byte":                  {good[:1], "bytes"},
		"too short":                 {good[:len(good)-1], "bytes"},
		"too long":                  {append(bytes.Clone(good), 0), "bytes"},
		"another layout":            {change(0, 2), "version 2"},
		"condemned in some way":     {change(1, 2), "header"},
		"too many former keys":      {change(2, 3), "header"},
		"something reserved":        {change(5, 1), "header"},
		"no current key":            {change(24, make([]byte, 32)...), "empty"},
		"no next key":               {change(56, make([]byte, 32)...), "empty"},
		"a former key too few":      {change(2, 0), "behind"},
		"a former key too many":     {change(2, 2), "empty"},
		"a key that is there twice": {change(24, good[56:88]...), "twice"},
		"something at the end":      {change(len(good)-1, 1), "behind"},
	} {
		k, err := tickets.Parse(c.b, time.Hour)
		if err == nil || !strings.Contains(err.Error(), c.want) || k.Known() {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}

// Some share keys that are rotated while others come and go, and what each is told may come
// late. As long as the next rotation waits until all have what there is, no ticket that anybody
// makes is unknown to any other, whatever happens in which order. Those of condemned keys are
// worth nothing in a moment.
func TestNoTicketIsUnknownToAnybody(t *testing.T) {
	t.Parallel()
	for seed := range uint64(300) {
		r := rand.New(rand.NewPCG(seed, 0))
		k := tickets.New(0)
		type sharer struct {
			has     [][32]byte
			pending [][][32]byte // on their way, in order
		}
		condemned := make(map[[32]byte]bool)
		first := &sharer{has: k.All()}
		all := []*sharer{first}
		tell := func() {
			for _, s := range all {
				s.pending = append(s.pending, k.All())
			}
		}
		now := time.Duration(0)
		for range 200 {
			switch r.IntN(6) {
			case 0: // another one begins with what there is
				if len(all) < 4 {
					all = append(all, &sharer{has: k.All()})
				}
			case 1: // one ends
				if len(all) > 1 {
					n := r.IntN(len(all))
					all = slices.Delete(all, n, n+1)
				}
			case 2, 3: // something arrives
				s := all[r.IntN(len(all))]
				if len(s.pending) > 0 {
					s.has, s.pending = s.pending[0], s.pending[1:]
				}
			case 4:
				if r.IntN(8) == 0 {
					for _, key := range k.All() {
						condemned[key] = true
					}
					k = k.Condemn()
					tell()
				}
			case 5: // a rotation, if everybody is up to date
				now += rotation
				if !slices.ContainsFunc(all, func(s *sharer) bool { return len(s.pending) > 0 }) {
					k = k.Rotate(now)
					tell()
				}
			}
			for _, maker := range all {
				for _, reader := range all {
					if !slices.Contains(reader.has, maker.has[0]) && !condemned[maker.has[0]] {
						t.Fatalf("seed %d: one makes tickets that another does not understand", seed)
					}
				}
			}
		}
	}
}

func FuzzParse(f *testing.F) {
	k := tickets.New(0)
	for range 4 {
		f.Add(k.Record(), int64(time.Hour))
		k = k.Rotate(1)
	}
	f.Add(k.Condemn().Record(), int64(-1))
	f.Add([]byte{}, int64(0))
	f.Add([]byte{1, 0, 2}, int64(0))
	f.Fuzz(func(t *testing.T, b []byte, now int64) {
		k, err := tickets.Parse(b, time.Duration(now))
		if err != nil {
			if k.Known() {
				t.Error("an error, and keys")
			}
			return
		}
		rotate, expire := k.Wait(time.Duration(max(now, 0)), rotation)
		if n := len(k.All()); n < 2 || n > tickets.Used+1 || rotate < 0 || rotate > rotation || expire < 0 || expire > rotation {
			t.Errorf("%d keys, due in %s, %s", n, rotate, expire)
		}
		again, err := tickets.Parse(k.Record(), time.Duration(now))
		if err != nil || !bytes.Equal(again.Record(), k.Record()) {
			t.Errorf("written and read again it is something else: %v", err)
		}
	})
}

// The clock goes on.
func TestUptime(t *testing.T) {
	t.Parallel()
	a, b := tickets.Uptime(), tickets.Uptime()
	if a <= 0 || b < a {
		t.Errorf("%s, then %s", a, b)
	}
}
