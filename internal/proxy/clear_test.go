package proxy_test

import (
	"os"
	"strings"
	"testing"
	"time"

	"holdfast/internal/control"
)

// A generation that drains is empty when it was told to be, with every end recorded as the
// operator's; and until then its tunnels go on.
func TestAGenerationIsEmptyWhenItWasToldToBe(t *testing.T) {
	t.Parallel()
	path, log, give := logged(t)
	c := command(t, "", log)
	give(c)
	c.serve()
	if a := c.question(control.Message{Type: control.TypeClear, Within: time.Hour}); a.Error == "" {
		t.Error("one that serves is cleared")
	}
	client, server := c.tunnel()
	c.drain(0)
	c.ask(control.Message{Type: control.TypeClear, Within: time.Hour})
	carries(client, server)
	if by := c.status().EmptyBy; time.Until(by) > time.Hour || time.Until(by) < time.Minute {
		t.Errorf("it is to be empty by %v", by)
	}
	if a := c.question(control.Message{Type: control.TypeClear, Within: 2 * time.Hour}); !strings.Contains(a.Error, "already") {
		t.Errorf("it can be put off: %q", a.Error)
	}
	if a := c.question(control.Message{Type: control.TypeServe}); a.Error == "" {
		t.Error("it serves again")
	}
	carries(client, server)
	c.ask(control.Message{Type: control.TypeClear})
	if up, down := server.rest(), client.rest(); up != "" || down != "" {
		t.Errorf("the server got %q, the client %q", up, down)
	}
	client.Close()
	server.Close()
	if err := c.wait(); err != nil { // which has nothing left
		t.Error(err)
	}
	if got, err := os.ReadFile(path); err != nil || !strings.Contains(string(got), "operator") {
		t.Errorf("recorded %q, %v", got, err)
	}
}

// Whoever does not end in time is cut.
func TestWhatIsLeftWhenTheTimeIsOverIsCut(t *testing.T) {
	t.Parallel()
	c := command(t, "", "")
	c.serve()
	w := c.dial()
	w.say(askPage)
	c.endpoint() // has the request, and never answers
	c.drain(0)
	c.ask(control.Message{Type: control.TypeClear, Within: time.Millisecond})
	if err := c.wait(); err != nil {
		t.Error(err)
	}
}
