package proxy

import (
	"math"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"holdfast/internal/config"
)

// spareDescriptors is how many are kept free at least: as many as a message may bring
// (control.FilesPerMessage).
const spareDescriptors = 64

// ownDescriptors is what a generation will have for itself beside what it has when it
// was built: what it keeps for a supervisor, and what tunnels need for a moment that go to
// Go's poller.
const ownDescriptors = 32

// descriptors is how those of the process are shared out. Connections have the ones
// with low numbers. The others are kept free for what the supervisor sends: a message
// whose descriptors find no room is cut off by the kernel (recvmsg(2), MSG_CTRUNC), and
// the channel with it.
//
// What is kept free nobody can take by counting wrongly: the kernel gives the lowest
// number that is free (open(2)), so whoever gets one that is not for connections knows
// that there is none for them, and gives it back. Clients are counted, too, so that it
// does not come to that: each may want a connection to an endpoint, and whoever comes in
// a crowd would be accepted first and refused then.
//
// All methods may be called concurrently; nil allows everything.
type descriptors struct {
	limit   func() uint64 // of the process; 0: not known
	reserve int           // how many are kept free
	own     atomic.Int64  // how many connections will not have, of those below most
	most    atomic.Int64  // numbers below are for connections
	clients atomic.Int64  // their connections, with those that became tunnels
}

// newDescriptors keeps as many free as taking over what the configuration names needs
// for a moment: two for each listening socket and each access log.
func newDescriptors(cfg *config.Config) *descriptors {
	d := &descriptors{limit: descriptorLimit, reserve: spareDescriptors + 2*(len(cfg.Listeners)+len(cfg.AccessLogs))}
	d.measure()
	return d
}

// measure asks how many descriptors there may be. Where they are few, connections have
// half of them.
func (d *descriptors) measure() int64 {
	limit := int64(min(d.limit(), math.MaxInt32))
	most := max(limit-int64(d.reserve), limit/2)
	if limit == 0 {
		most = math.MaxInt32
	}
	d.most.Store(most)
	return most
}

// built notes what the process has for itself, when nothing is served yet.
func (d *descriptors) built() {
	n, _ := openFiles() // not known: what is kept free has to do
	d.own.Store(n + ownDescriptors)
}

// allow says whether a connection may have the descriptor fd. The limit is asked for
// again before it says no: an operator may have raised it (prlimit(1)).
func (d *descriptors) allow(fd int) bool { return d == nil || d.reaches(int64(fd)+1) }

// room says whether there is a descriptor for another client, and one for each that may
// want a connection to an endpoint.
func (d *descriptors) room() bool {
	return d == nil || d.reaches(d.own.Load()+2*(d.clients.Load()+1))
}

func (d *descriptors) reaches(n int64) bool { return n <= d.most.Load() || n <= d.measure() }

// count notes that clients have come, or with a negative n that they have gone.
func (d *descriptors) count(n int64) {
	if d != nil {
		d.clients.Add(n)
	}
}

// descriptorLimit is how many descriptors the process may have.
func descriptorLimit() uint64 {
	var limit unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &limit) != nil {
		return 0
	}
	return limit.Cur
}

// tableSize is for how many descriptors there is room from the beginning. It costs
// 8 bytes of the kernel's memory for each.
const tableSize = 32 << 10

// growDescriptorTable makes room for n descriptors, or as many as the process may have.
//
// The kernel doubles the table when it is full, and whoever wants a descriptor then waits
// until no processor can be using the old table any more (expand_fdtable,
// synchronize_rcu). That is tens of milliseconds, in which no connection is accepted or
// made; and for all that wait the Go runtime starts threads, which stay. Who finds room
// in the old table does not wait.
func growDescriptorTable(n uint64) {
	last := min(n, descriptorLimit()) - 1
	// It is an aid: where it fails, the table grows as it is needed.
	if fd, err := unix.FcntlInt(uintptr(unix.Stderr), unix.F_DUPFD_CLOEXEC, int(last)); err == nil {
		unix.Close(fd)
	}
}
