package load

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"holdfast/bench/proc"
)

// secure is the client of a proxy that speaks TLS. Its cryptography takes several times what
// the rest of a client does, and goes by crypto/tls with a goroutine for each connection: what
// it takes from the cores is the same for all proxies, and is not theirs.
type secure struct {
	tunnels []*tls.Conn
	cache   tls.ClientSessionCache
}

// secureTimeout bounds each step of a connection.
const secureTimeout = 20 * time.Second

func (s *secure) do(cmd Command) (Answer, error) {
	switch cmd.Do {
	case "open":
		return s.open(cmd)
	case "echo":
		return s.echo(cmd)
	case "close":
		return s.closeAll(), nil
	case "handshake":
		return s.handshakes(cmd)
	case "connect":
		return s.during(cmd, cmd.Tunnels, func(int) error {
			c, err := s.tunnel(cmd)
			if err == nil {
				err = leave(c)
			}
			return err
		})
	}
	return Answer{}, fmt.Errorf("there is no command %q with TLS", cmd.Do)
}

// dial connects and agrees on TLS.
func (s *secure) dial(cmd Command) (*tls.Conn, error) {
	conn, err := net.DialTimeout("tcp", cmd.Address, secureTimeout)
	if err != nil {
		return nil, err
	}
	// Not every proxy has the exchange of keys that Go and browsers ask for first today, which takes
	// more than all the rest: here all do the same.
	config := &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"http/1.1"}, ServerName: "bench", CurvePreferences: []tls.CurveID{tls.X25519}}
	if cmd.Resume {
		config.ClientSessionCache = s.cache
	}
	c := tls.Client(conn, config)
	_ = c.SetDeadline(time.Now().Add(secureTimeout))
	if err := c.Handshake(); err != nil {
		conn.Close()
		return nil, err
	}
	return c, nil
}

// tunnel opens a tunnel.
func (s *secure) tunnel(cmd Command) (*tls.Conn, error) {
	c, err := s.dial(cmd)
	if err != nil {
		return nil, err
	}
	head := make([]byte, 0, 512)
	if _, err = c.Write(upgrade(cmd.Address, cmd.Path)); err == nil {
		for !bytes.HasSuffix(head, headEnd) && err == nil && len(head) < longestHead {
			var n int
			n, err = c.Read(head[len(head):cap(head)])
			head = head[:len(head)+n]
		}
	}
	if err == nil && !bytes.HasPrefix(head, switched) {
		err = fmt.Errorf("the answer begins with %q", head[:min(len(head), 40)])
	}
	if err != nil {
		c.NetConn().Close()
		return nil, err
	}
	return c, nil
}

// leave says that it is over, and waits until the other side has said so, too: by then it has
// done all that there was to do.
func leave(c *tls.Conn) error {
	defer c.NetConn().Close()
	if err := c.CloseWrite(); err != nil {
		return err
	}
	_, err := io.Copy(io.Discard, c)
	return err
}

func (s *secure) open(cmd Command) (Answer, error) {
	opened := make([]*tls.Conn, cmd.Tunnels)
	var failed atomic.Int64
	var reason atomic.Value
	places := make(chan int)
	var all sync.WaitGroup
	for range min(atOnce, cmd.Tunnels) {
		all.Go(func() {
			for i := range places {
				c, err := s.tunnel(cmd)
				if err != nil {
					failed.Add(1)
					reason.Store(err.Error())
					continue
				}
				_ = c.SetDeadline(time.Time{})
				opened[i] = c
			}
		})
	}
	for i := range opened {
		places <- i
	}
	close(places)
	all.Wait()
	for _, c := range opened {
		if c != nil {
			s.tunnels = append(s.tunnels, c)
		}
	}
	a := Answer{Count: len(s.tunnels), Failed: int(failed.Load())}
	a.Reason, _ = reason.Load().(string)
	return a, nil
}

func (s *secure) closeAll() Answer {
	a := Answer{Count: len(s.tunnels)}
	for _, c := range s.tunnels {
		c.NetConn().Close()
	}
	s.tunnels = nil
	return a
}

func (s *secure) echo(cmd Command) (Answer, error) {
	for _, c := range s.tunnels {
		_ = c.SetDeadline(time.Now().Add(cmd.Warm + cmd.For + secureTimeout))
	}
	buffers := make([][]byte, len(s.tunnels))
	return s.during(cmd, len(s.tunnels), func(i int) error {
		if buffers[i] == nil {
			buffers[i] = make([]byte, cmd.Size)
		}
		if _, err := s.tunnels[i].Write(buffers[i]); err != nil {
			return err
		}
		_, err := io.ReadFull(s.tunnels[i], buffers[i])
		return err
	})
}

// handshakes connects and leaves. With Resume each handshake goes on with an earlier one's
// session.
func (s *secure) handshakes(cmd Command) (Answer, error) {
	if cmd.Resume {
		s.cache = tls.NewLRUClientSessionCache(1)
		c, err := s.tunnel(cmd) // the ticket comes before an answer does
		if err != nil {
			return Answer{}, err
		}
		c.NetConn().Close()
	}
	return s.during(cmd, cmd.Tunnels, func(int) error {
		c, err := s.dial(cmd)
		if err != nil {
			return err
		}
		if c.ConnectionState().DidResume != cmd.Resume {
			c.NetConn().Close()
			return errors.New("a session that was to be resumed was not, or the other way round")
		}
		return leave(c)
	})
}

// during has so many goroutines take one step after the other, and counts those that end while
// it is measured. One that fails takes no more.
func (s *secure) during(cmd Command, workers int, step func(worker int) error) (Answer, error) {
	var steps, failed atomic.Int64
	var stop atomic.Bool
	var reason atomic.Value
	var all sync.WaitGroup
	for i := range workers {
		all.Go(func() {
			for !stop.Load() && (cmd.Limit == 0 || steps.Load() < int64(cmd.Limit)) {
				if err := step(i); err != nil {
					failed.Add(1)
					reason.Store(err.Error())
					return
				}
				steps.Add(1)
			}
		})
	}
	time.Sleep(cmd.Warm)
	before, began := steps.Load(), time.Now()
	cpu, err := proc.CPUOf(cmd.PIDs)
	time.Sleep(cmd.For)
	used, later := proc.CPUOf(cmd.PIDs)
	a := Answer{Count: int(steps.Load() - before), Measured: time.Since(began), CPU: used - cpu}
	stop.Store(true)
	all.Wait()
	a.Failed = int(failed.Load())
	a.Reason, _ = reason.Load().(string)
	return a, errors.Join(err, later)
}
