package cli

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"holdfast/internal/admin"
	"holdfast/internal/supervisor"
)

func (c *commands) reload() *cobra.Command {
	var wait bool
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "reload",
		Short: "Put the configuration file, as it is now, into service",
		Long: "Starts a new generation from the configuration file and has it serve; the old one keeps its\n" +
			"tunnels and finishes its requests. What cannot work is refused and changes nothing.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.ask(cmd, timeout, func(ctx context.Context, client *admin.Client) error {
				result, err := client.Reload(ctx, wait)
				if err != nil {
					return &commandError{notDone(err, "the reload was refused and nothing has changed", "the outcome of the reload is not known"), err}
				}
				return replaced(ctx, cmd.OutOrStdout(), client, result)
			})
		},
	}
	cmd.Flags().BoolVar(&wait, "wait", false, "wait until the new generation has passed its probation")
	timeoutFlag(cmd, &timeout)
	return cmd
}

// replaced tells what a reload or a rollback has done.
func replaced(ctx context.Context, w io.Writer, client *admin.Client, r *supervisor.ReloadResult) error {
	if r.Probation == "crashed" {
		return &commandError{"the new configuration is not in service", &crashError{r.Generation}}
	}
	tellReload(ctx, w, client, r)
	return nil
}

// crashError is a reload that was taken back.
type crashError struct{ generation int }

func (e *crashError) Error() string {
	return fmt.Sprintf("generation %d crashed in its probation, and another was put in its place", e.generation)
}

// tellReload says in a sentence or two what has happened.
func tellReload(ctx context.Context, w io.Writer, client *admin.Client, r *supervisor.ReloadResult) {
	fmt.Fprintf(w, "generation %d serves after %s%s\n", r.Generation, r.Duration.Round(time.Millisecond), relieved(ctx, client, r.Previous))
	if r.RolledBack {
		fmt.Fprintln(w, "the configuration file is as it was: the next reload puts it into service")
	}
	if len(r.Added) > 0 {
		fmt.Fprintf(w, "opened: %s\n", strings.Join(r.Added, ", "))
	}
	if len(r.Removed) > 0 {
		fmt.Fprintf(w, "closed: %s\n", strings.Join(r.Removed, ", "))
	}
	for _, warning := range r.Warnings {
		fmt.Fprintf(w, "warning: %s\n", warning)
	}
	switch r.Probation {
	case "passed":
		fmt.Fprintln(w, "it has passed its probation")
	case "superseded":
		fmt.Fprintln(w, "its probation was not waited out: something newer took its place")
	}
}

// relieved says what the previous generation does now. Where that cannot be learnt
// the reload has been done all the same.
func relieved(ctx context.Context, client *admin.Client, previous int) string {
	if previous == 0 {
		return ""
	}
	status, err := client.Status(ctx)
	if err != nil {
		return fmt.Sprintf(", generation %d drains", previous)
	}
	for _, g := range status.Generations {
		if g.Number == previous && g.NotAnswering {
			return fmt.Sprintf(", generation %d does not answer", previous)
		}
		if g.Number == previous && g.Tunnels+g.Requests == 0 {
			return fmt.Sprintf(", generation %d drains and has nothing left to finish", previous)
		}
		if g.Number == previous {
			return fmt.Sprintf(", generation %d drains %s and %s", previous, count(g.Tunnels, "tunnel"), count(g.Requests, "request"))
		}
	}
	return fmt.Sprintf(", generation %d had nothing left and has ended", previous)
}
