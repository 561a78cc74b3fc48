package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"holdfast/internal/admin"
	"holdfast/internal/control"
	"holdfast/internal/supervisor"
)

func (c *commands) clusters() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "clusters [NAME]",
		Short: "Show clusters and their endpoints: health, work, and limits",
		Long: "Shows every cluster, or the one of that name: its endpoints with their health and why they get no new work, what\n" +
			"they have to do in all generations together, and how much of its limits is used.\n\n" +
			"Health, weight and priority (PRIO) are those of the generation that serves; an endpoint that only a draining one has is\n" +
			"shown as that one sees it. REQUESTS and TUNNELS are what is there now, CONNECT is how long connecting took on\n" +
			"average, and FAILED counts attempts that did not work, since the oldest generation began.",
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: c.clusterNames,
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.ask(cmd, askTimeout, func(ctx context.Context, client *admin.Client) error {
				clusters, err := client.Clusters(ctx, strings.Join(args, ""))
				if err != nil {
					return &commandError{"nothing can be shown", err}
				}
				if asJSON {
					out := json.NewEncoder(cmd.OutOrStdout())
					out.SetIndent("", "  ")
					return out.Encode(clusters)
				}
				warn(cmd.ErrOrStderr(), clusters.Warnings)
				showClusters(cmd.OutOrStdout(), clusters, time.Now())
				return nil
			})
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "for programs")
	return cmd
}

// How wide the name of an endpoint and the notes below it may be, so that all fits into 100
// columns.
const (
	widestEndpoint = 30
	widestHealth   = 15
	widestNote     = 96
)

func showClusters(w io.Writer, all *supervisor.Clusters, now time.Time) {
	if len(all.Clusters) == 0 {
		fmt.Fprintln(w, "there are no clusters")
	}
	for i := range all.Clusters {
		c := &all.Clusters[i]
		if i > 0 {
			fmt.Fprintln(w)
		}
		fmt.Fprintln(w, cut(c.Name+clusterNote(c, all), widestNote))
		for _, note := range tlsNotes(c.TLS, now) {
			fmt.Fprintln(w, "  "+note) // whole: what is wrong stands at its end
		}
		for _, b := range c.Breakers {
			for _, l := range b.Limits {
				fmt.Fprintln(w, cut("  "+breakerNote(&b, &l), widestNote))
			}
		}
		showEndpoints(w, c, now)
	}
	if all.More > 0 {
		fmt.Fprintf(w, "\n%s more\n", number(all.More))
	}
}

// clusterNote says how a cluster balances, and that it is not one of what serves.
func clusterNote(c *supervisor.Cluster, all *supervisor.Clusters) string {
	note := ""
	if c.Policy != "" {
		note = " (" + c.Policy + ")"
	}
	if len(all.Generations) > 0 && !slices.Contains(c.Generations, all.Generations[0]) {
		note += ", in generation " + strings.Trim(strings.Join(strings.Fields(fmt.Sprint(c.Generations)), ", "), "[]") + " only"
	}
	return note
}

// tlsNotes say how a cluster speaks TLS, if it does.
func tlsNotes(s *control.TLSState, now time.Time) (notes []string) {
	if s == nil {
		return nil
	}
	note := "TLS"
	if s.Unverified {
		note += ", who an endpoint is is not verified"
	}
	switch left := s.Expires.Sub(now); {
	case s.Expires.IsZero():
	case left <= 0:
		note += ", its own certificate has expired " + age(-left) + " ago"
	default:
		note += ", its own certificate expires in " + age(left)
	}
	notes = append(notes, note)
	if s.Problem != "" {
		notes = append(notes, "its files are of no use: "+s.Problem)
	}
	if f := s.Failure; f != nil {
		notes = append(notes, fmt.Sprintf("last handshake that failed, %s ago: %s: %s", age(now.Sub(f.At)), f.Endpoint, f.Error))
	}
	return notes
}

func breakerNote(b *supervisor.Breaker, l *supervisor.BreakerLimit) string {
	most, state := ", no limit", ""
	if l.Most > 0 {
		most = " of " + number(int(l.Most))
	}
	if l.Open {
		state = ", open: nothing more is let through"
	}
	note := fmt.Sprintf("%s, %s priority: %s%s%s", l.Limit, b.Priority, number(int(l.Used)), most, state)
	if l.Overflows > 0 {
		note += ", " + number(int(l.Overflows)) + " refused"
	}
	return note
}

func showEndpoints(w io.Writer, c *supervisor.Cluster, now time.Time) {
	if len(c.Endpoints) == 0 {
		fmt.Fprintln(w, "  it has no endpoint")
		return
	}
	rows := [][]string{{"  ENDPOINT", "HEALTH", "PRIO", "WEIGHT", "REQUESTS", "TUNNELS", "CONNECT", "FAILED"}}
	for i := range c.Endpoints {
		rows = append(rows, endpointRow(&c.Endpoints[i]))
	}
	var lines strings.Builder
	table(&lines, rows, 2)
	for i, line := range strings.Split(strings.TrimSuffix(lines.String(), "\n"), "\n") {
		fmt.Fprintln(w, line)
		if i > 0 {
			for _, note := range endpointNotes(&c.Endpoints[i-1], now) {
				fmt.Fprintln(w, cut("    "+note, widestNote))
			}
		}
	}
}

func endpointRow(e *supervisor.Endpoint) []string {
	health := "healthy"
	if !e.Healthy {
		health = strings.Join(e.Conditions, ",")
	}
	connect := "-"
	if e.Connects > 0 {
		connect = fmt.Sprintf("%.1fms", e.ConnectSum/float64(e.Connects)*1000)
	}
	return []string{
		"  " + cut(endpointName(e), widestEndpoint), cut(orDash(health), widestHealth), number(e.Priority), number(int(e.Weight)),
		number(int(e.Requests)), number(int(e.Tunnels)), connect, number(int(e.ConnectFails)),
	}
}

// endpointName is where an endpoint is, and what it is called where that is not the same.
func endpointName(e *supervisor.Endpoint) string {
	if e.Address == e.Name {
		return e.Name
	}
	return e.Name + " " + e.Address
}

// endpointNotes are what the columns do not say.
func endpointNotes(e *supervisor.Endpoint, now time.Time) (notes []string) {
	if name := endpointName(e); utf8.RuneCountInString(name) > widestEndpoint {
		notes = append(notes, name)
	}
	if len(e.Conditions) > 2 {
		notes = append(notes, strings.Join(e.Conditions, ", "))
	}
	if e.Reason != "" {
		notes = append(notes, e.Reason)
	}
	if !e.EjectedUntil.IsZero() {
		notes = append(notes, fmt.Sprintf("ejected for another %s, the %d. time in a row", age(e.EjectedUntil.Sub(now)), e.Ejections))
	}
	if e.SuccessRate != nil {
		notes = append(notes, fmt.Sprintf("%.1f %% of requests succeeded", *e.SuccessRate))
	}
	if len(e.Generations) > 1 {
		var held []string
		for _, h := range e.Generations {
			if h.Requests != 0 || h.Tunnels != 0 {
				held = append(held, fmt.Sprintf("generation %d: %s, %s", h.Generation, count(int(h.Requests), "request"), count(int(h.Tunnels), "tunnel")))
			}
		}
		if len(held) > 0 {
			notes = append(notes, strings.Join(held, "; "))
		}
	}
	return notes
}

// cut shortens what is too long for its place.
func cut(s string, most int) string {
	if utf8.RuneCountInString(s) <= most {
		return s
	}
	return string([]rune(s)[:most-1]) + "…"
}
