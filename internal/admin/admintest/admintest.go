// Package admintest has a supervisor for tests: one that writes down what it is
// told and says what it was given to say.
package admintest

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	dto "github.com/prometheus/client_model/go"

	"holdfast/internal/supervisor"
)

// Supervisor implements [supervisor.Commands]. Its fields are set before it is
// used; a nil function does nothing and succeeds.
type Supervisor struct {
	OnReload       func(ctx context.Context, wait bool) (*supervisor.ReloadResult, error)
	OnStatus       func(ctx context.Context) (*supervisor.Status, error)
	OnReady        func(ready bool) error
	OnKill         func(generation int) error
	OnMove         func(generation int) error
	OnStop         func()
	OnMetrics      func(ctx context.Context) ([]*dto.MetricFamily, error)
	OnConfig       func(file bool) (string, error)
	OnLevel        func(level string) error
	OnReopen       func() error
	OnTickets      func() error
	OnUpgrade      func(ctx context.Context) (*supervisor.UpgradeResult, error)
	OnProfile      func(ctx context.Context, generation int, name string, over time.Duration) ([]byte, error)
	OnRuntime      func() (*supervisor.Runtime, error)
	OnSet          func(values map[string]float64) (*supervisor.OverrideResult, error)
	OnReset        func(key string) (*supervisor.OverrideResult, error)
	OnShow         func(name string) (*supervisor.Clusters, error)
	OnCertificates func() (*supervisor.Certificates, error)
	Dead           bool
	NotReady       bool
	OnClear        func(generation int, within time.Duration) error

	mu    sync.Mutex
	calls []string
}

// Calls returns what it was told to do, in order: "stop", "kill 3", "move 3", "ready false",
// "reload", "reload and wait", "upgrade", "log level debug", "reopen logs", "set map[a:1]", "reset a".
func (s *Supervisor) Calls() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.calls)
}

func (s *Supervisor) note(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls = append(s.calls, fmt.Sprintf(format, args...))
}

func (s *Supervisor) Reload(ctx context.Context, wait bool) (*supervisor.ReloadResult, error) {
	if wait {
		s.note("reload and wait")
	} else {
		s.note("reload")
	}
	if s.OnReload == nil {
		return &supervisor.ReloadResult{}, nil
	}
	return s.OnReload(ctx, wait)
}

func (s *Supervisor) Rollback(ctx context.Context, wait bool) (*supervisor.ReloadResult, error) {
	if wait {
		s.note("rollback and wait")
	} else {
		s.note("rollback")
	}
	if s.OnReload == nil {
		return &supervisor.ReloadResult{RolledBack: true}, nil
	}
	return s.OnReload(ctx, wait)
}

func (s *Supervisor) Upgrade(ctx context.Context) (*supervisor.UpgradeResult, error) {
	s.note("upgrade")
	if s.OnUpgrade == nil {
		return &supervisor.UpgradeResult{}, nil
	}
	return s.OnUpgrade(ctx)
}

func (s *Supervisor) Status(ctx context.Context) (*supervisor.Status, error) {
	if s.OnStatus == nil {
		return &supervisor.Status{Ready: !s.NotReady}, nil
	}
	return s.OnStatus(ctx)
}

func (s *Supervisor) Stop() {
	s.note("stop")
	if s.OnStop != nil {
		s.OnStop()
	}
}

func (s *Supervisor) SetReady(_ context.Context, ready bool) error {
	s.note("ready %t", ready)
	if s.OnReady == nil {
		return nil
	}
	return s.OnReady(ready)
}

func (s *Supervisor) Kill(_ context.Context, generation int) error {
	s.note("kill %d", generation)
	if s.OnKill == nil {
		return nil
	}
	return s.OnKill(generation)
}

func (s *Supervisor) Clear(_ context.Context, generation int, within time.Duration) error {
	s.note("clear %d within %s", generation, within)
	if s.OnClear == nil {
		return nil
	}
	return s.OnClear(generation, within)
}

func (s *Supervisor) MoveTunnels(_ context.Context, generation int) error {
	s.note("move %d", generation)
	if s.OnMove == nil {
		return nil
	}
	return s.OnMove(generation)
}

func (s *Supervisor) Metrics(ctx context.Context) ([]*dto.MetricFamily, error) {
	if s.OnMetrics == nil {
		return nil, nil
	}
	return s.OnMetrics(ctx)
}

func (s *Supervisor) Config(_ context.Context, file bool) (string, error) {
	if s.OnConfig == nil {
		return "", nil
	}
	return s.OnConfig(file)
}

func (s *Supervisor) SetLogLevel(_ context.Context, level string) error {
	s.note("log level %s", level)
	if s.OnLevel == nil {
		return nil
	}
	return s.OnLevel(level)
}

func (s *Supervisor) ReopenLogs(context.Context) error {
	s.note("reopen logs")
	if s.OnReopen == nil {
		return nil
	}
	return s.OnReopen()
}

func (s *Supervisor) RotateTickets(context.Context) error {
	s.note("rotate tickets")
	if s.OnTickets == nil {
		return nil
	}
	return s.OnTickets()
}

func (s *Supervisor) Runtime(context.Context) (*supervisor.Runtime, error) {
	if s.OnRuntime == nil {
		return &supervisor.Runtime{}, nil
	}
	return s.OnRuntime()
}

func (s *Supervisor) Override(_ context.Context, values map[string]float64) (*supervisor.OverrideResult, error) {
	s.note("set %v", values)
	if s.OnSet == nil {
		return &supervisor.OverrideResult{}, nil
	}
	return s.OnSet(values)
}

func (s *Supervisor) ResetOverrides(_ context.Context, key string) (*supervisor.OverrideResult, error) {
	s.note("reset %s", key)
	if s.OnReset == nil {
		return &supervisor.OverrideResult{}, nil
	}
	return s.OnReset(key)
}

func (s *Supervisor) Profile(ctx context.Context, generation int, name string, over time.Duration) ([]byte, error) {
	if s.OnProfile == nil {
		return nil, nil
	}
	return s.OnProfile(ctx, generation, name, over)
}

func (s *Supervisor) Alive() bool { return !s.Dead }
func (s *Supervisor) Ready() bool { return !s.NotReady }

func (s *Supervisor) Certificates(context.Context) (*supervisor.Certificates, error) {
	if s.OnCertificates == nil {
		return &supervisor.Certificates{}, nil
	}
	return s.OnCertificates()
}

func (s *Supervisor) Clusters(_ context.Context, name string) (*supervisor.Clusters, error) {
	if s.OnShow == nil {
		return &supervisor.Clusters{}, nil
	}
	return s.OnShow(name)
}
