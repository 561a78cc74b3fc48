package main

import (
	"fmt"
	"io"
	"strings"
)

// A comparison says where a statistic of Envoy's is found here.
type comparison struct {
	theirs string
	ours   []string // without "holdfast_"
	remark string   // more, or why there is none
}

var model = []comparison{
	{"listener.*.downstream_cx_total, _active, _destroy, _length_ms", []string{"downstream_connections_total", "downstream_connections_active", "downstream_connections_closed_total", "downstream_connection_duration_seconds"}, ""},
	{"listener.*.ssl.handshake, connection_error, fail_verify_*, no_certificate", []string{"downstream_tls_handshakes_total"}, "by `result`"},
	{"listener.*.ssl.session_reused, versions.*", []string{"downstream_tls_resumed_total", "downstream_tls_connections_total"}, "by `version`"},
	{"listener.*.ssl.certificate.*.expiration_unix_time_seconds, server.days_until_first_cert_expiring", []string{"downstream_tls_certificate_expiry_days"}, "by the file of each certificate"},
	{"sds.*.key_rotation_failed, update_success, update_rejected", []string{"downstream_tls_file_updates_total", "downstream_tls_file_failures_total", "downstream_tls_files_refused"}, "of files"},
	{"listener.*.ssl.ciphers.*, curves.*, sigalgs.*", nil, "the access log has the cipher of each connection"},
	{"http.*.downstream_cx_ssl_total, downstream_cx_ssl_active", []string{"downstream_tls_handshakes_total", "downstream_connections_active"}, "of listeners with tls"},
	{"listener_manager.listener_added, _removed, total_listeners_active", []string{"listeners_added_total", "listeners_removed_total", "listeners"}, ""},
	{"listener_manager.listener_modified, cluster_manager.cluster_modified, cluster_manager.warming_clusters", []string{"reloads_total"}, "whatever changes, a new generation has all of it"},
	{"listener_manager.listener_stopped", []string{"generation_draining"}, ""},
	{"listener_manager.listener_create_failure, total_listeners_warming", []string{"reload_refusals_total"}, "a listener that cannot be opened refuses the reload"},
	{"listener_manager.total_listeners_draining", []string{"generations"}, "what drains is a generation"},
	{"http.*.downstream_cx_total, cx_active, cx_http1_total", []string{"downstream_connections_total", "downstream_connections_active"}, ""},
	{"http.*.downstream_cx_destroy_local, _remote, _active_rq", []string{"downstream_connections_closed_total", "downstream_requests_cut_total"}, ""},
	{"http.*.downstream_cx_protocol_error", []string{"downstream_protocol_errors_total"}, ""},
	{"http.*.downstream_cx_rx_bytes_total, cx_tx_bytes_total", []string{"downstream_received_bytes_total", "downstream_sent_bytes_total", "tunnel_relayed_bytes_total", "route_tunnel_relayed_bytes_total"}, "the first two without tunnels, the last two of tunnels"},
	{"http.*.downstream_cx_rx_bytes_buffered, _tx_bytes_buffered, flow_control_*", []string{"tunnel_buffer_bytes", "tunnel_pipes"}, "of tunnels; bodies are not buffered: a slow receiver stops the reading of its sender"},
	{"http.*.downstream_cx_drain_close", []string{"downstream_connections_drained_total"}, ""},
	{"http.*.downstream_cx_idle_timeout", []string{"downstream_idle_timeouts_total"}, ""},
	{"http.*.downstream_cx_websocket_total, _active", []string{"tunnels_started_total", "tunnels_active"}, ""},
	{"http.*.downstream_cx_max_duration_reached, rq_overload_close", nil, "there is no such limit"},
	{"http.*.downstream_rq_completed", []string{"downstream_request_duration_seconds"}, "its count"},
	{"http.*.downstream_rq_total, rq_active, rq_1xx to rq_5xx, rq_time", []string{"downstream_requests_total", "downstream_requests_active", "downstream_responses_total", "downstream_request_duration_seconds"}, ""},
	{"http.*.downstream_rq_too_large, rq_non_relative_path, rq_timeout", []string{"downstream_requests_refused_total"}, "by `reason`"},
	{"http.*.downstream_rq_response_before_rq_complete", []string{"downstream_responses_early_total"}, ""},
	{"http.*.downstream_rq_ws_on_non_ws_route", []string{"downstream_upgrades_total"}, "`outcome=\"not enabled\"`"},
	{"http.*.downstream_rq_idle_timeout", []string{"route_stream_idle_timeouts_total"}, ""},
	{"http.*.downstream_rq_failed_path_normalization", []string{"downstream_requests_refused_total"}, "`reason=\"path\"`"},
	{"http.*.no_route", []string{"downstream_requests_refused_total"}, "`reason=\"no route\"`"},
	{"http.*.no_cluster", nil, "a route to a cluster that is not there refuses the reload"},
	{"http.*.rq_redirect, rq_total", []string{"route_redirects_total", "route_requests_total"}, ""},
	{"vhost.*.vcluster.*", []string{"route_requests_total", "route_responses_total", "route_request_duration_seconds"}, "by virtual host and route"},
	{"tcp.*.downstream_cx_total, downstream_cx_no_route", []string{"downstream_connections_total", "tcp_tunnels_total", "tcp_connections_refused_total"}, "`reason=\"no route\"`"},
	{"tcp.*.downstream_cx_rx_bytes_total, downstream_cx_tx_bytes_total", []string{"tcp_tunnel_relayed_bytes_total"}, ""},
	{"tcp.*.idle_timeout, max_downstream_connection_duration", []string{"tunnels_ended_total"}, "`reason=\"idle timeout\"` and `reason=\"max age\"`, of all tunnels"},
	{"tcp.*.downstream_cx_*_bytes_buffered, downstream_flow_control_*, upstream_flush_*", []string{"tunnel_buffer_bytes", "tunnel_pipes"}, "of all tunnels"},
	{"tls_inspector.*", []string{"tcp_hellos_total"}, ""},
	{"cluster.*.upstream_cx_total, _active, _length_ms, _connect_ms", []string{"cluster_connections_total", "cluster_connections_active", "cluster_connection_duration_seconds", "cluster_connect_duration_seconds"}, ""},
	{"cluster.*.upstream_cx_destroy, _destroy_local, _destroy_remote, _destroy_with_active_rq", []string{"cluster_connections_closed_total", "cluster_resets_total"}, ""},
	{"cluster.*.upstream_cx_connect_fail, _connect_timeout, _connect_attempts_exceeded", []string{"cluster_connect_failures_total", "cluster_connect_timeouts_total", "cluster_connect_attempts_exhausted_total"}, ""},
	{"cluster.*.upstream_cx_none_healthy", []string{"cluster_none_healthy_total"}, ""},
	{"cluster.*.lb_healthy_panic, membership_healthy, health_check.*, outlier_detection.*", nil, "with health checks"},
	{"cluster.*.upstream_cx_overflow, upstream_rq_pending_overflow, upstream_rq_pending_active", []string{"cluster_overflows_total", "cluster_pending_active"}, "by `limit`"},
	{"cluster.*.upstream_cx_max_requests", nil, "there is no such limit"},
	{"cluster.*.upstream_cx_protocol_error", []string{"cluster_protocol_errors_total"}, ""},
	{"cluster.*.upstream_cx_rx_bytes_total, _tx_bytes_total", []string{"cluster_received_bytes_total", "cluster_sent_bytes_total", "cluster_tunnel_relayed_bytes_total"}, "the first two without tunnels, the last one of tunnels"},
	{"cluster.*.upstream_rq_total, _active, _rq_xx, _time", []string{"cluster_requests_total", "cluster_requests_active", "cluster_responses_total", "cluster_request_duration_seconds"}, ""},
	{"cluster.*.upstream_cx_rx_bytes_buffered, _tx_bytes_buffered, flow_control_*", []string{"tunnel_buffer_bytes", "tunnel_pipes"}, "of tunnels; bodies are not buffered"},
	{"cluster.*.upstream_cx_http2_total; http2.streams_active, rx_reset, tx_reset, goaway_received, keepalive_timeout, inbound_empty_frames_flood", []string{"cluster_http2_connections_total", "cluster_http2_connections_active", "cluster_http2_streams_active", "cluster_http2_resets_total", "cluster_http2_goaways_total", "cluster_http2_ping_timeouts_total", "cluster_http2_floods_total"}, "all floods are one number"},
	{"cluster.*.upstream_cx_close_notify", nil, "what is said before a FIN is not counted"},
	{"cluster.*.ssl.handshake, ssl.session_reused", []string{"cluster_tls_handshakes_total"}, "by `kind`"},
	{"cluster.*.ssl.connection_error, ssl.fail_verify_error, fail_verify_san, fail_verify_no_cert, fail_verify_cert_hash", []string{"cluster_tls_handshake_failures_total"}, "by `reason`"},
	{"cluster.*.ssl.certificate.*.expiration_unix_time_seconds", []string{"cluster_tls_certificate_expiry_days"}, "of the certificate that endpoints are shown"},
	{"cluster.*.ssl.no_certificate, ssl.ocsp_staple_*, ssl.was_key_usage_invalid, ssl.versions.*, ssl.ciphers.*, ssl.curves.*, ssl.sigalgs.*", nil, "what endpoints choose is in no label"},
	{"cluster.*.client_ssl_socket_factory.ssl_context_update_by_sds, upstream_context_secrets_not_ready", []string{"cluster_tls_files_refused_total"}, "files that were of no use"},
	{"cluster.*.upstream_rq_retry, _retry_success, _retry_overflow, _retry_limit_exceeded, _per_try_timeout, retry_or_shadow_abandoned", []string{"route_retries_total", "route_retry_successes_total", "route_retry_overflows_total", "route_retry_limit_exceeded_total", "route_per_try_timeouts_total", "route_retries_abandoned_total", "route_mirror_drops_total", "cluster_retries_total"}, "by route, but for the last one: what is repeated because a kept connection was closed"},
	{"cluster.*.upstream_rq_tx_reset", nil, "with HTTP/2"},
	{"cluster.*.circuit_breakers.*", []string{"cluster_circuit_breaker_open"}, "by `priority` and `limit`"},
	{"cluster.*.upstream_rq_timeout, _rx_reset, _cancelled", []string{"cluster_timeouts_total", "cluster_resets_total", "cluster_cancelled_total"}, ""},
	{"cluster.*.membership_total", []string{"cluster_endpoints"}, ""},
	{"cluster.*.membership_change", nil, "endpoints change with a generation only"},
	{"cluster_manager.cluster_added, _removed, active_clusters", []string{"cluster_endpoints"}, "one series for each cluster of the configuration that serves"},
	{"per host cx and rq counters (/clusters)", []string{"endpoint_connections_total", "endpoint_connections_active", "endpoint_connect_failures_total", "endpoint_requests_total", "endpoint_requests_active", "endpoint_errors_total", "endpoint_tunnels_active"}, "`holdfast clusters` and `/clusters` have them by place, with health, connect times and what is left of limits"},
	{"server.uptime, server.live, server.version", []string{"start_time_seconds", "ready", "build_info"}, ""},
	{"server.parent_connections, total_connections", []string{"generation_connections", "generation_tunnels"}, "of each generation; the sums are those of the listeners"},
	{"server.concurrency, server.state", []string{"proxy_goroutines", "generation_info"}, ""},
	{"server.memory_allocated, memory_heap_size, memory_physical_size", []string{"proxy_heap_bytes", "proxy_resident_memory_bytes", "generation_resident_memory_bytes"}, ""},
	{"server.hot_restart_epoch, hot_restart_generation", []string{"supervisor_epoch", "generation_info", "generations_started_total"}, ""},
	{"server.initialization_time_ms", []string{"reload_duration_seconds"}, ""},
	{"filesystem.flushed_by_timer", nil, "records are written at once"},
	{"filesystem.write_completed, write_buffered, write_total_buffered, reopen_failed", []string{"access_log_records_total", "access_log_written_bytes_total", "access_log_queued_records", "access_log_lost_total", "access_log_dropped_total", "access_log_reopens_total"}, ""},
	{"stats.overflow", []string{"metrics_unshown_series", "metrics_conflicts"}, ""},
	{"runtime.num_keys", []string{"runtime_overrides"}, "keys that are overridden"},
	{"config_reload, update_attempt, update_success, update_failure, version", []string{"reloads_total", "reload_refusals_total", "config_info"}, ""},
}

// printModel says where somebody who knows Envoy's statistics finds them.
func printModel(w io.Writer) {
	fmt.Fprint(w, "\n## For those who know Envoy's statistics\n\n| there | here |\n| --- | --- |\n")
	for _, m := range model {
		var here []string
		for _, name := range m.ours {
			here = append(here, "`holdfast_"+name+"`")
		}
		text := strings.Join(here, ", ")
		switch {
		case len(m.ours) == 0:
			text = "none: " + m.remark
			if strings.HasPrefix(m.remark, "with ") {
				text = "comes " + m.remark
			}
		case m.remark != "":
			text += ": " + m.remark
		}
		fmt.Fprintf(w, "| %s | %s |\n", m.theirs, text)
	}
}
