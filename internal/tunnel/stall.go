package tunnel

import (
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/tunnel/inflight"
)

// silence is the moment since which a peer that has something to acknowledge has answered
// nothing, 0 if it has nothing.
type silence time.Duration

// dead judges such a peer. Keepalive probes are not sent to it, and the kernel alone would
// wait for a quarter of an hour.
//
// A peer that merely does not read answers each probe of its window, however rare the
// probes have become. So silence alone says nothing: in all that time the kernel must have
// asked more than once, by sending again or by a probe after one that was not answered.
func (s *silence) dead(info *unix.TCPInfo, now, patience time.Duration) bool {
	lasts := now - time.Duration(*s)
	if *s == 0 || time.Duration(info.Last_ack_recv)*time.Millisecond < lasts {
		*s = silence(now)
		return false
	}
	return lasts >= patience && (info.Retransmits > 0 || info.Probes > 1)
}

// idle says whether all that was sent has arrived.
func idle(info *unix.TCPInfo) bool { return info.Unacked == 0 && info.Notsent_bytes == 0 }

// watchPiece is how many flows are looked at in one turn.
const watchPiece = 512

// watchFlow notes that something is on its way to the receiver of a flow.
func (e *engine) watchFlow(n uint32, t *slot, from int) {
	f := &t.flows[from]
	if f.watched != 0 {
		return
	}
	e.watched = append(e.watched, key(n, from))
	f.watched = uint32(len(e.watched))
	e.watchSoon()
}

// unwatchFlow forgets about a flow.
func (e *engine) unwatchFlow(f *flow) {
	if f.watched == 0 {
		return
	}
	last := len(e.watched) - 1
	d := e.watched[last]
	e.watched[f.watched-1] = d
	e.table.at(uint32(d / 2)).flows[d%2].watched = f.watched
	e.watched = e.watched[:last]
	f.watched = 0
	e.watchAt = min(e.watchAt, last)
}

func (e *engine) watchSoon() {
	if !e.watching {
		e.watching = true
		e.watcher.Set(e.loop.Now().Add(e.set.bounds.check))
	}
}

// watch looks for receivers that are dead, a piece of the flows in each turn, from the
// last to the first. It is called while something is on its way anywhere: an engine in
// which nothing moves is not woken.
func (e *engine) watch() {
	if e.watchAt == 0 {
		e.watchAt = len(e.watched)
	}
	for range watchPiece {
		if e.watchAt == 0 {
			break
		}
		e.watchAt--
		e.watchOne(e.watched[e.watchAt])
	}
	if e.watchAt > 0 {
		e.watcher.Set(e.loop.Now())
		return
	}
	e.watching = false
	if len(e.watched) > 0 {
		e.watchSoon()
	}
}

func (e *engine) watchOne(d inflight.Direction) {
	n, from := uint32(d/2), int(d%2)
	t := e.table.at(n)
	defer e.finish(n, t)
	f, dst := &t.flows[from], &t.sockets[1-from]
	if back := &t.flows[1-from]; back.heard { // who sends is alive
		back.heard, f.silence = false, 0
		return
	}
	if dst.broken || tcpInfo(dst.fd, &e.info) != 0 || idle(&e.info) && !f.holds {
		f.silence = 0
		e.unwatchFlow(f)
		return
	}
	if f.silence.dead(&e.info, e.now(), e.origins.used[t.origin].patience) {
		e.lose(n, t, 1-from, unix.ETIMEDOUT)
	}
}

// watch is the same for a tunnel that has goroutines. It says whether something may
// still be on its way.
func (d *direction) watch() bool {
	if !d.watched.Load() {
		return false
	}
	d.watched.Store(false) // before the look: what is sent after it is noted again
	var info unix.TCPInfo
	errno := unix.EBADF // of a connection that was closed
	d.dst.raw.Control(func(fd uintptr) { errno = tcpInfo(int32(fd), &info) })
	if errno != 0 || idle(&info) {
		d.silence = 0
		return false
	}
	d.watched.Store(true)
	if d.silence.dead(&info, d.t.set.now(), d.t.limits.KeepAlive.patience()) {
		d.t.cut(DeadPeer, d.dst)
	}
	return true
}
