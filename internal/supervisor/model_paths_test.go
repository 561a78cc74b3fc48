package supervisor

import "testing"

// The scenarios that are explored in a moment go to the depth of one, with what goes
// wrong at every point of the path. The others show by their one path that they work,
// and are explored when somebody asks for it.
var scenarios = []*scenario{
	{name: "start", depth: 1},
	{name: "reload", commands: []string{"reload B"}, depth: 1},
	{name: "two reloads", commands: []string{"reload B", "reload A"}},
	{name: "two reloads with tunnels", commands: []string{"reload B", "reload A"}, tunnels: []string{"g1", "g2"}},
	{name: "reload that is not ready", commands: []string{"reload that is not ready"}, depth: 1},
	{name: "reload that dies", commands: []string{"reload that dies"}},
	{name: "reload that refuses to serve", commands: []string{"reload that refuses to serve"}, depth: 1},
	{name: "reload that the proxy refuses", commands: []string{"reload that the proxy refuses"}},
	{name: "reload that nobody can read", commands: []string{"reload that nobody can read"}},
	{name: "rollback", commands: []string{"reload B", "rollback"}, depth: 1},
	{name: "rollback with tunnels", commands: []string{"reload B", "rollback", "rollback"}, tunnels: []string{"g1", "g2"}},
	{name: "rollback after upgrade", commands: []string{"reload B", "upgrade", "rollback"}},
	{name: "rollback and stop", commands: []string{"reload B", "rollback", "stop"}},
	{name: "upgrade", commands: []string{"upgrade"}},
	{name: "upgrade under a service manager", commands: []string{"upgrade"}, supervised: true, depth: 1},
	{name: "upgrade while one drains", commands: []string{"reload B", "upgrade"}, tunnels: []string{"g1"}, depth: 1},
	{name: "reload after upgrade", commands: []string{"upgrade", "reload B"}},
	{name: "two upgrades", commands: []string{"upgrade", "upgrade"}},
	{name: "reload with a client", commands: []string{"reload B"}, clients: true, depth: 1},
	{name: "two reloads with clients", commands: []string{"reload B", "reload A"}, clients: true},
	{name: "two reloads with clients that stay", commands: []string{"reload B", "reload A"}, clients: true, tunnels: []string{"g1", "g2"}},
	{name: "reload and upgrade with clients", commands: []string{"reload B", "upgrade"}, clients: true},
	{name: "reload with clusters", commands: []string{"reload B"}, clusters: true, tunnels: []string{"g1"}, depth: 1},
	{name: "two reloads with clusters", commands: []string{"reload B", "reload A"}, clusters: true, tunnels: []string{"g1", "g2"}},
	{name: "reload and upgrade with clusters", commands: []string{"reload B", "upgrade"}, clusters: true, tunnels: []string{"g1"}},
	{name: "reload and rotations of ticket keys", commands: []string{"rotate", "reload B", "rotate"}, tickets: true, depth: 1},
	{name: "upgrade and rotations of ticket keys", commands: []string{"rotate", "upgrade", "rotate"}, tickets: true, depth: 1},
	{name: "reload and stop", commands: []string{"reload B", "stop"}},
	{name: "upgrade and stop", commands: []string{"upgrade", "stop"}, depth: 1},
}

// HOLDFAST_MODEL_DEPTH explores all of them to another depth, and HOLDFAST_MODEL_SECONDS
// says for how long each at the most.
func TestTheInvariantsHoldOnEveryPath(t *testing.T) {
	t.Parallel()
	for _, sc := range scenarios {
		t.Run(sc.name, func(t *testing.T) { explore(t, sc) })
	}
}
