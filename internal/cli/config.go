package cli

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"holdfast/internal/admin"
	"holdfast/internal/config"
)

// errDiffers is a difference that the exit code says, and nothing else.
var errDiffers = errors.New("the file differs from what serves")

func (c *commands) config() *cobra.Command {
	var file bool
	cmd := &cobra.Command{
		Use:   "config",
		Short: "Print the configuration that serves, with every default",
		Long: "Prints the configuration that serves as TOML, with every default filled in. With --file it is\n" +
			"that of the file as it is now, which `holdfast reload` would put into service.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			// The proxy binary is asked, as reload asks it, and that may take as long.
			return c.ask(cmd, waitTimeout, func(ctx context.Context, client *admin.Client) error {
				text, err := client.Config(ctx, file)
				if err != nil {
					return &commandError{"nothing can be shown", err}
				}
				fmt.Fprint(cmd.OutOrStdout(), text)
				return nil
			})
		},
	}
	cmd.Flags().BoolVar(&file, "file", false, "show the file as it is now")
	return cmd
}

func (c *commands) diff() *cobra.Command {
	var tell bool
	cmd := &cobra.Command{
		Use:   "diff",
		Short: "Say what a reload would change",
		Long: "Says in words how the configuration file, as it is now, differs from what serves. Comments, the\n" +
			"order of keys and defaults that are written out are no difference.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var lines []string
			err := c.ask(cmd, waitTimeout, func(ctx context.Context, client *admin.Client) (err error) {
				lines, err = differences(ctx, client)
				return err
			})
			if err != nil {
				return err
			}
			if len(lines) == 0 {
				fmt.Fprintln(cmd.OutOrStdout(), "nothing differs in what is configured")
				return nil
			}
			for _, line := range lines {
				fmt.Fprintln(cmd.OutOrStdout(), line)
			}
			if tell {
				return errDiffers
			}
			return nil
		},
	}
	// Not 1, as diff(1) has it: to a script 1 means that the command did not work.
	cmd.Flags().BoolVar(&tell, "exit-code", false, fmt.Sprintf("exit with %d if anything differs", exitDiffers))
	return cmd
}

func differences(ctx context.Context, client *admin.Client) ([]string, error) {
	running, err := client.Config(ctx, false)
	if err != nil {
		return nil, &commandError{"nothing can be compared", err}
	}
	file, err := client.Config(ctx, true)
	if err != nil {
		return nil, &commandError{"nothing can be compared", err}
	}
	lines, err := config.Diff([]byte(running), []byte(file))
	if err != nil {
		return nil, &commandError{"nothing can be compared", err}
	}
	return lines, nil
}
