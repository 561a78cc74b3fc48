package control_test

import (
	"bytes"
	"testing"

	"golang.org/x/sys/unix"

	"holdfast/internal/control"
)

func TestBytesAreReadAsTheyAreAndNoMoreThanAskedFor(t *testing.T) {
	t.Parallel()
	want := []byte("\x1f\x8b no JSON")
	for most, fits := range map[int64]bool{int64(len(want)): true, int64(len(want)) - 1: false, 0: false} {
		f, err := control.Bytes(want)
		if err != nil {
			t.Fatal(err)
		}
		fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		if err := f.Truncate(0); err == nil {
			t.Error("what was sent can be cut")
		}
		f.Close()
		got, err := control.ReadBytes(fd, most)
		if (err == nil) != fits || fits && !bytes.Equal(got, want) {
			t.Errorf("of at most %d bytes: got %q, %v", most, got, err)
		}
	}
}
