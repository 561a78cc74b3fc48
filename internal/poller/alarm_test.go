package poller_test

import (
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"holdfast/internal/poller"
)

func TestAlarmsRingOnceEachInTheirOrder(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := runVirtual(t)
		began := time.Now()
		var rang []int
		done := make(chan struct{})
		alarms := make([]poller.Alarm, 60)
		at := func(ms int) time.Time { return began.Add(time.Duration(ms) * time.Millisecond) }
		ring := func(ms int) func() {
			return func() {
				if late := l.Now().Sub(at(ms)); late < 0 || late > 5*time.Millisecond {
					t.Errorf("the alarm of %d ms is %v late", ms, late)
				}
				rang = append(rang, ms)
			}
		}
		l.Post(func() {
			for _, ms := range []int{50, 10, 30, 20, 40, 1, 35, 15} {
				l.SetAlarm(&alarms[ms], at(ms), ring(ms))
			}
			l.DropAlarm(&alarms[1]) // the first one
			l.DropAlarm(&alarms[30])
			l.DropAlarm(&alarms[30])                  // is not set any more
			l.DropAlarm(&alarms[0])                   // never was
			l.SetAlarm(&alarms[20], at(45), ring(45)) // later
			l.SetAlarm(&alarms[40], at(5), ring(5))   // earlier
			l.SetAlarm(&alarms[15], at(15), func() {  // again, from within, and another one's end
				l.SetAlarm(&alarms[15], at(25), ring(25))
				l.DropAlarm(&alarms[35])
			})
			l.SetAlarm(&alarms[55], at(55), func() { close(done) })
		})
		<-done
		l.Post(func() {
			if want := []int{5, 10, 25, 45, 50}; !slices.Equal(rang, want) {
				t.Errorf("they rang in the order %v, want %v", rang, want)
			}
			for i := range alarms {
				if alarms[i].IsSet() {
					t.Errorf("%d is still set", i)
				}
			}
		})
		synctest.Wait()
	})
}
