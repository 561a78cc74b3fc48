package service

import (
	"context"
	"errors"
	"os"
	"time"

	"github.com/cloudflare/tableflip"
	"golang.org/x/sys/unix"

	"holdfast/internal/control"
)

// marker is the environment variable by which tableflip knows that a process was
// started by another one of it. It never takes it away.
const marker = "TABLEFLIP_HAS_PARENT_7DIU3"

// channelName is what tableflip calls the only descriptor that it passes on: one end of
// a control channel, on which everything else travels.
const channelName = "handover"

// upgradeTimeout is after how long tableflip kills a candidate that is not ready,
// whatever it waits for. Our own limits come before.
const upgradeTimeout = 20 * time.Second

// flip is what is used of tableflip; *tableflip.Upgrader implements it.
type flip interface {
	HasParent() bool
	File(name string) (*os.File, error)
	AddFile(name string, file *os.File) error

	// Upgrade starts the program again, and blocks until that is ready, has ended, or was
	// killed because it took too long.
	Upgrade() error

	// Ready is what the Upgrade of the parent waits for.
	Ready() error

	// WaitForParent blocks until the parent has ended.
	WaitForParent(context.Context) error
}

// newFlip makes the only one that a process can have.
func newFlip() (*tableflip.Upgrader, error) {
	up, err := tableflip.New(tableflip.Options{UpgradeTimeout: upgradeTimeout})
	if err != nil {
		return nil, err
	}
	if !up.HasParent() {
		return up, up.Ready()
	}
	// Nothing that is started from here may have these: neither the marker nor the two
	// pipes to the parent, of which tableflip leaves the flag away.
	unix.CloseOnExec(3)
	unix.CloseOnExec(4)
	return up, os.Unsetenv(marker)
}

// upgrade is f.Upgrade once tableflip has taken notice that this process is ready and
// that its parent has ended: it hears of both in a goroutine of its own, a moment after
// they are known elsewhere.
func upgrade(f flip) error {
	for {
		err := f.Upgrade()
		if err == nil || err.Error() != "process is not ready yet" && err.Error() != "parent hasn't exited" {
			return err
		}
		time.Sleep(time.Millisecond)
	}
}

// passed is the channel to the parent.
func passed(f flip) (*control.Conn, error) {
	file, err := f.File(channelName)
	if err != nil {
		return nil, err
	}
	if file == nil {
		return nil, errors.New("the process that has started this one passes no control channel: it is no supervisor")
	}
	defer file.Close()
	fd, err := control.DuplicateOf(file)
	if err != nil {
		return nil, err
	}
	return control.NewCandidateConn(fd)
}
