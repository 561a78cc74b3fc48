package cli

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"holdfast/internal/admin"
)

func (c *commands) upgrade() *cobra.Command {
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "upgrade",
		Short: "Put the supervisor's program, as it is on disk now, into service",
		Long: "Starts the program `holdfast` again from where the running one was started from, and hands all\n" +
			"generations over to it. Connections do not notice. Where the new one cannot command them, the old\n" +
			"one goes on. The proxy's program is not concerned: `holdfast reload` puts that into service.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.ask(cmd, timeout, func(ctx context.Context, client *admin.Client) error {
				result, err := client.Upgrade(ctx)
				if err != nil {
					return &commandError{notDone(err, "the upgrade was refused and nothing has changed", "the outcome of the upgrade is not known"), err}
				}
				fmt.Fprintf(cmd.OutOrStdout(), "holdfast %s (pid %d) commands after %s, in the place of %s\n",
					result.Version, result.PID, result.Duration.Round(time.Millisecond), result.Previous)
				return nil
			})
		},
	}
	timeoutFlag(cmd, &timeout)
	return cmd
}
