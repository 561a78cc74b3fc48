package upstream

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/config"
	"holdfast/internal/metrics"
	"holdfast/internal/stream"
	"holdfast/internal/stream/streamtest"
)

// ManyEnv has the test program be the servers of [BenchmarkChecks].
const ManyEnv = "HOLDFAST_BENCH_SERVERS"

// ServeMany is a server at all addresses of the machine that says 200 to each request. It says
// its port, and ends with its standard input.
func ServeMany() {
	l, err := net.Listen("tcp4", "0.0.0.0:0")
	if err != nil {
		panic(err)
	}
	fmt.Println(l.Addr().(*net.TCPAddr).Port)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				buf := make([]byte, 1024)
				for {
					n, err := c.Read(buf)
					if err != nil {
						return
					}
					if bytes.HasSuffix(buf[:n], []byte("\r\n\r\n")) {
						io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
					}
				}
			}()
		}
	}()
	io.Copy(io.Discard, os.Stdin)
}

// serveMany starts that, and returns its port.
func serveMany(b *testing.B) (port int) {
	b.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), ManyEnv+"=1")
	in, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { in.Close(); cmd.Wait() })
	if _, err := fmt.Fscan(out, &port); err != nil {
		b.Fatal(err)
	}
	return port
}

// used is the processor time of this process, with what the kernel does for it.
func used(b *testing.B) time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkChecks says what 1,000 clusters of 10 endpoints cost that are checked and have no
// other work: the part of a core, and how many checks that were. Each endpoint has an address,
// and a kept connection, of its own; the servers are another process. It is run with
// -benchtime 1x, and takes its time.
func BenchmarkChecks(b *testing.B) {
	const clusters, each, window = 1000, 10, 30 * time.Second
	for _, bench := range []struct {
		name                string
		interval, noTraffic time.Duration
		reuse               bool
	}{
		{"defaults", 5 * time.Second, time.Minute, true},
		{"each-10s", 10 * time.Second, 10 * time.Second, true},
		{"each-10s-fresh", 10 * time.Second, 10 * time.Second, false},
		{"each-5s", 5 * time.Second, 5 * time.Second, true},
	} {
		b.Run(bench.name, func(b *testing.B) {
			port := serveMany(b)
			cfg := new(config.Config)
			for i := range clusters {
				check := byHTTP()
				check.Interval, check.UnhealthyInterval, check.NoTrafficInterval = bench.interval, bench.interval, bench.noTraffic
				check.Jitter, check.HTTP.Reuse = bench.interval/10, bench.reuse
				c := config.Cluster{Name: fmt.Sprint(i), HealthCheck: check, WarmingTimeout: time.Minute}
				for j := range each {
					n := i*each + j
					c.Endpoints = append(c.Endpoints, config.Endpoint{Address: fmt.Sprintf("127.0.%d.%d:%d", n/200, 1+n%200, port)})
				}
				cfg.Clusters = append(cfg.Clusters, c)
			}
			var loops []*stream.Loop
			for i := range 2 {
				l := streamtest.New(b)
				streamtest.Do(l, func() { l.Index = i })
				loops = append(loops, l)
			}
			r := metrics.NewRegistry()
			all, err := New(b.Context(), Options{Config: cfg, Loops: loops, Metrics: r})
			if err != nil {
				b.Fatal(err)
			}
			b.Cleanup(all.Close)
			began := time.Now()
			all.Run()
			all.Warm(b.Context())
			round := time.Since(began)
			time.Sleep(bench.interval) // in which they come apart
			passed := func() (n uint64) {
				for _, f := range r.Families() {
					if strings.HasPrefix(f.Desc.Name, "holdfast_cluster_health_checks") {
						for _, s := range f.Series {
							if s.Labels[1] != "success" && s.Value > 0 {
								b.Errorf("%d checks of cluster %s have failed", s.Value, s.Labels[0])
							}
							n += uint64(s.Value)
						}
					}
				}
				return n
			}
			for b.Loop() {
				before, checks, since := used(b), passed(), time.Now()
				time.Sleep(window)
				took := time.Since(since)
				cpu, n := used(b)-before, passed()-checks
				b.ReportMetric(100*cpu.Seconds()/took.Seconds(), "%core")
				b.ReportMetric(float64(n)/took.Seconds(), "checks/s")
				if n > 0 {
					b.ReportMetric(float64(cpu.Microseconds())/float64(n), "µs/check")
				}
			}
			b.ReportMetric(round.Seconds(), "s/first-round")
			b.ReportMetric(0, "ns/op")
		})
	}
}
