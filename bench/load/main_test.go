package load

import (
	"bufio"
	"io"
	"os"
	"os/exec"
	"testing"

	"go.uber.org/goleak"
)

// roleEnv makes the test binary play the upstream.
const roleEnv = "HOLDFAST_BENCH_TEST_ROLE"

func TestMain(m *testing.M) {
	if os.Getenv(roleEnv) == "upstream" {
		go func() { // it ends with whoever started it
			io.Copy(io.Discard, os.Stdin)
			os.Exit(0)
		}()
		ServeUpstream(1, os.Stdout)
		os.Exit(1)
	}
	goleak.VerifyTestMain(m)
}

// startUpstream starts an upstream in a process of its own.
func startUpstream(t *testing.T) (address string, pid int) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), roleEnv+"=upstream")
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		cmd.Wait()
	})
	lines := bufio.NewScanner(out)
	if !lines.Scan() {
		t.Fatalf("the upstream has said nothing: %v", lines.Err())
	}
	return lines.Text(), cmd.Process.Pid
}

// startClient runs a client here.
func startClient(t *testing.T) *Client {
	t.Helper()
	commands, in := io.Pipe()
	out, answers := io.Pipe()
	done := make(chan error, 1)
	go func() { done <- ServeClient(commands, answers) }()
	t.Cleanup(func() {
		in.Close()
		if err := <-done; err != nil {
			t.Errorf("the client ended with %v", err)
		}
	})
	return NewClient(in, out)
}
