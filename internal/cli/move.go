package cli

import (
	"cmp"
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"holdfast/internal/admin"
	"holdfast/internal/supervisor"
)

// movePoll is how often move --wait looks how many tunnels are left.
const movePoll = 100 * time.Millisecond

func (c *commands) move() *cobra.Command {
	var generation int
	var wait bool
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "move --generation N",
		Short: "Have a draining generation pass its tunnels to the serving one",
		Long: "Has a generation that drains pass its tunnels to the one that serves, also those of routes whose\n" +
			"tunnels.on_reload is \"keep\". The peers notice nothing. What cannot be moved stays where it is, and drains.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkGeneration(generation); err != nil {
				return err
			}
			return c.ask(cmd, timeout, func(ctx context.Context, client *admin.Client) error {
				if err := client.MoveTunnels(ctx, generation); err != nil {
					what := fmt.Sprintf("generation %d moves no tunnels", generation)
					return &commandError{notDone(err, what, fmt.Sprintf("whether generation %d moves its tunnels is not known", generation)), err}
				}
				if wait {
					if err := awaitMoved(ctx, client, generation); err != nil {
						return err
					}
				}
				fmt.Fprintln(cmd.OutOrStdout(), moved(ctx, client, generation))
				return nil
			})
		},
	}
	cmd.Flags().IntVar(&generation, "generation", 0, "its number `N`, as holdfast status shows it")
	cmd.Flags().BoolVar(&wait, "wait", false, "wait until it has no tunnels left")
	timeoutFlag(cmd, &timeout)
	cmd.MarkFlagRequired("generation")
	return cmd
}

// leftError is a move that was begun and not seen to its end.
type leftError struct{ why error }

func (e *leftError) Error() string { return e.why.Error() }
func (e *leftError) Unwrap() error { return e.why }

// awaitMoved waits until a generation has no tunnels. An error is a *commandError around a
// *leftError: they go on moving.
func awaitMoved(ctx context.Context, client *admin.Client, generation int) error {
	what := fmt.Sprintf("how many tunnels generation %d has left is not known", generation)
	for {
		status, err := client.Status(ctx)
		if err != nil {
			return &commandError{what, &leftError{cmp.Or(context.Cause(ctx), err)}}
		}
		left := tunnelsOf(status, generation)
		if left == 0 {
			return nil
		}
		what = fmt.Sprintf("generation %d has %s left, and goes on to move what can be moved", generation, count(left, "tunnel"))
		select {
		case <-time.After(movePoll):
		case <-ctx.Done():
			return &commandError{what, &leftError{context.Cause(ctx)}}
		}
	}
}

// moved says how far a move is. Where that cannot be learnt it was begun all the same.
func moved(ctx context.Context, client *admin.Client, generation int) string {
	status, err := client.Status(ctx)
	if err != nil {
		return fmt.Sprintf("generation %d moves its tunnels", generation)
	}
	if left := tunnelsOf(status, generation); left > 0 {
		return fmt.Sprintf("generation %d moves its tunnels; it has %s left", generation, number(left))
	}
	return fmt.Sprintf("generation %d has no tunnels left", generation)
}

// tunnelsOf returns how many tunnels a generation has. One that has ended has none.
func tunnelsOf(status *supervisor.Status, generation int) int {
	for _, g := range status.Generations {
		if g.Number == generation {
			return g.Tunnels
		}
	}
	return 0
}
