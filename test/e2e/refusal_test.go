package e2e

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// A reload that cannot work changes nothing, and says why.
func TestEachRefusalLeavesTheOldGenerationAlone(t *testing.T) {
	t.Parallel()
	backend := newBackend(t)
	good := simple(backend, "[reload]\nready_timeout = \"5s\"\n")
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	i := serve(t, good)
	load := startLoad(t, i.address("public"), 4)
	second := func(address string) string {
		return fmt.Sprintf("\n[[listeners]]\nname = \"second\"\naddress = %q\n", address)
	}
	for _, c := range []struct {
		name, config string
		code         int
		says         string
	}{
		{"broken syntax", good + "[[[", 2, "holdfast.toml:"},
		{"an unknown key", strings.Replace(good, "websocket =", "websockets =", 1), 2, `"websocket"`},
		{"a missing cluster", strings.Replace(good, "name = \"backend\"\nendpoints", "name = \"other\"\nendpoints", 1), 2, "backend"},
		{"a name that does not resolve", strings.Replace(good, backend, "nowhere.invalid:80", 1), 1, "nowhere.invalid"},
		{"a port that is taken", good + second(taken.Addr().String()), 1, taken.Addr().String()},
		{"an address of another machine", good + second("192.0.2.1:80"), 1, "192.0.2.1"},
		{"a unix path in a folder that is not there", good + second("unix:/nowhere/s"), 1, "/nowhere/s"},
		{"an admin address that is taken", good + "[admin]\nhttp = \"" + taken.Addr().String() + "\"\n", 1, "admin"},
	} {
		t.Run(c.name, func(t *testing.T) { i.on(t).wantRefused(c.config, c.code, c.says) })
	}
	t.Run("the file is gone", func(t *testing.T) {
		os.Remove(i.config())
		code, _, errs := i.on(t).holdfast("reload")
		if code != 2 || !strings.Contains(errs, "no such file") {
			t.Errorf("exit code %d: %s", code, errs)
		}
	})
	i.reload(good) // and it goes on as if nothing had been
	load.awaitProgress()
	load.stop()
	load.report()
}

func TestABrokenProxyBinaryIsRefused(t *testing.T) {
	t.Parallel()
	backend := newBackend(t)
	i := newInstance(t, "")
	// The configured binary is a path whose file changes, as an installation does it.
	binary := filepath.Join(i.dir, "proxy")
	install := func(name string) {
		t.Helper()
		tmp := binary + ".new"
		if err := copyExecutable(program(name), tmp); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(tmp, binary); err != nil {
			t.Fatal(err)
		}
	}
	config := simple(backend, fmt.Sprintf("[process]\nproxy = %q\n[reload]\nready_timeout = \"3s\"\n", binary))
	install("holdfast-proxy")
	i.write(config)
	i.start(nil)
	load := startLoad(t, i.address("public"), 4)
	for _, c := range []struct{ mood, says string }{
		{"crash in check", "crash in check"},
		{"crash", "exit status 2"},
		{"hang", "did not say hello within 3s"},
		{"foreign", "control protocol 90 to 99"},
		{"rubbish", "protocol violated"},
	} {
		t.Run(c.mood, func(t *testing.T) {
			if err := os.WriteFile(filepath.Join(i.dir, "mood"), []byte(c.mood), 0o600); err != nil {
				t.Fatal(err)
			}
			install("badproxy")
			i.on(t).wantRefused(config, 1, c.says)
		})
	}
	t.Run("missing", func(t *testing.T) {
		os.Remove(binary)
		i.on(t).wantRefused(config, 1, "no such file")
	})
	t.Run("not executable", func(t *testing.T) {
		if err := os.WriteFile(binary, []byte("#!/bin/sh\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		i.on(t).wantRefused(config, 1, "permission denied")
	})
	install("holdfast-proxy")
	i.reload(config)
	load.awaitProgress()
	load.stop()
	load.report()
}

func TestStartIsRefusedWithAReason(t *testing.T) {
	t.Parallel()
	backend := newBackend(t)
	t.Run("a broken file", func(t *testing.T) {
		i := newInstance(t, simple(backend, "nonsense"))
		i.launch(nil)
		i.wantEnd(2, "not valid TOML")
	})
	t.Run("a second supervisor with the same runtime directory", func(t *testing.T) {
		i := serve(t, simple(backend, ""))
		j := &instance{t: t, dir: i.dir, log: new(lockedBuffer)}
		j.launch(nil)
		j.wantEnd(1, fmt.Sprint(i.cmd.Process.Pid))
		wantAnswer(t, i.address("public"))
	})
	t.Run("no supervisor to command", func(t *testing.T) {
		i := newInstance(t, "")
		code, _, errs := i.holdfast("status")
		if code != 1 || !strings.Contains(errs, i.runtime()) {
			t.Errorf("exit code %d: %s", code, errs)
		}
	})
	t.Run("check says the same as start", func(t *testing.T) {
		i := newInstance(t, simple(backend, "[stop]\ntimeout = 3\n[reload]\nprobatoin = \"1s\"\n"))
		code, _, errs := i.holdfast("check", "-c", i.config())
		if code != 2 || !strings.Contains(errs, "probation") || !strings.Contains(errs, "stop.timeout") {
			t.Errorf("exit code %d: %s", code, errs)
		}
		i.write(simple(backend, ""))
		if code, _, errs := i.holdfast("check", "-c", i.config()); code != 0 {
			t.Errorf("exit code %d: %s", code, errs)
		}
	})
}

// on is the same service, with failures reported to a subtest.
func (i *instance) on(t *testing.T) *instance {
	c := *i
	c.t = t
	return &c
}

// wantEnd waits for the supervisor to end by itself, before it has a generation.
func (i *instance) wantEnd(code int, says string) {
	i.t.Helper()
	i.awaitEnd()
	select {
	case <-i.said: // what it has written may still be on its way
	case <-time.After(patience):
		i.t.Error("somebody has survived the supervisor")
	}
	if got := i.cmd.ProcessState.ExitCode(); got != code || !strings.Contains(i.log.String(), says) {
		i.t.Errorf("exit code %d, want %d; it said, and %q must be in it:\n%s", got, code, says, i.log.String())
	}
}
