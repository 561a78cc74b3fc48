package main

import (
	"time"

	"holdfast/bench/load"
)

// handshakesAtOnce is how many connections are about to agree on TLS.
const handshakesAtOnce = 16

// secureOpen opens tunnels over TLS, all of them.
func (b *bench) secureOpen(c *contestant, tunnels int) error {
	a, err := b.client.Do(load.Command{Do: "open", Secure: true, Address: c.instance.SecureAddress(), Path: load.EchoPath, Tunnels: tunnels})
	if err == nil && a.Failed > 0 {
		err = lost("refused", a.Failed, a)
	}
	return err
}

func (b *bench) secureClose() error {
	_, err := b.client.Do(load.Command{Do: "close", Secure: true})
	return err
}

// secureTurnover measures connections that are used once.
func (b *bench) secureTurnover(c *contestant, key string, cmd load.Command) error {
	if c.instance == nil {
		return nil
	}
	cmd.Secure, cmd.Address, cmd.Path, cmd.Tunnels, cmd.Limit = true, c.instance.SecureAddress(), load.EchoPath, handshakesAtOnce, 20_000
	a, err := b.timed(c, key, cmd)
	if err != nil {
		return err
	}
	b.addCPU(key+".cpu", c, a.CPU, time.Microsecond, float64(a.Count))
	b.run.Add(key+".rate", c.name, float64(a.Count)/a.CPU.Seconds())
	return nil
}

func (b *bench) handshakes(c *contestant) error {
	if err := b.secureTurnover(c, "tls.full", load.Command{Do: "handshake"}); err != nil {
		return err
	}
	return b.secureTurnover(c, "tls.resumed", load.Command{Do: "handshake", Resume: true})
}

func (b *bench) secureConnect(c *contestant) error {
	return b.secureTurnover(c, "tls.connect", load.Command{Do: "connect"})
}

func (b *bench) secureEcho(c *contestant) error {
	for _, n := range b.fewAndMany("tls.echo") {
		if err := b.secureOpen(c, n.connections); err != nil {
			return err
		}
		a, err := b.timed(c, n.key, load.Command{Do: "echo", Secure: true, Size: b.sizes.Message})
		if err != nil {
			return err
		}
		b.addCPU(n.key+".cpu", c, a.CPU, time.Microsecond, float64(a.Count))
		if err := b.secureClose(); err != nil {
			return err
		}
	}
	return nil
}

// secureIdle opens a few tunnels first: what a program sets up for the first one is no tunnel's.
func (b *bench) secureIdle(c *contestant) error {
	tunnels, err := b.idleTunnels(c)
	if err != nil {
		return err
	}
	if err := b.secureOpen(c, b.sizes.Few); err != nil {
		return err
	}
	if err := b.secureClose(); err != nil {
		return err
	}
	start, err := b.settled(c)
	if err != nil {
		return err
	}
	if err := b.secureOpen(c, tunnels); err != nil {
		return err
	}
	full, err := b.settled(c)
	if err != nil {
		return err
	}
	b.run.Add("tls.idle.private", c.name, float64(full.relays.private-start.relays.private)/float64(tunnels))
	return b.secureClose()
}
