package config

import "time"

func readTunnels(t *table) Tunnels {
	u := Tunnels{HandshakeTimeout: 60 * time.Second, Buffer: 256 << 10}
	readTunnelLimits(t, &u)

	// What becomes of tunnels in these cases is decided, but there is no choice yet.
	t.only("on_reload", "keep", "move")
	t.only("on_route_removed", "keep", "close")
	t.only("on_endpoint_removed", "keep", "close")
	t.only("on_endpoint_unhealthy", "keep", "close")
	var survive bool
	if t.boolean("survive_crash", &survive); survive {
		t.at("survive_crash").fail("true is not supported by this version; must be false")
	}
	t.strict()
	return u
}

// readTunnelLimits reads the keys that routes have as well.
func readTunnelLimits(t *table, u *Tunnels) {
	read(t, "drain_timeout", &u.DrainTimeout, durationOrOff)
	read(t, "idle_timeout", &u.IdleTimeout, durationOrOff)
	read(t, "max_age", &u.MaxAge, durationOrOff)
	read(t, "handshake_timeout", &u.HandshakeTimeout, durationOrOff)
	read(t, "buffer", &u.Buffer, sizeBetween(4, 64))
}
