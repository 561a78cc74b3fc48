package tunnel

import (
	"runtime/debug"
	"sync"
	"time"
)

// reportPause is how long ends are gathered while there are more and more of them: to begin a
// goroutine in each turn of a loop costs more than what it has to tell, and has the runtime
// look after its threads every 20 µs for some milliseconds. It is longer than it takes until
// enough of them are withdrawn together (see sendWithdrawals).
const reportPause = 25 * time.Millisecond

// reporter tells of tunnels that have ended or moved, in a goroutine that is there only while
// there is something to tell: what is called may write logs, for which no loop waits.
type reporter struct {
	set            *Set
	onEnd, onMoved func(Record) // nil: nobody wants to know

	mu      sync.Mutex
	ended   []Record
	told    []Record // memory for those that come next
	running bool     // run is under way, or comes again
}

// report notes records. It returns at once, and says whether a goroutine was made ready that
// tells of them.
func (r *reporter) report(ended []Record) (ready bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ended = append(r.ended, ended...)
	if r.running {
		return false
	}
	r.running = true
	go r.run()
	return true
}

// run tells of what there is, and comes again until there is nothing.
func (r *reporter) run() {
	r.mu.Lock()
	ended := r.ended
	r.ended, r.told = r.told, nil
	r.running = len(ended) > 0
	r.mu.Unlock()
	for i := range ended {
		r.tell(&ended[i])
	}
	r.mu.Lock()
	r.told = reuse(ended)
	r.mu.Unlock()
	if len(ended) > 0 {
		time.AfterFunc(reportPause, r.run)
	}
}

func (r *reporter) tell(record *Record) {
	defer r.set.removed()
	defer func() {
		if p := recover(); p != nil {
			r.set.logPanic(p, record.Number, record.ID)
		}
	}()
	tell := r.onEnd
	if record.Ended.IsZero() { // it lives on elsewhere
		tell = r.onMoved
		r.set.metrics.leave()
	} else {
		r.set.metrics.end(record)
	}
	if tell != nil {
		tell(*record)
	}
}

// logPanic writes down a fault in the handling of one tunnel, which must not end all
// others.
func (s *Set) logPanic(p any, number uint64, id string) {
	s.log.Error("panic in a tunnel", "tunnel", number, "request_id", id, "panic", p, "stack", string(debug.Stack()))
}
