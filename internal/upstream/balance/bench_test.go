package balance_test

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"holdfast/internal/config"
	"holdfast/internal/upstream/balance"
)

// BenchmarkPick is one decision, and nothing else.
func BenchmarkPick(b *testing.B) {
	eachKind(b, func(b *testing.B, c *cluster, hashed bool) {
		q := balance.Query{Hashed: hashed}
		b.ReportAllocs()
		for b.Loop() {
			q.Hash += 0x9e3779b97f4a7c15
			c.Pick(q)
		}
	})
}

// BenchmarkRequest is a decision, and the load that comes and goes.
func BenchmarkRequest(b *testing.B) {
	eachKind(b, func(b *testing.B, c *cluster, hashed bool) {
		q := balance.Query{Hashed: hashed}
		b.ReportAllocs()
		for b.Loop() {
			q.Hash += 0x9e3779b97f4a7c15
			h := c.Pick(q)
			h.Add(1)
			h.Add(-1)
		}
	})
}

// BenchmarkPickParallel is decisions of several loops.
func BenchmarkPickParallel(b *testing.B) {
	eachKind(b, func(b *testing.B, c *cluster, hashed bool) {
		b.ReportAllocs()
		b.RunParallel(func(pb *testing.PB) {
			q := balance.Query{Hashed: hashed}
			for pb.Next() {
				q.Hash += 0x9e3779b97f4a7c15
				c.Pick(q)
			}
		})
	})
}

// eachKind has f measure each policy with members that have some load.
func eachKind(b *testing.B, f func(b *testing.B, c *cluster, hashed bool)) {
	for _, n := range []int{10, 1000} {
		for _, p := range policies {
			for _, weighted := range []bool{false, true} {
				weights := even(n)
				name := fmt.Sprintf("%s/%d/even", p, n)
				if weighted {
					name = fmt.Sprintf("%s/%d/weighted", p, n)
					for i := range weights {
						weights[i] = int64(i%7 + 1)
					}
				}
				b.Run(name, func(b *testing.B) {
					c := newCluster(config.Balancing{Policy: p}, weights...)
					r := rand.New(rand.NewPCG(1, 2))
					for _, m := range c.members {
						m.Add(r.Int64N(100))
					}
					f(b, c, p == config.Maglev)
				})
			}
		}
	}
}

// BenchmarkSet is what a change of an endpoint's health costs.
func BenchmarkSet(b *testing.B) {
	for _, p := range policies {
		b.Run(p.String(), func(b *testing.B) {
			c := newCluster(config.Balancing{Policy: p}, even(1000)...)
			for b.Loop() {
				c.members[0].Healthy = !c.members[0].Healthy
				c.Set(c.members)
			}
		})
	}
}

// BenchmarkSettle is what a change of the members costs beyond that.
func BenchmarkSettle(b *testing.B) {
	for _, n := range []int{10, 1000} {
		for _, weight := range []int64{1, 2} {
			b.Run(fmt.Sprintf("%d/weight=%d", n, weight), func(b *testing.B) {
				c := newCluster(config.Balancing{Policy: config.Maglev}, even(n)...)
				c.members[0].Weight = weight
				for b.Loop() {
					c.members[n/2], c.members[n-1] = c.members[n-1], c.members[n/2]
					c.Set(c.members[:n-1])
					c.Settle()
				}
			})
		}
	}
}
