package cli

import (
	"context"
	"time"

	"github.com/spf13/cobra"

	"holdfast/internal/admin"
)

func (c *commands) rollback() *cobra.Command {
	var wait bool
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "rollback",
		Short: "Put what served before into service again",
		Long: "Has the configuration and the proxy program serve again that had passed their probation before those\n" +
			"that serve: by their very generation where it still drains, or by a new one. Both are what was read then,\n" +
			"whatever the files say by now; files that the configuration names are read anew. What serves now keeps its\n" +
			"tunnels and finishes its requests. What cannot work is refused and changes nothing.\n\n" +
			"The configuration file stays as it is, and the next reload puts it into service. Another rollback takes\n" +
			"this one back, once it has passed its probation.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.ask(cmd, timeout, func(ctx context.Context, client *admin.Client) error {
				result, err := client.Rollback(ctx, wait)
				if err != nil {
					return &commandError{notDone(err, "the rollback was refused and nothing has changed", "the outcome of the rollback is not known"), err}
				}
				return replaced(ctx, cmd.OutOrStdout(), client, result)
			})
		},
	}
	cmd.Flags().BoolVar(&wait, "wait", false, "wait until what serves again has passed its probation")
	timeoutFlag(cmd, &timeout)
	return cmd
}
