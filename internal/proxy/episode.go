package proxy

import (
	"sync"
	"time"
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
