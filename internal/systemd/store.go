package systemd

import (
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"holdfast/internal/control"
)

// storedPrefix begins the names of what is ours in the descriptor store. systemd passes
// it on beside the sockets of units, which have names that a person chose.
const storedPrefix = "holdfast-stored-"

// maxName is systemd's limit for the name of a descriptor.
const maxName = 255

// storedName is the name of key in the descriptor store. Names are printable ASCII
// without a colon; keys are not.
func storedName(key string) string {
	return storedPrefix + base64.RawURLEncoding.EncodeToString([]byte(key))
}

// storedKey is the inverse of storedName.
func storedKey(name string) (key string, ok bool) {
	text, ok := strings.CutPrefix(name, storedPrefix)
	if !ok {
		return "", false
	}
	raw, err := base64.RawURLEncoding.Strict().DecodeString(text)
	return string(raw), err == nil
}

// store is what the descriptor store shall have, as far as this process says.
type store struct {
	room     int             // for so many descriptors
	complain bool            // that it is full was not logged yet
	keys     map[string]file // what it has, or shall have when the deposits are made
	deposits []deposit       // not made yet, at most one for each key
}

// A deposit is what the store shall have for a key.
type deposit struct {
	key string
	fd  int // -1: nothing
}

func (d deposit) close() {
	if d.fd >= 0 {
		_ = unix.Close(d.fd) // a duplicate
	}
}

// file tells open files apart.
type file struct{ device, inode uint64 }

// newStore reads how much room there is: $FDSTORE, since systemd 254.
func newStore() store {
	room, _ := strconv.Atoi(os.Getenv("FDSTORE")) // not a number: none
	return store{room: room, complain: true, keys: make(map[string]file)}
}

var errNoRoom = errors.New("systemd has no room for more descriptors of this service (FileDescriptorStoreMax=)")

// Store leaves a duplicate of fd with systemd, in place of what key had there. It comes
// back when the service starts after all of its processes have died; see [Files]. fd
// stays the caller's. What is there already is not sent again. Two keys must not have
// the same open file: systemd keeps it under one of them, and does not say so.
//
// It does not block, and does not fail: without it the service loses something only
// where it has lost everything else. The log has what could not be stored.
func (n *Notifier) Store(key string, fd int) {
	if n == nil {
		return
	}
	n.mu.Lock()
	err := n.store.put(key, fd)
	complain := err != nil && (n.store.complain || !errors.Is(err, errNoRoom))
	if errors.Is(err, errNoRoom) {
		n.store.complain = false
	}
	n.mu.Unlock()
	if complain {
		n.log.Warn("a descriptor is not left with systemd: it does not outlive the service's processes", "key", key, "err", err)
	}
	n.nudge()
}

// Remove takes back what Store has left under key, in this process or one before it.
func (n *Notifier) Remove(key string) {
	if n == nil {
		return
	}
	n.mu.Lock()
	delete(n.store.keys, key)
	n.store.note(deposit{key, -1})
	n.mu.Unlock()
	n.nudge()
}

func (s *store) put(key string, fd int) error {
	if length := len(storedName(key)); length > maxName {
		return fmt.Errorf("its name would have %d characters; systemd takes %d", length, maxName)
	}
	var status unix.Stat_t
	if err := unix.Fstat(fd, &status); err != nil {
		return err
	}
	now := file{status.Dev, status.Ino}
	was, there := s.keys[key]
	if there && was == now {
		return nil
	}
	if !there && len(s.keys) >= s.room {
		return errNoRoom
	}
	duplicate, err := control.Duplicate(fd)
	if err != nil {
		return err
	}
	s.keys[key] = now
	s.note(deposit{key, duplicate})
	return nil
}

// note replaces what was noted for the key and not made.
func (s *store) note(d deposit) {
	if i := s.noted(d.key); i >= 0 {
		s.deposits[i].close()
		s.deposits = slices.Delete(s.deposits, i, i+1)
	}
	s.deposits = append(s.deposits, d)
}

func (s *store) noted(key string) int {
	return slices.IndexFunc(s.deposits, func(d deposit) bool { return d.key == key })
}

// forget closes what was not made.
func (s *store) forget() {
	for _, d := range s.deposits {
		d.close()
	}
	s.deposits = nil
}

// makeDeposits makes all that are noted, in order.
func (n *Notifier) makeDeposits() error {
	for {
		n.mu.Lock()
		if len(n.store.deposits) == 0 {
			n.mu.Unlock()
			return nil
		}
		d := n.store.deposits[0]
		n.store.deposits = slices.Delete(n.store.deposits, 0, 1)
		n.mu.Unlock()
		if err := n.line.deposit(d); err != nil {
			n.putBack(d)
			return err
		}
		d.close()
	}
}

// putBack notes d again, first, unless something newer was noted for its key.
func (n *Notifier) putBack(d deposit) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.store.noted(d.key) >= 0 {
		d.close()
		return
	}
	n.store.deposits = slices.Insert(n.store.deposits, 0, d)
}

// deposit replaces what systemd has for a key. It needs two messages: systemd does not
// look for anything else in one with FDSTOREREMOVE=1, and would have both descriptors
// under the name without it.
func (l *line) deposit(d deposit) error {
	name := storedName(d.key)
	if err := l.send("FDSTOREREMOVE=1\nFDNAME=" + name); err != nil || d.fd < 0 {
		return err
	}
	// FDPOLL=0: systemd does not watch it. It would drop a listening socket that one of
	// its holders has shut down, which can listen again.
	return l.send("FDSTORE=1\nFDPOLL=0\nFDNAME="+name, d.fd)
}
