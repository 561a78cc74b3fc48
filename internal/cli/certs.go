package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"holdfast/internal/admin"
	"holdfast/internal/control"
	"holdfast/internal/supervisor"
)

func (c *commands) certs() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "certs",
		Short: "Show certificates, and when they expire",
		Long: "Shows the certificates that listeners and clusters work with now, and those that sign certificates of clients (client ca):\n" +
			"the first to expire first. A file that was replaced by something of no use is shown with what is wrong with it.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.ask(cmd, askTimeout, func(ctx context.Context, client *admin.Client) error {
				all, err := client.Certificates(ctx)
				if err != nil {
					return &commandError{"nothing can be shown", err}
				}
				if asJSON {
					out := json.NewEncoder(cmd.OutOrStdout())
					out.SetIndent("", "  ")
					return out.Encode(all)
				}
				showCertificates(cmd.OutOrStdout(), all, time.Now())
				return nil
			})
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "for programs")
	return cmd
}

const (
	widestOwner = 30
	widestNames = 34
)

func showCertificates(w io.Writer, all *supervisor.Certificates, now time.Time) {
	if len(all.Certificates) == 0 {
		fmt.Fprintln(w, "there are no certificates")
		return
	}
	rows := [][]string{{"EXPIRES", "OF", "KEY", "NAMES"}}
	for i := range all.Certificates {
		rows = append(rows, certificateRow(&all.Certificates[i], now))
	}
	var lines strings.Builder
	table(&lines, rows, 0)
	for i, line := range strings.Split(strings.TrimSuffix(lines.String(), "\n"), "\n") {
		fmt.Fprintln(w, line)
		if i > 0 {
			c := &all.Certificates[i-1]
			fmt.Fprintln(w, "    "+c.File) // whole, however long: it is what has to be mended
			if c.Problem != "" {
				fmt.Fprintln(w, "    the file is of no use as it is now: "+c.Problem)
			}
		}
	}
}

func certificateRow(c *control.Certificate, now time.Time) []string {
	expires := "-"
	switch left := c.Expires.Sub(now); {
	case c.Expires.IsZero():
	case left <= 0:
		expires = "EXPIRED " + age(-left) + " ago"
	case c.ValidFrom.After(now):
		expires = "not valid for " + age(c.ValidFrom.Sub(now)) + " yet"
	default:
		expires = "in " + age(left)
	}
	owner := "listener " + c.Listener
	switch {
	case c.Authority:
		owner += ", client ca"
	case c.Cluster != "":
		owner = "cluster " + c.Cluster
	}
	names := strings.Join(c.Names, ", ")
	if names == "" || c.Authority {
		names = c.Subject
	}
	return []string{expires, cut(owner, widestOwner), orDash(c.Key), cut(orDash(names), widestNames)}
}
