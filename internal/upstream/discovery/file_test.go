package discovery_test

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/upstream/discovery"
)

// listed is a directory with a file that is followed.
type listed struct {
	t    *testing.T
	path string
}

func newListed(t *testing.T, name string) *listed {
	return &listed{t, filepath.Join(t.TempDir(), name)}
}

func (l *listed) config() *config.Discovery {
	return &config.Discovery{By: config.ByFile, File: l.path}
}

func (l *listed) must(err error) {
	l.t.Helper()
	if err != nil {
		l.t.Fatal(err)
	}
}

func (l *listed) write(text string) { l.t.Helper(); l.must(os.WriteFile(l.path, []byte(text), 0o644)) }

// replace renames another file to it.
func (l *listed) replace(text string) {
	l.t.Helper()
	l.must(os.WriteFile(l.path+"~", []byte(text), 0o644))
	l.must(os.Rename(l.path+"~", l.path))
}

func TestTheKernelTellsOfChangesOfAFile(t *testing.T) {
	t.Parallel()
	l := newListed(t, "web.json")
	l.write(`{"endpoints": ["10.0.0.1:80", {"address": "unix:/run/a"}]}`)
	_, f := follow(t, discovery.Options{Config: l.config()})
	if got := f.String(); got != "10.0.0.1:80 unix:/run/a" {
		t.Errorf("begins with %q", got)
	}
	l.replace(`{"endpoints": ["10.0.0.2:80"]}`)
	f.await("10.0.0.2:80")
	l.write(`{"endpoints": ["10.0.0.3:80"]}`)
	f.await("10.0.0.3:80")
	l.must(os.Remove(l.path))
	l.replace(`{"endpoints": []}`)
	f.await("")
}

// Kubernetes has a symbolic link to a directory that is exchanged, and one into that.
func TestADirectoryBehindASymbolicLinkIsExchanged(t *testing.T) {
	t.Parallel()
	l := newListed(t, "web.toml")
	dir := filepath.Dir(l.path)
	publish := func(version, text string) {
		l.must(os.Mkdir(filepath.Join(dir, version), 0o755))
		l.must(os.WriteFile(filepath.Join(dir, version, "web.toml"), []byte(text), 0o644))
		l.must(os.Symlink(version, filepath.Join(dir, "..data_tmp")))
		l.must(os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")))
	}
	publish("..1", "endpoints = [\"10.0.0.1:80\"]\n")
	l.must(os.Symlink("..data/web.toml", l.path))
	_, f := follow(t, discovery.Options{Config: l.config()})
	f.await("10.0.0.1:80")
	publish("..2", "endpoints = [\"10.0.0.2:80\"]\n")
	f.await("10.0.0.2:80")
}

func TestADirectoryThatComesLaterIsFound(t *testing.T) {
	t.Parallel()
	l := newListed(t, "later/web.toml")
	_, f := follow(t, discovery.Options{Config: l.config()})
	l.must(os.Mkdir(filepath.Dir(l.path), 0o755))
	l.replace("endpoints = [\"10.0.0.1:80\"]\n")
	f.await("10.0.0.1:80")
}

// unwatched is a world in which the kernel tells nothing, so that time may be virtual.
func unwatched() *discovery.World {
	return &discovery.World{Watch: func(ctx context.Context, _ []string, _ func()) { <-ctx.Done() }}
}

func TestAFileOfNoUseChangesNothing(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name  string
		spoil func(l *listed)
		says  string
	}{
		{"half written", func(l *listed) { l.write(`{"endpoints": ["10.0.0.1:80", "10.0.`) }, "not valid JSON: unexpected EOF"},
		{"empty", func(l *listed) { l.write("") }, "not valid JSON: EOF"},
		{"another thing", func(l *listed) { l.write("[]") }, "not valid JSON"},
		{"nothing", func(l *listed) { l.write("null") }, "it is no object"},
		{"too much", func(l *listed) { l.write(`{"endpoints": []} {}`) }, "something follows"},
		{"no endpoints", func(l *listed) { l.write("{}") }, "endpoints: missing"},
		{"a name", func(l *listed) { l.write(`{"endpoints": ["a.example:80"]}`) }, "no names"},
		{"a service", func(l *listed) { l.write(`{"endpoints": [{"srv": "_a._tcp.example"}]}`) }, "no names"},
		{"no port", func(l *listed) { l.write(`{"endpoints": ["10.0.0.1"]}`) }, "the port is missing"},
		{"twice", func(l *listed) { l.write(`{"endpoints": ["10.0.0.1:80", "10.0.0.1:80"]}`) }, "listed twice"},
		{"an unknown key", func(l *listed) { l.write(`{"endpoints": [], "version": 3}`) }, "unknown key"},
		{"an unknown key within", func(l *listed) { l.write(`{"endpoints": [{"address": "10.0.0.1:80", "adress": "x"}]}`) }, "unknown key"},
		{"too many", func(l *listed) {
			l.write(`{"endpoints": ["10.0.0.1:80"` + strings.Repeat(`, "10.0.0.1:81"`, config.MostDiscovered) + "]}")
		}, "a cluster can have 4096"},
		{"too large", func(l *listed) { l.write(`{"endpoints": [` + strings.Repeat(" ", 4<<20) + "]}") }, "more than 4 MiB"},
		{"gone", func(l *listed) { l.must(os.Remove(l.path)) }, "it is not there"},
		{"a directory", func(l *listed) { l.must(os.Remove(l.path)); l.must(os.Mkdir(l.path, 0o755)) }, "not a regular file"},
		{"a circle", func(l *listed) { l.must(os.Remove(l.path)); l.must(os.Symlink(l.path, l.path)) }, "too many levels"},
		{"many mistakes", func(l *listed) { l.write(`{"endpoints": ["a"` + strings.Repeat(`, "a"`, 1000) + "]}") }, "mistakes more"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				l := newListed(t, "web.json")
				l.write(`{"endpoints": ["10.0.0.1:80", "10.0.0.2:80"]}`)
				_, f := follow(t, discovery.Options{Config: l.config(), World: unwatched()})
				after(time.Second)
				f.want("10.0.0.1:80 10.0.0.2:80", true)
				tc.spoil(l)
				after(time.Minute)
				f.want("10.0.0.1:80 10.0.0.2:80", true)
				if got := f.log.String(); strings.Count(got, "\n") != 1 || !strings.Contains(got, tc.says) {
					t.Errorf("logged %q, want one line with %q", got, tc.says)
				}
				if f.count(2) != 1 {
					t.Errorf("%d failures are counted, want 1", f.count(2))
				}
				l.must(os.RemoveAll(l.path))
				l.write(`{"endpoints": ["10.0.0.2:80"]}`)
				after(10 * time.Second)
				f.want("10.0.0.2:80", true)
				if got := f.log.String(); strings.Count(got, "\n") != 2 || !strings.Contains(got, "of use again") {
					t.Errorf("logged %q, want a second line", got)
				}
			})
		})
	}
}

func TestAFileIsReadWhenItRests(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l, hear := newListed(t, "web.toml"), make(chan struct{})
		l.write("endpoints = [\"10.0.0.1:80\"]\n")
		world := &discovery.World{Watch: func(ctx context.Context, _ []string, tell func()) {
			for {
				select {
				case <-hear:
					tell()
				case <-ctx.Done():
					return
				}
			}
		}}
		_, f := follow(t, discovery.Options{Config: l.config(), World: world})
		after(time.Second)
		for i := range 50 { // somebody who writes and writes
			l.write(fmt.Sprintf("endpoints = [\"10.0.1.%d:80\"]\n#%s", i, strings.Repeat("x", i)))
			hear <- struct{}{}
			after(50 * time.Millisecond)
			f.want("10.0.0.1:80", true)
		}
		after(250 * time.Millisecond)
		f.want("10.0.1.49:80", true)
		if f.changes != 1 {
			t.Errorf("%d changes were told, want 1", f.changes)
		}
	})
}

func TestAFileThatNobodyTellsOfIsReadWhenItRests(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := newListed(t, "web.toml")
		l.write("endpoints = [\"10.0.0.1:80\"]\n")
		_, f := follow(t, discovery.Options{Config: l.config(), World: unwatched()})
		after(time.Second)
		for i := range 200 { // 10 s, in which it is looked at twice at least
			l.write(fmt.Sprintf("endpoints = [\"10.0.1.%d:80\"]\n#%s", i, strings.Repeat("x", i)))
			after(50 * time.Millisecond)
			f.want("10.0.0.1:80", true)
		}
		after(6 * time.Second)
		f.want("10.0.1.199:80", true)
	})
}

func TestAFileThatIsNotThereYet(t *testing.T) {
	t.Parallel()
	last := []discovery.Endpoint{{Address: "10.0.0.1:80", At: netip.MustParseAddrPort("10.0.0.1:80")}}
	synctest.Test(t, func(t *testing.T) {
		l := newListed(t, "web.toml")
		s, f := follow(t, discovery.Options{Config: l.config(), World: unwatched()})
		after(time.Minute)
		f.want("", false)
		s.Pause(true)
		l.write("endpoints = [\"10.0.0.2:80\"]\n")
		after(time.Minute)
		f.want("", false)
		s.Pause(false)
		after(10 * time.Second)
		f.want("10.0.0.2:80", true)
	})
	synctest.Test(t, func(t *testing.T) {
		l := newListed(t, "web.toml")
		_, f := follow(t, discovery.Options{Config: l.config(), World: unwatched(), Last: last})
		synctest.Wait()
		f.want("10.0.0.1:80", true)
	})
}
