package ledger_test

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"holdfast/internal/ledger"
)

const childMark = "HOLDFAST_TEST_WRITE"

func TestMain(m *testing.M) {
	if os.Getenv(childMark) != "" {
		fmt.Fprintln(os.Stderr, writeForever())
		os.Exit(1)
	}
	goleak.VerifyTestMain(m)
}

// writeForever says the descriptor of a new file, then each sequence number that was
// written.
func writeForever() error {
	f, err := ledger.New()
	if err != nil {
		return err
	}
	if _, err := fmt.Println(f.FD()); err != nil {
		return err
	}
	for i := uint64(1); ; i++ {
		if err := f.Write(pattern(i)); err != nil {
			return err
		}
		if _, err := os.Stdout.Write(order.AppendUint64(nil, i)); err != nil {
			return err
		}
	}
}

// A maker that writes without a pause is killed. What is left is whole, it is what was
// written last or what was about to be, and nothing that was read before is newer.
func TestAMakerIsKilledAtAnyMoment(t *testing.T) {
	t.Parallel()
	const kills = 50
	interrupted := 0
	for range kills {
		if killedWhileWriting(t) {
			interrupted++
		}
	}
	t.Logf("%d of %d were killed within a write", interrupted, kills)
}

func killedWhileWriting(t *testing.T) (interrupted bool) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childMark+"=1")
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	words := bufio.NewReader(out)
	var number int
	if _, err := fmt.Fscanln(words, &number); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Open(fmt.Sprintf("/proc/%d/fd/%d", cmd.Process.Pid, number), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)

	kill := time.AfterFunc(rand.N(20*time.Millisecond), func() { cmd.Process.Kill() })
	defer kill.Stop()
	said, before := uint64(0), uint64(0)
	for word := make([]byte, 8); ; {
		if _, err := io.ReadFull(words, word); err != nil {
			break // it is dead
		}
		said = order.Uint64(word)
		if said%16 == 0 {
			var b []byte
			if now, err := ledger.Read(fd, &b); err == nil {
				before = wantContent(t, now, b, max(before, said))
			}
		}
	}
	cmd.Wait()

	var b []byte
	last, err := ledger.Read(fd, &b)
	if said == 0 && err != nil {
		return true // killed within the first write
	}
	if err != nil {
		t.Fatalf("after %d: %v", said, err)
	}
	wantContent(t, last, b, max(before, said))
	if last > said+1 {
		t.Errorf("%d is there, %d was said", last, said)
	}
	return wholeSlots(t, fd) < 2
}

// wantContent fails unless b is what was written with this number, not before least. It
// returns the number.
func wantContent(t *testing.T, sequence uint64, b []byte, least uint64) uint64 {
	t.Helper()
	if sequence < least || !bytes.Equal(b, pattern(sequence)) {
		t.Fatalf("%d with %d bytes is there; at least %d was", sequence, len(b), least)
	}
	return sequence
}

// wholeSlots returns how many of the slots fit their checksums.
func wholeSlots(t *testing.T, fd int) (whole int) {
	t.Helper()
	head := make([]byte, 64)
	if _, err := unix.Pread(fd, head, 0); err != nil {
		t.Fatal(err)
	}
	size := int64(order.Uint64(head[16:]))
	for at := int64(64); at < 64+2*size; at += size {
		b := make([]byte, 24+longest)
		if _, err := unix.Pread(fd, b, at); err != nil {
			t.Fatal(err)
		}
		content := string(b[24:][:order.Uint64(b[8:])])
		if bytes.HasPrefix(b, slot(order.Uint64(b), content)) {
			whole++
		}
	}
	return whole
}
