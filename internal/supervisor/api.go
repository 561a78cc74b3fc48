package supervisor

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	dto "github.com/prometheus/client_model/go"

	"holdfast/internal/config"
)

// ErrStopping refuses a command that would change anything while the service ends.
var ErrStopping = errors.New("the service is stopping")

// ErrUnanswered says that a generation was told something and has not answered: it may do
// it yet.
var ErrUnanswered = errors.New("it may do so yet")

// Refusal is the error of a reload that has changed nothing.
type Refusal struct {
	Step     string   // what was attempted: "configuration", "proxy binary", "generations", "descriptors", "access logs", "listeners", "admin", "start", "serve" or "upgrade"; of commands about them "runtime values"
	Problems []string // each a sentence or a configuration problem; never empty
}

func (r *Refusal) Error() string { return r.Step + ": " + strings.Join(r.Problems, "\n") }

func refuse(step string, err error) *Refusal {
	var all []string
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		for _, e := range joined.Unwrap() {
			all = append(all, e.Error())
		}
	} else {
		all = strings.Split(err.Error(), "\n")
	}
	return &Refusal{Step: step, Problems: all}
}

// ReloadResult is what a reload did.
type ReloadResult struct {
	Generation int           `json:"generation"`         // the one that serves now
	Previous   int           `json:"previous,omitempty"` // the one that it relieved; 0: there was none
	Duration   time.Duration `json:"duration"`           // from reading the file to the old one's drain; nanoseconds
	Added      []string      `json:"added,omitempty"`    // listeners, by canonical address
	Removed    []string      `json:"removed,omitempty"`
	Warnings   []string      `json:"warnings,omitempty"`

	RolledBack bool `json:"rolled_back,omitempty"` // it has served before

	// Probation is "pending", or, for a caller that waited it out, "passed",
	// "crashed" (the generation died and another was put in its place) or
	// "superseded" (a later reload came first).
	Probation string `json:"probation"`
}

// Status is everything that can be seen from outside.
type Status struct {
	Version     string             `json:"version"`
	PID         int                `json:"pid"`
	Started     time.Time          `json:"started"`
	ConfigPath  string             `json:"config_path"`
	ConfigHash  string             `json:"config_hash"`          // of what serves
	FileDiffers bool               `json:"file_differs"`         // whether the file on disk is not what serves
	FileError   string             `json:"file_error,omitempty"` // why it could not be read
	Ready       bool               `json:"ready"`                // what /readyz answers
	ReadyOff    bool               `json:"ready_off"`            // the operator said `ready off`
	LogLevel    string             `json:"log_level,omitempty"`  // that was set by command
	Stopping    bool               `json:"stopping"`
	Reloading   bool               `json:"reloading"`
	Upgrading   bool               `json:"upgrading,omitempty"`
	Epoch       uint64             `json:"epoch"` // of this supervisor: each that commands has a higher one than those before
	LastReload  *LastReload        `json:"last_reload,omitempty"`
	Crashes     int                `json:"crashes,omitempty"`    // of serving generations in a row, failed replacements included; 0 when one has served for a while
	LastCrash   string             `json:"last_crash,omitempty"` // how the last of them came about
	Listeners   []ListenerStatus   `json:"listeners"`
	Generations []GenerationStatus `json:"generations"` // living ones, newest first
	LogsDropped uint64             `json:"logs_dropped"`
	Vault       VaultStatus        `json:"vault"`
	Overridden  Overridden         `json:"overridden,omitzero"` // runtime values
}

// VaultStatus is what the supervisor keeps of tunnels.
type VaultStatus struct {
	Deposits int    `json:"deposits"` // tunnels that outlive their process
	Resuming int    `json:"resuming"` // dead generations whose tunnels no other has resumed yet
	Bereft   int    `json:"bereft"`   // those tunnels
	Refused  uint64 `json:"refused"`  // deposits for which there were no descriptors
	Resumed  uint64 `json:"resumed"`  // times that a generation has resumed those of a dead one
	Moved    uint64 `json:"moved"`    // tunnels that one living generation has taken over from another
}

// LastReload is how the last reload or rollback ended.
type LastReload struct {
	Time       time.Time `json:"time"`
	Error      string    `json:"error,omitempty"`       // "" if it worked
	RolledBack int       `json:"rolled_back,omitempty"` // the generation that a rollback has relieved; 0: it was none
}

// ListenerStatus is one listening socket.
type ListenerStatus struct {
	Name    string `json:"name"`
	Key     string `json:"key"`     // canonical address as configured
	Address string `json:"address"` // as bound: the port is the real one
}

// GenerationStatus is one living generation.
type GenerationStatus struct {
	Number        int       `json:"generation"`
	State         string    `json:"state"`
	NotAnswering  bool      `json:"not_answering,omitempty"` // the figures are its last ones
	PID           int       `json:"pid"`
	Version       string    `json:"version"`
	ConfigHash    string    `json:"config_hash"`
	Started       time.Time `json:"started"`
	Connections   int       `json:"connections"`
	Requests      int       `json:"requests"` // in flight
	Tunnels       int       `json:"tunnels"`
	OldestTunnel  time.Time `json:"oldest_tunnel,omitzero"`
	RSS           int64     `json:"rss_bytes"`
	RequestsTotal uint64    `json:"requests_total"`
	TunnelsTotal  uint64    `json:"tunnels_total"`
	LogsDropped   uint64    `json:"logs_dropped"`
	Deposits      int       `json:"deposits"`          // tunnels that outlive the process
	EmptyBy       time.Time `json:"empty_by,omitzero"` // when all that is left will be ended, by command
}

// Commands is what the admin surface and signals may ask of a running supervisor.
// All methods may be called from anywhere, block until they are done or ctx is,
// and fail with [ErrStopping] once it has ended.
type Commands interface {
	// Reload puts the file as it is now into service. The error is a *Refusal if
	// nothing was changed. With wait it returns when probation has ended.
	Reload(ctx context.Context, wait bool) (*ReloadResult, error)

	// Rollback puts what has passed probation before what serves into service again: the
	// very process where it still drains, or a new one of the same configuration and
	// program. The error is a *Refusal if nothing was changed. With wait it returns when
	// probation has ended; what served until it went on probation is not on it again.
	Rollback(ctx context.Context, wait bool) (*ReloadResult, error)

	// Status asks every generation what it holds, and waits a moment only for one
	// that does not answer.
	Status(ctx context.Context) (*Status, error)

	// Upgrade has a new process of the supervisor's program, as it is on the disk now,
	// take this one's place. The error is a *Refusal if nothing was changed. If it is
	// nil, this supervisor commands no more and Run returns.
	Upgrade(ctx context.Context) (*UpgradeResult, error)

	// Stop begins the end of the service and returns at once; a second call ends
	// it without waiting for anything.
	Stop()

	// SetReady overrides what /readyz answers.
	SetReady(ctx context.Context, ready bool) error

	// Kill ends a generation at once, whatever it holds.
	Kill(ctx context.Context, generation int) error

	// MoveTunnels has a draining generation pass its tunnels to the one that serves, and
	// returns when it was told to. What cannot be moved stays where it is.
	MoveTunnels(ctx context.Context, generation int) error

	// Clear has a draining generation be empty within a time: its tunnels are closed one after
	// the other, spread evenly with jitter, and what is left at its end is ended then. It
	// returns when the generation was told. A later call can only make it sooner.
	Clear(ctx context.Context, generation int, within time.Duration) error

	// Metrics returns what all living and ended generations, and the supervisor
	// itself, have counted.
	Metrics(ctx context.Context) ([]*dto.MetricFamily, error)

	// Config returns the effective configuration as TOML, with every default: of
	// what serves, or of the file as it is now, for which the error is a *Refusal.
	Config(ctx context.Context, file bool) (string, error)

	// SetLogLevel sets the level of the supervisor and of every generation, also of
	// those to come: "debug", "info", "warn", "error", or "config", which takes that
	// back.
	SetLogLevel(ctx context.Context, level string) error

	// Override has these runtime values hold, in addition to those that were set before,
	// until they are reset. With an error other than a *Refusal, which has changed nothing,
	// they hold all the same, but a generation may not have heard of it.
	Override(ctx context.Context, values map[string]float64) (*OverrideResult, error)

	// ResetOverrides takes back what was set by Override for a key, or for all if it is "".
	ResetOverrides(ctx context.Context, key string) (*OverrideResult, error)

	// Runtime asks every generation which runtime values it has.
	Runtime(ctx context.Context) (*Runtime, error)

	// Clusters asks every generation what it knows of its clusters, or of the one of that
	// name. The error says so where none answers.
	Clusters(ctx context.Context, name string) (*Clusters, error)

	// Certificates asks the serving generation which certificates it works with.
	Certificates(ctx context.Context) (*Certificates, error)

	// ReopenLogs has the access logs of all generations written to what their paths
	// name now. A path that cannot be opened goes on as it was.
	ReopenLogs(ctx context.Context) error

	// RotateTickets has other keys of TLS session tickets made at once, and all former ones
	// dropped. With an error that wraps [ErrUnanswered] a generation may have those still.
	RotateTickets(ctx context.Context) error

	// Profile returns a profile of a generation in the format of pprof: one that
	// runtime/pprof names, or "cpu" or "trace" over a time.
	Profile(ctx context.Context, generation int, name string, over time.Duration) ([]byte, error)

	// Alive and Ready answer health checks without blocking.
	Alive() bool
	Ready() bool
}

// AdminSurface is the part of the admin surface that depends on the configuration.
type AdminSurface interface {
	// Prepare makes what cfg needs (its listening socket). Exactly one of commit
	// and abort is then called.
	Prepare(cfg config.Admin) (commit, abort func(), err error)
}

// notFound says that there is no such generation.
func notFound(generation int) error {
	return fmt.Errorf("no living generation %d", generation)
}
