package metrics_test

import (
	"encoding/binary"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"holdfast/internal/metrics"
)

func TestMain(m *testing.M) {
	becomeChild()
	goleak.VerifyTestMain(m)
}

func newFile(t testing.TB) *metrics.File {
	t.Helper()
	f, err := metrics.NewFile()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	return f
}

// open is what a generation does that was sent the descriptor.
func open(t testing.TB, f *metrics.File) *metrics.Registry {
	t.Helper()
	fd, err := unix.Dup(f.FD())
	if err != nil {
		t.Fatal(err)
	}
	r, err := metrics.Open(fd)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// find returns the series of a metric in what was read.
func find(families []metrics.Family, name string) []metrics.Series {
	for _, f := range families {
		if f.Desc.Name == name {
			return f.Series
		}
	}
	return nil
}

func wantFamilies(t *testing.T, f *metrics.File) []metrics.Family {
	t.Helper()
	families, err := f.Families()
	if err != nil {
		t.Fatal(err)
	}
	return families
}

var order = binary.NativeEndian

// handmade is a memory file as the documentation of the package describes it.
type handmade []byte

func newHandmade() handmade {
	h := make(handmade, 64)
	copy(h, "HFmetric")
	order.PutUint64(h[8:], 1)
	return h
}

func (h *handmade) record(kind uint32, body ...any) {
	var b []byte
	for _, v := range body {
		switch v := v.(type) {
		case string:
			b = append(order.AppendUint16(b, uint16(len(v))), v...)
		case []byte:
			b = append(b, v...)
		case uint32:
			b = order.AppendUint32(b, v)
		case uint64: // a cell, or a bound
			b = order.AppendUint64(b, v)
		case pad:
			b = append(b, make([]byte, -len(b)&7)...)
		}
	}
	b = append(b, make([]byte, -len(b)&7)...)
	*h = order.AppendUint32(*h, kind)
	*h = order.AppendUint32(*h, uint32(8+len(b)))
	*h = append(*h, b...)
}

type pad struct{}

// into writes the file's bytes in place of what a generation would.
func (h handmade) into(t testing.TB, f *metrics.File) {
	t.Helper()
	if order.Uint64(h[16:]) == 0 {
		order.PutUint64(h[16:], uint64(len(h)))
	}
	write(t, f, h)
}

func write(t testing.TB, f *metrics.File, b []byte) {
	t.Helper()
	if _, err := unix.Pwrite(f.FD(), b[:min(len(b), metrics.Size)], 0); err != nil {
		t.Fatal(err)
	}
}
