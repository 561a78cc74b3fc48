package canary

import (
	"errors"
	"fmt"
	"io"
	"net"
	"time"
)

// What a spoiler does, once this much has gone through it.
const spoilAfter = 4 << 10

// spoil opens a tunnel whose way leads through a small proxy of ours, and returns
// when that has spoiled it. The tunnel is used as all others.
func (c *canary) spoil(how string) error {
	if how != "byte" && how != "tunnel" {
		return fmt.Errorf("nobody knows how to spoil a %q", how)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	defer listener.Close()
	s := &spoiler{how: how, address: c.address, done: make(chan struct{})}
	c.work.Go(func() { c.tunnel(listener.Addr().String(), &kinds[0], longLife) })
	client, err := listener.Accept()
	if err != nil {
		return err
	}
	c.work.Go(func() { s.relay(client) })
	select {
	case <-s.done:
		return nil
	case <-time.After(patience):
		return errors.New("nothing has passed that could be spoiled")
	}
}

// spoiler relays one connection to the proxy, and not faithfully.
type spoiler struct {
	how     string
	address string // of the proxy
	done    chan struct{}
}

func (s *spoiler) relay(client net.Conn) {
	defer client.Close()
	proxy, err := net.Dial("tcp", s.address)
	if err != nil {
		return
	}
	defer proxy.Close()
	back := make(chan struct{})
	go func() {
		defer close(back)
		io.Copy(client, proxy)
		client.(*net.TCPConn).CloseWrite()
	}()
	s.forward(client, proxy)
	if s.how == "tunnel" {
		client.Close()
	}
	proxy.(*net.TCPConn).CloseWrite()
	<-back
}

// forward relays what the client sends.
func (s *spoiler) forward(client, proxy net.Conn) {
	buf := make([]byte, slowRead)
	for sum, spoiled := 0, false; ; {
		n, err := client.Read(buf)
		if sum += n; sum >= spoilAfter && !spoiled {
			spoiled = true
			close(s.done)
			if s.how == "tunnel" {
				return
			}
			buf[0] ^= 1
		}
		if _, err := proxy.Write(buf[:n]); err != nil {
			return
		}
		if err != nil {
			return
		}
	}
}
