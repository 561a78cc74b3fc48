package proxy_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"runtime/pprof"
	"strings"
	"sync"
	"testing"

	"holdfast/internal/config"
	"holdfast/internal/control"
	"holdfast/internal/proxy"
)

// apartEnv makes this binary a generation, with the control channel as descriptor 3.
const apartEnv = "HOLDFAST_TEST_GENERATION"

// profileEnv names a file for a profile of what tunnels hold, for who wants to see it.
const profileEnv = "HOLDFAST_TEST_PROFILE"

// generationApart runs a generation that is alone in its process, and answers each line
// on the standard input with what it holds after collections: bytes of objects, and
// private bytes of the process. The line may name a file for a profile of the objects.
func generationApart() int {
	if os.Getenv(profileEnv) != "" {
		runtime.MemProfileRate = 1 // whose own records are private bytes, too
	}
	go func() {
		lines := bufio.NewScanner(os.Stdin)
		for lines.Scan() {
			runtime.GC()
			debug.FreeOSMemory()
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			private := privateBytes()
			if path := lines.Text(); path != "" {
				if f, err := os.Create(path); err == nil {
					pprof.Lookup("heap").WriteTo(f, 0)
					f.Close()
				}
			}
			fmt.Println(m.HeapAlloc, private)
		}
		os.Exit(0) // the test is over
	}()
	err := proxy.Run(context.Background(), proxy.Options{Control: 3, Loops: 2, Logger: func(config.Log, int) proxy.Logger {
		return proxy.Logger{Log: slog.New(slog.DiscardHandler), Level: new(slog.LevelVar), Dropped: func() uint64 { return 0 }}
	}})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// privateBytes is what the kernel would get back if the process ended.
func privateBytes() (n int64) {
	text, _ := os.ReadFile("/proc/self/smaps_rollup")
	for line := range strings.Lines(string(text)) {
		var kib int64
		if name, rest, ok := strings.Cut(line, ":"); ok && strings.HasPrefix(name, "Private_") {
			fmt.Sscan(rest, &kib)
			n += kib << 10
		}
	}
	return n
}

// apart is a generation in a process of its own.
type apart struct {
	t   *testing.T
	cmd *exec.Cmd
	end func() error // waits for the process, any number of times
	in  io.Writer
	out *bufio.Reader
}

// kill ends the process as the kernel does, and waits for that.
func (a *apart) kill() {
	a.t.Helper()
	if err := a.cmd.Process.Kill(); err != nil {
		a.t.Fatal(err)
	}
	a.end()
}

// apartIn has the commander's generation run in a process of its own.
func (a *apart) option(c *commander) {
	a.t = c.t
	c.run = func(fd int) (end func()) {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), apartEnv+"=1")
		channel := os.NewFile(uintptr(fd), "control")
		defer channel.Close()
		cmd.ExtraFiles, cmd.Stderr = []*os.File{channel}, os.Stderr
		in, err := cmd.StdinPipe()
		if err != nil {
			a.t.Fatal(err)
		}
		out, err := cmd.StdoutPipe()
		if err != nil {
			a.t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			a.t.Fatal(err)
		}
		a.cmd, a.end = cmd, sync.OnceValue(cmd.Wait)
		a.in, a.out = in, bufio.NewReader(out)
		return func() {
			in.Close()
			c.ended <- a.end()
		}
	}
}

// holds asks the generation for bytes of objects and private bytes. profile may be "".
func (a *apart) holds(profile string) (objects, private int64) {
	a.t.Helper()
	if _, err := fmt.Fprintln(a.in, profile); err != nil {
		a.t.Fatal(err)
	}
	if _, err := fmt.Fscanln(a.out, &objects, &private); err != nil {
		a.t.Fatal(err)
	}
	return objects, private
}

// Of the exchange that a tunnel was, nothing stays: neither the heads, which are large
// here, nor buffers, timers or goroutines.
func TestATunnelKeepsNothingOfItsExchange(t *testing.T) {
	t.Parallel()
	const tunnels, most = 1000, 400
	a := new(apart)
	c := command(t, "trusted_proxies = [\"127.0.0.1\"]", "", a.option)
	c.serve()
	open := func(n int) {
		for range n {
			client := c.dial()
			// The id that a trusted proxy has given is part of the head.
			client.say("GET /socket HTTP/1.1\nHost: a.example\nConnection: Upgrade\nUpgrade: websocket\nX-Padding: %s\nX-Request-Id: given-%08x\n\n",
				strings.Repeat("x", 4<<10), n)
			server := c.endpoint()
			server.head()
			server.say("HTTP/1.1 101 Switching Protocols\nConnection: Upgrade\nUpgrade: websocket\nX-Padding: %s\n\n", strings.Repeat("y", 4<<10))
			client.wantHead("101")
		}
	}
	open(10) // what is made once
	objects, private := a.holds("")
	open(tunnels)
	c.awaitConnections(0)
	objectsNow, privateNow := a.holds(os.Getenv(profileEnv))
	each := (objectsNow - objects) / tunnels
	t.Logf("%d bytes of objects and %d private bytes for each tunnel", each, (privateNow-private)/tunnels)
	if each > most {
		t.Errorf("an idle tunnel holds %d bytes of objects, want at most %d", each, most)
	}
}

// awaitConnections waits until the codec has let go of all but n.
func (c *commander) awaitConnections(n int) {
	c.t.Helper()
	eventually(c.t, "the codec lets go", func() bool {
		return c.ask(control.Message{Type: control.TypeStatus}).Status.Connections == n
	})
}
