package tunnel

import (
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// One end is told of at once. While there are more and more of them they are gathered, for a
// moment.
func TestEndsAreGathered(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var told atomic.Int32
		s := NewSet(Options{OnEnd: func(Record) { told.Add(1) }})
		report := func(number uint64) (ready bool) {
			s.enter()
			s.live.Add(-1)
			ready = s.reporter.report([]Record{{Origin: new(Origin), Number: number, Ended: time.Now()}})
			synctest.Wait()
			return ready
		}
		if !report(1) || told.Load() != 1 {
			t.Errorf("the first one: %d were told", told.Load())
		}
		if report(2) || report(3) || told.Load() != 1 {
			t.Errorf("at once: %d were told", told.Load())
		}
		time.Sleep(reportPause)
		synctest.Wait()
		if told.Load() != 3 {
			t.Errorf("a moment later: %d were told", told.Load())
		}
		<-s.Empty()
		time.Sleep(reportPause)
		synctest.Wait()
		if !report(4) || told.Load() != 4 {
			t.Errorf("after a pause: %d were told", told.Load())
		}
		time.Sleep(reportPause) // the goroutine ends
	})
}
