package main

import (
	"time"

	"holdfast/bench/load"
	"holdfast/bench/proc"
)

// smallBody is about what a head takes, too.
const smallBody = 100

// hold opens connections for requests, and has one answered on each.
func (b *bench) hold(c *contestant, connections, body int) error {
	a, err := b.client.Do(load.Command{Do: "hold", Address: c.address(), Tunnels: connections, Body: body})
	if err == nil && a.Failed > 0 {
		err = lost("refused", a.Failed, a)
	}
	return err
}

// asking returns a mode that asks for bodies of a length, again and again, on a few
// connections and on many.
func asking(name string, body int) func(*bench, *contestant) error {
	return func(b *bench, c *contestant) error {
		for _, n := range b.fewAndMany("http." + name) {
			if err := b.hold(c, n.connections, body); err != nil {
				return err
			}
			a, err := b.timed(c, n.key, load.Command{Do: "ask"})
			if err != nil {
				return err
			}
			b.addCPU(n.key+".cpu", c, a.CPU, time.Microsecond, float64(a.Count))
			b.run.Add(n.key+".rate", c.name, float64(a.Count)/a.Measured.Seconds())
			if _, err := b.client.Do(load.Command{Do: "close"}); err != nil {
				return err
			}
		}
		return nil
	}
}

func (b *bench) httpPaced(c *contestant) error {
	if err := b.hold(c, b.sizes.Few, smallBody); err != nil {
		return err
	}
	a, err := b.timed(c, "http.paced", load.Command{Do: "askpaced", Rate: b.sizes.Rate})
	if err != nil {
		return err
	}
	b.addPaced("http.paced", c, a)
	return nil
}

func (b *bench) httpConns(c *contestant) error {
	return b.turnover(c, "http.conns", load.Command{Do: "fresh", Body: smallBody})
}

// httpIdle holds some connections first: what a program sets up for these, and gives back
// when it has become quiet, is not counted. All stay open, each used once.
func (b *bench) httpIdle(c *contestant) error {
	connections, err := b.idleTunnels(c)
	if err != nil {
		return err
	}
	few := min(b.sizes.Many, connections/2)
	if err := b.hold(c, few, smallBody); err != nil {
		return err
	}
	before, err := b.pss(c)
	if err != nil {
		return err
	}
	if err := b.hold(c, connections-few, smallBody); err != nil {
		return err
	}
	after, err := b.pss(c)
	if err != nil {
		return err
	}
	// Nobody has closed one of them meanwhile.
	a, err := b.client.Do(load.Command{Do: "ask"})
	if err != nil {
		return err
	}
	if a.Failed > 0 {
		return lost("lost while they were idle", a.Failed, a)
	}
	b.run.Add("http.idle.pss", c.name, float64(after-before)/float64(connections-few))
	return nil
}

// pss waits for what a proxy does behind the scenes, and returns what the processes occupy
// that carry traffic.
func (b *bench) pss(c *contestant) (int64, error) {
	time.Sleep(time.Duration(b.sizes.Settle))
	m, err := proc.MemoryOf(c.instance.Relays())
	return m.Pss, err
}
