package tunnel

import (
	"runtime/debug"
	"sync"
)

// reporter tells of tunnels that have ended or moved, in a goroutine that is there only while
// there is something to tell: what is called may write logs, for which no loop waits.
type reporter struct {
	set            *Set
	onEnd, onMoved func(Record) // nil: nobody wants to know

	mu      sync.Mutex
	ended   []Record
	running bool
}

// report takes records over. It returns at once.
func (r *reporter) report(ended []Record) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ended == nil {
		r.ended = ended
	} else {
		r.ended = append(r.ended, ended...)
	}
	if !r.running {
		r.running = true
		go r.run()
	}
}

func (r *reporter) run() {
	for {
		r.mu.Lock()
		ended := r.ended
		r.ended = nil
		r.running = len(ended) > 0
		r.mu.Unlock()
		if len(ended) == 0 {
			return
		}
		for i := range ended {
			r.tell(&ended[i])
		}
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
