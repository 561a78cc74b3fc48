package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"holdfast/internal/admin"
	"holdfast/internal/supervisor"
)

func (c *commands) status() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show what runs",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.ask(cmd, askTimeout, func(ctx context.Context, client *admin.Client) error {
				status, err := client.Status(ctx)
				if err != nil {
					return &commandError{"nothing can be shown", err}
				}
				if asJSON {
					out := json.NewEncoder(cmd.OutOrStdout())
					out.SetIndent("", "  ")
					return out.Encode(status)
				}
				showStatus(cmd.OutOrStdout(), status, time.Now())
				return nil
			})
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "for programs")
	return cmd
}

func showStatus(w io.Writer, s *supervisor.Status, now time.Time) {
	fmt.Fprintf(w, "holdfast %s, pid %d, up %s\n\n", s.Version, s.PID, age(now.Sub(s.Started)))
	heading := [][]string{{"configuration", s.ConfigPath + " (" + short(s.ConfigHash) + ")"}}
	if note := fileNote(s); note != "" {
		heading = append(heading, []string{"", note})
	}
	heading = append(heading, []string{"ready", readiness(s)}, []string{"last reload", lastReload(s, now)})
	if s.Crashes > 0 {
		heading = append(heading, []string{"crashes", number(s.Crashes) + " in a row; the last: " + s.LastCrash})
	}
	for i, l := range s.Listeners {
		label := ""
		if i == 0 {
			label = "listeners"
		}
		heading = append(heading, []string{label, l.Name + " on " + l.Address})
	}
	for i, note := range vaultNotes(s) {
		label := ""
		if i == 0 {
			label = "vault"
		}
		heading = append(heading, []string{label, note})
	}
	for i, note := range overriddenNotes(&s.Overridden) {
		label := ""
		if i == 0 {
			label = "runtime"
		}
		heading = append(heading, []string{label, note})
	}
	if s.LogLevel != "" {
		heading = append(heading, []string{"log level", s.LogLevel + ", set by command; `holdfast log-level config` takes that back"})
	}
	if s.LogsDropped > 0 {
		heading = append(heading, []string{"log", count(int(s.LogsDropped), "line") + " dropped: the reader of the log is gone or too slow, or its disk is full"})
	}
	table(w, heading, 0)

	fmt.Fprintln(w)
	rows := [][]string{{"GENERATION", "STATE", "VERSION", "CONFIG", "PID", "AGE", "REQUESTS", "TUNNELS", "DEPOSITED", "OLDEST", "RSS"}}
	for _, g := range s.Generations {
		rows = append(rows, generationRow(g, now))
	}
	table(w, rows, 4)
	for _, g := range s.Generations {
		if g.NotAnswering {
			fmt.Fprintf(w, "\ngeneration %d does not answer; its figures are the last ones.\n", g.Number)
			fmt.Fprintf(w, "`holdfast kill --generation %d` ends it: its requests are cut, and another process goes on with its deposited tunnels.\n", g.Number)
		}
	}
}

func generationRow(g supervisor.GenerationStatus, now time.Time) []string {
	state, oldest, old := g.State, "-", "-"
	if !g.Started.IsZero() { // otherwise it is not known yet
		old = age(now.Sub(g.Started))
	}
	if g.NotAnswering {
		state += ", not answering"
	}
	if !g.EmptyBy.IsZero() {
		state += ", empty within " + age(max(0, g.EmptyBy.Sub(now)))
	}
	if !g.OldestTunnel.IsZero() {
		oldest = age(now.Sub(g.OldestTunnel))
	}
	return []string{
		fmt.Sprint(g.Number), state, g.Version, short(g.ConfigHash), fmt.Sprint(g.PID), old,
		number(g.Requests), number(g.Tunnels), number(g.Deposits), oldest, size(g.RSS),
	}
}

func fileNote(s *supervisor.Status) string {
	switch {
	case s.FileError != "":
		return "the file on disk cannot be read: " + s.FileError
	case s.FileDiffers && s.LastReload != nil && s.LastReload.RolledBack > 0:
		return fmt.Sprintf("rolled back from generation %d; the file on disk differs from what runs: `holdfast diff` says how, `holdfast reload` puts it into service", s.LastReload.RolledBack)
	case s.FileDiffers:
		return "the file on disk differs from what runs: `holdfast diff` says how, `holdfast reload` puts it into service"
	}
	return ""
}

// vaultNotes says what is not as it should be with what is kept of tunnels.
func vaultNotes(s *supervisor.Status) []string {
	v, undeposited := &s.Vault, false
	for _, g := range s.Generations {
		undeposited = undeposited || g.Deposits < g.Tunnels
	}
	var notes []string
	if v.Resuming > 0 {
		notes = append(notes, count(v.Bereft, "tunnel")+" of "+count(v.Resuming, "dead generation")+" to be resumed")
	}
	if v.Refused > 0 && undeposited {
		notes = append(notes, count(int(v.Refused), "deposit")+" found no room so far: the supervisor has too few descriptors")
	}
	return notes
}

func readiness(s *supervisor.Status) string {
	switch why := admin.Unreadiness(s); why {
	case "":
		return "yes"
	case "off":
		return "no: turned off; `holdfast ready on` turns it on"
	default:
		return "no: " + why
	}
}

func lastReload(s *supervisor.Status, now time.Time) string {
	if s.Reloading {
		return "running"
	}
	if s.LastReload == nil {
		return "none"
	}
	when := age(now.Sub(s.LastReload.Time)) + " ago: "
	if s.LastReload.Error == "" {
		return when + "done"
	}
	return when + "refused: " + s.LastReload.Error
}

// short is enough of a hash for a person to tell two configurations apart.
func short(hash string) string {
	if hash == "" {
		return "-"
	}
	return hash[:min(len(hash), 8)]
}

// table writes rows in columns, those from the first number on aligned to the
// right; 0 means none. A cell with several lines keeps its column.
func table(w io.Writer, rows [][]string, firstNumber int) {
	widths := make([]int, len(rows[0]))
	for _, row := range rows {
		for i, cell := range row {
			widths[i] = max(widths[i], utf8.RuneCountInString(cell))
		}
	}
	for _, row := range rows {
		var line strings.Builder
		for i, cell := range row {
			pad := strings.Repeat(" ", widths[i]-utf8.RuneCountInString(cell))
			switch {
			case firstNumber > 0 && i >= firstNumber:
				line.WriteString(pad + cell + "  ")
			case i == len(row)-1:
				// The rest of a cell of several lines stands below its first.
				line.WriteString(strings.ReplaceAll(cell, "\n", "\n"+strings.Repeat(" ", utf8.RuneCountInString(line.String()))))
			default:
				line.WriteString(cell + pad + "  ")
			}
		}
		fmt.Fprintln(w, strings.TrimRight(line.String(), " "))
	}
}
