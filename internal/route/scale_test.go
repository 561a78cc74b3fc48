package route_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"runtime"
	"testing"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/route"
)

// manyHosts is a file with so many virtual hosts, and routes in each.
func manyHosts(hosts, routes int) []byte {
	var b bytes.Buffer
	b.WriteString("[[listeners]]\nname = \"public\"\naddress = \"127.0.0.1:0\"\n")
	for c := range 100 {
		fmt.Fprintf(&b, "\n[[clusters]]\nname = \"cluster-%d\"\nendpoints = [\"127.0.0.1:9000\"]\n", c)
	}
	for h := range hosts {
		fmt.Fprintf(&b, "\n[[virtual_hosts]]\nname = \"host-%d\"\ndomains = [\"h%d.example.com\"]\n", h, h)
		for r := range routes {
			fmt.Fprintf(&b, "\n  [[virtual_hosts.routes]]\n  match = { prefix = \"/service-%d/\" }\n  cluster = \"cluster-%d\"\n", r, (h*routes+r)%100)
		}
	}
	return b.Bytes()
}

const (
	scaleHosts  = 10_000
	scaleRoutes = 10
)

// The bound of the time is far from what it takes, so that it holds on any machine. What it
// takes is measured by the benchmarks.
func TestTenThousandVirtualHostsAreReadInBoundedTimeAndMemory(t *testing.T) {
	hosts := scaleHosts
	if slow {
		hosts /= 10
	}
	data := manyHosts(hosts, scaleRoutes)
	before := heap()
	began := time.Now()
	cfg, err := config.Parse("f", data)
	if err != nil {
		t.Fatal(err)
	}
	read := time.Since(began)
	tbl := route.New(cfg, nil)
	took := time.Since(began)
	kept := heap() - before
	runtime.KeepAlive(cfg) // as a generation does
	t.Logf("%d MB of file are read in %v, with the table %v; %d MB are kept", len(data)>>20, read, took, kept>>20)
	if took > time.Minute {
		t.Errorf("it took %v", took)
	}
	if kept > 100<<20 {
		t.Errorf("%d MB are kept", kept>>20)
	}
	if n := len(tbl.Routes()); n != hosts*scaleRoutes {
		t.Errorf("%d routes", n)
	}
}

// heap is how many bytes are in use.
func heap() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

func BenchmarkLoad(b *testing.B) {
	data := manyHosts(scaleHosts, scaleRoutes)
	b.ReportAllocs()
	for b.Loop() {
		cfg, err := config.Parse("f", data)
		if err != nil {
			b.Fatal(err)
		}
		route.New(cfg, nil)
	}
}

func BenchmarkMatch(b *testing.B) {
	for _, hosts := range []int{1, scaleHosts} {
		cfg, err := config.Parse("f", manyHosts(hosts, scaleRoutes))
		if err != nil {
			b.Fatal(err)
		}
		tbl := route.New(cfg, nil)
		queries := make([]route.Query, 1<<16)
		for i := range queries {
			queries[i] = route.Query{
				Listener: "public", Authority: fmt.Sprintf("h%d.example.com:8080", rand.N(hosts)), Method: "GET",
				Target: fmt.Sprintf("/service-%d/x?y", rand.N(scaleRoutes)),
			}
		}
		b.Run(fmt.Sprintf("hosts=%d", hosts), func(b *testing.B) {
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				i++
				if r, _ := tbl.Match(&queries[i%len(queries)]); r == nil {
					b.Fatal("no route")
				}
			}
		})
	}
}
