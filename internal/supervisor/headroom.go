package supervisor

import (
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"holdfast/internal/control"
)

const (
	// generationDescriptors is what a generation needs of the supervisor while it
	// starts, access logs not counted: channel, pidfd, memory files, program, what os/exec
	// needs, and two of each while they change hands.
	generationDescriptors = 16

	// surfaceDescriptors are for those who ask meanwhile: commands, scrapes, generations
	// that look for a supervisor.
	surfaceDescriptors = 16
)

// headroom refuses a reload for which there are too few descriptors. It must leave
// enough to replace the generation that it starts, should that one crash. Called in the
// loop.
func (s *Supervisor) headroom(r *release) error {
	need := surfaceDescriptors + 2*(generationDescriptors+2*len(r.config.AccessLogs))
	for _, l := range r.config.Listeners {
		if s.open[l.Key()] == nil {
			need++
		}
	}
	err := freeDescriptors(need)
	if err == nil {
		return nil
	}
	problems := []string{err.Error() + "; raise the limit of descriptors (LimitNOFILE, ulimit -n), or end generations that drain"}
	for _, g := range slices.Backward(s.newestFirst()) {
		if g.state == draining {
			problems = append(problems, fmt.Sprintf("generation %d is draining with %d tunnels and %d requests (pid %d)",
				g.number, g.lastSeen.Tunnels, g.lastSeen.Requests, g.proc.PID()))
		}
	}
	return &Refusal{Step: "descriptors", Problems: problems}
}

// freeDescriptors says whether n descriptors are free. It tries: no file says so
// everywhere, and a limit may have been changed from outside.
func freeDescriptors(n int) error {
	var fds []int
	defer func() { control.CloseAll(fds) }()
	first, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	for err == nil {
		if fds = append(fds, first); len(fds) == n {
			return nil
		}
		first, err = unix.FcntlInt(uintptr(fds[0]), unix.F_DUPFD_CLOEXEC, 0)
	}
	if errors.Is(err, unix.EMFILE) {
		return fmt.Errorf("%d descriptors are needed and %d are free", n, len(fds))
	}
	return fmt.Errorf("%d descriptors are needed: %w", n, err)
}
