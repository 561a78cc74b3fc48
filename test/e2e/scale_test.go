package e2e

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestNineThousandTunnels opens as many tunnels as the descriptors of one process allow,
// with the clients and the servers in processes of their own. It runs alone, and with
// programs that are built as they are for use: the race detector has memory of its own.
func TestNineThousandTunnels(t *testing.T) {
	const n = 9000
	needDescriptors(t, 2*n+1000)
	t.Setenv(binEnv, program("plain"))
	servers := startActor(t, "servers")
	i := serve(t, simple(servers.ask("listen"), ""))
	pid := i.status().Generations[0].PID
	before, files := private(t, pid), descriptors(t, pid)

	clients := startActor(t, "clients")
	clients.ask("open", strconv.Itoa(n), i.address("public"))
	i.wait("all tunnels", func(s *status) bool { return s.Generations[0].Tunnels == n })
	clients.ask("say")
	servers.ask("echo")
	clients.ask("hear")
	if got := descriptors(t, pid) - files; got < 2*n || got > 2*n+50 {
		t.Errorf("%d descriptors more than before, want 2 for each of %d tunnels", got, n)
	}
	each := (private(t, pid) - before) / n
	t.Logf("%d bytes of memory for each tunnel", each)
	if each > 4<<10 {
		t.Errorf("%d bytes of memory for each tunnel", each)
	}

	clients.ask("end", string(clientCloses), string(clientResets))
	servers.ask("end", string(serverCloses))
	clients.ask("wait")
	servers.ask("wait")
	i.wait("no tunnels", func(s *status) bool { return s.Generations[0].Tunnels == 0 })
	i.wantSeries(series{
		"holdfast_tunnels_started_total":                         n,
		"holdfast_tunnels_active":                                0,
		"holdfast_tunnel_buffer_bytes":                           0,
		"holdfast_tunnels_ended_total{reason=downstream closed}": n / 3,
		"holdfast_tunnels_ended_total{reason=downstream reset}":  n / 3,
		"holdfast_tunnels_ended_total{reason=upstream closed}":   n / 3,
		"holdfast_tunnel_relayed_bytes_total{to=upstream}":       3 * n,
		"holdfast_tunnel_relayed_bytes_total{to=downstream}":     3 * n,
	})
	eventually(t, func() bool { return descriptors(t, pid) <= files+50 }, func() string {
		return fmt.Sprintf("the descriptors to be given back: %d before, %d now", files, descriptors(t, pid))
	})
	t.Logf("%d KiB of memory before, %d KiB after", before>>10, private(t, pid)>>10)
}

// needDescriptors skips a test where a process may not have so many.
func needDescriptors(t *testing.T, n int) {
	t.Helper()
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if limit.Max >= uint64(n) {
		return
	}
	why := fmt.Sprintf("%d descriptors are allowed, %d needed (ulimit -Hn)", limit.Max, n)
	if os.Getenv("HOLDFAST_TEST_REQUIRE_TOOLS") == "1" {
		t.Fatal(why)
	}
	t.Skip(why)
}

// private is the memory of a process that it shares with no other, in bytes.
func private(t *testing.T, pid int) (n int) {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		if len(f) == 3 && strings.HasPrefix(f[0], "Private_") {
			kib, err := strconv.Atoi(f[1])
			if err != nil {
				t.Fatal(err)
			}
			n += kib << 10
		}
	}
	return n
}

// actor is a process of this program that plays the clients or the servers of many
// tunnels. What it is asked it answers with one line.
type actor struct {
	t       *testing.T
	role    string
	in      io.Writer
	answers *bufio.Reader
}

func startActor(t *testing.T, role string) *actor {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), roleEnv+"="+role)
	in, out := startChild(t, cmd, role)
	return &actor{t: t, role: role, in: in, answers: bufio.NewReader(out)}
}

// startChild starts a process to talk to, which ends when it hears no more.
func startChild(t *testing.T, cmd *exec.Cmd, name string) (in io.Writer, out io.Reader) {
	t.Helper()
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stdin.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("the %s: %v", name, err)
		}
	})
	return stdin, stdout
}

// ask has the actor do something and returns what it says then.
func (a *actor) ask(words ...string) string {
	a.t.Helper()
	began := time.Now()
	fmt.Fprintln(a.in, strings.Join(words, " "))
	answer, err := a.answers.ReadString('\n')
	if err != nil {
		a.t.Fatalf("%s: %s: %v", a.role, words, err)
	}
	said, failed := strings.CutPrefix(strings.TrimSpace(answer), "error: ")
	if failed {
		a.t.Fatalf("%s: %s: %s", a.role, words, said)
	}
	a.t.Logf("%s: %s: %v", a.role, words[0], time.Since(began).Round(time.Millisecond))
	return said
}

// roleEnv says that this process is an actor.
const roleEnv = "HOLDFAST_E2E_ROLE"

// act is what an actor does, until nobody asks any more.
func act() {
	p := new(party)
	deeds := map[string]func(args []string) (string, error){
		"listen": p.listen, "open": p.open, "say": p.say, "echo": p.echo, "hear": p.hear, "end": p.end, "wait": p.wait,
	}
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		words := strings.Fields(lines.Text())
		answer, err := deeds[words[0]](words[1:])
		if err != nil {
			answer = "error: " + err.Error()
		}
		fmt.Println(answer)
	}
}

// party is one end of many tunnels. It has few goroutines: the race detector knows
// 8,128 of them.
type party struct {
	mu    sync.Mutex
	conns []*voice
}

// voice is one end of one tunnel.
type voice struct {
	*net.TCPConn
	manner byte // how the tunnel is to end, as its hello says
}

// The manners, a third of the tunnels for each.
const (
	clientCloses = '0' + iota
	clientResets
	serverCloses
)

// hello is the first that goes through a tunnel, and comes back.
func hello(manner byte) string { return "\x81\x01" + string(manner) }

const atATime = 8 // handshakes

func (p *party) add(c *net.TCPConn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.conns = append(p.conns, &voice{TCPConn: c, manner: byte(clientCloses + len(p.conns)%3)})
}

// listen accepts connections, agrees to an upgrade on each, and says where.
func (p *party) listen([]string) (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	for range atATime {
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				c.SetDeadline(time.Now().Add(2 * patience))
				if err := wantHead(c, "GET /ws HTTP/1.1\r\n"); err != nil {
					fmt.Fprintln(os.Stderr, err)
					return
				}
				p.add(c.(*net.TCPConn))
				io.WriteString(c, agreement)
			}
		}()
	}
	return l.Addr().String(), nil
}

// wantHead reads a head that begins as told. Nothing is sent behind it before it is
// answered.
func wantHead(c net.Conn, start string) error {
	buf := make([]byte, 0, 4<<10)
	for !strings.HasSuffix(string(buf), "\r\n\r\n") {
		n, err := c.Read(buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+n]
		if err != nil {
			return fmt.Errorf("%w after %q", err, buf)
		}
	}
	if !strings.HasPrefix(string(buf), start) {
		return fmt.Errorf("got the head %q", buf)
	}
	return nil
}

// open opens n tunnels at an address.
func (p *party) open(args []string) (string, error) {
	n, err := strconv.Atoi(args[0])
	if err != nil {
		return "", err
	}
	errs := make([]error, atATime)
	var dialers sync.WaitGroup
	for d := range atATime {
		dialers.Go(func() {
			for i := d; i < n && errs[d] == nil; i += atATime {
				errs[d] = p.openOne(args[1])
			}
		})
	}
	dialers.Wait()
	return "opened", errors.Join(errs...)
}

func (p *party) openOne(address string) error {
	c, err := net.DialTimeout("tcp", address, patience)
	if err != nil {
		return err
	}
	c.SetDeadline(time.Now().Add(2 * patience))
	if _, err := io.WriteString(c, request("GET /ws HTTP/1.1", "Host: many.test", "Upgrade: websocket", "Connection: Upgrade",
		"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13")); err != nil {
		return err
	}
	p.add(c.(*net.TCPConn))
	return wantHead(c, agreed)
}

// say sends the hellos.
func (p *party) say([]string) (string, error) {
	for _, c := range p.conns {
		if _, err := io.WriteString(c, hello(c.manner)); err != nil {
			return "", err
		}
	}
	return "said", nil
}

// echo sends the hellos back.
func (p *party) echo([]string) (string, error) {
	for _, c := range p.conns {
		b := make([]byte, len(hello(0)))
		if _, err := io.ReadFull(c, b); err != nil {
			return "", err
		}
		c.manner = b[len(b)-1]
		if _, err := c.Write(b); err != nil {
			return "", err
		}
	}
	return "echoed", nil
}

// hear waits for the hellos to come back.
func (p *party) hear([]string) (string, error) {
	for _, c := range p.conns {
		b := make([]byte, len(hello(0)))
		if _, err := io.ReadFull(c, b); err != nil || string(b) != hello(c.manner) {
			return "", fmt.Errorf("got %q (%v), want %q", b, err, hello(c.manner))
		}
	}
	return "heard", nil
}

// end ends the tunnels in those manners, and returns how many.
func (p *party) end(manners []string) (string, error) {
	var left []*voice
	for _, c := range p.conns {
		if !slices.Contains(manners, string(c.manner)) {
			left = append(left, c)
			continue
		}
		if c.manner == clientResets {
			c.SetLinger(0)
		}
		if err := c.Close(); err != nil {
			return "", err
		}
	}
	ended := len(p.conns) - len(left)
	p.conns = left
	return strconv.Itoa(ended), nil
}

// wait waits until the others have ended all tunnels that are left.
func (p *party) wait([]string) (string, error) {
	for _, c := range p.conns {
		want := io.EOF
		if c.manner == clientResets {
			want = syscall.ECONNRESET
		}
		if n, err := c.Read(make([]byte, 1)); n != 0 || !errors.Is(err, want) {
			return "", fmt.Errorf("read %d bytes and %v, want %v", n, err, want)
		}
		c.Close()
	}
	return "waited", nil
}
