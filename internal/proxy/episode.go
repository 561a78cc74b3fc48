package proxy

import (
	"errors"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// episodeCalm is how long a condition must not have come up until it counts as over.
// One that comes and goes with every connection is one episode.
const episodeCalm = 10 * time.Second

// episode is a condition that is worth a line when it begins and one when it is over,
// and none for each time in between. The zero value is one that is over. Its methods
// may be called concurrently.
type episode struct {
	mu    sync.Mutex
	last  time.Time // when it last came up or stood; zero while it is over
	times int       // it came up in this episode
}

// comesUp says whether the episode begins with this time.
func (e *episode) comesUp(now time.Time) (begins bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	begins = e.last.IsZero()
	e.last = now
	e.times++
	return begins
}

// lasts says that the condition stands, if it came up.
func (e *episode) lasts(now time.Time) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.last.IsZero() {
		e.last = now
	}
}

// ends says, once, that the episode is over, and how often the condition came up.
func (e *episode) ends(now time.Time) (times int, over bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.last.IsZero() || now.Sub(e.last) < episodeCalm {
		return 0, false
	}
	times = e.times
	e.last, e.times = time.Time{}, 0
	return times, true
}

// notConnected says, once for an episode, that there was no descriptor for a connection
// to an endpoint, if that is the error. Every request meets it then, and none of them
// can tell how many descriptors there may be.
func (m *Manager) notConnected(err error) {
	ours := errors.Is(err, unix.EMFILE)
	if !ours && !errors.Is(err, unix.ENFILE) || !m.noDescriptor.comesUp(time.Now()) {
		return
	}
	if !ours {
		m.options.Log.Error("cannot connect: the system has no descriptor left; raise fs.file-max", "err", err)
		return
	}
	var limit unix.Rlimit
	_ = unix.Getrlimit(unix.RLIMIT_NOFILE, &limit) // fails for no limit that exists
	m.options.Log.Error("cannot connect: no descriptor is left; raise the limit of descriptors", "limit", limit.Cur, "err", err)
}

// report says that there are descriptors again. The generation's loop calls it now and
// then.
func (m *Manager) report(now time.Time) {
	if times, over := m.noDescriptor.ends(now); over {
		m.options.Log.Info("there are descriptors to connect with again", "failures", times)
	}
}
