package drill

import (
	"fmt"
	"math/rand/v2"
	"strings"

	"holdfast/internal/drill/canary"
)

// extras is how many routes, clusters and listeners come and go beside what the
// canary uses.
const extras = 3

// configuration is what the instance serves: what the canary uses, and beside it
// things that come and go.
type configuration struct {
	dir      string // of unix sockets
	upstream string // of the canary
	number   int    // each has a route of its own, which shows that it serves

	routes, clusters, listeners [extras]bool
	probation                   string
	moves                       bool // tunnels to the generation that serves
	mortal                      bool // tunnels end with their generation
}

// change makes another configuration of it: something beside what the canary uses
// comes or goes.
func (c *configuration) change(r *rand.Rand) {
	c.number++
	of := []*[extras]bool{&c.routes, &c.clusters, &c.listeners}[r.IntN(3)]
	i := r.IntN(extras)
	of[i] = !of[i]
	c.probation = []string{"0s", "200ms", "2s"}[r.IntN(3)]
	c.moves = r.IntN(2) == 0
}

// mark is the path that only this configuration redirects.
func (c *configuration) mark() string { return fmt.Sprintf("/configuration-%d", c.number) }

// listener is the address of an extra one. Port 0 is the kernel's choice.
func (c *configuration) listener(i int) string {
	if i == 0 {
		return "unix:" + c.dir + "/extra.sock"
	}
	return fmt.Sprintf("127.0.1.%d:0", i)
}

func (c *configuration) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, `# Written by "holdfast drill".

[reload]
probation = %q

[tunnels]
on_reload = %q
survive_crash = %t

[[listeners]]
name = "canary"
address = "127.0.0.1:0"
`, c.probation, map[bool]string{false: "keep", true: "move"}[c.moves], !c.mortal)
	for i, there := range c.listeners {
		if there {
			fmt.Fprintf(&b, "\n[[listeners]]\nname = \"extra-%d\"\naddress = %q\n", i, c.listener(i))
		}
	}
	fmt.Fprintf(&b, "\n[[clusters]]\nname = \"canary\"\nendpoints = [%q]\n", c.upstream)
	for i, there := range c.clusters {
		if there {
			fmt.Fprintf(&b, "\n[[clusters]]\nname = \"extra-%d\"\nendpoints = [%q]\n", i, c.upstream)
		}
	}
	fmt.Fprintf(&b, `
[[virtual_hosts]]
name = "drill"
domains = ["*"]

  [[virtual_hosts.routes]]
  match = { path = %q }
  redirect = { path = "/", status = 302 }
`, c.mark())
	for i, there := range c.routes {
		if there {
			fmt.Fprintf(&b, "\n  [[virtual_hosts.routes]]\n  match = { prefix = \"/extra-%d\" }\n  cluster = \"canary\"\n", i)
		}
	}
	fmt.Fprintf(&b, `
  [[virtual_hosts.routes]]
  match = { prefix = %q }
  websocket = true
  cluster = "canary"

  [[virtual_hosts.routes]]
  match = { prefix = "/" }
  cluster = "canary"
`, canary.TunnelPath)
	return b.String()
}

// broken returns files that a reload must refuse.
func (c *configuration) broken() []string {
	good := c.String()
	return []string{
		good + "\n[[clusters]\n",
		good + "\n[drain]\nidle_grease = \"5s\"\n",
		strings.Replace(good, `  cluster = "canary"`, `  cluster = "canari"`, 1),
		// Somebody else has the address.
		good + fmt.Sprintf("\n[[listeners]]\nname = \"taken\"\naddress = %q\n", c.upstream),
	}
}
