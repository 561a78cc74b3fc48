// Package systemd is what the service and systemd say to each other: that it
// serves, reloads or stops, that it lives, which process it is, which listening sockets
// systemd passes on, and which descriptors it keeps for a time when no process of the
// service lives. Without systemd nothing is said.
package systemd

import (
	"os"
	"strconv"
	"time"

	"github.com/coreos/go-systemd/v22/activation"

	"holdfast/internal/control"
)

// WatchdogInterval returns within which time systemd wants to hear that the service
// lives; 0: it does not.
//
// WATCHDOG_PID is not compared with our pid, which is another one after the program
// has been replaced in place. A message of a process that systemd does not watch has
// no effect (NotifyAccess= in systemd.service(5)).
func WatchdogInterval() time.Duration {
	usec, err := strconv.ParseInt(os.Getenv("WATCHDOG_USEC"), 10, 64)
	if err != nil || usec <= 0 {
		return 0
	}
	return time.Duration(usec) * time.Microsecond
}

// Files returns the descriptors that systemd has passed to this process, and takes that
// out of the environment: the sockets of socket units, with the units' names
// (sd_listen_fds(3)), and by key what [Notifier.Store] has left in its descriptor store,
// in a process that is dead by now. The caller owns them. It must be called once, before
// anything else can have opened or closed one of these descriptors.
func Files() (sockets []*os.File, stored map[string]int) {
	stored = make(map[string]int)
	for _, f := range activation.Files(true) {
		key, ours := storedKey(f.Name())
		if !ours {
			sockets = append(sockets, f)
			continue
		}
		// systemd passes the newest of a name first. There is another only if it was
		// stored by somebody else, or a message was lost.
		if _, another := stored[key]; !another {
			if fd, err := control.DuplicateOf(f); err == nil { // fails without free descriptors only, with which nothing starts
				stored[key] = fd
			}
		}
		_ = f.Close() // nothing was written to it
	}
	return sockets, stored
}
