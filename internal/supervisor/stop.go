package supervisor

import (
	"context"
	"errors"
	"net"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/control"
)

// stopMargin is how much longer than stop.timeout a generation may take before it
// is killed: at the time limit it still has to close what is left.
const stopMargin = 5 * time.Second

// Stop implements [Commands]. It wins over everything: what is starting is killed,
// a reload is refused.
func (s *Supervisor) Stop() {
	s.do(func() {
		if !s.stopping {
			s.stopping = true
			s.enter(Stopping)
			s.noteReadiness()
			s.stopWork(ErrStopping)
			if s.upgrading != nil {
				s.upgrading.cancel(ErrStopping)
			}
			for _, c := range slices.Concat(s.waiting, s.backing) {
				s.refuseReload(c)
			}
			s.waiting, s.backing = nil, nil
			go s.shutdown() // ends the loop, for which Run waits
			return
		}
		select {
		case <-s.stopNow:
		default:
			s.log.Warn("second stop: nothing is waited for")
			close(s.stopNow)
		}
	})
}

// shutdown ends every generation and then the loop. The order matters: readiness
// turned negative first, so that a load balancer has the delay to look elsewhere;
// our copies of the sockets go before the generations empty the queues, so that no
// connection can arrive behind their backs.
func (s *Supervisor) shutdown() {
	if s.awaitBegin(context.Background()) != nil || s.awaitUpgrade() != nil {
		return // another supervisor commands
	}
	var limits config.Stop
	unserved := make(chan struct{}) // closed when there is no reason for a delay
	s.do(func() {
		if s.pinned != nil {
			limits = s.pinned.config.Stop
		}
		if s.serving != nil {
			limits = s.serving.release.config.Stop
			unserved = s.serving.died
		} else {
			close(unserved)
		}
	})
	s.log.Info("stopping", "delay", limits.Delay, "timeout", limits.Timeout)
	if limits.Delay > 0 {
		s.workers.Go(func() { // nobody waits for a generation that does not answer
			ctx, cancel := context.WithTimeout(context.Background(), limits.Delay)
			defer cancel()
			s.tellReadiness(ctx)
		})
	}
	select {
	case <-time.After(limits.Delay):
	case <-unserved:
	case <-s.stopNow:
	}
	var all []*generation
	s.do(func() {
		s.closeSockets()
		all = s.newestFirst()
		for _, g := range all {
			if g.state == serving || g.state == draining || g.signal(os.Kill) == nil {
				s.move(g, evStop)
			}
		}
	})
	var ends sync.WaitGroup
	for _, g := range all {
		ends.Go(func() { s.end(g, limits.Timeout) })
	}
	ends.Wait()
	s.awaitWorkers()
	s.do(func() {
		s.alive.Store(false)
		s.pin(nil)
	})
	s.log.Info("stopped")
	s.endLoop()
}

// awaitUpgrade waits until no upgrade is under way.
func (s *Supervisor) awaitUpgrade() error {
	var u *upgrading
	if !s.do(func() { u = s.upgrading }) {
		return ErrSucceeded
	}
	if u != nil {
		<-u.over
	}
	succeeded := true // also if the loop has ended
	s.do(func() { succeeded = s.succeeded })
	if succeeded {
		return ErrSucceeded
	}
	return nil
}

// awaitWorkers waits for what was going on, within bounds: a worker may be in a call of
// the kernel that does not return, such as an open(2) on a file system that is gone,
// and nobody may have to kill the service for that.
func (s *Supervisor) awaitWorkers() {
	done := make(chan struct{})
	go func() {
		s.workers.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(stopMargin):
		s.log.Error("something does not end and is left behind", "after", stopMargin)
	}
}

// end has g end in time, or kills it.
func (s *Supervisor) end(g *generation, within time.Duration) {
	stop := &control.Message{Type: control.TypeStop, Within: within}
	err := g.send(stop)
	// Whose channel has broken may find us again, or not: a signal reaches it.
	if errors.Is(err, errUnattached) || errors.Is(err, syscall.EPIPE) || errors.Is(err, net.ErrClosed) {
		err = g.signal(syscall.SIGTERM)
	}
	if err != nil {
		g.log.Warn("cannot be told to stop; killing it", "err", err)
		_ = g.kill(context.Background()) // logs what goes wrong
		return
	}
	select {
	case <-g.died:
		return
	case <-time.After(within + stopMargin):
		g.log.Error("generation has not ended in time; killing it")
	case <-s.stopNow:
	}
	_ = g.kill(context.Background()) // logs what goes wrong
}
