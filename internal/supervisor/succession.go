package supervisor

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"holdfast/internal/control"
	"holdfast/internal/runtimedir"
)

// ErrSucceeded is what [Supervisor.Run] returns when another supervisor commands: the
// generations live on, and nothing may be stopped or removed that the two share.
var ErrSucceeded = errors.New("another supervisor has taken over")

// UpgradeResult is what an upgrade did.
type UpgradeResult struct {
	PID      int           `json:"pid"` // of the supervisor that commands now
	Version  string        `json:"version"`
	Previous string        `json:"previous"` // version of the one that it relieved
	Duration time.Duration `json:"duration"` // nanoseconds
}

// A Successor is a supervisor that was started to take this one's place: the candidate,
// as its predecessor sees it. Its methods are called one after the other, but Discard
// may be called at any time.
type Successor interface {
	// Offer hands over what estate says and duplicates of the descriptors, and blocks
	// until the candidate could command every generation. The error is why it cannot.
	Offer(ctx context.Context, estate *control.Estate, fds map[string]int) error

	// Commit has it command, and blocks until it does. With an error it may have
	// commanded some generations already.
	Commit(ctx context.Context) error

	// Farewell tells the service manager which process the service is now, and then the
	// candidate that its predecessor ends.
	Farewell(ctx context.Context)

	// Discard kills it and returns when it is dead for certain.
	Discard() error

	PID() int
	Version() string
}

// A Predecessor is the supervisor that has started this one to take its place.
type Predecessor interface {
	// Estate is what it leaves. The descriptors are the caller's from now on; see the
	// keys of [control.Estate].
	Estate() (*control.Estate, map[string]int)

	// Prepared says that this process could command every generation, and blocks until
	// it shall. With an error it shall not: the predecessor goes on or is gone, and
	// nothing has changed.
	Prepared() error

	// Refuse says why this process cannot succeed.
	Refuse(error)

	// Committed says that this process commands, and blocks until the predecessor has
	// told the service manager so. With an error it could not, and a service manager
	// will start another one: this process ends, and that one adopts.
	Committed() error
}

// Directory is the runtime directory, as far as the supervisor is concerned;
// *runtimedir.Dir implements it.
type Directory interface {
	// LoadState returns what a supervisor has saved, nil if none has. The error is about
	// what is there and cannot be understood.
	LoadState() (*runtimedir.State, error)
	SaveState(*runtimedir.State) error
}

// Rendezvous is where generations come that have lost their supervisor;
// *control.Rendezvous implements it.
type Rendezvous interface {
	// Serve gives everybody to admit who proves to know the key of the generation that
	// it says it is. It blocks until ctx ends.
	Serve(ctx context.Context, key func(generation int) []byte, log *slog.Logger, admit func(*control.Conn, *control.Hello))

	Path() string
	Refused() uint64
}

// Store keeps duplicates of descriptors for a supervisor to come; *systemd.Notifier
// implements it. Neither method blocks.
type Store interface {
	Store(key string, fd int)
	Remove(key string)
}
