package control

import "sync"

// heldFile is a descriptor that is closed when nobody uses it any more: its number would
// be another file's by then.
type heldFile struct {
	fd int

	mu     sync.Mutex
	users  int
	closed bool
}

// hold says whether the descriptor may be used until release.
func (f *heldFile) hold() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return false
	}
	f.users++
	return true
}

// close has the last release close the descriptor.
func (f *heldFile) close() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed = true
}

func (f *heldFile) release() {
	f.mu.Lock()
	f.users--
	last := f.closed && f.users == 0
	f.mu.Unlock()
	if last {
		Discard([]int{f.fd})
	}
}
