// Package stream is connections on a loop, for tasks that read and write them one step
// after the other.
//
//	err := conn.Fill(t)             // waits until something has come
//	head, n := parse(conn.Buffered())
//	conn.Consume(n)
//	...
//	err = other.Send(t, head, body, nil) // waits while the peer is slow
//	n, err := stream.Splice(t, other, conn, length)
//
// A connection that waits for its next message is parked: it has an [Owner], which is told
// when something comes, and neither a task nor a buffer, nor anything but its Conn.
//
// # Buffers
//
// All connections of a loop read into one buffer. What a connection has read and not
// consumed moves to a buffer of its own when another one reads, so whoever waits
// holds no memory but what it needs. A slice that Buffered has returned is good until
// anything of the loop is read or its task waits, whether it was consumed meanwhile or the
// connection closed; Send does not keep what it was given.
//
// In steady state nothing of this allocates. All is done on the loop's goroutine.
package stream

import (
	"holdfast/internal/metrics"
	"holdfast/internal/poller"
	"holdfast/internal/task"
)

// readSize is what a connection reads at once: the head and the body of a usual message.
const readSize = 64 << 10

// mostWorks is how many works are kept of connections that were busy.
const mostWorks = 1024

// Loop is what the connections of a loop share.
type Loop struct {
	*poller.Loop
	Tasks *task.Pool
	Index int // its number among the loops of a process

	// Counts is what is counted in a turn, and added to the metrics at its end.
	Counts metrics.Batch

	conns    []*Conn
	vacant   []uint32 // places in conns
	shared   *[readSize]byte
	borrower *Conn // which has bytes in shared; nil: none
	works    []*work
	buffers  buffers
	dropped  [][]byte // private buffers of which somebody may still have a part, until anything is read or he waits
	pipes    pipes
	vector   vector
	dialling dialling
	probe    [1]byte       // what Quiet looks at
	records  *[record]byte // what is gathered for one; nil until it is needed
	batch    *batch        // of records; nil until it is needed

	date   string
	dateOf int64    // the second of date
	trims  []func() // see OnTrim
}

// NewLoop returns what connections of l share. tasks are those of the same loop.
func NewLoop(l *poller.Loop, tasks *task.Pool, index int) *Loop {
	sl := &Loop{Loop: l, Tasks: tasks, Index: index, shared: new([readSize]byte), pipes: pipes{most: mostPipes}}
	l.AfterTurn(sl.Counts.Flush) // after the tasks
	return sl
}

// Date returns the time of the turn as a Date field has it (RFC 9110 §5.6.7).
func (l *Loop) Date() string {
	now := l.Now()
	if second := now.Unix(); second != l.dateOf || l.date == "" {
		l.date, l.dateOf = now.UTC().Format("Mon, 02 Jan 2006 15:04:05 GMT"), second
	}
	return l.date
}

// Conns is how many connections there are.
func (l *Loop) Conns() int { return len(l.conns) - len(l.vacant) }

// OnTrim has fn called by every Trim, too: who keeps things for the next ones of a loop lets
// go of them.
func (l *Loop) OnTrim(fn func()) { l.trims = append(l.trims, fn) }

// Trim gives back the memory of what nobody uses, and closes the pipes of [Splice]. It is
// called before the loop ends.
func (l *Loop) Trim() {
	for _, fn := range l.trims {
		fn()
	}
	l.Tasks.Trim()
	l.pipes.trim()
	l.buffers.trim()
	l.works = nil
}

// Buffer returns a buffer of n bytes or more, whose length is its capacity, for as long as
// something is under way. Release takes it back.
func (l *Loop) Buffer(n int) []byte { return l.buffers.get(n) }

// Release takes back what Buffer gave, or anything that grew out of it. Nobody may have a
// part of it any more.
func (l *Loop) Release(p []byte) { l.buffers.put(p) }

// Ready implements [poller.Owner].
func (l *Loop) Ready(index uint32, e poller.Events) { l.conns[index].ready(e) }

// drop takes back a private buffer, of which whoever is just running may have a part.
func (l *Loop) drop(p []byte) { l.dropped = append(l.dropped, p) }

// reuse lets others have what was dropped: a slice of it is not good any more.
func (l *Loop) reuse() {
	for i, p := range l.dropped {
		l.buffers.put(p)
		l.dropped[i] = nil
	}
	l.dropped = l.dropped[:0]
}

// evict has the shared buffer free.
func (l *Loop) evict() {
	if l.borrower != nil {
		l.borrower.save()
	}
}

func (l *Loop) takeWork() *work {
	last := len(l.works) - 1
	if last < 0 {
		return new(work)
	}
	w := l.works[last]
	l.works[last] = nil
	l.works = l.works[:last]
	return w
}

// putWork takes back what nobody uses.
func (l *Loop) putWork(w *work) {
	if *w = (work{}); len(l.works) < mostWorks {
		l.works = append(l.works, w)
	}
}

// place gives c a place among the connections.
func (l *Loop) place(c *Conn) uint32 {
	if n := len(l.vacant); n > 0 {
		i := l.vacant[n-1]
		l.vacant = l.vacant[:n-1]
		l.conns[i] = c
		return i
	}
	l.conns = append(l.conns, c)
	return uint32(len(l.conns) - 1)
}

func (l *Loop) vacate(i uint32) {
	l.conns[i] = nil
	l.vacant = append(l.vacant, i)
}
