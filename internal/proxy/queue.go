package proxy

import (
	"golang.org/x/sys/unix"

	"holdfast/internal/metrics"
)

// What the kernel tells of listening sockets. Several generations may have the same
// one, so the serving one shows it. Of unix sockets it tells nothing (0).
var (
	queueConnections = queueGauge("connections", "Connections that wait in the queue of the listening socket until they are accepted.")
	queueLimit       = queueGauge("limit", "Connections for which the queue of the listening socket has room: a client that finds it full tries again until it has. 0: not known.")
)

func queueGauge(what, help string) *metrics.Desc {
	return metrics.Define(metrics.Desc{
		Name: "holdfast_downstream_queue_" + what, Help: help,
		Type: metrics.TypeGauge, Merge: metrics.Serving, Labels: []string{"listener"},
	})
}

// queueMetrics is what is known of a listener's queue.
type queueMetrics struct{ connections, limit *metrics.Gauge }

func newQueueMetrics(r *metrics.Registry, listener string) queueMetrics {
	return queueMetrics{r.Gauge(queueConnections, listener), r.Gauge(queueLimit, listener)}
}

// sample looks at the queue of the listening socket fd; -1: there is none.
func (q *queueMetrics) sample(fd int) {
	connections, limit := queueOf(fd)
	q.connections.Set(int64(connections))
	q.limit.Set(int64(limit))
}

// queueOf returns what the kernel tells of the queue of the listening socket fd; nothing:
// it is none.
func queueOf(fd int) (connections, limit uint32) {
	// Of a listening socket these fields say something else than their names
	// (tcp_get_info in the kernel).
	info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	if err != nil || info.State != tcpListen {
		return 0, 0
	}
	return info.Unacked, info.Sacked
}

// tcpListen is the state of a listening socket (TCP_LISTEN in the kernel).
const tcpListen = 10
