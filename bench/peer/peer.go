// Package peer knows the proxies that are measured: how to find or build each, what
// its configuration is, how it is started, reloaded and ended.
//
// The configurations are as alike as the programs allow: one listener on loopback
// without TLS, one upstream, tunnels without a time limit, a thread or worker for each
// core, no access log, warnings only in the log. For requests each is set as was found best:
// none closes a connection after so many, each keeps enough of them to the upstream, HAProxy
// takes any of these and splices, and nginx has buffers that hold a body of 1 MiB (it would
// write to a file otherwise). Everything else is the program's default.
package peer

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"
)

// kept is how many idle connections to the upstream a proxy keeps at least, where it can be
// told: as many as requests are under way at once.
const kept = 1100

// A Kind is a proxy that can be measured.
type Kind struct {
	Name  string // by which it is chosen
	Title string // in the table

	// Ours says that it is built from this tree: without it there is nothing to measure.
	Ours bool

	// Descriptors is how many a tunnel takes at most, which bounds how many
	// tunnels one process can hold.
	Descriptors int

	find      func(Finder) (Program, error)
	files     func(Site) []File            // its configuration; nil: it has none
	arguments func(Program, Site) []string // the command line, program first
	reload    func(*Instance) error        // what has to be said after files were written; nil: it cannot reload
	restarted bool                         // by the service manager, once a relaying process has died
}

// Reloads says whether the proxy can change its configuration while it serves.
func (k *Kind) Reloads() bool { return k.reload != nil }

// Kinds are those that people would use, in the order of the table.
func Kinds() []*Kind {
	return []*Kind{holdfast, haproxy, nginx, caddy, traefik, httputilProxy, ioCopy}
}

// VaultKinds are Holdfast without deposits and with them.
func VaultKinds() []*Kind { return []*Kind{noVault, vault} }

// KeepsTunnels says whether tunnels outlive the process that relays them, and move to
// the next one.
func (k *Kind) KeepsTunnels() bool { return k == vault }

// A Program is a proxy that was found on this machine.
type Program struct {
	Path    string
	Version string
	Note    string // what the reader of a comparison must know
}

// A Finder finds programs, or builds them.
type Finder struct {
	Root     string // of this module
	Holdfast string // where its programs are; empty: they are built
	Self     string // this program, which also is the two smallest proxies
	Temp     string // for what is built anew
	Say      func(format string, args ...any)
}

// Find finds a proxy's program. An error says why it cannot be measured here.
func (k *Kind) Find(f Finder) (Program, error) { return k.find(f) }

// A Site is what one instance of a proxy is told.
type Site struct {
	Dir      string // its own, for everything that it writes
	Listen   string // IP:port
	Secure   string // the same, of the listener with TLS
	Upstream string // IP:port
	Tunnels  int    // that it must be able to hold
	Cores    int
	Revision int // of the configuration: RevisionPath is redirected to one with this number
}

// RevisionPath is redirected by each configuration to a path that tells it from others.
const RevisionPath = "/revision"

// RevisionTarget is where a configuration redirects RevisionPath.
func (s Site) RevisionTarget() string { return fmt.Sprintf("/revision-%d", s.Revision) }

// A File is one of a configuration, named relative to the site's folder.
type File struct{ Name, Text string }

// write writes the configuration. A file changes in one step, and nothing else in its
// folder does: Traefik watches it.
func (k *Kind) write(s Site) error {
	if k.files == nil {
		return nil
	}
	for _, f := range k.files(s) {
		name := filepath.Join(s.Dir, f.Name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			return err
		}
		draft := filepath.Join(s.Dir, "draft")
		if err := os.WriteFile(draft, []byte(f.Text), 0o644); err != nil {
			return err
		}
		if err := os.Rename(draft, name); err != nil {
			return err
		}
	}
	return nil
}

// MaxTunnels returns how many tunnels a process may hold that keeps some descriptors
// for other things.
func (k *Kind) MaxTunnels() (int, error) {
	const spare = 500
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return 0, err
	}
	return (int(min(limit.Max, 1<<20)) - spare) / k.Descriptors, nil
}

// exists says whether there is a file.
func exists(name string) bool {
	_, err := os.Stat(name)
	return err == nil || !os.IsNotExist(err)
}
