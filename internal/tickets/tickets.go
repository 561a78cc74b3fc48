// Package tickets has the keys of TLS session tickets: which there are, and which of them is
// used when.
//
// Tickets are made with one key, the current one, and understood that were made with any. With
// each rotation the next key becomes the current one, and the current one a former one. The next
// one is there long before, so that whoever shares the keys has it when the first ticket is made
// with it.
//
//	key 0   next     current  former   former   gone
//	key 1            next     current  former   former   gone
//	key 2                     next     current  former   former
//	        rotation rotation rotation rotation rotation rotation
//
// So a ticket is understood for two rotations at least, and three at the most ([Used]). Whoever
// learns all keys can understand the tickets of that time and no others: those of TLS 1.2 give
// away what was said, see the manual.
//
// [Keys] are a value, and what happens to them are functions without any other effect. Times
// are those of a clock that neither jumps nor stands still while the machine sleeps ([Uptime]).
package tickets

import (
	"crypto/rand"
	"fmt"
	"io"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// Used is how many keys, beside the next one, there may be: the current and the former ones.
const Used = 3

// Uptime is the clock of the keys: how long the machine has been up, asleep or not. All
// processes agree on it, and where keys outlive a process it is still the same.
func Uptime() time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &t); err != nil {
		panic(fmt.Sprintf("tickets: clock_gettime: %v", err)) // it has been there since Linux 2.6.39
	}
	return time.Duration(t.Nano())
}

type key = [32]byte

func fresh() (k key) {
	rand.Read(k[:]) // never fails
	return k
}

// Keys are the keys at one time. They are not changed but replaced. The zero value is that there
// are none, and no method but [Keys.Known] may be called; see [New] and [Parse].
//
// They are behind a pointer so that whoever writes down what something consists of does not write
// down keys.
type Keys struct{ *state }

type state struct {
	rotations     uint64
	since         time.Duration // when the current key became that
	current, next key
	former        []former // the newest first, Used-1 at the most
	condemned     bool     // the next rotation leaves no former key
}

type former struct {
	key   key
	since time.Duration // when it became one
}

// Known says whether there are any.
func (k Keys) Known() bool { return k.state != nil }

// Format implements [fmt.Formatter]: nothing of the keys is shown.
func (k Keys) Format(w fmt.State, _ rune) { io.WriteString(w, "(ticket keys)") }

// MarshalText implements [encoding.TextMarshaler], for the same.
func (k Keys) MarshalText() ([]byte, error) { return []byte("(ticket keys)"), nil }

// New returns keys that nobody has had before.
func New(now time.Duration) Keys {
	return Keys{&state{since: now, current: fresh(), next: fresh()}}
}

// Rotations is how often there was another current key.
func (k Keys) Rotations() uint64 { return k.rotations }

// Age is for how long the current key has been that.
func (k Keys) Age(now time.Duration) time.Duration { return max(now-k.since, 0) }

// Condemned says whether [Keys.Condemn] was called and no rotation since.
func (k Keys) Condemned() bool { return k.condemned }

// All are the keys: tickets are made with the first, and understood of each.
func (k Keys) All() [][32]byte {
	all := [][32]byte{k.current}
	for _, f := range k.former {
		all = append(all, f.key)
	}
	return append(all, k.next)
}

// Wait is how long nothing is to be done where keys rotate so often: neither a [Keys.Rotate], if
// it is the time for that which is zero, nor a [Keys.Expire].
func (k Keys) Wait(now, rotation time.Duration) (rotate, expire time.Duration) {
	rotate, expire = max(rotation-k.Age(now), 0), rotation
	if k.condemned {
		rotate = 0
	}
	for _, f := range k.former {
		expire = min(expire, max((Used-1)*rotation-(now-f.since), 0))
	}
	return rotate, expire
}

// Rotate takes the next key into use. Whoever shares the keys must have k by then.
func (k Keys) Rotate(now time.Duration) Keys {
	next := &state{rotations: k.rotations + 1, since: now, current: k.next, next: fresh()}
	if !k.condemned {
		next.former = append([]former{{k.current, now}}, k.former...)
		next.former = next.former[:min(len(next.former), Used-1)]
	}
	return Keys{next}
}

// Expire forgets former keys whose time is over, also where nobody could rotate them away for
// long. It returns k if there is none.
func (k Keys) Expire(now, rotation time.Duration) (_ Keys, changed bool) {
	over := func(f former) bool { return now-f.since >= (Used-1)*rotation }
	if !slices.ContainsFunc(k.former, over) {
		return k, false
	}
	left := *k.state
	left.former = slices.DeleteFunc(slices.Clone(k.former), over)
	return Keys{&left}, true
}

// Condemn has all keys that there are be gone with the next rotation, which is due at once: they
// may be known to somebody.
func (k Keys) Condemn() Keys {
	condemned := *k.state
	condemned.next, condemned.condemned = fresh(), true
	return Keys{&condemned}
}
