// Package cli is the command line of `holdfast`: what a person types, and what
// they read.
//
// The commands speak to a running supervisor over its admin socket. What does the
// work of `run` and `check`, and the tools beside the commands, are put in by main,
// so that neither side imports the other.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"holdfast/internal/admin"
	"holdfast/internal/control"
	"holdfast/internal/supervisor"
	"holdfast/internal/version"
)

const (
	// askTimeout bounds commands that are done at once.
	askTimeout = 10 * time.Second

	// slowTimeout bounds those for which the supervisor has to ask others, and waits
	// for them up to 10 s.
	slowTimeout = 20 * time.Second

	// waitTimeout is how long reload and stop wait unless they are told otherwise.
	waitTimeout = 2 * time.Minute
)

// Program is the command line with what is behind it.
type Program struct {
	// Run is `holdfast run`: it serves until the service has ended.
	Run func(configPath, runtimeDir string, log io.Writer) error

	// Check validates a configuration file. A *supervisor.Refusal says what is wrong.
	Check func(ctx context.Context, configPath string) error

	// Route answers a question about the routes of a configuration file. A
	// *supervisor.Refusal says what is wrong with that.
	Route func(ctx context.Context, configPath string, q *control.RouteQuestion) (*control.RouteAnswer, error)

	// Tools are commands beside these.
	Tools []*cobra.Command
}

// Main runs the command that args (without the program's name) ask for and returns
// the exit code. See exit.go for the codes.
func (p *Program) Main(args []string, stdout, stderr io.Writer) int {
	c := &commands{program: p}
	root := c.root()
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(context.Background())
	if err != nil && !c.began {
		err = &usageError{err}
	}
	complain(stderr, err)
	return exitCode(err)
}

// Command returns the tree of commands, for those who describe it. They are not to be executed.
func (p *Program) Command() *cobra.Command { return (&commands{program: p}).root() }

// commands are the commands of one execution.
type commands struct {
	program    *Program
	runtimeDir string // as given by the flag
	configPath string
	began      bool // the command line was understood
}

func (c *commands) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "holdfast",
		Short: "A reverse proxy that reloads without dropping a connection",
		Args:  cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return unknownCommand(cmd, args[0])
			}
			cmd.SetOut(cmd.ErrOrStderr())
			cmd.Help()
			return &usageError{errors.New("a command is missing")}
		},
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			if err := cmd.ValidateRequiredFlags(); err != nil { // cobra does it after this
				return err
			}
			c.began = true
			return nil
		},
		SuggestionsMinimumDistance: 2,
		SilenceErrors:              true,
		SilenceUsage:               true,
		CompletionOptions:          cobra.CompletionOptions{HiddenDefaultCmd: true},
	}
	root.PersistentFlags().StringVar(&c.runtimeDir, "runtime-dir", "",
		"where the supervisor is found (default $HOLDFAST_RUNTIME_DIR, $RUNTIME_DIRECTORY, "+systemRuntimeDir+" or $XDG_RUNTIME_DIR/holdfast)")
	root.MarkPersistentFlagDirname("runtime-dir")
	root.AddCommand(c.run(), c.check(), c.reload(), c.rollback(), c.upgrade(), c.status(), c.stop(), c.ready(), c.kill(), c.move(), c.drain(),
		c.config(), c.diff(), c.route(), c.metrics(), c.clusters(), c.certs(), c.runtime(), c.logLevel(), c.reopenLogs(), c.tickets(), c.profile(), versionCommand())
	root.AddCommand(c.program.Tools...)
	c.completions(root)
	return root
}

func unknownCommand(root *cobra.Command, name string) error {
	text := fmt.Sprintf("there is no command %q", name)
	if near := root.SuggestionsFor(name); len(near) > 0 {
		text += "; did you mean " + strings.Join(near, " or ") + "?"
	}
	return &usageError{errors.New(text)}
}

func (c *commands) configFlag(cmd *cobra.Command) {
	cmd.Flags().StringVarP(&c.configPath, "config", "c", "", "the configuration `FILE`")
	cmd.MarkFlagRequired("config")
	cmd.MarkFlagFilename("config", "toml")
}

// ask runs f with a client of the supervisor that is meant, and a context that ends
// after limit.
func (c *commands) ask(cmd *cobra.Command, limit time.Duration, f func(context.Context, *admin.Client) error) error {
	dir, err := runtimeDir(c.runtimeDir)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(cmd.Context(), limit, fmt.Errorf("after %s", limit))
	defer cancel()
	return f(ctx, admin.Dial(dir))
}

func (c *commands) run() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "run -c FILE",
		Short: "Serve until told to stop",
		Long: "Serves what FILE says until SIGTERM, SIGINT or `holdfast stop`; a second signal ends at once.\n" +
			"SIGHUP reloads, as `holdfast reload` does, which also says whether it worked.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			dir, err := runtimeDir(c.runtimeDir)
			if err != nil {
				return err
			}
			path, err := filepath.Abs(c.configPath)
			if err != nil {
				return err
			}
			err = c.program.Run(path, dir, cmd.ErrOrStderr())
			switch {
			case errors.Is(err, supervisor.ErrSucceeded):
				return &commandError{"this process ends, and the service needs another one", err}
			case err != nil:
				return &commandError{"the service did not start", err}
			}
			return nil
		},
	}
	c.configFlag(cmd)
	return cmd
}

func (c *commands) check() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "check -c FILE",
		Short: "Say whether a configuration file would start",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := c.program.Check(cmd.Context(), c.configPath); err != nil {
				return &commandError{c.configPath + " would not start", err}
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s is good\n", c.configPath)
			return nil
		},
	}
	c.configFlag(cmd)
	return cmd
}

func (c *commands) stop() *cobra.Command {
	var now, orphans bool
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "stop",
		Short: "End the service and wait until it has ended",
		Long: "Ends the service as [stop] in its configuration says and waits until it has ended.\n" +
			"When the timeout is over only the waiting ends.\n\n" +
			"With --orphans it ends what a supervisor has left behind that was killed, where none is to come:\n" +
			"its generations drain, and those that take longer than the timeout (30s) are killed.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if orphans {
				if !cmd.Flags().Changed("timeout") {
					timeout = orphansTimeout
				}
				return c.stopOrphans(cmd, timeout, now)
			}
			return c.ask(cmd, timeout, func(ctx context.Context, client *admin.Client) error {
				process := supervisorOf(ctx, client)
				if err := client.Stop(ctx, now); err != nil {
					return &commandError{notDone(err, "the service was not stopped", "the service was told to stop and its end was not seen"), err}
				}
				awaitGone(process)
				fmt.Fprintln(cmd.OutOrStdout(), "the service has ended")
				return nil
			})
		},
	}
	cmd.Flags().BoolVar(&now, "now", false, "cut what still runs")
	cmd.Flags().BoolVar(&orphans, "orphans", false, "end generations that no supervisor commands")
	timeoutFlag(cmd, &timeout)
	return cmd
}

// notDone says what is so now: where the answer was lost, that is not known.
func notDone(err error, refused, unknown string) string {
	if exitCode(err) == exitUnknown {
		return unknown
	}
	return refused
}

func (c *commands) ready() *cobra.Command {
	return &cobra.Command{
		Use:   "ready on|off",
		Short: "Say to load balancers whether new connections are welcome",
		Long: "After `ready off`, /readyz and the health checks of listeners answer 503 until `ready on`. Connections are accepted all the same.\n" +
			"It outlives reloads, not the service.",
		Args:      cobra.MatchAll(cobra.ExactArgs(1), cobra.OnlyValidArgs),
		ValidArgs: []string{"on", "off"},
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.ask(cmd, askTimeout, func(ctx context.Context, client *admin.Client) error {
				if err := client.SetReady(ctx, args[0] == "on"); err != nil {
					return &commandError{notDone(err, "readiness was not set", "whether readiness was set is not known"), err}
				}
				if args[0] == "on" {
					fmt.Fprintln(cmd.OutOrStdout(), "readiness is on: /readyz says whether a generation serves")
				} else {
					fmt.Fprintln(cmd.OutOrStdout(), "readiness is off: /readyz answers 503 until `holdfast ready on`")
				}
				return nil
			})
		},
	}
}

func (c *commands) kill() *cobra.Command {
	var generation int
	cmd := &cobra.Command{
		Use:   "kill --generation N",
		Short: "End a generation at once, with all its requests",
		Long: "Ends a generation at once, with all its requests: for one that does not answer. Another process goes on\n" +
			"with those of its tunnels that are deposited; the others end. Where it is the serving one, another takes\n" +
			"its place; new connections wait meanwhile.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkGeneration(generation); err != nil {
				return err
			}
			return c.ask(cmd, askTimeout, func(ctx context.Context, client *admin.Client) error {
				if err := client.Kill(ctx, generation); err != nil {
					what := fmt.Sprintf("generation %d was not killed", generation)
					return &commandError{notDone(err, what, fmt.Sprintf("whether generation %d was killed is not known", generation)), err}
				}
				fmt.Fprintf(cmd.OutOrStdout(), "generation %d is killed\n", generation)
				return nil
			})
		},
	}
	cmd.Flags().IntVar(&generation, "generation", 0, "its number `N`, as holdfast status shows it")
	cmd.MarkFlagRequired("generation")
	return cmd
}

func checkGeneration(number int) error {
	if number < 1 {
		return &usageError{fmt.Errorf("there is no generation %d: the first is 1", number)}
	}
	return nil
}

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Say which build this is",
		Args:  cobra.NoArgs,
		Run: func(cmd *cobra.Command, _ []string) {
			fmt.Fprintf(cmd.OutOrStdout(), "holdfast %s (%s, %s/%s)\n", version.String(), runtime.Version(), runtime.GOOS, runtime.GOARCH)
		},
	}
}

func timeoutFlag(cmd *cobra.Command, timeout *time.Duration) {
	cmd.Flags().DurationVar(timeout, "timeout", waitTimeout, "how long to wait")
}
