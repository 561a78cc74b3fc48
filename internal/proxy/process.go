package proxy

import (
	"fmt"
	"os"
	"runtime"
	runtimemetrics "runtime/metrics"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/control"
	"holdfast/internal/metrics"
)

// What each living generation shows by itself. The list is short on purpose: every
// reload makes these series anew.
var (
	generationDraining     = generationGauge("draining", metrics.None, "1 if the generation accepts no more and ends when nothing is left, otherwise 0.")
	generationConnections  = generationGauge("connections", metrics.None, "Open connections of clients, without those that became tunnels.")
	generationRequests     = generationGauge("requests_active", metrics.None, "Requests that are being answered, without tunnels.")
	generationTunnels      = generationGauge("tunnels", metrics.None, "Open tunnels.")
	generationOldestTunnel = generationGauge("oldest_tunnel_start_timestamp_seconds", metrics.Seconds, "When the oldest open tunnel was started, in Unix time; 0 without one.")
	generationMemory       = generationGauge("resident_memory_bytes", metrics.None, "Memory of the generation's process, as the kernel counts it.")
	generationStart        = generationGauge("start_timestamp_seconds", metrics.Seconds, "When the generation's process was started, in Unix time.")
)

func generationGauge(what string, unit metrics.Unit, help string) *metrics.Desc {
	return metrics.Define(metrics.Desc{
		Name: "holdfast_generation_" + what, Help: help, Type: metrics.TypeGauge, Merge: metrics.PerGeneration, Unit: unit,
	})
}

// What the processes of all generations use together.
var (
	processMemory = metrics.Define(metrics.Desc{
		Name: "holdfast_proxy_resident_memory_bytes", Type: metrics.TypeGauge,
		Help: "Memory of all generations, as the kernel counts it; what they share is counted for each.",
	})
	processHeap = metrics.Define(metrics.Desc{
		Name: "holdfast_proxy_heap_bytes", Type: metrics.TypeGauge,
		Help: "Memory of objects of all generations, with those that are not collected yet.",
	})
	processGoroutines = metrics.Define(metrics.Desc{
		Name: "holdfast_proxy_goroutines", Type: metrics.TypeGauge,
		Help: "Goroutines of all generations.",
	})
	processCPU = metrics.Define(metrics.Desc{
		Name: "holdfast_proxy_cpu_seconds_total", Type: metrics.TypeCounter, Unit: metrics.Seconds,
		Help: "Processor time of all generations, of the kernel on their behalf included. Of one that died, up to the last time that it was asked.",
	})
	processFiles = metrics.Define(metrics.Desc{
		Name: "holdfast_proxy_open_fds", Type: metrics.TypeGauge, Merge: metrics.Max,
		Help: "Open file descriptors of the generation that has the most.",
	})
	processFileLimit = metrics.Define(metrics.Desc{
		Name: "holdfast_proxy_max_fds", Type: metrics.TypeGauge, Merge: metrics.Max,
		Help: "File descriptors that one generation may have open.",
	})
	processLogDropped = metrics.Define(metrics.Desc{
		Name: "holdfast_proxy_log_lines_dropped_total", Type: metrics.TypeCounter,
		Help: "Lines of the logs of generations that were dropped, because nobody took them in time.",
	})
)

// process is what a generation knows about itself by looking. The loop owns it.
type process struct {
	draining, connections, requests, tunnels, oldestTunnel, memory, started *metrics.Gauge

	allMemory, heap, goroutines, files, fileLimit *metrics.Gauge
	cpu, logDropped                               *metrics.Counter
}

func newProcess(r *metrics.Registry) process {
	p := process{
		draining:     r.Gauge(generationDraining),
		connections:  r.Gauge(generationConnections),
		requests:     r.Gauge(generationRequests),
		tunnels:      r.Gauge(generationTunnels),
		oldestTunnel: r.Gauge(generationOldestTunnel),
		memory:       r.Gauge(generationMemory),
		started:      r.Gauge(generationStart),
		allMemory:    r.Gauge(processMemory),
		heap:         r.Gauge(processHeap),
		goroutines:   r.Gauge(processGoroutines),
		cpu:          r.Counter(processCPU),
		files:        r.Gauge(processFiles),
		fileLimit:    r.Gauge(processFileLimit),
		logDropped:   r.Counter(processLogDropped),
	}
	p.started.Set(time.Now().UnixNano())
	return p
}

// sample brings all of it up to date. What could not be found out stays as it was.
func (p *process) sample(st *control.Status) {
	p.draining.Set(0)
	if st.Draining {
		p.draining.Set(1)
	}
	p.connections.Set(int64(st.Connections))
	p.requests.Set(int64(st.Requests))
	p.tunnels.Set(int64(st.Tunnels))
	p.oldestTunnel.Set(0)
	if !st.OldestTunnel.IsZero() {
		p.oldestTunnel.Set(st.OldestTunnel.UnixNano())
	}
	p.memory.Set(st.RSS)
	p.allMemory.Set(st.RSS)
	raise(p.logDropped, st.LogsDropped)

	p.goroutines.Set(int64(runtime.NumGoroutine()))
	heap := []runtimemetrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}}
	runtimemetrics.Read(heap)
	p.heap.Set(int64(heap[0].Value.Uint64()))

	var used unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &used); err == nil {
		raise(p.cpu, uint64(used.Utime.Nano()+used.Stime.Nano()))
	}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err == nil {
		p.fileLimit.Set(int64(limit.Cur))
	}
	if n, err := openFiles(); err == nil {
		p.files.Set(n)
	}
}

// raise brings a counter to a total that somebody else keeps.
func raise(c *metrics.Counter, total uint64) {
	if now := c.Value(); total > now {
		c.Add(total - now)
	}
}

// openFiles is how many descriptors the process has. The kernel says it as the size
// of the folder since Linux 6.2; before, the size is 0.
func openFiles() (int64, error) {
	const folder = "/proc/self/fd"
	info, err := os.Stat(folder)
	if err != nil || info.Size() > 0 {
		return info.Size(), err
	}
	f, err := os.Open(folder)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	names, err := f.Readdirnames(-1)
	return int64(len(names)) - 1, err // without the one that reads
}

// residentBytes is what the kernel counts as this process's memory.
func residentBytes() int64 {
	data, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0
	}
	var size, resident int64
	if _, err := fmt.Sscan(string(data), &size, &resident); err != nil {
		return 0
	}
	return resident * int64(os.Getpagesize())
}
