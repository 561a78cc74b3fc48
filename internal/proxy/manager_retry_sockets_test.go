package proxy_test

import (
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"holdfast/internal/config"
)

// again has the site try again what fails.
func again(s *site) {
	s.change = func(r *config.Route) {
		r.Retry = retrying(onReset|on5xx, attempts(5), func(r *config.Retry) {
			r.BackoffBase, r.BackoffMax = time.Millisecond, time.Millisecond
		}).Retry
	}
}

func TestARetryOverConnections(t *testing.T) {
	t.Parallel()
	s := newSite(t, again)
	client := s.client()
	client.say("POST /a HTTP/1.1\nHost: a.example\nTransfer-Encoding: chunked\n\n5\nfirst\n")
	one := <-s.conns
	one.wantHead("POST /a HTTP/1.1\n", "Host: a.example\n")
	one.want("5\nfirst\n")
	one.Close() // within the request

	two := <-s.conns
	two.wantHead("POST /a HTTP/1.1\n")
	two.want("5\nfirst\n")
	client.say("4\nlast\n0\n\n")
	two.want("4\nlast\n0\n\n")
	two.say("HTTP/1.1 503 Later\nContent-Length: 4\n\nbusy")
	two.wantHead("POST /a HTTP/1.1\n") // the connection was kept
	two.want("9\nfirstlast\n0\n\n")
	two.say("HTTP/1.1 503 Later\nContent-Length: 4000000\n\nbusy")

	three := <-s.conns // the other one has too much to come
	three.wantHead("POST /a HTTP/1.1\n")
	three.want("9\nfirstlast\n0\n\n")
	three.say("HTTP/1.1 200 OK\nContent-Length: 4\n\ndone")
	client.wantHead("HTTP/1.1 200 OK\n")
	client.want("done")
	client.say("GET /b HTTP/1.1\nHost: a.example\n\n")
	three.wantHead("GET /b HTTP/1.1\n")
	three.say("HTTP/1.1 204 None\n\n")
	client.wantHead("HTTP/1.1 204 None\n")
}

// Endpoints that fail at any point, with bodies of any length in any framing, over kept
// connections: what is answered has been received as it was sent.
func TestBodiesAreTheClientsOverManyRetries(t *testing.T) {
	t.Parallel()
	s := newSite(t, again, func(s *site) { s.unrecorded = true })
	done := make(chan struct{})
	var endpoints sync.WaitGroup
	endpoints.Go(func() {
		for seed := uint64(0); ; seed++ {
			select {
			case conn := <-s.conns:
				defer conn.Close() // it may be kept
				endpoints.Go(func() { unreliable(conn, seed) })
			case <-done:
				return
			}
		}
	})
	var clients sync.WaitGroup
	for n := range uint64(4) {
		clients.Go(func() {
			random := rand.New(rand.NewPCG(n, 3))
			client := s.client()
			for i := range 40 {
				body := strings.Repeat(fmt.Sprintf("%d-%d,", n, i), random.IntN(8_000))
				if random.IntN(2) == 0 {
					client.say("PUT /%d HTTP/1.1\nHost: a.example\nContent-Length: %d\n\n", len(body), len(body))
					io.WriteString(client, body)
				} else {
					client.say("PUT /%d HTTP/1.1\nHost: a.example\nTransfer-Encoding: chunked\n\n", len(body))
					for left := body; left != ""; {
						k := 1 + random.IntN(min(len(left), 20_000))
						fmt.Fprintf(client, "%x\r\n%s\r\n", k, left[:k])
						left = left[k:]
					}
					client.say("0\n\n")
				}
				resp, err := http.ReadResponse(client.in, nil)
				if err != nil {
					t.Errorf("client %d, request %d: %v", n, i, err)
					return
				}
				got, err := io.ReadAll(resp.Body)
				if err != nil || resp.StatusCode == 200 && string(got) != body {
					t.Errorf("client %d, request %d: %d bytes came back of %d: %v", n, i, len(got), len(body), err)
				}
				if resp.Close {
					client = s.client()
				}
			}
		})
	}
	clients.Wait()
	close(done)
	endpoints.Wait()
	s.settled()
	if n := figures(s.counted)["route_retry_successes_total{site,site:prefix=/}"]; n < 10 {
		t.Errorf("%d retries were successful", n)
	}
}

// unreliable is an endpoint's connection that answers with the body, or fails somehow.
func unreliable(conn *wire, seed uint64) {
	defer conn.Close()
	random := rand.New(rand.NewPCG(seed, 4))
	for {
		req, err := http.ReadRequest(conn.in)
		if err != nil {
			return
		}
		fate := random.IntN(6)
		if fate == 0 {
			io.CopyN(io.Discard, req.Body, int64(random.IntN(10_000)))
			conn.Conn.(*net.TCPConn).SetLinger(random.IntN(2) - 1) // a reset, or not
			return
		}
		if fate == 1 { // early
			fmt.Fprint(conn, "HTTP/1.1 503 Later\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
			return
		}
		body, err := io.ReadAll(req.Body)
		if err != nil {
			return
		}
		switch fate {
		case 2:
			fmt.Fprint(conn, "HTTP/1.1 503 Later\r\nContent-Length: 5\r\n\r\nlater")
		case 3:
			fmt.Fprint(conn, "HTTP/1.1 2")
			return
		default:
			fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n", len(body))
			conn.Write(body)
		}
	}
}
