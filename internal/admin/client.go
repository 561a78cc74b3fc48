package admin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unicode"
	"unicode/utf8"

	"holdfast/internal/supervisor"
)

// ErrNotRunning is wrapped where no supervisor listens: the command has done nothing.
var ErrNotRunning = errors.New("no supervisor runs")

// ErrUnknown is wrapped where a command was sent and its answer was lost: it may
// have been done, or be done yet.
var ErrUnknown = errors.New("unknown whether it was done")

// maxAnswer bounds what is read of an answer. A profile may be long.
const maxAnswer = 64 << 20

// endPoll is how often Stop looks whether the socket is gone, and how soon a command is
// repeated that met a supervisor which another one has just succeeded.
const endPoll = 20 * time.Millisecond

// Client commands the supervisor of a runtime directory. Its methods may run
// concurrently; each uses a connection of its own and blocks until the answer is
// there or ctx has ended.
type Client struct {
	dir  string
	http *http.Client
}

// Dial returns a client. It connects when it is used.
func Dial(runtimeDir string) *Client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		path, err := socketPath(runtimeDir)
		if err != nil {
			return nil, &notConnected{err}
		}
		conn, err := new(net.Dialer).DialContext(ctx, "unix", path)
		if err != nil {
			return nil, &notConnected{err}
		}
		return conn, nil
	}
	return &Client{dir: runtimeDir, http: &http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}}
}

// notConnected marks an error before which nothing was sent.
type notConnected struct{ error }

func (e *notConnected) Unwrap() error { return e.error }

// Reload is [supervisor.Commands.Reload]: a *supervisor.Refusal has changed nothing.
func (c *Client) Reload(ctx context.Context, wait bool) (*supervisor.ReloadResult, error) {
	result := new(supervisor.ReloadResult)
	return result, c.into(ctx, result, "POST", "/reload", url.Values{"wait": {strconv.FormatBool(wait)}})
}

// Rollback is [supervisor.Commands.Rollback]: a *supervisor.Refusal has changed nothing.
func (c *Client) Rollback(ctx context.Context, wait bool) (*supervisor.ReloadResult, error) {
	result := new(supervisor.ReloadResult)
	return result, c.into(ctx, result, "POST", "/rollback", url.Values{"wait": {strconv.FormatBool(wait)}})
}

// Upgrade is [supervisor.Commands.Upgrade]: a *supervisor.Refusal has changed nothing.
func (c *Client) Upgrade(ctx context.Context) (*supervisor.UpgradeResult, error) {
	result := new(supervisor.UpgradeResult)
	return result, c.into(ctx, result, "POST", "/upgrade", nil)
}

// Status is [supervisor.Commands.Status].
func (c *Client) Status(ctx context.Context) (*supervisor.Status, error) {
	status := new(supervisor.Status)
	return status, c.into(ctx, status, "GET", "/status", nil)
}

// Clusters is [supervisor.Commands.Clusters].
func (c *Client) Clusters(ctx context.Context, name string) (*supervisor.Clusters, error) {
	query := make(url.Values)
	if name != "" {
		query.Set("cluster", name)
	}
	clusters := new(supervisor.Clusters)
	return clusters, c.into(ctx, clusters, "GET", "/clusters", query)
}

// Certificates is [supervisor.Commands.Certificates].
func (c *Client) Certificates(ctx context.Context) (*supervisor.Certificates, error) {
	certificates := new(supervisor.Certificates)
	return certificates, c.into(ctx, certificates, "GET", "/certs", nil)
}

// Stop ends the service, with now without waiting for anything, and returns when
// it has ended. ctx ends the waiting only.
func (c *Client) Stop(ctx context.Context, now bool) error {
	_, err := c.do(ctx, "POST", "/stop", url.Values{"wait": {"true"}, "now": {strconv.FormatBool(now)}})
	if err == nil || ctx.Err() != nil || !errors.Is(err, ErrUnknown) {
		return err
	}
	// The connection broke: the process has ended without a word, or will be found.
	for {
		_, err := c.do(ctx, "GET", "/healthz", nil)
		if errors.Is(err, ErrNotRunning) {
			return fmt.Errorf("%w: the supervisor has ended without a word, and generations may live", ErrUnknown)
		}
		select {
		case <-time.After(endPoll):
		case <-ctx.Done():
			return fmt.Errorf("%w: the connection was lost and a supervisor still answers", ErrUnknown)
		}
	}
}

// SetReady is [supervisor.Commands.SetReady].
func (c *Client) SetReady(ctx context.Context, ready bool) error {
	_, err := c.do(ctx, "POST", "/ready", url.Values{"on": {strconv.FormatBool(ready)}})
	return err
}

// Kill is [supervisor.Commands.Kill].
func (c *Client) Kill(ctx context.Context, generation int) error {
	_, err := c.do(ctx, "POST", "/kill", url.Values{"generation": {strconv.Itoa(generation)}})
	return err
}

// MoveTunnels is [supervisor.Commands.MoveTunnels].
func (c *Client) MoveTunnels(ctx context.Context, generation int) error {
	_, err := c.do(ctx, "POST", "/move", url.Values{"generation": {strconv.Itoa(generation)}})
	return err
}

// Clear is [supervisor.Commands.Clear].
func (c *Client) Clear(ctx context.Context, generation int, within time.Duration) error {
	_, err := c.do(ctx, "POST", "/drain", url.Values{"generation": {strconv.Itoa(generation)}, "within": {within.String()}})
	return err
}

// Metrics returns what all generations have counted, and the supervisor itself, in
// the text format of Prometheus. It is for a person to read: a character that
// could drive a terminal is replaced.
func (c *Client) Metrics(ctx context.Context) (string, error) {
	body, err := c.do(ctx, "GET", "/metrics", nil)
	return printable(body), err
}

// Config is [supervisor.Commands.Config].
func (c *Client) Config(ctx context.Context, file bool) (string, error) {
	body, err := c.do(ctx, "GET", "/config", url.Values{"file": {strconv.FormatBool(file)}})
	return string(body), err
}

// SetLogLevel is [supervisor.Commands.SetLogLevel].
func (c *Client) SetLogLevel(ctx context.Context, level string) error {
	_, err := c.do(ctx, "POST", "/log-level", url.Values{"level": {level}})
	return err
}

// Runtime is [supervisor.Commands.Runtime].
func (c *Client) Runtime(ctx context.Context) (*supervisor.Runtime, error) {
	values := new(supervisor.Runtime)
	return values, c.into(ctx, values, "GET", "/runtime", nil)
}

// Override is [supervisor.Commands.Override].
func (c *Client) Override(ctx context.Context, values map[string]float64) (*supervisor.OverrideResult, error) {
	query := make(url.Values)
	for _, key := range slices.Sorted(maps.Keys(values)) {
		query.Add("key", key)
		query.Add("value", strconv.FormatFloat(values[key], 'g', -1, 64))
	}
	result := new(supervisor.OverrideResult)
	return result, c.into(ctx, result, "POST", "/runtime/set", query)
}

// ResetOverrides is [supervisor.Commands.ResetOverrides].
func (c *Client) ResetOverrides(ctx context.Context, key string) (*supervisor.OverrideResult, error) {
	query := make(url.Values)
	if key != "" {
		query.Set("key", key)
	}
	result := new(supervisor.OverrideResult)
	return result, c.into(ctx, result, "POST", "/runtime/reset", query)
}

// ReopenLogs is [supervisor.Commands.ReopenLogs].
func (c *Client) ReopenLogs(ctx context.Context) error {
	_, err := c.do(ctx, "POST", "/reopen-logs", nil)
	return err
}

// RotateTickets is [supervisor.Commands.RotateTickets].
func (c *Client) RotateTickets(ctx context.Context) error {
	_, err := c.do(ctx, "POST", "/tickets/rotate", nil)
	return err
}

// Profile is [supervisor.Commands.Profile]; of generation 0 it is one of the
// supervisor itself. over is 0, or whole seconds, at most 60.
func (c *Client) Profile(ctx context.Context, generation int, name string, over time.Duration) ([]byte, error) {
	if name == "cpu" {
		name = "profile" // as net/http/pprof calls it
	}
	query := make(url.Values)
	if generation > 0 {
		query.Set("generation", strconv.Itoa(generation))
	}
	if over > 0 {
		query.Set("seconds", strconv.Itoa(int(over/time.Second)))
	}
	return c.do(ctx, "GET", pprofPath+name, query)
}

func (c *Client) into(ctx context.Context, value any, method, path string, query url.Values) error {
	body, err := c.do(ctx, method, path, query)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(body, value); err != nil {
		return fmt.Errorf("answer of the supervisor: %w", err)
	}
	return nil
}

// do returns the body of a 200 and makes an error of everything else. A supervisor that
// another one has succeeded has done nothing, and the other one is asked.
func (c *Client) do(ctx context.Context, method, path string, query url.Values) ([]byte, error) {
	for {
		body, err := c.once(ctx, method, path, query)
		if !errors.Is(err, supervisor.ErrSucceeded) {
			return body, err
		}
		select {
		case <-time.After(endPoll):
		case <-ctx.Done():
			return nil, err
		}
	}
}

func (c *Client) once(ctx context.Context, method, path string, query url.Values) ([]byte, error) {
	to := url.URL{Scheme: "http", Host: "localhost", Path: path, RawQuery: query.Encode()}
	request, err := http.NewRequestWithContext(ctx, method, to.String(), nil)
	if err != nil {
		return nil, err
	}
	response, err := c.http.Do(request)
	if err != nil {
		return nil, c.explain(ctx, method, err)
	}
	defer response.Body.Close()
	body, err := readAll(response.Body, maxAnswer)
	if errors.Is(err, errTooLong) {
		return nil, err
	}
	if err != nil {
		return nil, c.explain(ctx, method, err)
	}
	if response.StatusCode == http.StatusOK {
		return body, nil
	}
	return nil, said(response.StatusCode, body)
}

var errTooLong = errors.New("the answer of the supervisor is too long")

// readAll refuses what is longer than most rather than cutting it short.
func readAll(r io.Reader, most int) ([]byte, error) {
	body, err := io.ReadAll(io.LimitReader(r, int64(most)+1))
	if err == nil && len(body) > most {
		return nil, fmt.Errorf("%w: it has more than %d bytes", errTooLong, most)
	}
	return body, err
}

// explain turns an error of the connection into one that says what is known.
func (c *Client) explain(ctx context.Context, method string, err error) error {
	if before, ok := errors.AsType[*notConnected](err); ok {
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
			return fmt.Errorf("%w with runtime directory %s", ErrNotRunning, c.dir)
		}
		return before
	}
	what := "the connection to the supervisor was lost"
	if ctx.Err() != nil {
		what = "no answer from the supervisor in time"
		err = context.Cause(ctx)
	}
	if method == "GET" {
		return fmt.Errorf("%s: %w", what, err)
	}
	return fmt.Errorf("%s (%w): %w", what, err, ErrUnknown)
}

// said turns an answer other than 200 into the error that the supervisor had.
func said(code int, body []byte) error {
	if code == http.StatusConflict {
		var r refused
		if err := json.Unmarshal(body, &r); err == nil && len(r.Problems) > 0 {
			return &supervisor.Refusal{Step: r.Step, Problems: r.Problems}
		}
	}
	text := printable(bytes.TrimSpace(body))
	for _, known := range []error{supervisor.ErrStopping, supervisor.ErrSucceeded} {
		if code == http.StatusServiceUnavailable && text == known.Error() {
			return known
		}
	}
	if code == http.StatusGatewayTimeout {
		return fmt.Errorf("%s (%w)", text, ErrUnknown)
	}
	return errors.New(text)
}

// printable replaces what could drive a terminal: some of what a supervisor says
// it has from a generation, which an attacker may own.
func printable(text []byte) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) || r == '\n' || r == '\t' {
			return r
		}
		return utf8.RuneError
	}, string(text))
}
