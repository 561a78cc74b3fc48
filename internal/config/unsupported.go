package config

// unsupported lists keys that Holdfast has a meaning for, but not in this
// version, by the section in which they stand. Calling them unknown would send
// their reader looking for a spelling mistake.
var unsupported = map[string][]string{
	"listeners":                    {"tls", "cluster", "weighted_clusters", "tunnels"},
	"virtual_hosts.routes.tunnels": {"on_endpoint_removed", "on_endpoint_unhealthy"},
	"clusters":                     {"health_check", "limits"},
	"clusters.endpoints":           {"weight"},
}
