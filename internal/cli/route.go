package cli

import (
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"holdfast/internal/config"
	"holdfast/internal/control"
	"holdfast/internal/supervisor"
)

// unmetError is how many requests do not get what a file expects. What came instead stands on
// stdout.
type unmetError struct{ n int }

func (e *unmetError) Error() string {
	if e.n == 1 {
		return "an expectation is not met"
	}
	return fmt.Sprintf("%d expectations are not met", e.n)
}

func (c *commands) route() *cobra.Command {
	var q control.RouteQuestion
	var tests string
	cmd := &cobra.Command{
		Use:   "route -c FILE METHOD URL | route -c FILE --test FILE",
		Short: "Say which route a request gets, and why",
		Long: "Says which virtual host, route and cluster a request gets by the configuration in FILE, what the\n" +
			"upstream sees of it, and why the routes before that one do not match. Nothing is sent to anybody.\n\n" +
			"With --test it tries the requests of a file, and exits with 1 if one does not get what is expected.",
		Example: "  holdfast route -c holdfast.toml GET http://example.com/api/users -H 'X-Version: 2'\n" +
			"  holdfast route -c holdfast.toml --test routes.toml",
		Args: func(cmd *cobra.Command, args []string) error {
			switch {
			case tests == "" && len(args) != 2:
				return errors.New("a method and a URL are needed, or --test FILE")
			case tests != "" && len(args) > 0:
				return errors.New("with --test requests stand in the file")
			case tests != "" && (q.Listener != "" || q.Client != "" || q.Upgrade != "" || q.Headers != nil):
				return errors.New("with --test all that belongs to a request stands in the file")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if tests == "" {
				q.Method, q.URL = args[0], args[1]
			} else {
				data, err := config.ReadFile(tests)
				if err != nil {
					return &commandError{"nothing was tried", &usageError{err}}
				}
				q.Path, q.Tests = tests, append([]byte{}, data...)
			}
			a, err := c.program.Route(cmd.Context(), c.configPath, &q)
			switch {
			case err != nil:
				return &commandError{"nothing can be said about the routes of " + c.configPath, err}
			case len(a.Wrong) > 0 && tests != "":
				return &commandError{"nothing was tried", &supervisor.Refusal{Step: "configuration", Problems: a.Wrong}}
			case len(a.Wrong) > 0:
				return &usageError{errors.New(a.Wrong[0])}
			}
			if _, err := fmt.Fprint(cmd.OutOrStdout(), a.Text); err != nil && !errors.Is(err, os.ErrClosed) {
				return err
			}
			if a.Unmet > 0 {
				return &unmetError{a.Unmet}
			}
			return nil
		},
	}
	c.configFlag(cmd)
	cmd.Flags().StringArrayVarP(&q.Headers, "header", "H", nil, "a header of the request, as `'Name: value'`; may be repeated")
	cmd.Flags().StringVar(&q.Listener, "listener", "", "the listener `NAME` that it comes in on (default the first one)")
	cmd.Flags().StringVar(&q.Client, "client", "", "the address `ADDR` of the client, behind trusted proxies")
	cmd.Flags().StringVar(&q.Upgrade, "upgrade", "", "the `PROTOCOL` that it asks to change to, such as websocket")
	cmd.Flags().BoolVar(&q.JSON, "json", false, "answer for a program")
	cmd.Flags().StringVar(&tests, "test", "", "try the requests of `FILE`")
	return cmd
}
