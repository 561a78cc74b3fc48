package upstream_test

import (
	"errors"
	"net"
	"testing"

	"golang.org/x/sys/unix"

	"holdfast/internal/upstream"
)

// A descriptor that a connection may not have is as good as none, and is given back
// before anybody is connected to.
func TestADescriptorThatAConnectionMayNotHaveIsNotUsed(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	serve(t, l)
	may := false
	e := realClusters(t, nil, func(int) bool { return may }, web(l.Addr().String())).of("web")[0]
	up, err := e.try((*upstream.Endpoint).Get, 0)
	if failed, ok := errors.AsType[*upstream.ConnectError](err); !ok || failed.Timeout || !errors.Is(err, unix.EMFILE) {
		t.Errorf("got %v, %v, want that there is no descriptor", up, err)
	}
	may = true
	e.roundTrip(false)
}
