package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"holdfast/internal/supervisor"
)

// actionHeader must be "1" in a POST over TCP. A page in a browser cannot send it
// to another origin without a preflight request, which nothing here answers.
const actionHeader = "Holdfast-Action"

// A resource is one path, or all below it where it ends in a slash. What changes
// something is a POST.
type resource struct {
	method, path, about string
	serve               func(http.ResponseWriter, *http.Request) error
}

func (r *resource) covers(path string) bool {
	return r.path == path || strings.HasSuffix(r.path, "/") && strings.HasPrefix(path, r.path)
}

func (s *Server) resources() []resource {
	return []resource{
		{"GET", "/healthz", "200 if the supervisor is alive", s.health},
		{"GET", "/readyz", "200 if new connections are welcome, or 503 and why not", s.ready},
		{"GET", "/status", "what runs and what it holds, as JSON", s.status},
		{"GET", "/metrics", "what all generations have counted, for Prometheus", s.metrics},
		{"GET", "/clusters", "clusters and their endpoints: health, work, and limits, as JSON; ?cluster=NAME of one", s.clusters},
		{"GET", "/certs", "certificates of listeners and clusters, and when they expire, as JSON", s.certificates},
		{"POST", "/reload", "put the configuration file into service; ?wait=1 waits for the end of probation", s.reload},
		{"POST", "/rollback", "put what served before, and had passed its probation, into service again; ?wait=1 waits for the end of probation", s.rollback},
		{"POST", "/stop", "end the service; ?now=1 without waiting for anything, ?wait=1 answers when it has ended", s.stop},
		{"POST", "/ready", "?on=false has /readyz answer 503, ?on=true takes that back", s.setReady},
		{"POST", "/kill", "?generation=N ends a generation at once", s.kill},
		{"POST", "/move", "?generation=N has one that drains pass its tunnels to the one that serves", s.move},
		{"POST", "/drain", "?generation=N&within=10m has one that drains be empty within a time: its tunnels are closed one after the other", s.clear},
		{"POST", "/log-level", "?level=debug, info, warn or error sets it, ?level=config takes that back", s.setLogLevel},
		{"GET", "/runtime", "runtime values: what is configured, what overrides it, and what holds, as JSON", s.runtime},
		{"POST", "/runtime/set", "?key=KEY&value=NUMBER overrides a runtime value; both may be there several times", s.setRuntime},
		{"POST", "/runtime/reset", "?key=KEY takes back what was set by command, of every key if none is given", s.resetRuntime},
		{"POST", "/tickets/rotate", "make other keys of TLS session tickets, and drop all former ones", s.rotateTickets},
		{"POST", "/reopen-logs", "write access logs to what their paths name now", s.reopenLogs},
	}
}

// socketResources are those of the admin socket alone, whatever the configuration
// allows over TCP, where nobody is asked who they are. A configuration names every
// file and every upstream; a profile shows the insides of a process, and taking one
// costs it time; an upgrade runs whatever is on disk.
func (s *Server) socketResources() []resource {
	return []resource{
		{"POST", "/upgrade", "put the supervisor's program, as it is on disk now, in the place of the one that runs", s.upgrade},
		{"GET", "/config", "the configuration that serves with every default, as TOML; ?file=true that of the file as it is now", s.config},
		{"GET", pprofPath, "profiles of the supervisor, as net/http/pprof has them; ?generation=N of a generation", s.profile},
	}
}

// failure is an error with its status code.
type failure struct {
	code int
	text string
}

func (f *failure) Error() string { return f.text }

func (s *Server) handler(e *endpoint) http.Handler {
	all := s.resources()
	if e.overUnix() {
		all = append(all, s.socketResources()...)
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		res, err := find(all, r)
		if err == nil {
			err = e.admit(r)
		}
		if err == nil {
			err = noBody(w, r)
		}
		if err == nil {
			if res.method == "POST" {
				s.log.Info("admin command", "command", r.URL.RequestURI(), "from", e.from(r))
			}
			err = res.serve(w, r)
		}
		if err != nil {
			answerError(w, err)
		}
	})
}

func find(all []resource, r *http.Request) (*resource, error) {
	var list strings.Builder
	for i, res := range all {
		if !res.covers(r.URL.Path) {
			fmt.Fprintf(&list, "%-4s %-14s  %s\n", res.method, res.path, res.about)
			continue
		}
		if r.Method == res.method || r.Method == "HEAD" && res.method == "GET" {
			return &all[i], nil
		}
		return nil, &failure{http.StatusMethodNotAllowed, fmt.Sprintf("%s takes %s", res.path, res.method)}
	}
	return nil, &failure{http.StatusNotFound, "there is no such path here; there are\n" + strings.TrimSuffix(list.String(), "\n")}
}

// admit applies the rules of TCP, where anybody may call, also a browser that was
// sent by somebody else's page.
func (e *endpoint) admit(r *http.Request) error {
	if e.overUnix() {
		return nil
	}
	rules := e.rules.Load()
	switch {
	case !allowedHost(r.Host, rules.Hosts):
		return &failure{http.StatusForbidden, "the Host header must be an IP address, localhost, or one of admin.hosts"}
	case r.Method == "GET" || r.Method == "HEAD":
		return nil
	case !rules.AllowActions:
		return &failure{http.StatusForbidden, "this address changes nothing: admin.allow_actions is false"}
	case r.Header.Get(actionHeader) != "1":
		return &failure{http.StatusForbidden, "a POST needs the header " + actionHeader + ": 1"}
	}
	return nil
}

func (e *endpoint) overUnix() bool { return !e.address.IsValid() }

func (e *endpoint) from(r *http.Request) string {
	if e.overUnix() {
		return "admin socket"
	}
	return r.RemoteAddr
}

// allowedHost says whether a Host header names this machine by nothing that the
// DNS could have been made to say (rebinding), or as the operator has agreed to. A
// browser always sends the header; health checks over HTTP/1.0 may not.
func allowedHost(host string, names []string) bool {
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	}
	host = strings.TrimSuffix(strings.TrimPrefix(host, "["), "]")
	named := func(name string) bool { return strings.EqualFold(host, name) }
	if host == "" || named("localhost") || slices.ContainsFunc(names, named) {
		return true
	}
	_, err := netip.ParseAddr(host)
	return err == nil
}

// noBody refuses a request with a body, and to read it.
func noBody(w http.ResponseWriter, r *http.Request) error {
	if r.ContentLength == 0 {
		return nil
	}
	http.NewResponseController(w).SetReadDeadline(time.Now())
	w.Header().Set("Connection", "close")
	return &failure{http.StatusBadRequest, "no request here takes a body"}
}

func (s *Server) health(w http.ResponseWriter, _ *http.Request) error {
	if !s.cmds.Alive() {
		return &failure{http.StatusServiceUnavailable, "dead"}
	}
	answerText(w, http.StatusOK, "ok")
	return nil
}

func (s *Server) ready(w http.ResponseWriter, r *http.Request) error {
	if !s.cmds.Ready() {
		return &failure{http.StatusServiceUnavailable, s.whyNotReady(r.Context())}
	}
	answerText(w, http.StatusOK, "ok")
	return nil
}

func (s *Server) whyNotReady(ctx context.Context) string {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	status, err := s.cmds.Status(ctx)
	switch {
	case errors.Is(err, supervisor.ErrStopping):
		return "stopping"
	case err != nil:
		return "stuck"
	}
	return Unreadiness(status)
}

// Unreadiness says in a word why the service is not ready; "" if it is.
func Unreadiness(status *supervisor.Status) string {
	switch {
	case status.Ready:
		return ""
	case status.Stopping:
		return "stopping"
	case status.ReadyOff:
		return "off"
	case status.Crashes > 0:
		return "crashed"
	}
	return "starting"
}

func (s *Server) status(w http.ResponseWriter, r *http.Request) error {
	ctx, cancel := context.WithTimeout(r.Context(), askTimeout)
	defer cancel()
	status, err := s.cmds.Status(ctx)
	if err != nil {
		return err
	}
	answerJSON(w, http.StatusOK, status)
	return nil
}

func (s *Server) reload(w http.ResponseWriter, r *http.Request) error {
	return replace(w, r, s.cmds.Reload)
}

func (s *Server) rollback(w http.ResponseWriter, r *http.Request) error {
	return replace(w, r, s.cmds.Rollback)
}

// replace takes as long as it takes: the configuration bounds it.
func replace(w http.ResponseWriter, r *http.Request, by func(ctx context.Context, wait bool) (*supervisor.ReloadResult, error)) error {
	wait, err := boolean(r, "wait", false)
	if err != nil {
		return err
	}
	result, err := by(r.Context(), wait)
	if err != nil {
		return err
	}
	answerJSON(w, http.StatusOK, result)
	return nil
}

// upgrade takes as long as it takes: every step of it has a limit of its own.
func (s *Server) upgrade(w http.ResponseWriter, r *http.Request) error {
	result, err := s.cmds.Upgrade(r.Context())
	if err != nil {
		return err
	}
	answerJSON(w, http.StatusOK, result)
	return nil
}

func (s *Server) stop(w http.ResponseWriter, r *http.Request) error {
	now, err := boolean(r, "now", false)
	if err != nil {
		return err
	}
	wait, err := boolean(r, "wait", false)
	if err != nil {
		return err
	}
	s.begin(r.Context(), now)
	if !wait {
		answerText(w, http.StatusOK, "stopping")
		return nil
	}
	select {
	case <-s.ending:
		if s.left.Load() {
			return supervisor.ErrSucceeded
		}
		answerText(w, http.StatusOK, "ended")
	case <-r.Context().Done(): // nobody is there to be answered
	}
	return nil
}

// begin has the service end. A second Stop cuts what is left, which here only now
// means: to ask for the end twice is no haste.
func (s *Server) begin(ctx context.Context, now bool) {
	if now {
		s.cmds.Stop()
		s.cmds.Stop()
		return
	}
	s.stopping.Do(func() {
		ctx, cancel := context.WithTimeout(ctx, askTimeout)
		defer cancel()
		status, err := s.cmds.Status(ctx)
		begun := errors.Is(err, supervisor.ErrStopping) || err == nil && status.Stopping // by a signal
		if !begun {
			s.cmds.Stop()
		}
	})
}

func (s *Server) setReady(w http.ResponseWriter, r *http.Request) error {
	if !r.URL.Query().Has("on") {
		return &failure{http.StatusBadRequest, "say ?on=true or ?on=false"}
	}
	on, err := boolean(r, "on", false)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(r.Context(), askTimeout)
	defer cancel()
	if err := s.cmds.SetReady(ctx, on); err != nil {
		return err
	}
	answerText(w, http.StatusOK, "ok")
	return nil
}

func (s *Server) kill(w http.ResponseWriter, r *http.Request) error {
	generation, err := generationNumber(r)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(r.Context(), askTimeout)
	defer cancel()
	if err := s.cmds.Kill(ctx, generation); err != nil {
		return err
	}
	answerText(w, http.StatusOK, "killed")
	return nil
}

// move answers when the generation was told: tunnels go one batch after the other, and
// /status says how many are left.
func (s *Server) move(w http.ResponseWriter, r *http.Request) error {
	generation, err := generationNumber(r)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(r.Context(), askTimeout)
	defer cancel()
	if err := s.cmds.MoveTunnels(ctx, generation); err != nil {
		return err
	}
	answerText(w, http.StatusOK, "moving")
	return nil
}

// clear answers when the generation was told.
func (s *Server) clear(w http.ResponseWriter, r *http.Request) error {
	generation, err := generationNumber(r)
	if err != nil {
		return err
	}
	within, err := time.ParseDuration(r.URL.Query().Get("within"))
	if err != nil || within < 0 {
		return &failure{http.StatusBadRequest, "say ?within= with a time such as 10m; 0s is at once"}
	}
	ctx, cancel := context.WithTimeout(r.Context(), askTimeout)
	defer cancel()
	if err := s.cmds.Clear(ctx, generation, within); err != nil {
		return err
	}
	answerText(w, http.StatusOK, "draining")
	return nil
}

// config takes as long as the proxy binary does, which is asked for it; the
// configuration bounds that.
func (s *Server) config(w http.ResponseWriter, r *http.Request) error {
	file, err := boolean(r, "file", false)
	if err != nil {
		return err
	}
	text, err := s.cmds.Config(r.Context(), file)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	answer(w, http.StatusOK)
	io.WriteString(w, text) // an error is the peer's absence
	return nil
}

// LogLevels are what the log level can be set to; "config" means what the
// configuration says.
var LogLevels = []string{"debug", "info", "warn", "error", "config"}

func (s *Server) setLogLevel(w http.ResponseWriter, r *http.Request) error {
	level := r.URL.Query().Get("level")
	if !slices.Contains(LogLevels, level) {
		return &failure{http.StatusBadRequest, "say ?level= with one of " + strings.Join(LogLevels, ", ")}
	}
	ctx, cancel := context.WithTimeout(r.Context(), askTimeout)
	defer cancel()
	if err := s.cmds.SetLogLevel(ctx, level); err != nil {
		return err
	}
	answerText(w, http.StatusOK, "ok")
	return nil
}

func (s *Server) reopenLogs(w http.ResponseWriter, r *http.Request) error {
	ctx, cancel := context.WithTimeout(r.Context(), askTimeout)
	defer cancel()
	if err := s.cmds.ReopenLogs(ctx); err != nil {
		return err
	}
	answerText(w, http.StatusOK, "ok")
	return nil
}

func (s *Server) rotateTickets(w http.ResponseWriter, r *http.Request) error {
	ctx, cancel := context.WithTimeout(r.Context(), askTimeout)
	defer cancel()
	if err := s.cmds.RotateTickets(ctx); err != nil {
		return err
	}
	answerText(w, http.StatusOK, "ok")
	return nil
}

func generationNumber(r *http.Request) (int, error) {
	n, err := strconv.Atoi(r.URL.Query().Get("generation"))
	if err != nil || n < 1 {
		return 0, &failure{http.StatusBadRequest, "say ?generation=N, with a number from 1"}
	}
	return n, nil
}

func boolean(r *http.Request, key string, absent bool) (bool, error) {
	if !r.URL.Query().Has(key) {
		return absent, nil
	}
	v, err := strconv.ParseBool(r.URL.Query().Get(key))
	if err != nil {
		return false, &failure{http.StatusBadRequest, "?" + key + "= takes true or false"}
	}
	return v, nil
}

// refused is the body of a 409.
type refused struct {
	Step     string   `json:"step"`
	Problems []string `json:"problems"`
}

func answerError(w http.ResponseWriter, err error) {
	if refusal, ok := errors.AsType[*supervisor.Refusal](err); ok {
		answerJSON(w, http.StatusConflict, refused{refusal.Step, refusal.Problems})
		return
	}
	code := http.StatusInternalServerError
	if known, ok := errors.AsType[*failure](err); ok {
		code = known.code
	} else if errors.Is(err, supervisor.ErrStopping) || errors.Is(err, supervisor.ErrSucceeded) {
		code = http.StatusServiceUnavailable
	} else if errors.Is(err, supervisor.ErrUnanswered) {
		code = http.StatusGatewayTimeout
	} else if errors.Is(err, context.DeadlineExceeded) {
		code, err = http.StatusGatewayTimeout, errors.New("the supervisor does not answer")
	}
	answerText(w, code, err.Error())
}

func answerJSON(w http.ResponseWriter, code int, value any) {
	w.Header().Set("Content-Type", "application/json")
	answer(w, code)
	body := json.NewEncoder(w)
	body.SetIndent("", "  ")
	body.Encode(value) // an error is the peer's absence
}

func answerText(w http.ResponseWriter, code int, text string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	answer(w, code)
	fmt.Fprintln(w, text)
}

// answer writes the head. From here on a peer that does not read has writeTimeout.
func answer(w http.ResponseWriter, code int) {
	headers(w, writeTimeout)
	w.WriteHeader(code)
}

// headers sets what every answer has, and by when it must be written.
func headers(w http.ResponseWriter, within time.Duration) {
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	http.NewResponseController(w).SetWriteDeadline(time.Now().Add(within))
}
