package supervisor

import (
	"errors"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Not parallel: for its time there are few descriptors for everybody.
func TestDescriptorsAreFreeOrNot(t *testing.T) {
	var before unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &before); err != nil {
		t.Fatal(err)
	}
	next, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(next)
	few := before
	few.Cur = uint64(next) + 10 // the lowest that is free, and so at most ten
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &few); err != nil {
		t.Fatal(err)
	}
	most, none := freeDescriptors(11), freeDescriptors(500)
	var some error
	for range 20 { // what was tried is given back
		some = errors.Join(some, freeDescriptors(1))
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &before); err != nil {
		t.Fatal(err)
	}
	if some != nil {
		t.Errorf("one descriptor: %v", some)
	}
	for n, err := range map[string]error{"11": most, "500": none} {
		if err == nil || !strings.Contains(err.Error(), n+" descriptors are needed and ") {
			t.Errorf("%s descriptors: %v", n, err)
		}
	}
}
