package main

import (
	"bytes"
	"encoding/json"
	"strings"
)

// A panel shows some series. In its queries $i stands for the instances that were chosen, $l for
// those and their listeners, $c for those and their clusters.
type panel struct {
	title   string
	kind    string // of Grafana's own; "" is a time series
	unit    string // as Grafana calls it
	about   string
	stacked bool
	width   int // of 24; 0 is 8
	show    []query
}

// A query has its PromQL and what its series are called.
type query struct{ expr, legend string }

type row struct {
	title  string
	panels []panel
}

const rate = "[$__rate_interval]"

var rows = []row{
	{"Now", []panel{
		{title: "Ready", kind: "stat", width: 3, show: []query{{"min(holdfast_ready{$i})", ""}}},
		{title: "Generations", kind: "stat", width: 3, show: []query{{"sum(holdfast_generations{$i})", ""}}},
		{title: "Tunnels", kind: "stat", width: 4, unit: "short", show: []query{{"sum(holdfast_tunnels_active{$i})", ""}}},
		{title: "Connections of clients", kind: "stat", width: 4, unit: "short", show: []query{{"sum(holdfast_downstream_connections_active{$l})", ""}}},
		{title: "Requests", kind: "stat", width: 4, unit: "reqps", show: []query{{"sum(rate(holdfast_downstream_requests_total{$l}" + rate + "))", ""}}},
		{title: "Answers with 5xx", kind: "stat", width: 3, unit: "percentunit", show: []query{{`(sum(rate(holdfast_downstream_responses_total{$l,class="5xx"}` + rate + ")) or vector(0)) / sum(rate(holdfast_downstream_responses_total{$l}" + rate + "))", ""}}},
		{title: "Next certificate expires", kind: "stat", width: 3, unit: "d", show: []query{{"min(holdfast_downstream_tls_certificate_expiry_days{$l})", ""}}},
	}},
	{"Generations and reloads", []panel{
		{title: "Tunnels by generation", unit: "short", stacked: true, width: 12, about: "An old generation lives for as long as it holds tunnels or requests.", show: []query{{"holdfast_generation_tunnels{$i}", "{{instance}} {{generation}}"}}},
		{title: "Generations by state", unit: "short", stacked: true, width: 6, show: []query{{"sum by (state) (holdfast_generations{$i})", "{{state}}"}}},
		{title: "Reloads", width: 6, kind: "bars", show: []query{
			{"sum by (result) (increase(holdfast_reloads_total{$i}" + rate + "))", "{{result}}"},
			{"sum by (step) (increase(holdfast_reload_refusals_total{$i}" + rate + ")) > 0", "refused by {{step}}"},
		}},
		{title: "Memory by generation", unit: "bytes", stacked: true, show: []query{{"holdfast_generation_resident_memory_bytes{$i}", "{{instance}} {{generation}}"}}},
		{title: "Age of the oldest tunnel", unit: "s", show: []query{{"time() - (holdfast_generation_oldest_tunnel_start_timestamp_seconds{$i} > 0)", "{{instance}} {{generation}}"}}},
		{title: "How long reloads take", unit: "s", about: "From reading the file until the new generation served.", show: []query{{"histogram_quantile(0.95, sum by (le) (increase(holdfast_reload_duration_seconds_bucket{$i}[1h])))", "95%"}}},
		{title: "Crashes and replacements", kind: "bars", show: []query{
			{"sum by (state) (increase(holdfast_generation_crashes_total{$i}" + rate + "))", "died while {{state}}"},
			{"sum by (by) (increase(holdfast_generation_replacements_total{$i}" + rate + "))", "replaced: {{by}}"},
			{"sum(increase(holdfast_generation_replacement_failures_total{$i}" + rate + "))", "not replaced"},
		}},
		{title: "Requests by generation", unit: "short", stacked: true, show: []query{{"holdfast_generation_requests_active{$i}", "{{instance}} {{generation}}"}}},
		{title: "What a drain did to connections", unit: "ops", show: []query{
			{"sum(rate(holdfast_downstream_connections_passed_total{$l}" + rate + "))", "passed to the new generation"},
			{"sum(rate(holdfast_downstream_connections_drained_total{$l}" + rate + "))", "ended"},
			{"sum(rate(holdfast_downstream_connections_cut_total{$l}" + rate + "))", "cut"},
			{"sum(rate(holdfast_downstream_connections_declined_total{$l}" + rate + "))", "no descriptor left"},
		}},
	}},
	{"Clients", []panel{
		{title: "Requests by listener", unit: "reqps", show: []query{{"sum by (listener) (rate(holdfast_downstream_requests_total{$l}" + rate + "))", "{{listener}}"}}},
		{title: "Responses by class", unit: "reqps", stacked: true, show: []query{{"sum by (class) (rate(holdfast_downstream_responses_total{$l}" + rate + "))", "{{class}}"}}},
		{title: "How long responses take", unit: "s", show: []query{
			{"histogram_quantile(0.5, sum by (le) (rate(holdfast_downstream_request_duration_seconds_bucket{$l}" + rate + ")))", "50%"},
			{"histogram_quantile(0.95, sum by (le) (rate(holdfast_downstream_request_duration_seconds_bucket{$l}" + rate + ")))", "95%"},
			{"histogram_quantile(0.99, sum by (le) (rate(holdfast_downstream_request_duration_seconds_bucket{$l}" + rate + ")))", "99%"},
		}},
		{title: "Open connections", unit: "short", show: []query{{"sum by (listener) (holdfast_downstream_connections_active{$l})", "{{listener}}"}}},
		{title: "New connections", unit: "ops", show: []query{{"sum by (listener) (rate(holdfast_downstream_connections_total{$l}" + rate + "))", "{{listener}}"}}},
		{title: "Bytes, without tunnels", unit: "Bps", show: []query{
			{"sum(rate(holdfast_downstream_received_bytes_total{$l}" + rate + "))", "received"},
			{"sum(rate(holdfast_downstream_sent_bytes_total{$l}" + rate + "))", "sent"},
		}},
		{title: "Requests that were refused", unit: "reqps", about: "Answered with an error of Holdfast's own.", show: []query{{"sum by (reason) (rate(holdfast_downstream_requests_refused_total{$l}" + rate + ")) > 0", "{{reason}}"}}},
		{title: "Requests that were cut", unit: "reqps", show: []query{{"sum by (by) (rate(holdfast_downstream_requests_cut_total{$l}" + rate + "))", "by {{by}}"}}},
		{title: "Upgrades", unit: "reqps", show: []query{{"sum by (outcome) (rate(holdfast_downstream_upgrades_total{$l}" + rate + ")) > 0", "{{outcome}}"}}},
	}},
	{"Tunnels", []panel{
		{title: "Tunnels by cluster", unit: "short", stacked: true, show: []query{{"sum by (cluster) (holdfast_cluster_tunnels_active{$c})", "{{cluster}}"}}},
		{title: "Tunnels that begin and end", unit: "ops", show: []query{
			{"sum(rate(holdfast_tunnels_started_total{$i}" + rate + "))", "begin"},
			{"sum by (reason) (rate(holdfast_tunnels_ended_total{$i}" + rate + ")) > 0", "end: {{reason}}"},
		}},
		{title: "Bytes of tunnels", unit: "Bps", show: []query{{"sum by (to) (rate(holdfast_tunnel_relayed_bytes_total{$i}" + rate + "))", "to {{to}}"}}},
		{title: "The vault", unit: "short", about: "Tunnels that would outlive their process, and those that would not although they should.", show: []query{
			{"sum(holdfast_vault_deposits{$i})", "deposited"},
			{"sum(holdfast_tunnels_active{$i})", "open"},
			{"sum by (cause) (holdfast_tunnels_undeposited{$i}) > 0", "not deposited: {{cause}}"},
			{"sum(holdfast_vault_bereft_tunnels{$i})", "wait for a process"},
		}},
		{title: "Tunnels that changed their process", kind: "bars", show: []query{
			{"sum(increase(holdfast_vault_moved_total{$i}" + rate + "))", "moved"},
			{"sum(increase(holdfast_tunnels_resumed_total{$i}" + rate + "))", "resumed"},
			{"sum(increase(holdfast_tunnels_lost_total{$i}" + rate + "))", "lost"},
			{"sum(increase(holdfast_vault_refused_total{$i}" + rate + "))", "deposits refused"},
		}},
		{title: "How long handshakes of tunnels take", unit: "s", show: []query{
			{"histogram_quantile(0.5, sum by (le) (rate(holdfast_tunnel_handshake_duration_seconds_bucket{$l}" + rate + ")))", "50%"},
			{"histogram_quantile(0.95, sum by (le) (rate(holdfast_tunnel_handshake_duration_seconds_bucket{$l}" + rate + ")))", "95%"},
		}},
	}},
	{"Clusters", []panel{
		{title: "Requests by cluster", unit: "reqps", show: []query{{"sum by (cluster) (rate(holdfast_cluster_requests_total{$c}" + rate + "))", "{{cluster}}"}}},
		{title: "Answers with 5xx by cluster", unit: "reqps", show: []query{{`sum by (cluster) (rate(holdfast_cluster_responses_total{$c,class="5xx"}` + rate + "))", "{{cluster}}"}}},
		{title: "How long requests take, 95%", unit: "s", show: []query{{"histogram_quantile(0.95, sum by (le, cluster) (rate(holdfast_cluster_request_duration_seconds_bucket{$c}" + rate + ")))", "{{cluster}}"}}},
		{title: "Healthy endpoints", unit: "percentunit", show: []query{{"sum by (cluster) (holdfast_cluster_endpoints_healthy{$c}) / sum by (cluster) (holdfast_cluster_endpoints{$c})", "{{cluster}}"}}},
		{title: "Endpoints that get no new work", unit: "short", show: []query{
			{"sum by (cluster) (holdfast_cluster_endpoints{$c} - holdfast_cluster_endpoints_healthy{$c}) > 0", "{{cluster}}: unhealthy"},
			{"sum by (cluster) (holdfast_cluster_outlier_ejections_active{$c}) > 0", "{{cluster}}: ejected"},
		}},
		{title: "Health checks that failed", unit: "ops", show: []query{{`sum by (cluster, result) (rate(holdfast_cluster_health_checks_total{$c,result!="success"}` + rate + ")) > 0", "{{cluster}}: {{result}}"}}},
		{title: "How long connecting takes, 95%", unit: "s", show: []query{{"histogram_quantile(0.95, sum by (le, cluster) (rate(holdfast_cluster_connect_duration_seconds_bucket{$c}" + rate + ")))", "{{cluster}}"}}},
		{title: "Failures", unit: "ops", show: []query{
			{"sum by (cluster) (rate(holdfast_cluster_connect_failures_total{$c}" + rate + ")) > 0", "{{cluster}}: not connected"},
			{"sum by (cluster) (rate(holdfast_cluster_timeouts_total{$c}" + rate + ")) > 0", "{{cluster}}: too late"},
			{"sum by (cluster) (rate(holdfast_cluster_resets_total{$c}" + rate + ")) > 0", "{{cluster}}: reset"},
			{"sum by (cluster) (rate(holdfast_cluster_none_healthy_total{$c}" + rate + ")) > 0", "{{cluster}}: no endpoint"},
		}},
		{title: "Limits that were reached", unit: "ops", show: []query{
			{"sum by (cluster, limit) (rate(holdfast_cluster_overflows_total{$c}" + rate + ")) > 0", "{{cluster}}: {{limit}}"},
			{"max by (cluster, limit) (holdfast_cluster_circuit_breaker_open{$c}) > 0", "{{cluster}}: {{limit}} is used up"},
		}},
		{title: "Endpoints by requests", unit: "reqps", width: 12, show: []query{{"topk(20, sum by (cluster, endpoint) (rate(holdfast_endpoint_requests_total{$c}" + rate + ")))", "{{cluster}}: {{endpoint}}"}}},
		{title: "Endpoints by tunnels", unit: "short", width: 12, show: []query{{"topk(20, sum by (cluster, endpoint) (holdfast_endpoint_tunnels_active{$c}))", "{{cluster}}: {{endpoint}}"}}},
	}},
	{"TLS", []panel{
		{title: "Handshakes of clients", unit: "ops", show: []query{{"sum by (result) (rate(holdfast_downstream_tls_handshakes_total{$l}" + rate + ")) > 0", "{{result}}"}}},
		{title: "Sessions that are resumed", unit: "percentunit", show: []query{{"sum by (listener) (rate(holdfast_downstream_tls_resumed_total{$l}" + rate + ")) / sum by (listener) (rate(holdfast_downstream_tls_connections_total{$l}" + rate + "))", "{{listener}}"}}},
		{title: "Handshakes with endpoints that failed", unit: "ops", show: []query{{"sum by (cluster, reason) (rate(holdfast_cluster_tls_handshake_failures_total{$c}" + rate + ")) > 0", "{{cluster}}: {{reason}}"}}},
		{title: "Days until certificates expire", kind: "bargauge", unit: "d", width: 12, show: []query{
			{"min by (certificate) (holdfast_downstream_tls_certificate_expiry_days{$l})", "{{certificate}}"},
			{"min by (cluster) (holdfast_cluster_tls_certificate_expiry_days{$c})", "shown to endpoints of {{cluster}}"},
		}},
		{title: "Handshakes that wait", unit: "short", width: 6, show: []query{{"sum by (listener) (holdfast_downstream_tls_handshakes_waiting{$l})", "{{listener}}"}}},
		{title: "Files of no use", unit: "short", width: 6, show: []query{{"sum by (listener) (holdfast_downstream_tls_files_refused{$l})", "{{listener}}"}}},
	}},
	{"Limits and resources", []panel{
		{title: "Memory", unit: "bytes", show: []query{
			{"sum by (instance) (holdfast_proxy_resident_memory_bytes{$i})", "{{instance}}: generations"},
			{"sum by (instance) (holdfast_proxy_heap_bytes{$i})", "{{instance}}: their heaps"},
			{"sum by (instance) (holdfast_tunnel_buffer_bytes{$i})", "{{instance}}: buffers of tunnels"},
			{"process_resident_memory_bytes{$i} and on (job, instance) holdfast_start_time_seconds", "{{instance}}: supervisor"},
		}},
		{title: "Processor time", unit: "percentunit", about: "1 is one core.", show: []query{
			{"sum by (instance) (rate(holdfast_proxy_cpu_seconds_total{$i}" + rate + "))", "{{instance}}: generations"},
			{"rate(process_cpu_seconds_total{$i}" + rate + ") and on (job, instance) holdfast_start_time_seconds", "{{instance}}: supervisor"},
		}},
		{title: "Descriptors", unit: "percentunit", about: "Of the limit that each process has.", show: []query{
			{"holdfast_proxy_open_fds{$i} / holdfast_proxy_max_fds{$i}", "{{instance}}: the generation with the most"},
			{"process_open_fds{$i} / process_max_fds{$i} and on (job, instance) holdfast_start_time_seconds", "{{instance}}: supervisor"},
		}},
		{title: "Queues of listening sockets", unit: "short", show: []query{{"sum by (listener) (holdfast_downstream_queue_connections{$l})", "{{listener}}"}}},
		{title: "Accepting that was held up", unit: "ops", show: []query{
			{"sum by (listener) (rate(holdfast_downstream_accept_failures_total{$l}" + rate + ")) > 0", "{{listener}}: no descriptor"},
			{"sum by (listener) (rate(holdfast_downstream_connection_limit_reached_total{$l}" + rate + ")) > 0", "{{listener}}: limits.connections"},
		}},
		{title: "What filters refused", unit: "reqps", show: []query{
			{"sum by (scope, name, of) (rate(holdfast_filter_rate_limited_total{$i}" + rate + ")) > 0", "{{scope}} {{name}}: too many {{of}}"},
			{"sum by (scope, name) (rate(holdfast_filter_addresses_denied_total{$i}" + rate + ")) > 0", "{{scope}} {{name}}: address"},
		}},
		{title: "Records of access logs", unit: "ops", show: []query{
			{"sum by (path) (rate(holdfast_access_log_records_total{$i}" + rate + "))", "{{path}}"},
			{"sum by (path) (rate(holdfast_access_log_dropped_total{$i}" + rate + ")) > 0", "{{path}}: dropped"},
		}},
		{title: "Lines of the log that were dropped", unit: "ops", show: []query{
			{"sum(rate(holdfast_proxy_log_lines_dropped_total{$i}" + rate + "))", "generations"},
			{"sum(rate(holdfast_supervisor_log_lines_dropped_total{$i}" + rate + "))", "supervisor"},
		}},
		{title: "Wake-ups of loops", unit: "ops", show: []query{{"sum by (instance) (rate(holdfast_loop_wakeups_total{$i}" + rate + "))", "{{instance}}"}}},
	}},
}

// annotations are events that every panel shows.
var annotations = []struct{ name, expr, title, color string }{
	{"Reloads", `sum by (instance) (increase(holdfast_reloads_total{$i,result="done"}[1m])) > 0`, "reload on {{instance}}", "blue"},
	{"Refused reloads", "sum by (instance, step) (increase(holdfast_reload_refusals_total{$i}[1m])) > 0", "reload refused on {{instance}}: {{step}}", "orange"},
	{"Crashes", "sum by (instance, state) (increase(holdfast_generation_crashes_total{$i}[1m])) > 0", "a {{state}} generation on {{instance}} died", "red"},
}

// variables are what the dashboard can be narrowed to.
var variables = []struct{ name, label, values string }{
	{"instance", "Instance", "label_values(holdfast_start_time_seconds, instance)"},
	{"listener", "Listener", "label_values(holdfast_downstream_connections_total{$i}, listener)"},
	{"cluster", "Cluster", "label_values(holdfast_cluster_endpoints{$i}, cluster)"},
}

// promQL writes out what stands for the variables.
func promQL(expr string) string {
	const instance = `instance=~"$instance"`
	return strings.NewReplacer("$i}", instance+"}", "$i,", instance+",", "$l", instance+`,listener=~"$listener"`, "$c", instance+`,cluster=~"$cluster"`).Replace(expr)
}

type object = map[string]any

var datasource = object{"type": "prometheus", "uid": "${datasource}"}

// dashboard is deploy/grafana/holdfast.json, for Grafana 9 and later, which needs nothing that does
// not come with it.
func dashboard() []byte {
	d := object{
		"title": "Holdfast", "uid": "holdfast", "tags": []string{"holdfast"}, "schemaVersion": 37, "version": 1, "editable": true,
		"time": object{"from": "now-3h", "to": "now"}, "refresh": "30s", "graphTooltip": 1,
		"panels": panels(), "templating": object{"list": templating()}, "annotations": object{"list": events()},
	}
	var out bytes.Buffer
	e := json.NewEncoder(&out)
	e.SetEscapeHTML(false)
	e.SetIndent("", " ")
	if err := e.Encode(d); err != nil {
		panic(err)
	}
	return out.Bytes()
}

func templating() []object {
	list := []object{{"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}}
	for _, v := range variables {
		list = append(list, object{
			"name": v.name, "label": v.label, "type": "query", "datasource": datasource, "query": object{"query": promQL(v.values), "refId": v.name},
			"definition": promQL(v.values), "refresh": 2, "sort": 1, "multi": true, "includeAll": true, "allValue": ".*",
			"current": object{"text": "All", "value": "$__all"},
		})
	}
	return list
}

func events() (list []object) {
	for _, a := range annotations {
		list = append(list, object{
			"name": a.name, "datasource": datasource, "enable": true, "iconColor": a.color, "expr": promQL(a.expr), "step": "60s", "titleFormat": a.title,
		})
	}
	return list
}

// panels places them from left to right, row below row.
func panels() (all []object) {
	const total, high, low = 24, 8, 4
	id, y := 0, 0
	for _, r := range rows {
		id++
		all = append(all, object{"id": id, "type": "row", "title": r.title, "collapsed": false, "gridPos": object{"x": 0, "y": y, "w": total, "h": 1}, "panels": []any{}})
		y++
		x, height := 0, 0
		for _, p := range r.panels {
			id++
			w, h := p.width, high
			if w == 0 {
				w = 8
			}
			if p.kind == "stat" {
				h = low
			}
			if x+w > total {
				x, y, height = 0, y+height, 0
			}
			all = append(all, p.object(id, object{"x": x, "y": y, "w": w, "h": h}))
			x, height = x+w, max(height, h)
		}
		y += height
	}
	return all
}

func (p *panel) object(id int, at object) object {
	var targets []object
	for i, q := range p.show {
		t := object{"refId": string(rune('A' + i)), "datasource": datasource, "expr": promQL(q.expr), "legendFormat": q.legend, "range": true}
		if p.kind == "stat" || p.kind == "bargauge" {
			t["range"], t["instant"] = false, true
		}
		targets = append(targets, t)
	}
	o := object{"id": id, "type": "timeseries", "title": p.title, "datasource": datasource, "gridPos": at, "targets": targets}
	if p.about != "" {
		o["description"] = p.about
	}
	defaults := object{"unit": p.unit, "min": 0}
	switch p.kind {
	case "stat":
		o["type"] = "stat"
		o["options"] = object{"reduceOptions": object{"calcs": []string{"lastNotNull"}}, "colorMode": "value", "graphMode": "none"}
		defaults = object{"unit": p.unit, "thresholds": thresholds(p), "color": object{"mode": "thresholds"}}
	case "bargauge":
		o["type"] = "bargauge"
		o["options"] = object{"reduceOptions": object{"calcs": []string{"lastNotNull"}}, "orientation": "horizontal", "displayMode": "basic"}
		defaults["max"] = 90
		defaults["thresholds"] = thresholds(p)
		defaults["color"] = object{"mode": "thresholds"}
	default:
		custom := object{"lineWidth": 1, "fillOpacity": 0, "showPoints": "never"}
		if p.stacked {
			custom["fillOpacity"], custom["stacking"] = 40, object{"mode": "normal", "group": "A"}
		}
		if p.kind == "bars" {
			custom["drawStyle"], custom["fillOpacity"] = "bars", 60
		}
		defaults["custom"] = custom
		o["options"] = object{"legend": object{"displayMode": "list", "placement": "bottom"}, "tooltip": object{"mode": "multi", "sort": "desc"}}
	}
	o["fieldConfig"] = object{"defaults": defaults, "overrides": []any{}}
	return o
}

// thresholds are where a figure changes its colour.
func thresholds(p *panel) object {
	steps := []object{{"color": "blue", "value": nil}}
	switch p.unit {
	case "d":
		steps = []object{{"color": "red", "value": nil}, {"color": "orange", "value": 3}, {"color": "green", "value": 14}}
	case "percentunit":
		steps = []object{{"color": "green", "value": nil}, {"color": "orange", "value": 0.01}, {"color": "red", "value": 0.05}}
	case "":
		if p.title == "Ready" {
			steps = []object{{"color": "red", "value": nil}, {"color": "green", "value": 1}}
		}
	}
	return object{"mode": "absolute", "steps": steps}
}
