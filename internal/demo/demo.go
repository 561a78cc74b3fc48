// Package demo is `holdfast demo`: it shows in half a minute, with real processes
// on this machine, what Holdfast is for. The supervisor never imports it.
package demo

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"holdfast/internal/admin"
	"holdfast/internal/child"
	"holdfast/internal/supervisor"
)

const (
	sockets = 5
	reloads = 3

	// between is how many messages are echoed between two reloads.
	between = 500

	// patience bounds every step of the story; each is a matter of milliseconds.
	patience = 20 * time.Second
)

// Commands returns `demo`, and the command that it starts as its upstream.
func Commands() []*cobra.Command {
	var once bool
	demo := &cobra.Command{
		Use:   "demo",
		Short: "Show what this is for, on this machine",
		Long: "Starts an echo server and Holdfast in front of it, opens WebSockets, reloads while they talk,\n" +
			"says what happened and serves until Ctrl-C. Everything is stopped and removed at the end.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
			defer stop()
			return Run(ctx, cmd.OutOrStdout(), once)
		},
	}
	demo.Flags().BoolVar(&once, "once", false, "end after the story")
	upstream := &cobra.Command{
		Use:    "demo-upstream",
		Short:  "The echo server of the demo; ends with its standard input",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return serveUpstream(cmd.InOrStdin(), cmd.OutOrStdout())
		},
	}
	return []*cobra.Command{demo, upstream}
}

// stage is everything that the demo has started.
type stage struct {
	out  io.Writer
	self string // this program
	dir  string

	upstream     *child.Child
	upstreamAddr string
	supervisor   *child.Child
	client       *admin.Client
	url          string
	talk         *talk
}

// Run plays the demo until ctx ends, or with once until the story has been told,
// and leaves nothing behind. The error says what was lost, if anything was.
func Run(ctx context.Context, out io.Writer, once bool) (err error) {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "holdfast-demo-")
	if err != nil {
		return err
	}
	s := &stage{out: out, self: self, dir: dir}
	defer func() { err = errors.Join(err, s.clear()) }()

	err = s.tell(ctx)
	if ctx.Err() != nil {
		return s.farewell()
	}
	if err != nil || once {
		return err
	}
	s.invite()
	select {
	case <-ctx.Done():
	case <-s.supervisor.Ended():
	case <-s.talk.broken:
	}
	if ctx.Err() == nil && s.stopped() {
		s.say("\nHoldfast was stopped, and the WebSockets ended with it.\n")
		return nil
	}
	return s.farewell()
}

func (s *stage) say(format string, args ...any) { fmt.Fprintf(s.out, format, args...) }

// tell is the story.
func (s *stage) tell(ctx context.Context) error {
	s.say("Everything in this demo runs on this machine; its files are in %s\n\n", s.dir)
	if err := s.startUpstream(); err != nil {
		return fmt.Errorf("start the echo server: %w", err)
	}
	if err := s.startSupervisor(ctx); err != nil {
		return fmt.Errorf("start holdfast: %w", err)
	}
	s.say("started    an echo server (pid %d)\n", s.upstream.PID())
	s.say("started    holdfast in front of it (pid %d), at %s\n", s.supervisor.PID(), s.url)
	var err error
	if s.talk, err = openTalk(ctx, s.url+"/echo", sockets); err != nil {
		return fmt.Errorf("open WebSockets: %w", err)
	}
	s.say("opened     %d WebSockets through it; each sends numbered messages and checks every echo\n\n", sockets)
	for i := range reloads {
		if err := s.talk.waitFor(ctx, between); err != nil {
			return err
		}
		if err := s.reload(ctx, i+1); err != nil {
			return fmt.Errorf("reload %d: %w", i+1, err)
		}
	}
	if err := s.talk.waitFor(ctx, between); err != nil {
		return err
	}
	return s.conclude(ctx)
}

func (s *stage) startUpstream() error {
	cmd := exec.Command(s.self, "demo-upstream")
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	// It ends with its standard input: when we close it, or are gone ourselves.
	if _, err := cmd.StdinPipe(); err != nil {
		return err
	}
	if s.upstream, err = child.Start(cmd); err != nil {
		return err
	}
	_, err = fmt.Fscanln(out, &s.upstreamAddr)
	return err
}

func (s *stage) startSupervisor(ctx context.Context) error {
	if err := s.writeConfig(0); err != nil {
		return err
	}
	log, err := os.Create(s.logPath())
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(s.self, "run", "-c", s.configPath(), "--runtime-dir", s.runtimeDir())
	cmd.Stdout, cmd.Stderr = log, log
	if s.supervisor, err = child.Start(cmd); err != nil {
		return err
	}
	s.client = admin.Dial(s.runtimeDir())
	status, err := s.waitReady(ctx)
	if err != nil {
		return err
	}
	s.url = "http://" + status.Listeners[0].Address
	return nil
}

// waitReady asks until a generation serves. There is nothing to listen to before
// the admin socket is there.
func (s *stage) waitReady(ctx context.Context) (*supervisor.Status, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		status, err := s.client.Status(ctx)
		if err == nil && status.Ready {
			return status, nil
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-s.supervisor.Ended():
			log, _ := os.ReadFile(s.logPath())
			return nil, fmt.Errorf("it has ended, and its log says\n%s", log)
		case <-ctx.Done():
			return nil, fmt.Errorf("it was not ready: %w", cmp.Or(err, ctx.Err()))
		}
	}
}

// reload changes the configuration, runs `holdfast reload` as anybody would, and
// looks whether the change is in service.
func (s *stage) reload(ctx context.Context, i int) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if err := s.writeConfig(i); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, s.self, "reload", "--runtime-dir", s.runtimeDir())
	said, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w: %s", err, said)
	}
	if err := s.checkRoute(ctx, i); err != nil {
		return err
	}
	sentence, _, _ := strings.Cut(string(said), "\n")
	s.say("reload %d   %s\n", i, sentence)
	s.say("           %s\n", s.talk)
	return nil
}

// checkRoute asks for what reload i has added.
func (s *stage) checkRoute(ctx context.Context, i int) error {
	request, err := http.NewRequestWithContext(ctx, "GET", s.url+addedPath(i), nil)
	if err != nil {
		return err
	}
	fresh := &http.Transport{DisableKeepAlives: true}
	response, err := fresh.RoundTrip(request)
	if err != nil {
		return err
	}
	response.Body.Close()
	if response.StatusCode != http.StatusFound {
		return fmt.Errorf("%s answers %s where the new configuration redirects", addedPath(i), response.Status)
	}
	return nil
}

func (s *stage) conclude(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	status, err := s.client.Status(ctx)
	if err != nil {
		return err
	}
	var serving, keeping supervisor.GenerationStatus
	for _, g := range status.Generations {
		if g.State == "serving" {
			serving = g
		}
		if g.Tunnels > 0 {
			keeping = g
		}
	}
	if keeping.Tunnels != sockets {
		return fmt.Errorf("generation %d has %d tunnels, and there were %d", keeping.Number, keeping.Tunnels, sockets)
	}
	if err := s.talk.err(); err != nil {
		return err
	}
	s.say("\nThe %d WebSockets are still the connections that were opened before the first reload:\n", sockets)
	s.say("generation %d (pid %d) keeps them, generation %d (pid %d) serves whatever is new.\n",
		keeping.Number, keeping.PID, serving.Number, serving.PID)
	s.say("So far: %s.\n", s.talk)
	return nil
}

// invite says what to try while everything goes on.
func (s *stage) invite() {
	self := shortest(s.self)
	s.say("\nTry, in another terminal:\n")
	s.say("    curl %s/\n", s.url)
	s.say("    curl -N %s/events\n", s.url)
	s.say("    %s --runtime-dir %s status\n", self, s.runtimeDir())
	s.say("    %s --runtime-dir %s reload\n", self, s.runtimeDir())
	s.say("The configuration is %s; a change comes into service by that reload.\n", s.configPath())
	s.say("In a browser, %s/ opens a WebSocket of its own.\n", s.url)
	s.say("\nServing until Ctrl-C.\n")
}

// stopped says whether somebody has stopped Holdfast, which ends WebSockets
// without breaking a promise.
func (s *stage) stopped() bool {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if status, err := s.client.Status(ctx); err == nil && !status.Stopping {
		return false
	}
	select {
	case <-s.supervisor.Ended():
		return s.supervisor.Outcome().Success()
	case <-ctx.Done():
		return false
	}
}

// farewell says how it went until the end.
func (s *stage) farewell() error {
	if s.talk == nil {
		return nil
	}
	if err := s.talk.err(); err != nil {
		return err
	}
	select {
	case <-s.supervisor.Ended():
		return fmt.Errorf("holdfast has ended: %s", s.supervisor.Outcome())
	default:
	}
	s.say("\nAt the end: %s.\n", s.talk)
	return nil
}

// clear ends what was started, those in front first, and removes the files.
func (s *stage) clear() error {
	var left []error
	if s.talk != nil {
		s.talk.close()
	}
	if s.supervisor != nil {
		left = append(left, s.supervisor.Stop())
	}
	if s.upstream != nil {
		left = append(left, s.upstream.Stop())
	}
	return errors.Join(append(left, os.RemoveAll(s.dir))...)
}

func (s *stage) runtimeDir() string { return filepath.Join(s.dir, "run") }
func (s *stage) configPath() string { return filepath.Join(s.dir, "holdfast.toml") }
func (s *stage) logPath() string    { return filepath.Join(s.dir, "holdfast.log") }

// writeConfig writes the configuration with the routes of as many reloads.
func (s *stage) writeConfig(reloads int) error {
	return os.WriteFile(s.configPath(), []byte(configuration(s.upstreamAddr, reloads)), 0o600)
}

// configuration has one route more for each reload.
func configuration(upstream string, reloads int) string {
	var b strings.Builder
	fmt.Fprintf(&b, `# Written by "holdfast demo". Change it, and reload.

[[listeners]]
name = "demo"
address = "127.0.0.1:0"

[[clusters]]
name = "echo"
endpoints = [%q]

[[virtual_hosts]]
name = "demo"
domains = ["*"]
`, upstream)
	for i := range reloads {
		fmt.Fprintf(&b, `
  [[virtual_hosts.routes]]
  match = { path = %q }
  redirect = { path = "/", status = 302 }
`, addedPath(i+1))
	}
	b.WriteString(`
  [[virtual_hosts.routes]]
  match = { path = "/echo" }
  websocket = true
  cluster = "echo"

  [[virtual_hosts.routes]]
  match = { prefix = "/" }
  cluster = "echo"
`)
	return b.String()
}

func addedPath(reload int) string { return fmt.Sprintf("/added-by-reload-%d", reload) }

// shortest is path as one would type it here.
func shortest(path string) string {
	if here, err := os.Getwd(); err == nil {
		if rel, err := filepath.Rel(here, path); err == nil && !strings.HasPrefix(rel, "..") {
			return "./" + rel
		}
	}
	return path
}
