package cli_test

import (
	"context"
	"testing"
	"time"

	"holdfast/internal/admin/admintest"
	"holdfast/internal/cli"
	"holdfast/internal/supervisor"
)

func TestUpgrade(t *testing.T) {
	t.Parallel()
	upgrade := func(result *supervisor.UpgradeResult, err error) string {
		dir, _ := serve(t, &admintest.Supervisor{OnUpgrade: func(context.Context) (*supervisor.UpgradeResult, error) { return result, err }})
		return "upgrade --runtime-dir " + dir
	}
	done := &supervisor.UpgradeResult{PID: 4711, Version: "1.1.0", Previous: "1.0.0", Duration: 16_600_000}
	execute(new(cli.Program), upgrade(done, nil)).want(t, 0, "holdfast 1.1.0 (pid 4711) commands after 17ms, in the place of 1.0.0\n", "")

	refused := &supervisor.Refusal{Step: "upgrade", Problems: []string{"h.toml:1: no", "h.toml:2: neither"}}
	execute(new(cli.Program), upgrade(nil, refused)).want(t, 1, "",
		"holdfast: the upgrade was refused and nothing has changed (upgrade)\nh.toml:1: no\nh.toml:2: neither\n")

	slow := func(ctx context.Context) (*supervisor.UpgradeResult, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	dir, _ := serve(t, &admintest.Supervisor{OnUpgrade: slow})
	execute(new(cli.Program), "upgrade --timeout "+(50*time.Millisecond).String()+" --runtime-dir "+dir).want(t, 3, "",
		"holdfast: the outcome of the upgrade is not known: no answer from the supervisor in time (after 50ms): unknown whether it was done\n  try: `holdfast status`\n")
}
