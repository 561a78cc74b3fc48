// Package drill is `holdfast drill`: it shows on this machine, with the installed
// programs, whether the promise holds. A private instance is reloaded, upgraded and
// killed in every way, in an order that a seed repeats, while a canary counts what its
// clients notice. What serves never imports it.
package drill

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/signal"
	"slices"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"holdfast/internal/drill/canary"
)

// canaryCommand is the hidden command that is the canary's process.
const canaryCommand = "drill-canary"

// Options say how much is drilled.
type Options struct {
	// One of the three; the others are 0.
	Rounds int
	For    time.Duration
	Kills  int // of generations

	Only     []string // kinds of rounds, those that are named more often more often; none: all kinds
	Tunnels  int      // of each kind of the canary's
	Seed     uint64
	Sabotage string    // one of the sabotages; "": none
	Log      io.Writer // gets a line for each round
}

// Commands returns `drill`, and the command that it starts as its canary.
func Commands() []*cobra.Command {
	var o Options
	var asJSON, verbose bool
	drill := &cobra.Command{
		Use:   "drill",
		Short: "Reload, upgrade and kill a private instance, and count what clients notice",
		Long: "Starts a private instance on loopback and a canary whose tunnels, requests and new connections go\n" +
			"through it. Then it reloads, upgrades and kills in a random order, and says at the end what the canary\n" +
			"has noticed. It ends early if the instance does not recover. The exit code is 0 if the promise held.",
		Args: func(cmd *cobra.Command, args []string) error {
			if cmd.Flags().Changed("for") || cmd.Flags().Changed("kills") {
				if cmd.Flags().Changed("rounds") || o.For > 0 && o.Kills > 0 {
					return errors.New("only one of --rounds, --for and --kills")
				}
				o.Rounds = 0
			}
			return errors.Join(cobra.NoArgs(cmd, args), o.check())
		},
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !cmd.Flags().Changed("seed") {
				o.Seed = uint64(rand.Uint32())
			}
			o.Log = io.Discard
			if verbose {
				o.Log = cmd.ErrOrStderr()
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
			defer stop()
			result, err := Run(ctx, o)
			if err != nil {
				return err
			}
			if asJSON {
				err = result.WriteJSON(cmd.OutOrStdout())
			} else {
				err = result.WriteTable(cmd.OutOrStdout())
			}
			if err == nil && !result.Held {
				err = fmt.Errorf("the promise did not hold; configuration, log, and how things were in the end are in %s", result.Files)
			}
			return err
		},
	}
	flags := drill.Flags()
	flags.IntVar(&o.Rounds, "rounds", 50, "so many rounds")
	flags.DurationVar(&o.For, "for", 0, "instead, as many rounds as there are in this time")
	flags.IntVar(&o.Kills, "kills", 0, "instead, as many rounds as it takes to kill so many generations, and each kind once")
	flags.IntVar(&o.Tunnels, "tunnels", 4, "so many tunnels of each of the canary's kinds at a time")
	flags.StringArrayVar(&o.Only, "only", nil, "only rounds of this kind, as the table calls it; may be given several times, also the same, for more of these")
	flags.Uint64Var(&o.Seed, "seed", 0, "decides what happens, and in which order (default a random one)")
	flags.StringVar(&o.Sabotage, "sabotage", "", "break the promise on purpose: close a listener, flip a byte, cut a tunnel or have nobody keep tunnels (listener, byte, tunnel, vault)")
	flags.BoolVar(&asJSON, "json", false, "print the result as JSON")
	flags.BoolVarP(&verbose, "verbose", "v", false, "print a line for each round on the standard error")
	process := &cobra.Command{
		Use:    canaryCommand,
		Short:  "The clients and servers of the drill; ends with its standard input",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return canary.Serve(cmd.InOrStdin(), cmd.OutOrStdout())
		},
	}
	return []*cobra.Command{drill, process}
}

// check says what is wrong with the options.
func (o *Options) check() error {
	if _, ok := sabotages[o.Sabotage]; !ok && o.Sabotage != "" {
		return fmt.Errorf("there is no sabotage %q: it is listener, byte, tunnel or vault", o.Sabotage)
	}
	for _, name := range o.Only {
		if !slices.ContainsFunc(kinds, func(k kind) bool { return k.name == name }) {
			return fmt.Errorf("there are no rounds of the kind %q", name)
		}
	}
	if o.Rounds < 1 && o.For <= 0 && o.Kills < 1 {
		return errors.New("there must be a round at least")
	}
	if o.Tunnels < 1 {
		return errors.New("there must be a tunnel at least")
	}
	return nil
}

// Run drills until the rounds or the time are over, the instance does not recover or
// ctx ends, and leaves no process behind. The files are left if the promise was broken.
// The error is that there was no drill.
func Run(ctx context.Context, o Options) (*Result, error) {
	s, err := newStage(o)
	if err != nil {
		return nil, err
	}
	began := time.Now()
	if err := s.begin(ctx); err != nil {
		log, _ := os.ReadFile(s.logPath())
		return nil, errors.Join(fmt.Errorf("%w\n%s", err, log), s.clear(), s.remove())
	}
	result := newResult(o.Seed)
	s.play(ctx, o, result)
	if !result.Held {
		s.keepTraces()
	}
	if err := s.conclude(result); err != nil {
		result.mishap("the end", err)
	}
	result.Duration, result.Kills, result.Changes = time.Since(began), s.kills, s.counters.changes()
	if result.Held {
		return result, s.remove()
	}
	result.Files = s.dir
	return result, nil
}

// play plays one round after the other.
func (s *stage) play(ctx context.Context, o Options, result *Result) {
	end, kinds := time.Now().Add(o.For), newDeck(s.random, o.Only)
	over := func() bool {
		return ctx.Err() != nil || result.Mishaps > 0 || o.Rounds > 0 && result.Rounds == o.Rounds ||
			o.For > 0 && time.Now().After(end) || o.Kills > 0 && s.kills.Generations() >= o.Kills && kinds.through()
	}
	for !over() {
		s.round(ctx, kinds.next(), o, result)
	}
}

// round plays one.
func (s *stage) round(ctx context.Context, k int, o Options, result *Result) {
	began, kind := time.Now(), &result.Kinds[k]
	when := fmt.Sprintf("round %d (%s)", result.Rounds+1, kind.Kind)
	s.within(between)
	err := kinds[k].do(s, ctx)
	if err == nil {
		err = s.settle(ctx, kinds[k].mend)
	}
	if err == nil && o.Sabotage != "" && result.Rounds == 0 {
		if err = sabotages[o.Sabotage](s, ctx); err == nil {
			err = s.settle(ctx, kinds[k].mend)
		}
	}
	if ctx.Err() != nil { // which may be why
		return
	}
	if err != nil {
		result.mishap(when, err)
	}
	result.Rounds++
	kind.Rounds++
	took := time.Since(began)
	pauses := s.examine(ctx, when, result)
	kind.Pauses = kind.Pauses.Longest(pauses)
	fmt.Fprintf(o.Log, "%s %-58s %7s  new connection %s, request %s, tunnel %s\n", began.Format("15:04:05.000"), when,
		short(took), short(pauses.Connection), short(pauses.Request), short(pauses.Tunnel))
}

// examine looks what a round has done, and returns how long it made others wait.
func (s *stage) examine(ctx context.Context, when string, result *Result) canary.Pauses {
	report, err := s.canary.Do(canary.Command{Do: "report"})
	if err != nil {
		result.mishap(when, err)
		return canary.Pauses{}
	}
	result.see(when, report)
	for _, end := range s.strangeEnds() {
		result.mishap(when, errors.New(end))
	}
	compared, decreased, err := s.scrape(ctx)
	if err != nil {
		result.mishap(when, err)
	}
	result.Compared += compared
	result.Decreased += len(decreased)
	result.wrong(when, decreased...)
	return report.Pauses
}

// conclude has the canary close what it has, which must come to its end, and then
// ends everything.
func (s *stage) conclude(result *Result) error {
	report, err := s.canary.Do(canary.Command{Do: "end"})
	if err == nil {
		result.see("the end", report)
	}
	return errors.Join(err, s.clear())
}
