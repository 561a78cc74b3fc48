package metrics_test

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"holdfast/internal/metrics"
)

func TestWhatAGenerationCountsIsReadFromItsFile(t *testing.T) {
	t.Parallel()
	f := newFile(t)
	if got := wantFamilies(t, f); len(got) != 0 {
		t.Errorf("a file that nobody has opened holds %v", got)
	}
	r := open(t, f)
	r.Counter(requests, "a", "200").Add(3)
	r.Counter(requests, "", "Größe\n\"").Inc()
	r.Gauge(connections).Set(-7)
	r.Histogram(duration, "x").Observe(int64(time.Second))
	want := r.Families()
	if got := wantFamilies(t, f); !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	r.Counter(requests, "a", "200").Inc()
	if got := find(wantFamilies(t, f), requests.Name)[0].Value; got != 4 {
		t.Errorf("got %d", got)
	}
}

// The child of TestWhatWasCountedOutlivesAProcessThatIsKilled.
func becomeChild() {
	if os.Getenv("HOLDFAST_TEST_COUNT") == "" {
		return
	}
	r, err := metrics.Open(3)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	for range 1000 {
		r.Counter(requests, "a", "200").Inc()
	}
	r.Histogram(duration, "x").Observe(int64(time.Second))
	syscall.Kill(os.Getpid(), syscall.SIGKILL)
	select {}
}

func TestWhatWasCountedOutlivesAProcessThatIsKilled(t *testing.T) {
	t.Parallel()
	f := newFile(t)
	fd, err := unix.FcntlInt(uintptr(f.FD()), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	sent := os.NewFile(uintptr(fd), "metrics")
	defer sent.Close()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "HOLDFAST_TEST_COUNT=1")
	cmd.ExtraFiles = []*os.File{sent}
	out, err := cmd.CombinedOutput()
	exit, ok := errors.AsType[*exec.ExitError](err)
	if !ok || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Fatalf("the child was not killed: %v\n%s", err, out)
	}
	families := wantFamilies(t, f)
	if got := find(families, requests.Name); len(got) != 1 || got[0].Value != 1000 {
		t.Errorf("got %+v", got)
	}
	if got := find(families, duration.Name); len(got) != 1 || got[0].Sum != int64(time.Second) {
		t.Errorf("got %+v", got)
	}
}

func TestNobodyCanTakeTheFileAwayUnderItsReader(t *testing.T) {
	t.Parallel()
	f := newFile(t)
	for _, size := range []int64{0, metrics.Size - 1, metrics.Size + 1} {
		if err := unix.Ftruncate(f.FD(), size); !errors.Is(err, unix.EPERM) {
			t.Errorf("truncated to %d: %v", size, err)
		}
	}
	if _, err := unix.FcntlInt(uintptr(f.FD()), unix.F_ADD_SEALS, unix.F_SEAL_FUTURE_WRITE); !errors.Is(err, unix.EPERM) {
		t.Errorf("another seal: %v", err)
	}
	if flags, err := unix.FcntlInt(uintptr(f.FD()), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("inherited by whatever is executed: %x, %v", flags, err)
	}
}

func TestAGenerationCountsOnlyInAFileThatIsItsOwn(t *testing.T) {
	t.Parallel()
	const all = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW
	for name, c := range map[string]struct {
		size  int64
		seals int
		bytes string
	}{
		"may shrink":       {size: metrics.Size, seals: all &^ unix.F_SEAL_SHRINK},
		"may grow":         {size: metrics.Size, seals: all &^ unix.F_SEAL_GROW},
		"may be sealed":    {size: metrics.Size, seals: all &^ unix.F_SEAL_SEAL},
		"cannot be mapped": {size: metrics.Size, seals: all | unix.F_SEAL_WRITE},
		"empty":            {size: 0, seals: all},
		"too small":        {size: 4096, seals: all},
		"too large":        {size: 2 << 30, seals: all},
		"in use":           {size: metrics.Size, seals: all, bytes: strings.Repeat("x", 64)},
	} {
		fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Ftruncate(fd, c.size); err != nil {
			t.Fatal(err)
		}
		if _, err := unix.Pwrite(fd, []byte(c.bytes), 0); err != nil {
			t.Fatal(err)
		}
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, c.seals); err != nil {
			t.Fatal(err)
		}
		if dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0); err != nil {
			t.Fatal(err)
		} else if f, err := metrics.OpenFile(dup); (err == nil) != (name == "in use") && name != "cannot be mapped" {
			t.Errorf("%s: opened for reading: %v, %v", name, f, err)
		} else if err == nil {
			defer f.Close()
		}
		if _, err := metrics.Open(fd); err == nil {
			t.Errorf("%s: opened", name)
		}
	}
	if _, err := metrics.OpenFile(-1); err == nil {
		t.Error("opened nothing for reading")
	}
	if _, err := metrics.Open(-1); err == nil {
		t.Error("opened nothing")
	}
}

// Runs alone: what another test opens could have the same number.
func TestOpenTakesTheDescriptorOver(t *testing.T) {
	f := newFile(t)
	for range 2 { // the second one is refused: the file is in use
		fd, err := unix.Dup(f.FD())
		if err != nil {
			t.Fatal(err)
		}
		metrics.Open(fd)
		if err := unix.Close(fd); !errors.Is(err, unix.EBADF) {
			t.Errorf("the descriptor is still open: %v", err)
		}
	}
	null, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := metrics.OpenFile(null); err == nil {
		t.Error("read from what is no memory file")
	}
	if err := unix.Close(null); !errors.Is(err, unix.EBADF) {
		t.Errorf("the descriptor is still open: %v", err)
	}
}

func TestAClosedFileHoldsNothing(t *testing.T) {
	t.Parallel()
	f := newFile(t)
	open(t, f).Counter(requests, "a", "b").Inc()
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			if families, err := f.Families(); errors.Is(err, os.ErrClosed) {
				return
			} else if err != nil || len(families) == 0 {
				t.Errorf("got %v, %v", families, err)
				return
			}
		}
	}()
	for range 2 {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}
	<-done
}

func TestAFullFileIsCountedInOnAndSaysWhatItDoesNotShow(t *testing.T) {
	t.Parallel()
	const placed = 1 << 16 // without the series that says what is not shown
	f := newFile(t)
	r := open(t, f)
	for i := range placed + 9 {
		r.Counter(requests, "a", fmt.Sprint(i)).Inc()
	}
	last := r.Counter(requests, "a", fmt.Sprint(placed+8))
	last.Inc()
	if last.Value() != 2 || r.Counter(requests, "a", fmt.Sprint(placed+8)) != last {
		t.Error("a series without a place does not count")
	}
	r.Gauge(connections) // a family that is new, too
	families := wantFamilies(t, f)
	if got := find(families, "holdfast_metrics_unshown_series"); len(got) != 1 || got[0].Value != 11 {
		t.Errorf("got %+v, want 11", got)
	}
	if got := len(find(families, requests.Name)); got != placed-1 {
		t.Errorf("%d series are shown", got)
	}
}

func TestAFileWithoutRoomForItsBytesIsFull(t *testing.T) {
	t.Parallel()
	f := newFile(t)
	r := open(t, f)
	long := strings.Repeat("x", 500)
	for i := range 20_000 {
		r.Counter(requests, long, fmt.Sprint(i)).Inc()
	}
	families := wantFamilies(t, f)
	shown, unshown := len(find(families, requests.Name)), find(families, "holdfast_metrics_unshown_series")[0].Value
	if unshown != 0 || shown != 20_000 {
		t.Fatalf("%d shown, %d not", shown, unshown)
	}
	for i := range 20_000 {
		r.Counter(requests, fmt.Sprint(i), long).Inc()
	}
	families = wantFamilies(t, f)
	shown, unshown = len(find(families, requests.Name)), find(families, "holdfast_metrics_unshown_series")[0].Value
	if shown < 25_000 || unshown == 0 || shown+int(unshown) != 40_000 {
		t.Errorf("%d shown, %d not", shown, unshown)
	}
}

// gauge is a definition without labels, as it is in a file.
func (h *handmade) gauge(name string) {
	h.record(1, []byte{byte(metrics.TypeGauge), 0, 0, 0, 0}, name, "Help.")
}

func TestWhatANewerBuildWritesIsSkipped(t *testing.T) {
	t.Parallel()
	h := newHandmade()
	h.record(77, "what", "ever")
	h.gauge("holdfast_known")
	h.record(78)
	h.record(2, uint32(0), pad{}, uint64(5))
	f := newFile(t)
	h.into(t, f)
	if got := find(wantFamilies(t, f), "holdfast_known"); len(got) != 1 || got[0].Value != 5 {
		t.Errorf("got %+v", got)
	}
}

// Each of these is left out and said, and what is good beside it is returned.
func TestNonsenseIsLeftOut(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		nonsense func(h *handmade)
		want     string
	}{
		"a bad name":             {func(h *handmade) { h.gauge("up") }, "the name is not of the form"},
		"a name with a line":     {func(h *handmade) { h.gauge("holdfast_x 1\nup") }, "the name is not of the form"},
		"another prefix":         {func(h *handmade) { h.gauge("process_cpu") }, "the name is not of the form"},
		"a metric twice":         {func(h *handmade) { h.gauge("holdfast_good") }, "is defined twice"},
		"an unknown type":        {func(h *handmade) { h.record(1, []byte{9, 0, 0, 0, 0}, "holdfast_x", "Help.") }, "is not known"},
		"a cut definition":       {func(h *handmade) { h.record(1, []byte{1, 0, 0, 200, 0}, "holdfast_x", "Help.") }, "is cut"},
		"bounds that fall":       {func(h *handmade) { h.record(1, []byte{2, 0, 0, 0, 2}, "holdfast_x", "Help.", bound(2), bound(1)) }, "do not rise"},
		"too many labels":        {func(h *handmade) { h.record(1, []byte{1, 0, 0, 255, 0}, "holdfast_x", "Help.", make([]byte, 600)) }, "too many"},
		"too many bounds":        {func(h *handmade) { h.record(1, []byte{2, 0, 0, 0, 255}, "holdfast_x", "Help.", make([]byte, 2048)) }, "1 to 64 bounds"},
		"a series of nothing":    {func(h *handmade) { h.record(2, uint32(1<<31), pad{}, uint64(5)) }, "no metric"},
		"an empty series":        {func(h *handmade) { h.record(2) }, "no metric"},
		"a series too short":     {func(h *handmade) { h.record(2, uint32(0)) }, "wrong length"},
		"a series too long":      {func(h *handmade) { h.record(2, uint32(0), pad{}, uint64(1), uint64(2)) }, "wrong length"},
		"a label that is cut":    {func(h *handmade) { h.labelled(); h.record(2, uint32(1), []byte{255, 255}) }, "wrong length"},
		"a label that is binary": {func(h *handmade) { h.labelled(); h.record(2, uint32(1), "\xff", pad{}, uint64(1)) }, "not valid"},
		"a label without an end": {func(h *handmade) { h.labelled(); h.record(2, uint32(1), strings.Repeat("x", 513), pad{}, uint64(1)) }, "not valid"},
	} {
		h := newHandmade()
		h.gauge("holdfast_good")
		c.nonsense(&h)
		h.record(2, uint32(0), pad{}, uint64(5))
		f := newFile(t)
		h.into(t, f)
		families, err := f.Families()
		if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
		if got := find(families, "holdfast_good"); len(got) != 1 || got[0].Value != 5 {
			t.Errorf("%s: got %+v", name, got)
		}
	}
}

func bound(b float64) uint64 { return math.Float64bits(b) }

func (h *handmade) labelled() {
	h.record(1, []byte{1, 0, 0, 1, 0}, "holdfast_labelled", "Help.", "a")
}

func TestAFileThatIsNotAsItShouldBeIsLeftOut(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		change func(h handmade)
		want   string
		good   bool // what comes before
	}{
		"another magic":          {change: func(h handmade) { h[0]++ }, want: "not a memory file"},
		"another layout":         {change: func(h handmade) { h[8]++ }, want: "layout version 2"},
		"more than there is":     {change: func(h handmade) { order.PutUint64(h[16:], metrics.Size+8) }, want: "bytes in use"},
		"more than there can be": {change: func(h handmade) { order.PutUint64(h[16:], math.MaxUint64-7) }, want: "bytes in use"},
		"less than a header":     {change: func(h handmade) { order.PutUint64(h[16:], 56) }, want: "bytes in use"},
		"half a cell":            {change: func(h handmade) { order.PutUint64(h[16:], uint64(len(h)-4)) }, want: "bytes in use"},
		"nothing after it":       {change: func(h handmade) { order.PutUint64(h[16:], uint64(len(h)+64)) }, want: "a record of 0 bytes", good: true},
		"a record without end":   {change: func(h handmade) { order.PutUint32(h[len(h)-20:], 1<<31) }, want: "a record of", good: true},
		"a record of odd length": {change: func(h handmade) { order.PutUint32(h[len(h)-20:], 23) }, want: "a record of 23 bytes", good: true},
	} {
		h := newHandmade()
		h.gauge("holdfast_good")
		h.record(2, uint32(0), pad{}, uint64(5))
		h.record(2, uint32(0), pad{}, uint64(5))
		order.PutUint64(h[16:], uint64(len(h)))
		c.change(h)
		f := newFile(t)
		h.into(t, f)
		families, err := f.Families()
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
		if got := find(families, "holdfast_good"); (len(got) > 0) != c.good {
			t.Errorf("%s: got %+v", name, got)
		}
	}
}

// fill repeats a record as often as there is room.
func (h *handmade) fill(kind uint32, body ...any) {
	var one handmade
	one.record(kind, body...)
	*h = append(*h, bytes.Repeat(one, (metrics.Size-len(*h))/len(one))...)
}

func TestAFileOfNonsenseCostsNoMoreThanItsSize(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		fill func(h *handmade)
		want string
	}{
		"definitions": {func(h *handmade) {
			for i := range 2000 {
				h.gauge(fmt.Sprint("holdfast_", i))
			}
		}, "metrics: too many definitions"},
		"series":   {func(h *handmade) { h.fill(2, uint32(0), pad{}, uint64(1)) }, "metrics: too many series"},
		"mistakes": {func(h *handmade) { h.fill(2) }, "more"},
		"unknown":  {func(h *handmade) { h.fill(3) }, "<nil>"},
	} {
		h := newHandmade()
		h.gauge("holdfast_good")
		c.fill(&h)
		f := newFile(t)
		h.into(t, f)
		families, err := f.Families()
		if got := fmt.Sprint(err); !strings.HasSuffix(got, c.want) || len(got) > 1000 {
			t.Errorf("%s: %.2000v", name, err)
		}
		if got := len(find(families, "holdfast_good")); got > 1<<16 || len(families) > 1<<10 {
			t.Errorf("%s: %d series, %d metrics", name, got, len(families))
		}
	}
}

func wantValid(t *testing.T, d *metrics.Desc, s metrics.Series) {
	t.Helper()
	buckets := 0
	if d.Type == metrics.TypeHistogram {
		buckets = len(d.Bounds) + 1
	}
	if len(s.Labels) != len(d.Labels) || len(s.Buckets) != buckets || s.Sum < 0 || d.Type == metrics.TypeCounter && s.Value < 0 {
		t.Errorf("%s: %+v", d.Name, s)
	}
	for _, v := range s.Labels {
		if len(v) > 512 || !utf8.ValidString(v) {
			t.Errorf("%s: the value %q", d.Name, v)
		}
	}
}

// FuzzFile: whatever the bytes are, what is returned is valid.
func FuzzFile(f *testing.F) {
	good := newHandmade()
	good.gauge("holdfast_good")
	good.record(2, uint32(0), pad{}, uint64(5))
	good.labelled()
	good.record(2, uint32(1), "value", pad{}, uint64(5))
	good.record(1, []byte{2, 0, 1, 0, 2}, "holdfast_x_seconds", "Help.", bound(1), bound(2))
	good.record(2, uint32(2), pad{}, uint64(1), uint64(2), uint64(3), uint64(4))
	good.record(1, []byte{0, 3, 0, 0, 0}, "holdfast_x_total", "Help.")
	good.record(3, "unknown")
	order.PutUint64(good[16:], uint64(len(good)))
	f.Add([]byte(good))
	f.Add([]byte(good[:64]))
	f.Add([]byte{})
	for at := 64; at < len(good); at += 24 {
		bad := append([]byte(nil), good...)
		bad[at] ^= 0x41
		f.Add(bad)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		file := newFile(t)
		write(t, file, b)
		families, err := file.Families()
		if err != nil && len(err.Error()) > 10_000 {
			t.Fatalf("an error of %d bytes", len(err.Error()))
		}
		series := 0
		names := make(map[string]bool)
		for i := range families {
			d := &families[i].Desc
			if err := d.Check(); err != nil || names[d.Family()] {
				t.Errorf("%s is there: %v", d.Name, err)
			}
			names[d.Family()] = true
			series += len(families[i].Series)
			for _, s := range families[i].Series {
				wantValid(t, d, s)
			}
		}
		if series > 1<<16 || len(families) > 1<<10 {
			t.Errorf("%d series of %d metrics", series, len(families))
		}
	})
}
