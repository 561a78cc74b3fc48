package cli

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"holdfast/internal/admin"
)

func (c *commands) metrics() *cobra.Command {
	return &cobra.Command{
		Use:   "metrics",
		Short: "Print what has been counted, as Prometheus sees it",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.ask(cmd, slowTimeout, func(ctx context.Context, client *admin.Client) error {
				text, err := client.Metrics(ctx)
				if err != nil {
					return &commandError{"nothing can be shown", err}
				}
				fmt.Fprint(cmd.OutOrStdout(), text)
				return nil
			})
		},
	}
}
