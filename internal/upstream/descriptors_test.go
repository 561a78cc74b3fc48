package upstream_test

import (
	"errors"
	"net"
	"testing"

	"golang.org/x/sys/unix"

	"holdfast/internal/config"
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
	cs, err := upstream.New(t.Context(), &config.Config{Clusters: []config.Cluster{web(l.Addr().String())}}, nil, nil,
		func(fd int) bool { return may })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(cs.Close)
	c, _ := cs.Get("web")
	for e := range c.Endpoints() {
		up, err := e.Get(t.Context())
		if err == nil {
			up.Close()
		}
		if failed, ok := errors.AsType[*upstream.ConnectError](err); !ok || failed.Timeout || !errors.Is(err, unix.EMFILE) {
			t.Errorf("got %v, want that there is no descriptor", err)
		}
		may = true
		up, err = e.Get(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		roundTrip(t, up)
		up.Close()
	}
}
