package proxy_test

import (
	"context"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// However many requests meet it, there is one line that tells the operator what to do.
func TestRequestsThatFindNoDescriptorToConnectWithSaySoOnce(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f := newFarm(t)
		f.connect[first] = func(context.Context) error {
			return &net.OpError{Op: "dial", Err: os.NewSyscallError("socket", unix.EMFILE)}
		}
		m := f.manager()
		for range 5 {
			get(t, "a.example", "/").start(m).wait().wantStatus(503)
			upgrade(t, "a.example", "/").start(m).wait()
			time.Sleep(time.Second)
		}
		if n := strings.Count(f.logged(), "level=ERROR"); n != 1 {
			t.Errorf("%d lines of level ERROR", n)
		}
		f.wantLog("raise the limit of descriptors")
	})
}
