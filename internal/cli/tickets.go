package cli

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"holdfast/internal/admin"
)

func (c *commands) tickets() *cobra.Command {
	all := &cobra.Command{
		Use:   "tickets",
		Short: "Keys of TLS session tickets",
		Long:  "Clients resume TLS sessions by tickets, under keys that all generations share.",
		Args:  cobra.NoArgs,
	}
	all.AddCommand(&cobra.Command{
		Use:   "rotate",
		Short: "Make other keys at once, and drop all former ones",
		Long: "For when somebody may know the keys. Every client does one full handshake then, at its next connection.\n" +
			"The service rotates keys by itself, and understands tickets of before: see tls.ticket_rotation.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.ask(cmd, askTimeout, func(ctx context.Context, client *admin.Client) error {
				if err := client.RotateTickets(ctx); err != nil {
					return &commandError{notDone(err, "the keys of session tickets were not rotated", "whether the keys of session tickets are rotated everywhere is not known"), err}
				}
				fmt.Fprintln(cmd.OutOrStdout(), "session tickets have other keys, and those of before are dropped")
				return nil
			})
		},
	})
	return all
}
