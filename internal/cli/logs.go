package cli

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"holdfast/internal/admin"
)

func (c *commands) logLevel() *cobra.Command {
	return &cobra.Command{
		Use:   "log-level " + strings.Join(admin.LogLevels, "|"),
		Short: "Set from which level on log lines are written",
		Long: "Sets the level of the supervisor's log and of every generation's, also of those to come. It outlives\n" +
			"reloads, not the service; `holdfast log-level config` takes it back to what the configuration says.",
		Args:      cobra.MatchAll(cobra.ExactArgs(1), cobra.OnlyValidArgs),
		ValidArgs: admin.LogLevels,
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.ask(cmd, askTimeout, func(ctx context.Context, client *admin.Client) error {
				if err := client.SetLogLevel(ctx, args[0]); err != nil {
					return &commandError{notDone(err, "the log level was not set everywhere", "whether the log level was set is not known"), err}
				}
				if args[0] == "config" {
					fmt.Fprintln(cmd.OutOrStdout(), "the log level is that of the configuration")
				} else {
					fmt.Fprintf(cmd.OutOrStdout(), "the log level is %s until `holdfast log-level config`\n", args[0])
				}
				return nil
			})
		},
	}
}

func (c *commands) reopenLogs() *cobra.Command {
	return &cobra.Command{
		Use:   "reopen-logs",
		Short: "Write access logs to what their paths name now",
		Long: "Opens the access logs of all generations again by their paths: for after they were moved away.\n" +
			"SIGUSR1 does the same. A log that cannot be opened goes on to where it was.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.ask(cmd, askTimeout, func(ctx context.Context, client *admin.Client) error {
				if err := client.ReopenLogs(ctx); err != nil {
					return &commandError{notDone(err, "the access logs were not all opened again", "whether the access logs were opened again is not known"), err}
				}
				fmt.Fprintln(cmd.OutOrStdout(), "the access logs are open again")
				return nil
			})
		},
	}
}
