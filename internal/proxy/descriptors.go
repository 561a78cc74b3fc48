package proxy

import "golang.org/x/sys/unix"

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
