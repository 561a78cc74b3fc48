package filter

import (
	"holdfast/internal/exchange"
	"holdfast/internal/metrics"
)

// What is counted of filters, by where they are configured: a scope is listener, virtual_host
// or route, and the name its.
var (
	addressesDenied = metrics.Define(metrics.Desc{
		Name: "holdfast_filter_addresses_denied_total",
		Help: "Requests that were refused for the address of their client, by where allow or deny says so.",
		Type: metrics.TypeCounter, Labels: []string{"scope", "name"},
	})
	rateLimited = metrics.Define(metrics.Desc{
		Name: "holdfast_filter_rate_limited_total",
		Help: "Requests that were refused because there were too many, by where the limit is configured and what it is for: requests or tunnels.",
		Type: metrics.TypeCounter, Labels: []string{"scope", "name", "of"},
	})
	clientsForgotten = metrics.Define(metrics.Desc{
		Name: "holdfast_filter_rate_limit_clients_forgotten_total",
		Help: "Clients whose bucket was given to another one before it was full again, because too many had to be told apart.",
		Type: metrics.TypeCounter, Labels: []string{"scope", "name", "of"},
	})
	faultsInjected = metrics.Define(metrics.Desc{
		Name: "holdfast_filter_faults_total",
		Help: "What was done to requests on purpose: delay, abort, or overflow for a delay that was left out because there were too many at once.",
		Type: metrics.TypeCounter, Labels: []string{"virtual_host", "route", "kind"},
	})
	delaysActive = metrics.Define(metrics.Desc{
		Name: "holdfast_filter_fault_delays_active",
		Help: "Requests that are held up on purpose.",
		Type: metrics.TypeGauge, Labels: []string{"virtual_host", "route"},
	})
	authorizationsTotal = metrics.Define(metrics.Desc{
		Name: "holdfast_filter_authorizations_total",
		Help: "Questions to authorization services, by what came of them. After error and timeout the request passes where on_error is allow.",
		Type: metrics.TypeCounter, Labels: []string{"virtual_host", "route", "outcome"},
	})
	authorizationDuration = metrics.Define(metrics.Desc{
		Name: "holdfast_filter_authorization_duration_seconds",
		Help: "How long it took until an authorization service had answered, or its time was over.",
		Type: metrics.TypeHistogram, Unit: metrics.Seconds, Labels: []string{"virtual_host", "route"}, Bounds: exchange.RequestBounds,
	})
)
