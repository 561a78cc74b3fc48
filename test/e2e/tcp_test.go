package e2e

import (
	"bufio"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// tlsServer says its name to whoever connects, and then back what it hears. Only its
// certificate is trusted.
func tlsServer(t *testing.T, name string) (address string, trusted *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	trusted = x509.NewCertPool()
	trusted.AddCert(certificate)
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}})
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan struct{})
	go func() {
		defer close(served)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				fmt.Fprintf(conn, "%s\n", name)
				io.Copy(conn, conn)
			}()
		}
	}()
	t.Cleanup(func() { l.Close(); <-served })
	return l.Addr().String(), trusted
}

// helloTo is what a client sends first that asks for a server.
func helloTo(t *testing.T, server string) string {
	t.Helper()
	client, sent := net.Pipe()
	defer client.Close()
	defer sent.Close()
	go tls.Client(client, &tls.Config{ServerName: server}).Handshake() // ends with its connection
	sent.SetReadDeadline(time.Now().Add(patience))
	head := make([]byte, 5)
	if _, err := io.ReadFull(sent, head); err != nil {
		t.Fatal(err)
	}
	body := make([]byte, int(head[3])<<8+int(head[4]))
	if _, err := io.ReadFull(sent, body); err != nil {
		t.Fatal(err)
	}
	return string(head) + string(body)
}

// hangUp closes a connection when the server has closed it, too: before, that would be a reset.
func hangUp(conn *tls.Conn) {
	conn.CloseWrite()
	io.Copy(io.Discard, conn)
	conn.Close()
}

// Connections that are relayed as they are have the lives of tunnels.
func TestConnectionsThatAreRelayedAsTheyAre(t *testing.T) {
	t.Parallel()
	u := newUpstream(t)
	a, trustA := tlsServer(t, "a.test")
	b, trustB := tlsServer(t, "x.b.test")
	i := newInstance(t, "")
	log := filepath.Join(i.dir, "access.log")
	config := func(more string) string {
		return noProbation + fmt.Sprintf(`
[[access_logs]]
path = %q
text_format = "%%EVENT%% %%LISTENER_NAME%% %%ROUTE_NAME%% %%UPSTREAM_CLUSTER%% %%REQUESTED_SERVER_NAME%% %%RESPONSE_FLAGS%%"
events = ["tunnel_close"]
[[listeners]]
name = "moves"
address = "127.0.0.1:0"
protocol = "tcp"
cluster = "echo"
tunnels = { on_reload = "move" }
[[listeners]]
name = "stays"
address = "127.0.0.1:0"
protocol = "tcp"
weighted_clusters = [{ cluster = "a", weight = 0 }, { cluster = "echo", weight = 1 }]
[[listeners]]
name = "denies"
address = "127.0.0.1:0"
protocol = "tcp"
cluster = "echo"
deny = ["127.0.0.0/8"]
[[listeners]]
name = "tls"
address = "127.0.0.1:0"
protocol = "tcp"
tunnels = { on_reload = "move" }
tcp_routes = [{ name = "a", server_names = ["a.test"], cluster = "a" }, { server_names = ["*.b.test"], cluster = "b" }]
[[clusters]]
name = "echo"
endpoints = [%q]
[[clusters]]
name = "a"
endpoints = [%q]
[[clusters]]
name = "b"
endpoints = [%q]
%s`, log, u.addr, a, b, more)
	}
	i.write(config(""))
	i.start(nil)
	at := i.addresses()

	plain := func(listener string) (client, server *wire) {
		t.Helper()
		client = dialWire(t, "tcp", at[listener])
		server = u.accept(t)
		server.send("220 ready\n")
		client.wantBytes("220 ready\n")
		return client, server
	}
	both := func(client, server *wire) {
		t.Helper()
		client.send("ping")
		server.wantBytes("ping")
		server.send("pong")
		client.wantBytes("pong")
	}
	secure := func(server string, trusted *x509.CertPool) (*tls.Conn, *bufio.Reader) {
		t.Helper()
		conn := tls.Client(dial(t, at["tls"]), &tls.Config{ServerName: server, RootCAs: trusted})
		conn.SetDeadline(time.Now().Add(patience))
		r := bufio.NewReader(conn)
		if line, err := r.ReadString('\n'); err != nil || line != server+"\n" {
			t.Fatalf("%s: got %q, %v", server, line, err)
		}
		return conn, r
	}
	echo := func(conn *tls.Conn, r *bufio.Reader) {
		t.Helper()
		if _, err := io.WriteString(conn, "sealed\n"); err != nil {
			t.Fatal(err)
		}
		if line, err := r.ReadString('\n'); err != nil || line != "sealed\n" {
			t.Fatalf("got %q, %v", line, err)
		}
	}

	moves, movesServer := plain("moves")
	stays, staysServer := plain("stays")
	sealed, sealedIn := secure("a.test", trustA)
	other, _ := secure("x.b.test", trustB)
	hangUp(other)
	if conn, err := net.Dial("tcp", at["denies"]); err == nil { // it may be reset before that is noticed
		newWire(t, conn).wantReset()
	}
	nobody := tls.Client(dial(t, at["tls"]), &tls.Config{ServerName: "c.test", RootCAs: trustA})
	if err := nobody.Handshake(); err == nil {
		t.Error("there is a server that nobody is")
	}
	nobody.Close()
	begin := helloTo(t, "a.test")
	begun := dialWire(t, "tcp", at["tls"])
	begun.send(begin[:60])
	i.wait("three tunnels", func(s *status) bool { return len(s.Generations) == 1 && s.Generations[0].Tunnels == 3 })

	i.write(config("\n[drain]\nidle_grace = \"1s\"\n"))
	if code, out, errs := i.holdfast("diff"); code != 0 || !strings.Contains(out, "drain.idle_grace") {
		t.Errorf("diff: %d %s%s", code, out, errs)
	}
	if code, out, errs := i.holdfast("config"); code != 0 || !strings.Contains(out, "[[listeners.tcp_routes]]") {
		t.Errorf("config: %d %s%s", code, out, errs)
	}
	if code, _, errs := i.holdfast("reload"); code != 0 {
		t.Fatal(errs)
	}
	i.wait("two tunnels to have moved, and one to stay", func(s *status) bool {
		return s.states() == "2 serving, 1 draining" && s.Generations[0].Tunnels == 2 && s.Generations[1].Tunnels == 1
	})
	begun.send(begin[60:]) // to the generation that drains, which makes a tunnel of it still
	begun.wantBytes("\x16\x03\x03")
	begun.reset()
	both(moves, movesServer)
	both(stays, staysServer)
	echo(sealed, sealedIn)
	late, lateServer := plain("stays")

	i.wantKept(4)
	i.kill(1, syscall.SIGKILL)
	i.kill(2, syscall.SIGKILL)
	i.wantKept(4)
	both(moves, movesServer)
	both(stays, staysServer)
	both(late, lateServer)
	echo(sealed, sealedIn)
	again, againServer := plain("moves")
	both(again, againServer)

	for _, w := range []*wire{moves, stays, late, again} {
		w.sendFIN()
	}
	for _, w := range []*wire{movesServer, staysServer, lateServer, againServer} {
		w.wantEOF()
		w.close()
	}
	hangUp(sealed)
	want := []string{
		"tunnel_close denies - - - -",
		"tunnel_close moves - echo - -", "tunnel_close moves - echo - -",
		"tunnel_close stays - echo - -", "tunnel_close stays - echo - -",
		"tunnel_close tls - - c.test NR",
		"tunnel_close tls - b x.b.test -",
		"tunnel_close tls a a a.test -",
		"tunnel_close tls a a a.test DC",
	}
	var got []string
	eventually(t, func() bool {
		data, _ := os.ReadFile(log)
		got = strings.Split(strings.TrimSpace(string(data)), "\n")
		slices.Sort(got)
		return slices.Equal(got, want)
	}, func() string {
		return fmt.Sprintf("the records to be\n%s\nnot\n%s", strings.Join(want, "\n"), strings.Join(got, "\n"))
	})
	figures := i.mustScrape()
	for name, want := range map[string]float64{
		"holdfast_tcp_tunnels_active{listener=moves,route=}": 0, "holdfast_tcp_tunnels_total{listener=tls,route=a}": 2,
		"holdfast_tcp_connections_refused_total{listener=denies,reason=address denied}": 1,
	} {
		if figures[name] != want {
			t.Errorf("%s is %v, want %v", name, figures[name], want)
		}
	}
}
