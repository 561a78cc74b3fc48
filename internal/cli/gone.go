package cli

import (
	"context"
	"os"
	"time"

	"holdfast/internal/admin"
	"holdfast/internal/pidfd"
)

const (
	// whoTimeout is how long the supervisor may take to say which process it is.
	whoTimeout = time.Second

	// goneTimeout is how long it may take to be gone after it has said that it has ended:
	// it writes the rest of its log.
	goneTimeout = 5 * time.Second
)

// supervisorOf returns the process that answers, or nil where that cannot be found out,
// as in another PID namespace.
func supervisorOf(ctx context.Context, client *admin.Client) *pidfd.Process {
	ctx, cancel := context.WithTimeout(ctx, whoTimeout)
	defer cancel()
	status, err := client.Status(ctx)
	if err != nil || status.PID == os.Getpid() {
		return nil
	}
	id, err := pidfd.Of(status.PID)
	if err != nil {
		return nil
	}
	p, err := pidfd.Open(id)
	if err != nil {
		return nil
	}
	return p
}

// awaitGone waits for the end of p, which may be nil. systemd kills a main process that
// is not its child, as after an upgrade, if it still lives when ExecStop= has ended, and
// takes that for a failure of the service.
func awaitGone(p *pidfd.Process) {
	if p == nil {
		return
	}
	late := time.AfterFunc(goneTimeout, func() { p.Close() })
	_ = p.Wait() // an error is that it takes longer
	if late.Stop() {
		p.Close()
	}
}
