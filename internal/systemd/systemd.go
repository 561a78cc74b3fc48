// Package systemd is what the service and systemd say to each other: that it
// serves, reloads or stops, that it lives, and which listening sockets systemd
// passes on. Without systemd nothing is said.
package systemd

import (
	"os"
	"strconv"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
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

// Files returns the descriptors that systemd has passed to this process, with the
// names of their socket units (sd_listen_fds(3)), and takes that out of the
// environment. The caller owns them. It must be called once, before anything else
// can have opened or closed one of these descriptors.
func Files() []*os.File { return activation.Files(true) }
