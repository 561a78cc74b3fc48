package socket_test

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"os/exec"
	"testing"
)

// elsewhere is set in a process that listens at this path until its input ends.
const elsewhere = "SOCKET_TEST_LISTEN"

func TestMain(m *testing.M) {
	if path := os.Getenv(elsewhere); path != "" {
		os.Exit(listenForever(path))
	}
	os.Exit(m.Run())
}

func listenForever(path string) int {
	l, err := net.Listen("unix", path)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer l.Close()
	fmt.Println("listening")
	os.Stdin.Read(make([]byte, 1))
	return 0
}

// listenElsewhere has another process listen at path.
func listenElsewhere(t *testing.T, path string) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), elsewhere+"="+path)
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
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	})
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Fatal(err)
	}
}
