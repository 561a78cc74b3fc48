package proxy

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"

	"holdfast/internal/config"
	"holdfast/internal/control"
	"holdfast/internal/poller"
	"holdfast/internal/stream"
	"holdfast/internal/task"
	"holdfast/internal/tunnel"
	"holdfast/internal/tunnel/inflight"
)

// What a generation has for tunnels. All of it is room that costs nothing until it
// is used, apart from the pipes' descriptors.
const (
	maxDirections = 2 << 20  // of each loop: two for each tunnel
	bufferMemory  = 64 << 20 // of all loops together, for receivers that are slow
	leastBuffers  = 16       // of each loop, however many there are

	bodyPipes = 16 // of all loops together, for large bodies; they are made when they are needed

	mostPipes    = 32 // of each loop
	enoughPipes  = 16 // fewer of them are made smaller before they are made fewer still
	largestPipe  = 1 << 20
	smallestPipe = 64 << 10
)

// loops serve the connections of a generation, and relay its tunnels as far as both
// connections are plain TCP: one loop for each processor, with what is in flight beside
// each.
type loops struct {
	all     []tunnel.Loop
	streams []*stream.Loop // the same ones, for connections
	ran     bool
	running sync.WaitGroup
}

// newLoops makes n loops, which wait to be run. A direction holds at most buffer bytes.
func newLoops(n int, buffer int64, log *slog.Logger) (*loops, error) {
	each, size := pipesOfEach(n, buffer, descriptorLimit(), pipePages())
	l := new(loops)
	made := 0
	for range n {
		pipes := inflight.NewPipes(each, size)
		made += len(pipes)
		loop, err := newLoop(max(bufferMemory/inflight.BufferSize/n, leastBuffers), pipes)
		if err != nil {
			return nil, errors.Join(err, l.stop())
		}
		l.all = append(l.all, loop)
	}
	if made < n*each {
		// Other generations, or other programs of the same user, have them.
		log.Info("fewer pipes than wanted: much data in a tunnel may cost more processor time", "pipes", made, "wanted", n*each)
	}
	l.addStreams(log)
	return l, nil
}

// addStreams gives each loop what its connections share.
func (l *loops) addStreams(log *slog.Logger) {
	onPanic := func(value any) {
		log.Error("a task has panicked", "panic", fmt.Sprint(value), "stack", string(debug.Stack()))
	}
	for i, loop := range l.all {
		l.streams = append(l.streams, stream.NewLoop(loop.Poller, task.NewPool(loop.Poller, onPanic), i))
	}
}

// newLoop takes pipes over.
func newLoop(buffers int, pipes []inflight.Pipe) (tunnel.Loop, error) {
	fd, err := inflight.NewFile(maxDirections, buffers)
	if err != nil {
		for _, p := range pipes {
			p.Close()
		}
		return tunnel.Loop{}, err
	}
	store, err := inflight.Open(fd, pipes)
	if err != nil {
		return tunnel.Loop{}, err
	}
	return withPoller(store)
}

// withPoller takes store over.
func withPoller(store *inflight.Store) (tunnel.Loop, error) {
	p, err := poller.New()
	if err != nil {
		return tunnel.Loop{}, errors.Join(err, store.Close())
	}
	return tunnel.Loop{Poller: p, Store: store}, nil
}

// mostLoops is how many loops a generation may have: more than machines have processors.
const mostLoops = 4096

// inheritLoops makes the loops of a dead generation run again, from what the supervisor
// has kept of each: its memory file, and both ends of its pipes. It takes all over. One of
// which the memory is damaged begins anew, so that only its own tunnels are lost.
func inheritLoops(stores []*control.VaultPacket, log *slog.Logger) (*loops, error) {
	l := &loops{all: make([]tunnel.Loop, len(stores))}
	var errs []error
	for _, p := range stores {
		if p.Loop >= len(stores) || l.all[p.Loop].Store != nil || len(p.Files)%2 != 1 {
			errs = append(errs, fmt.Errorf("loop %d of %d with %d descriptors", p.Loop, len(stores), len(p.Files)))
			p.CloseFiles()
			continue
		}
		var pipes []inflight.Pipe
		for i := 1; i < len(p.Files); i += 2 {
			pipes = append(pipes, inflight.Pipe{R: p.Files[i], W: p.Files[i+1]})
		}
		store, err := inflight.Reopen(p.Files[0], pipes, p.Flags&control.VaultKilled != 0)
		if err == nil {
			l.all[p.Loop], err = withPoller(store)
		} else if errors.Is(err, inflight.ErrDamaged) {
			log.Error("what a loop of a dead generation had in flight is damaged: its tunnels are lost", "loop", p.Loop, "err", err)
			l.all[p.Loop], err = newLoop(leastBuffers, nil)
			l.all[p.Loop].Damaged = true
		}
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return nil, errors.Join(fmt.Errorf("the loops of a dead generation: %w", err), l.stop())
	}
	l.addStreams(log)
	return l, nil
}

// run starts the loops. stop ends them.
func (l *loops) run() {
	l.ran = true
	for _, loop := range l.all {
		l.running.Go(loop.Poller.Run)
	}
}

// trim has all loops give back the memory of what nobody uses, and waits for that.
func (l *loops) trim() {
	var trimming sync.WaitGroup
	for _, s := range l.streams {
		trimming.Add(1)
		if !s.Post(func() { defer trimming.Done(); s.Trim() }) {
			trimming.Done()
		}
	}
	trimming.Wait()
}

// stop ends the loops, whether they run or not, waits for that and lets go of what was
// in flight. No tunnel, connection or task may be left.
func (l *loops) stop() (err error) {
	l.all = slices.DeleteFunc(l.all, func(l tunnel.Loop) bool { return l.Store == nil })
	for _, loop := range l.all {
		loop.Poller.Stop()
	}
	if !l.ran {
		l.run() // which only lets go of their descriptors
	}
	l.running.Wait()
	for _, s := range l.streams {
		s.Tasks.Trim()
	}
	for _, loop := range l.all {
		err = errors.Join(err, loop.Store.Close())
	}
	return err
}

// largestBuffer is the most that a direction of any tunnel may hold; 0: nothing makes
// tunnels.
func largestBuffer(c *config.Config) (most int64) {
	for _, l := range c.HTTPListeners {
		if l.TCP != nil {
			most = max(most, l.TCP.Tunnels.Buffer)
		}
	}
	for _, vh := range c.VirtualHosts {
		for _, r := range vh.Routes {
			if r.MakesTunnels() {
				most = max(most, r.Tunnels.Buffer)
			}
		}
	}
	return most
}

// pipesOfEach returns how many pipes each of n loops gets, and of which size: a power of
// two, as the kernel has them, and no larger than what may be held.
//
// The pipes of a generation take a 32nd of its descriptors at most, which are needed
// for connections. Of what the user may have in pipes (pipe(7), pipe-user-pages-soft),
// in pages, they take an eighth: draining generations and those that resume tunnels keep
// theirs, and whoever comes too late gets none. 0 pages: there is no limit.
func pipesOfEach(n int, buffer int64, descriptors, pages uint64) (each, size int) {
	if buffer < smallestPipe {
		return 0, 0
	}
	each, size = int(min(mostPipes, descriptors/32/2/uint64(n))), smallestPipe
	for size < largestPipe && int64(size) < buffer {
		size *= 2
	}
	if pages == 0 {
		return each, size
	}
	room := int(min(pages/8*uint64(os.Getpagesize())/uint64(n), mostPipes*largestPipe))
	for size > smallestPipe && room/size < min(each, enoughPipes) {
		size /= 2
	}
	return min(each, room/size), size
}

// pipePages is how many pages a user may have in pipes: what the kernel says, or where
// /proc does not show that (proc(5), subset=pid), what it is by default.
func pipePages() uint64 {
	const byDefault = 16 << 10
	text, err := os.ReadFile("/proc/sys/fs/pipe-user-pages-soft")
	if err != nil {
		return byDefault
	}
	n, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64)
	if err != nil {
		return byDefault
	}
	return n
}
