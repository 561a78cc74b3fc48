package e2e

import (
	"io"
	"os"
	"syscall"
	"testing"
)

// Nobody may be able to stop the service by not reading its log.
func TestALogReaderThatGoesAwayStopsNothing(t *testing.T) {
	t.Parallel()
	backend := newBackend(t)
	config := simple(backend, "[log]\nlevel = \"debug\"\n")
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	i := newInstance(t, config)
	i.start(w)
	w.Close()
	io.ReadFull(r, make([]byte, 64)) // it has said something
	r.Close()                        // every write is EPIPE, with SIGPIPE, from now on
	i.talkAndReload(config)
}

func TestALogReaderThatNeverReadsStopsNothing(t *testing.T) {
	t.Parallel()
	backend := newBackend(t)
	config := simple(backend, "[log]\nlevel = \"debug\"\n")
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	// The smallest pipe there is, so that it is full at once.
	if _, _, errno := syscall.Syscall(syscall.SYS_FCNTL, w.Fd(), syscall.F_SETPIPE_SZ, 4096); errno != 0 {
		t.Fatal(errno)
	}
	i := newInstance(t, config)
	i.start(w)
	w.Close()
	i.talkAndReload(config)
}

// talkAndReload has the service do everything that it logs.
func (i *instance) talkAndReload(config string) {
	i.t.Helper()
	load := startLoad(i.t, i.address("public"), 6)
	for range 3 {
		i.reload(config)
		load.awaitProgress()
	}
	s := i.status()
	syscall.Kill(s.Generations[0].PID, syscall.SIGKILL)
	wantAnswer(i.t, i.address("public"))
	load.stop()
	if code, _, errs := i.holdfast("stop"); code != 0 {
		i.t.Errorf("stop: exit code %d: %s", code, errs)
	}
	i.awaitEnd()
}
