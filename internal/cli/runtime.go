package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"holdfast/internal/admin"
	"holdfast/internal/config"
	"holdfast/internal/supervisor"
)

func (c *commands) runtime() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "runtime",
		Short: "Show and override numbers of the configuration that have a runtime key",
		Long: "Shows every runtime key: what is configured, what the file of [runtime] says, what was set by command, and what\n" +
			"holds. What was set by command counts more than the file, and the file more than the configuration.\n\n" +
			"What is set takes effect at once in every generation, also in those that drain, without a reload. It outlives\n" +
			"reloads, upgrades and the death of the supervisor, until `holdfast runtime reset`, but not the service: what is to\n" +
			"stay belongs into the file or the configuration.\n\n" +
			"FILE is what the file says, SET what was set by command. Where numbers that differ have one key, all are shown.",
		Example: "  holdfast runtime set site.green 10\n  holdfast runtime set site.blue 90 site.green 10\n  holdfast runtime reset site.green\n  holdfast runtime reset",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.ask(cmd, askTimeout, func(ctx context.Context, client *admin.Client) error {
				values, err := client.Runtime(ctx)
				if err != nil {
					return &commandError{"nothing can be shown", err}
				}
				if asJSON {
					out := json.NewEncoder(cmd.OutOrStdout())
					out.SetIndent("", "  ")
					return out.Encode(values)
				}
				showRuntime(cmd.OutOrStdout(), values)
				return nil
			})
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "for programs")
	cmd.AddCommand(c.setRuntime(), c.resetRuntime())
	return cmd
}

func (c *commands) setRuntime() *cobra.Command {
	return &cobra.Command{
		Use:   "set KEY VALUE [KEY VALUE]…",
		Short: "Override runtime values until they are reset",
		Long: "Has numbers of the configuration that have these runtime keys be something else, at once and in every generation,\n" +
			"until `holdfast runtime reset`. Several are set together. A percentage is written without its sign.\n\n" +
			"A number that is out of range is refused, and then nothing has changed. A key that no generation knows is taken\n" +
			"with a warning: a configuration to come may bring it.",
		Args: func(_ *cobra.Command, args []string) error {
			_, err := overridesOf(args)
			return err
		},
		ValidArgsFunction: c.runtimeKeys,
		RunE: func(cmd *cobra.Command, args []string) error {
			values, err := overridesOf(args)
			if err != nil {
				return err
			}
			return c.ask(cmd, slowTimeout, func(ctx context.Context, client *admin.Client) error {
				result, err := client.Override(ctx, values)
				if err != nil {
					return &commandError{notDone(err, "no runtime value was set", "whether the runtime values hold everywhere is not known"), err}
				}
				warn(cmd.ErrOrStderr(), result.Warnings)
				for key := range slices.Chunk(args, 2) {
					fmt.Fprintf(cmd.OutOrStdout(), "%s is %s until `holdfast runtime reset %s`\n", key[0], numbers(values[key[0]]), key[0])
				}
				return nil
			})
		},
	}
}

// overridesOf understands the arguments of runtime set.
func overridesOf(args []string) (map[string]float64, error) {
	if len(args) == 0 || len(args)%2 != 0 {
		return nil, fmt.Errorf("a key and a value belong together, as in `holdfast runtime set site.green 10`")
	}
	values := make(map[string]float64)
	for pair := range slices.Chunk(args, 2) {
		if err := config.CheckRuntimeKey(pair[0]); err != nil {
			return nil, fmt.Errorf("%q is none: %w", pair[0], err)
		}
		v, err := strconv.ParseFloat(pair[1], 64)
		if err != nil || config.CheckOverride(v) != nil {
			return nil, fmt.Errorf("%q is no number that %s could be", pair[1], pair[0])
		}
		if _, twice := values[pair[0]]; twice {
			return nil, fmt.Errorf("%s is there twice", pair[0])
		}
		values[pair[0]] = v
	}
	return values, nil
}

func (c *commands) resetRuntime() *cobra.Command {
	return &cobra.Command{
		Use:               "reset [KEY]",
		Short:             "Take back what was set by `holdfast runtime set`, of one key or of all",
		Long:              "Takes back what was set by `holdfast runtime set`, of one key or of all: what the file of [runtime] says holds, or\nelse what is configured.",
		ValidArgsFunction: c.runtimeKeys,
		Args:              cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.ask(cmd, slowTimeout, func(ctx context.Context, client *admin.Client) error {
				result, err := client.ResetOverrides(ctx, strings.Join(args, ""))
				if err != nil {
					return &commandError{notDone(err, "no runtime value was reset", "whether the runtime values are reset everywhere is not known"), err}
				}
				warn(cmd.ErrOrStderr(), result.Warnings)
				if len(result.Reset) == 0 {
					fmt.Fprintln(cmd.OutOrStdout(), "no runtime value was set by command")
					return nil
				}
				fmt.Fprintf(cmd.OutOrStdout(), "no longer set by command: %s\n", strings.Join(result.Reset, ", "))
				return nil
			})
		},
	}
}

func warn(w io.Writer, warnings []string) {
	for _, text := range warnings {
		fmt.Fprintln(w, "holdfast: "+text)
	}
}

func showRuntime(w io.Writer, r *supervisor.Runtime) {
	if len(r.Values) == 0 {
		fmt.Fprintln(w, "there are no runtime keys")
	} else {
		rows := [][]string{{"KEY", "CONFIGURED", "FILE", "SET", "EFFECTIVE", "UNIT", "WHERE"}}
		for _, v := range r.Values {
			where := "no generation knows it"
			if v.Unit != "" {
				where = strings.Join(v.Places, "\n")
			}
			rows = append(rows, []string{v.Key, numbers(v.Configured...), layer(v.File), layer(v.Command), numbers(v.Effective...), orDash(v.Unit), where})
		}
		table(w, rows, 0)
	}
	notes := slices.Clone(r.Warnings)
	if r.File != "" {
		notes = append(notes, "the file is "+r.File)
	}
	if r.FileError != "" {
		notes = append(notes, "what the file says now is of no use, so what it said before holds: "+r.FileError)
	}
	if len(notes) > 0 {
		fmt.Fprintln(w)
	}
	for _, note := range notes {
		fmt.Fprintln(w, note)
	}
}

func numbers(all ...float64) string {
	words := make([]string, len(all))
	for i, v := range all {
		words[i] = strconv.FormatFloat(v, 'f', -1, 64)
	}
	return orDash(strings.Join(words, ", "))
}

// layer is a number that may be missing.
func layer(v *float64) string {
	if v == nil {
		return "-"
	}
	return numbers(*v)
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// overriddenNotes says in the status that something is not as configured.
func overriddenNotes(o *supervisor.Overridden) (notes []string) {
	var by []string
	if o.ByCommand > 0 {
		by = append(by, number(o.ByCommand)+" by command")
	}
	if o.ByFile > 0 {
		by = append(by, number(o.ByFile)+" by the file")
	}
	if len(by) > 0 {
		notes = append(notes, count(o.ByCommand+o.ByFile, "key")+" overridden ("+strings.Join(by, ", ")+"); `holdfast runtime` shows them")
	}
	if o.FileError != "" {
		notes = append(notes, "what the file says is of no use: "+o.FileError)
	}
	return notes
}
