// Bench measures Holdfast beside the proxies that people would use instead, on this
// machine, in one run:
//
//	go run ./bench                                              everything, as on the page
//	go run ./bench -quick -proxies holdfast,nginx -modes echo   a first look
//	go run ./bench -http -profile /tmp/profiles -modes small    … and where the time goes
//	go run ./bench -docs docs                                   … and writes the page's table
//	go run ./bench -http -docs docs                             the same of the page's table about HTTP
//	go run ./bench -vault -docs docs                            … and of what the vault costs and does
//	go run ./bench -targets docs/performance.json               what is asked of Holdfast, and what a run has shown
//
// The client, the upstream and each proxy are processes of their own. The proxies take
// turns within a round (A B C, then B C A, …), and what counts is the median of the
// rounds: what disturbs the machine for a while disturbs all of them. CPU is what all
// processes of a proxy use, its supervisor included; the clocks are the kernel's.
//
// Modes:
//
//	idle     -tunnels tunnels that carry nothing: private memory and descriptors of the
//	         processes that relay, and what is kept after all tunnels were closed
//	echo     a 64-byte message on each tunnel and the next one when it is back
//	paced    messages at a fixed rate; latency is counted from when each was due
//	bulk     the upstream sends as much as is taken
//	connect  connect, upgrade, close
//	reload   reloads while tunnels are open and new ones are tried
//	crash    SIGKILL to a process that relays; the run plays the service manager
//	resume   SIGKILL to the process that relays -tunnels tunnels, until all have echoed again
//	move     -tunnels tunnels go to the next generation while messages are paced
//
// and of requests, on connections that are kept unless it says otherwise:
//
//	small, 16k, 1m   answers of this length, as fast as they come
//	httppaced        small ones at a fixed rate; latency is counted from when each was due
//	httpconns        small ones, each on a connection of its own
//	httpidle         memory for -tunnels connections, each of which was used once
//
// and over TLS:
//
//	handshake   connections that agree on TLS and end: with a certificate, and with a ticket
//	tlsconnect  the same with an upgrade
//	tlsecho     as echo
//	tlsidle     private memory of tunnels that carry nothing
//
// Whatever is started is ended by its pid, all addresses are on loopback, and
// temporary files are removed. HAProxy and nginx are those of the machine (Debian's
// packages haproxy and nginx-light); Caddy and Traefik are built once from their
// modules into the user's cache folder, which takes minutes.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"holdfast/bench/load"
	"holdfast/bench/peer"
	"holdfast/bench/report"
)

func main() {
	var err error
	if len(os.Args) > 1 && os.Args[1] == "role" {
		err = play(os.Args[2:])
	} else {
		err = run(os.Args[1:])
	}
	switch {
	case errors.Is(err, flag.ErrHelp):
		os.Exit(2)
	case err != nil:
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// play is what this program does when it has started itself: it is a part of the load,
// or one of the two smallest proxies.
func play(args []string) error {
	if len(args) == 3 {
		switch args[0] {
		case "httputil":
			return peer.ServeHTTPUtil(args[1], args[2])
		case "iocopy":
			return peer.ServeIOCopy(args[1], args[2])
		}
	}
	switch {
	case len(args) == 1 && args[0] == "client":
		return load.ServeClient(os.Stdin, os.Stdout)
	case len(args) == 2 && args[0] == "upstream":
		addresses, err := strconv.Atoi(args[1])
		if err != nil {
			return err
		}
		go func() { // it ends with whoever started it
			io.Copy(io.Discard, os.Stdin)
			os.Exit(0)
		}()
		return load.ServeUpstream(addresses, os.Stdout)
	}
	return fmt.Errorf("there is no role %q", args)
}

// options are what the command line says.
type options struct {
	table    *table
	proxies  []string
	modes    []string
	sizes    report.Sizes
	root     string // of the module
	holdfast string // folder of its programs; empty: they are built
	profiles string // folder; empty: none are taken
	command  string // as a person would type it
}

// A table is one of the page's.
type table struct {
	name      string // of the file with its run, and of its block of the page
	kinds     []*peer.Kind
	direct    bool     // no proxy is one of its columns, too
	modes     []string // in their order
	reference string
	full      report.Sizes // what the page shows
}

// tables are all. The first one is what is measured unless another is asked for.
var tables = []*table{
	{name: "performance", kinds: peer.Kinds(), direct: true, modes: []string{"idle", "echo", "paced", "bulk", "connect", "reload", "crash"}, full: full},
	{name: "http", kinds: peer.Kinds(), direct: true, modes: []string{"small", "16k", "1m", "httppaced", "httpconns", "connect", "httpidle"}, full: fullHTTP},
	{name: "tls", kinds: peer.TLSKinds(), modes: []string{"handshake", "tlsconnect", "tlsecho", "tlsidle"}, full: fullTLS},
	{name: "vault", kinds: peer.VaultKinds(), modes: []string{"idle", "echo", "bulk", "connect", "resume", "move"}, reference: report.NoVault, full: fullVault},
}

func (t *table) proxies() []string {
	var names []string
	for _, k := range t.kinds {
		names = append(names, k.Name)
	}
	if t.direct {
		names = append(names, direct)
	}
	return names
}

// full takes some twenty minutes.
var full = report.Sizes{
	Idle: 9000, Few: 100, Many: 1000, Rate: 10_000, Message: 64, Held: 1000, Reloads: 10, Rounds: 5, Slow: 1,
	Measured: report.Duration(1500 * time.Millisecond), Settle: report.Duration(8 * time.Second),
}

// fullVault has more and shorter rounds: the differences are small. It takes some ten
// minutes.
var fullVault = report.Sizes{
	Idle: 9000, Few: 100, Many: 1000, Rate: 5000, Message: 64, Rounds: 15, Slow: 5,
	Measured: report.Duration(time.Second), Settle: report.Duration(8 * time.Second),
}

// fullHTTP takes some six minutes.
var fullHTTP = report.Sizes{
	Idle: 9000, Few: 100, Many: 1000, Rate: 4000, Message: 64, Rounds: 3, Slow: 1,
	Measured: report.Duration(600 * time.Millisecond), Settle: report.Duration(10 * time.Second),
}

// fullTLS takes some four minutes.
var fullTLS = report.Sizes{
	Idle: 4000, Few: 100, Many: 1000, Rate: 4000, Message: 64, Rounds: 5, Slow: 3,
	Measured: report.Duration(time.Second), Settle: report.Duration(8 * time.Second),
}

// quick is for a first look, and smoke only shows that everything works.
var (
	quick = report.Sizes{
		Idle: 2000, Few: 100, Many: 1000, Rate: 10_000, Message: 64, Held: 200, Reloads: 3, Rounds: 1, Slow: 1,
		Measured: report.Duration(time.Second), Settle: report.Duration(6 * time.Second),
	}
	smoke = report.Sizes{
		Idle: 50, Few: 5, Many: 20, Rate: 2000, Message: 64, Held: 20, Reloads: 2, Rounds: 1, Slow: 1,
		Measured: report.Duration(100 * time.Millisecond), Settle: report.Duration(100 * time.Millisecond),
	}
)

// A commandLine is what can be said.
type commandLine struct {
	flags                            *flag.FlagSet
	proxies, modes                   string
	http, vault, tls, quick, smoke   bool
	rounds, tunnels                  int
	docs, rendered, judged, holdfast string
	profiles                         string
}

func newCommandLine() *commandLine {
	c := &commandLine{flags: flag.NewFlagSet("bench", flag.ContinueOnError)}
	f := c.flags
	f.BoolVar(&c.http, "http", false, "requests, instead of tunnels")
	f.BoolVar(&c.vault, "vault", false, "what the vault costs and does, instead of Holdfast beside others")
	f.BoolVar(&c.tls, "tls", false, "TLS: handshakes, and tunnels over it")
	f.StringVar(&c.proxies, "proxies", "", "which are measured, if not all of the table")
	f.StringVar(&c.modes, "modes", "", "what is measured, if not all of the table")
	f.BoolVar(&c.quick, "quick", false, "one short round with fewer tunnels")
	f.BoolVar(&c.smoke, "smoke", false, "a round so small that its figures mean nothing, to see that everything works")
	f.IntVar(&c.rounds, "rounds", 0, "rounds of everything, if not as usual")
	f.IntVar(&c.tunnels, "tunnels", 0, "idle tunnels or connections, if not as usual")
	f.StringVar(&c.holdfast, "holdfast", "", "folder with the programs holdfast and holdfast-proxy, if they are not to be built from this tree")
	f.StringVar(&c.docs, "docs", "", "folder in which performance.json (with -http: http.json, with -tls: tls.json, with -vault: vault.json) and its table of performance.md are written")
	f.StringVar(&c.profiles, "profile", "", "folder for CPU profiles of Holdfast under each load, and for which system calls each proxy makes; spoils the figures a little")
	f.StringVar(&c.rendered, "render", "", "measures nothing: writes the tables of performance.md in this folder again, from the runs beside it")
	f.StringVar(&c.judged, "targets", "", "measures nothing: says which targets the run in this file has met")
	return c
}

func run(args []string) error {
	c := newCommandLine()
	if err := c.flags.Parse(args); err != nil {
		return err
	}
	switch {
	case c.flags.NArg() > 0:
		return fmt.Errorf("what is %q?", c.flags.Arg(0))
	case c.rendered != "":
		return render(c.rendered)
	case c.judged != "":
		r, err := report.Read(c.judged)
		if err == nil {
			r.WriteTargets(os.Stdout)
		}
		return err
	}
	o, err := c.options()
	if err != nil {
		return err
	}
	o.command = strings.Join(append([]string{"go run ./bench"}, args...), " ")
	r, err := measure(o)
	if err != nil {
		return err
	}
	fmt.Print(r.Markdown(), "\n")
	r.WriteTargets(os.Stdout)
	if c.docs != "" {
		err = errors.Join(r.Write(filepath.Join(c.docs, o.table.name+".json")), render(c.docs))
	}
	if n := len(r.Failures); n > 0 {
		err = errors.Join(err, fmt.Errorf("%d measurements did not come about", n))
	}
	return err
}

func (c *commandLine) options() (options, error) {
	o := options{table: tables[0], holdfast: c.holdfast, profiles: c.profiles}
	chosenTables := map[string]bool{"http": c.http, "tls": c.tls, "vault": c.vault}
	for _, t := range tables {
		if chosenTables[t.name] && o.table != tables[0] {
			return options{}, fmt.Errorf("-%s and -%s are different tables", o.table.name, t.name)
		}
		if chosenTables[t.name] {
			o.table = t
		}
	}
	o.sizes = o.table.full
	switch {
	case c.smoke:
		o.sizes = smoke
	case c.quick:
		o.sizes = quick
	}
	o.sizes.Rate = min(o.sizes.Rate, o.table.full.Rate)
	if c.rounds > 0 {
		o.sizes.Rounds, o.sizes.Slow = c.rounds, c.rounds
	}
	if c.tunnels > 0 {
		o.sizes.Idle = c.tunnels
	}
	var errs [3]error
	o.proxies, errs[0] = chosen(c.proxies, o.table.proxies())
	o.modes, errs[1] = chosen(c.modes, o.table.modes)
	o.root, errs[2] = moduleRoot()
	return o, errors.Join(errs[:]...)
}

// chosen splits a list and keeps the order of all, which an empty one means.
func chosen(list string, all []string) ([]string, error) {
	if list == "" {
		return all, nil
	}
	wanted := strings.Split(list, ",")
	for _, w := range wanted {
		if !slices.Contains(all, w) {
			return nil, fmt.Errorf("there is no %q; there are %s", w, strings.Join(all, ", "))
		}
	}
	return slices.DeleteFunc(slices.Clone(all), func(name string) bool { return !slices.Contains(wanted, name) }), nil
}

// measure runs everything and ends it, also upon Ctrl-C.
func measure(o options) (r *report.Run, err error) {
	b, err := newBench(o)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, b.clear()) }()
	interrupted := make(chan os.Signal, 1)
	signal.Notify(interrupted, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer signal.Stop(interrupted)
	b.interrupted = interrupted
	return &b.run, b.all()
}

// render writes the page's tables from the runs that are kept beside it.
func render(docs string) error {
	name := filepath.Join(docs, "performance.md")
	page, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	written, err := insertAll(docs, string(page))
	if err != nil {
		return err
	}
	return os.WriteFile(name, []byte(written), 0o644)
}

func insertAll(docs, page string) (string, error) {
	for _, t := range tables {
		r, err := report.Read(filepath.Join(docs, t.name+".json"))
		if err != nil {
			return "", err
		}
		if page, err = r.Insert(page, t.name); err != nil {
			return "", err
		}
	}
	return page, nil
}
