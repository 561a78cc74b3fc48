package proxy_test

import (
	"io"
	"testing"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/control"
)

// A health check is answered on the listener, whatever host and route it has and whoever asks.
func TestHealthChecks(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f := newFarm(t)
		f.change = func(c *config.Config) {
			c.HTTPListeners[0].HealthCheck = &config.HealthCheck{Path: "/healthz"}
			c.HTTPListeners[0].Filters = &config.Filters{Deny: networks("192.0.2.0/24")}
		}
		m := f.manager()
		checks := func(method, target, unready string) *client {
			c := get(t, "unknown.example", target)
			c.request.Method = method
			m.SetUnready(unready)
			return c.start(m).wait()
		}
		for _, tt := range []struct {
			method, target, unready string
			status                  int
			body                    string
		}{
			{"GET", "/healthz", "", 200, "ok\n"},
			{"GET", "/healthz?a=b", "", 200, "ok\n"},
			{"HEAD", "/healthz", "", 200, ""},
			{"GET", "/healthz", "off", 503, "off\n"},
			{"HEAD", "/healthz", "stopping", 503, ""},
			{"GET", "/healthz", "", 200, "ok\n"},
			{"POST", "/healthz", "", 404, "404 Not Found\n"},
			{"GET", "/healthz/", "", 404, "404 Not Found\n"},
			{"GET", "/health", "", 404, "404 Not Found\n"},
		} {
			c := checks(tt.method, tt.target, tt.unready)
			c.wantStatus(tt.status)
			c.wantBody(tt.body)
			c.wantEnd(true)
			if stored, _ := c.answer.Fields.Get("Cache-Control"); tt.status != 404 && stored != "no-store" {
				t.Errorf("%s %s: Cache-Control is %q", tt.method, tt.target, stored)
			}
		}
		c := upgrade(t, "a.example", "/healthz").start(m).wait()
		c.wantStatus(403)
		got := figures(f.registry)
		if got["downstream_health_checks_total{public,ok}"] != 4 || got["downstream_health_checks_total{public,unready}"] != 2 {
			t.Errorf("counted are %v", got)
		}
	})
}

// A generation says that no traffic is wanted when it hears so, and when it is stopped, and
// serves on.
func TestAGenerationSaysWhetherTrafficIsWanted(t *testing.T) {
	c := command(t, "health_check = { path = \"/healthz\" }\n", "[drain]\nidle_grace = \"1h\"\n")
	c.serve()
	conn := c.dial()
	wants := func(status, body string) {
		t.Helper()
		conn.say("GET /healthz HTTP/1.1\nHost: x\n\n")
		conn.wantHead("HTTP/1.1 " + status)
		got := make([]byte, len(body))
		if _, err := io.ReadFull(conn.in, got); err != nil || string(got) != body {
			t.Errorf("the body is %q, %v, want %q", got, err, body)
		}
	}
	wants("200", "ok\n")
	for _, why := range []string{control.UnreadyOff, control.UnreadyStopping} {
		c.ask(control.Message{Type: control.TypeReadiness, Unready: why})
		wants("503", why+"\n")
	}
	c.ask(control.Message{Type: control.TypeReadiness})
	wants("200", "ok\n")
	c.say(&control.Message{Type: control.TypeStop, Within: time.Hour})
	c.status() // it has heard that
	wants("503", "stopping\n")
	conn.wantEnd()
	conn.Close()
	if err := c.wait(); err != nil {
		t.Error(err)
	}
}
