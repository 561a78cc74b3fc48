package config

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"holdfast/internal/headers"
)

// EndpointCheck is how the endpoints of a cluster are checked: by HTTP or by TCP.
type EndpointCheck struct {
	HTTP *HTTPCheck // nil: by TCP
	TCP  *TCPCheck  // nil: by HTTP

	Port              uint16        // of a TCP address that is asked; 0: the endpoint's own
	Plain             bool          // without the cluster's TLS
	Interval          time.Duration // from the end of a check to the next one
	UnhealthyInterval time.Duration // in place of it for an endpoint that fails
	NoTrafficInterval time.Duration // in place of it where nobody uses the cluster; not shorter
	Jitter            time.Duration // up to which an interval is made longer
	Timeout           time.Duration

	UnhealthyThreshold int64 // checks in a row that fail before an endpoint does
	HealthyThreshold   int64 // checks in a row that it passes before it is healthy again
}

// HTTPCheck is a request, and which answer is expected.
type HTTPCheck struct {
	Target   string
	Method   string
	Host     string   // "": the endpoint's address
	Headers  []Header // without variables
	Statuses []StatusRange
	Body     string // a text that must be in it; "": none
	Reuse    bool   // the connection, for the next check
}

// TCPCheck is what is sent on a connection, and the texts that must come, one behind the other.
// With none of both it is enough that there is a connection.
type TCPCheck struct {
	Send    []byte
	Receive [][]byte
}

// What a check may have at most.
const (
	maxThreshold    = 1000
	maxCheckText    = 4 << 10
	maxCheckTexts   = 16
	maxCheckHeaders = 32
)

// ofHTTP are the keys that a check by TCP has no use for.
var ofHTTP = []string{"host", "method", "expected_statuses", "body", "request_headers", "reuse_connection"}

// readEndpointCheck reads how the endpoints of a cluster are checked, nil for not at all.
func readEndpointCheck(cluster *table) *EndpointCheck {
	if !cluster.asked("health_check") {
		return nil
	}
	t := cluster.table("health_check")
	c := &EndpointCheck{Interval: 5 * time.Second, UnhealthyThreshold: 3, HealthyThreshold: 2}
	http, tcp := t.asked("http"), t.asked("tcp")
	switch {
	case t.keys == nil: // it is something else, which was said
	case http && tcp:
		t.at("tcp").fail("a check is by http or by tcp; drop one of them")
	case !http && !tcp:
		t.fail(`says nothing of how to check; it needs http = "/path", or tcp = true`)
	}
	c.HTTP = readHTTPCheck(t)
	if tcp {
		c.TCP = readTCPCheck(t)
	}
	if !http {
		c.HTTP = nil
		for _, key := range ofHTTP {
			t.unset(key)
			if tcp && t.has(key) {
				t.inapplicable(key, "has a meaning only beside http")
			}
		}
	}
	if t.asked("port") {
		var port int64
		t.integer("port", &port, 1, 65535)
		c.Port = uint16(port)
	}
	readCheckTLS(cluster, t, c)
	readCheckTimes(t, c)
	t.integer("unhealthy_threshold", &c.UnhealthyThreshold, 1, maxThreshold)
	t.integer("healthy_threshold", &c.HealthyThreshold, 1, maxThreshold)
	t.strict()
	return c
}

// readCheckTLS reads whether the cluster's TLS is that of its checks.
func readCheckTLS(cluster, t *table, c *EndpointCheck) {
	encrypted := cluster.has("tls")
	t.boolean("tls", &encrypted)
	if !cluster.has("tls") {
		t.inapplicable("tls", "the cluster has no tls, and so have its checks none")
	}
	c.Plain = cluster.has("tls") && !encrypted
}

// readCheckTimes reads when an endpoint is checked. What the file leaves out goes by the
// interval.
func readCheckTimes(t *table, c *EndpointCheck) {
	read(t, "interval", &c.Interval, checkInterval)
	c.UnhealthyInterval = c.Interval
	read(t, "unhealthy_interval", &c.UnhealthyInterval, checkInterval)
	c.NoTrafficInterval = max(time.Minute, c.Interval)
	read(t, "no_traffic_interval", &c.NoTrafficInterval, checkInterval)
	if t.has("no_traffic_interval") && c.NoTrafficInterval < c.Interval {
		t.at("no_traffic_interval").fail("is shorter than interval, %s", writeDuration(c.Interval))
	}
	c.Jitter = (c.Interval / 10).Round(time.Millisecond)
	read(t, "jitter", &c.Jitter, durationOrZero)
	if c.Jitter > c.Interval {
		t.at("jitter").fail("is longer than interval, %s", writeDuration(c.Interval))
	}
	c.Timeout = min(2*time.Second, c.Interval)
	read(t, "timeout", &c.Timeout, duration)
}

// checkInterval is no shorter than what the loops tell apart.
var checkInterval = form[time.Duration]{`a duration from "250ms" to "24h"`, func(s string) (time.Duration, error) {
	d, err := positive(s)
	if err == nil && (d < 250*time.Millisecond || d > 24*time.Hour) {
		err = errForm
	}
	return d, err
}, writeDuration}

func readHTTPCheck(t *table) *HTTPCheck {
	h := &HTTPCheck{Method: "GET", Statuses: []StatusRange{{200, 299}}, Reuse: true}
	read(t, "http", &h.Target, checkPath)
	read(t, "method", &h.Method, oneOf("GET", "HEAD", "OPTIONS", "POST"))
	read(t, "host", &h.Host, authority)
	h.Headers = readCheckHeaders(t)
	if t.has("expected_statuses") {
		h.Statuses = nil
		for _, e := range list(t, "expected_statuses", checkStatus) {
			h.Statuses = append(h.Statuses, e.value)
		}
		if t.empty("expected_statuses") {
			t.at("expected_statuses").fail("must have %s", checkStatus.is)
		}
	} else {
		t.get("expected_statuses")
		t.set("expected_statuses", []string{strconv.Quote("2xx")})
	}
	read(t, "body", &h.Body, checkBody)
	if h.Body != "" && h.Method == "HEAD" {
		t.at("body").fail("the answer to HEAD has no body")
	}
	t.boolean("reuse_connection", &h.Reuse)
	return h
}

// checkPath is what is asked for: a path, and maybe a query.
var checkPath = form[string]{`a path like "/healthz"`, func(s string) (string, error) {
	const most = 8 << 10
	switch {
	case s == "" || s[0] != '/' || strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r >= 0x7f || r == '#' }):
		return "", errForm
	case len(s) > most:
		return "", fmt.Errorf("it is longer than %d bytes", most)
	}
	return s, nil
}, asIs}

var checkStatus = form[StatusRange]{`statuses like "204", "2xx" or "200-299"`, func(s string) (StatusRange, error) {
	r, err := statusRange.parse(s)
	switch {
	case err != nil:
		return r, err
	case r.From < 200 || r.To > 599:
		return r, errors.New("an answer has a status from 200 to 599")
	}
	return r, nil
}, func(r StatusRange) string { return statusRange.write(r) }}

// checkBody is a text of a body.
var checkBody = form[string]{`a text of 1 to 4096 bytes`, func(s string) (string, error) {
	if s == "" || len(s) > maxCheckText {
		return "", errForm
	}
	return s, nil
}, asIs}

// readCheckHeaders reads the fields that a check sends besides those of every request.
func readCheckHeaders(check *table) []Header {
	lines := readLines(check, "request_headers", true)
	if len(lines) == 0 {
		check.unset("request_headers")
		return nil
	}
	n := check.at("request_headers")
	if len(lines) > maxCheckHeaders {
		n.fail("has %d fields; at most %d are sent", len(lines), maxCheckHeaders)
	}
	t := newTable(n)
	for i, l := range lines {
		v, err := headers.Parse(l.Value)
		if err != nil {
			continue // which was said
		}
		text, fixed := v.Text()
		if !fixed {
			t.at(l.Name).fail("a check has no client, and so no variables; write %%%% for a percent sign")
		}
		lines[i].Value = text
	}
	return lines
}

func readTCPCheck(check *table) *TCPCheck {
	c := new(TCPCheck)
	n := check.at("tcp")
	if yes, ok := n.raw.(bool); ok {
		if !yes {
			n.fail("must be true, or a table with send and receive")
		}
		check.set("tcp", "true")
		return c
	}
	if _, isTable := n.raw.(map[string]any); !isTable {
		n.fail("must be true, or a table with send and receive, found %s", describe(n.raw))
		return c
	}
	t := check.table("tcp")
	read(t, "send", &c.Send, payload)
	for _, e := range optional(t, "receive", payload) {
		c.Receive = append(c.Receive, e.value)
	}
	if len(c.Receive) > maxCheckTexts {
		t.at("receive").fail("has %d texts; at most %d are looked for", len(c.Receive), maxCheckTexts)
	}
	if len(c.Send) > 0 && len(c.Receive) == 0 {
		t.at("send").fail("needs receive beside it: nobody would look at the answer")
	}
	t.strict()
	return c
}

// payload is some bytes: a text, or hexadecimal digits behind a word.
var payload = form[[]byte]{`a text of 1 to 4096 bytes, or "hex:" with pairs of hexadecimal digits`, func(s string) ([]byte, error) {
	b := []byte(s)
	if digits, ok := strings.CutPrefix(s, inHex); ok {
		var err error
		if b, err = hex.DecodeString(strings.ReplaceAll(digits, " ", "")); err != nil {
			return nil, errForm
		}
	}
	if len(b) == 0 || len(b) > maxCheckText {
		return nil, errForm
	}
	return b, nil
}, func(b []byte) string {
	plain := !bytes.ContainsFunc(b, func(r rune) bool { return r < ' ' || r > '~' })
	if plain && !bytes.HasPrefix(b, []byte(inHex)) {
		return string(b)
	}
	return inHex + hex.EncodeToString(b)
}}

const inHex = "hex:"
