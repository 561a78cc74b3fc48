package cli

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"holdfast/internal/admin"
)

func (c *commands) drain() *cobra.Command {
	var generation int
	var within, timeout time.Duration
	var wait bool
	cmd := &cobra.Command{
		Use:   "drain --generation N --within TIME",
		Short: "Have a draining generation be empty within a time",
		Long: "Closes the tunnels of a generation that drains one after the other, evenly spread over the time with jitter, so\n" +
			"that their clients do not all come back at once; their reason is \"operator\". Requests may end by themselves until\n" +
			"then, and what is left at the end of the time is cut. Another command can only make it sooner.\n\n" +
			"Tunnels that may move can be moved instead, without their peers noticing: `holdfast move`.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkGeneration(generation); err != nil {
				return err
			}
			if within < 0 {
				return &usageError{errors.New("--within takes a time from now")}
			}
			return c.ask(cmd, timeout+within, func(ctx context.Context, client *admin.Client) error {
				if err := client.Clear(ctx, generation, within); err != nil {
					what := fmt.Sprintf("generation %d goes on to drain as it did", generation)
					return &commandError{notDone(err, what, fmt.Sprintf("whether generation %d was told is not known", generation)), err}
				}
				if !wait {
					fmt.Fprintf(cmd.OutOrStdout(), "generation %d closes what it has within %s; it has %s\n", generation, within, holds(ctx, client, generation))
					return nil
				}
				if err := awaitDrained(ctx, client, generation); err != nil {
					return err
				}
				fmt.Fprintf(cmd.OutOrStdout(), "generation %d has ended\n", generation)
				return nil
			})
		},
	}
	cmd.Flags().IntVar(&generation, "generation", 0, "its number `N`, as holdfast status shows it")
	cmd.Flags().DurationVar(&within, "within", 0, "how long it may take, such as 10m")
	cmd.Flags().BoolVar(&wait, "wait", false, "wait until it has ended")
	cmd.Flags().DurationVar(&timeout, "timeout", waitTimeout, "how long to wait, beside the time that it may take")
	cmd.MarkFlagRequired("generation")
	cmd.MarkFlagRequired("within")
	return cmd
}

// holds says what a generation has left.
func holds(ctx context.Context, client *admin.Client, generation int) string {
	if status, err := client.Status(ctx); err == nil {
		for _, g := range status.Generations {
			if g.Number == generation {
				return count(g.Tunnels, "tunnel") + " and " + count(g.Requests, "request")
			}
		}
	}
	return "nothing left"
}

// awaitDrained waits until a generation has ended. An error is a *commandError around a
// *leftError: it goes on to close what it has.
func awaitDrained(ctx context.Context, client *admin.Client, generation int) error {
	for {
		status, err := client.Status(ctx)
		if err != nil {
			return &commandError{fmt.Sprintf("what generation %d has left is not known", generation), &leftError{err}}
		}
		lives := false
		for _, g := range status.Generations {
			lives = lives || g.Number == generation
		}
		if !lives {
			return nil
		}
		select {
		case <-time.After(movePoll):
		case <-ctx.Done():
			return &commandError{fmt.Sprintf("generation %d has not ended yet, and goes on to close what it has", generation), &leftError{context.Cause(ctx)}}
		}
	}
}
