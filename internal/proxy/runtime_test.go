package proxy_test

import (
	"fmt"
	"os"
	"testing"

	"holdfast/internal/control"
)

// keyed has routes whose weights can be overridden.
const keyed = `
[[virtual_hosts]]
name = "split"
domains = ["split.example"]
[[virtual_hosts.routes]]
match = { prefix = "/a" }
weighted_clusters = [{ cluster = "web", weight = 90, runtime_key = "split.web" }]
[[virtual_hosts.routes]]
match = { prefix = "/b" }
weighted_clusters = [{ cluster = "web", weight = 5, runtime_key = "split.web" }]
`

// override sends overrides with a question or without.
func (c *commander) override(m control.Message, values map[string]float64) {
	c.t.Helper()
	f, err := control.Payload(control.Overrides{Values: values})
	if err != nil {
		c.t.Fatal(err)
	}
	defer f.Close()
	c.say(&m, int(f.Fd()))
}

// values is what the generation says of its runtime values.
func (c *commander) values() string {
	c.t.Helper()
	c.ask(control.Message{Type: control.TypeValues})
	all, err := control.ReadRuntimeValues(await(c.t, "the values", c.payloads))
	if err != nil {
		c.t.Fatal(err)
	}
	return fmt.Sprint(all.Values)
}

func valuesNow(effective string) string {
	return "[{split.web count [90 5] " + effective + " 0 1e+06 [virtual_hosts[0].routes[0].weighted_clusters[0] virtual_hosts[0].routes[1].weighted_clusters[0]]}]"
}

func TestOverridesHoldFromBeforeAGenerationIsReadyUntilItsEnd(t *testing.T) {
	t.Parallel()
	c := command(t, "", keyed, func(c *commander) {
		c.beforeReady = func() {
			c.override(control.Message{Type: control.TypeOverride}, map[string]float64{"split.web": 7, "another": 1})
		}
	})
	if c.hello.Runtime != control.RuntimeVersion {
		t.Errorf("it says version %d in its hello", c.hello.Runtime)
	}
	want := func(when, effective string) {
		t.Helper()
		if got := c.values(); got != valuesNow(effective) {
			t.Errorf("%s: got %s, want %s", when, got, valuesNow(effective))
		}
	}
	want("before it serves", "[7]")
	c.serve()
	c.override(control.Message{Type: control.TypeOverride}, map[string]float64{"split.web": 8})
	want("while it serves", "[8]")
	client, server := c.tunnel()
	carries(client, server)
	c.drain(0)
	c.override(control.Message{Type: control.TypeOverride}, nil)
	want("while it drains, when none is left", "[90 5]")
	client.Close()
	server.Close()
	if err := c.wait(); err != nil {
		t.Error(err)
	}
}

func TestOverridesThatCannotBeReadChangeNothing(t *testing.T) {
	t.Parallel()
	c := command(t, "", keyed)
	c.override(control.Message{Type: control.TypeOverride}, map[string]float64{"split.web": 7})
	file, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if a := c.question(control.Message{Type: control.TypeOverride}, int(file.Fd())); a.Error == "" {
		t.Error("it took a file that can still be written to")
	}
	if a := c.question(control.Message{Type: control.TypeOverride}); a.Error == "" {
		t.Error("it took nothing for overrides")
	}
	if got := c.values(); got != valuesNow("[7]") {
		t.Errorf("got %s", got)
	}
}
