package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"holdfast/internal/admin"
)

// profileOptions are what `profile` was told.
type profileOptions struct {
	name       string
	generation int           // 0: the supervisor
	over       time.Duration // 0: the profile is of a moment
	output     string        // "": stdout
}

func (c *commands) profile() *cobra.Command {
	var o profileOptions
	cmd := &cobra.Command{
		Use:   "profile NAME",
		Short: "Take a profile of a process, for go tool pprof",
		Long: "Takes a profile of a generation, or else of the supervisor: cpu or trace over a time; or as it is now\n" +
			"goroutine, heap, allocs, mutex, block or threadcreate. `go tool pprof` reads it, a trace `go tool trace`.",
		Args:      cobra.ExactArgs(1),
		ValidArgs: []string{"cpu", "trace", "goroutine", "heap", "allocs", "mutex", "block", "threadcreate"},
		RunE: func(cmd *cobra.Command, args []string) error {
			o.name = args[0]
			if err := o.check(cmd); err != nil {
				return err
			}
			return c.ask(cmd, o.over+slowTimeout, func(ctx context.Context, client *admin.Client) error {
				data, err := client.Profile(ctx, o.generation, o.name, o.over)
				if err == nil {
					err = o.write(cmd.OutOrStdout(), data)
				}
				if err != nil {
					return &commandError{"nothing was written", err}
				}
				return nil
			})
		},
	}
	cmd.Flags().IntVar(&o.generation, "generation", 0, "the number `N` of a generation, as holdfast status shows it (default: the supervisor)")
	cmd.Flags().DurationVar(&o.over, "over", 10*time.Second, "the time that cpu and trace cover, in whole seconds up to 1m")
	cmd.Flags().StringVarP(&o.output, "output", "o", "", "the `FILE` to write (default: the standard output)")
	return cmd
}

// check completes o. It comes before a profile is taken, so that nobody waits for
// one that cannot be written.
func (o *profileOptions) check(cmd *cobra.Command) error {
	if cmd.Flags().Changed("generation") {
		if err := checkGeneration(o.generation); err != nil {
			return err
		}
	}
	switch takesTime := o.name == "cpu" || o.name == "trace"; {
	case !takesTime && cmd.Flags().Changed("over"):
		return &usageError{fmt.Errorf("%s is of a moment: --over is for cpu and trace", o.name)}
	case !takesTime:
		o.over = 0
	case o.over < time.Second || o.over > time.Minute || o.over%time.Second != 0:
		return &usageError{fmt.Errorf("--over %s: it takes whole seconds, from 1s to 1m", o.over)}
	}
	if o.output == "" && isTerminal(cmd.OutOrStdout()) {
		return &usageError{errors.New("a profile is nothing for a terminal: name a file with -o FILE, or pipe it")}
	}
	return nil
}

func (o *profileOptions) write(stdout io.Writer, data []byte) error {
	if o.output == "" {
		_, err := stdout.Write(data)
		return err
	}
	if err := os.WriteFile(o.output, data, 0o666); err != nil {
		return err
	}
	tool := "pprof"
	if o.name == "trace" {
		tool = "trace"
	}
	fmt.Fprintf(stdout, "%s is written: `go tool %s %s` reads it\n", o.output, tool, o.output)
	return nil
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
