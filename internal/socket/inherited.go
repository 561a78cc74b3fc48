package socket

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"holdfast/internal/config"
	"holdfast/internal/control"
)

// Inherited are the listening sockets that systemd has passed to this process, for
// listeners at "systemd:NAME". They stay open for as long as the process lives: a
// listener that uses one has a duplicate, so a configuration can drop it and a later
// one name it again. nil has none.
type Inherited struct {
	byName map[string][]int // descriptors, which nobody closes
}

// Inherit takes over what systemd has passed: files with the names of their socket
// units (FileDescriptorName= in systemd.socket(5)). It closes the files.
func Inherit(files []*os.File) (*Inherited, error) {
	i := &Inherited{byName: make(map[string][]int)}
	for _, f := range files {
		fd, err := control.DuplicateOf(f)
		if err = errors.Join(err, f.Close()); err != nil {
			return nil, fmt.Errorf("socket %q of systemd: %w", f.Name(), err)
		}
		i.byName[f.Name()] = append(i.byName[f.Name()], fd)
	}
	return i, nil
}

// InheritDescriptors takes over what a predecessor's [Inherited.All] were.
func InheritDescriptors(byName map[string][]int) *Inherited { return &Inherited{byName: byName} }

// All returns the descriptors by name, for a successor: they stay those of i.
func (i *Inherited) All() map[string][]int {
	if i == nil {
		return nil
	}
	return i.byName
}

// unfit says why nobody could accept connections from fd that the proxy understands.
// Units of other kinds (ListenDatagram=, ListenFIFO=, Accept=yes) pass such.
func unfit(fd int) error {
	kind, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil || kind != unix.SOCK_STREAM || !listens(fd) {
		return errors.New("what systemd has passed is no listening stream socket: its unit needs ListenStream= and Accept=no")
	}
	switch at, err := unix.Getsockname(fd); at.(type) {
	case *unix.SockaddrInet4, *unix.SockaddrInet6, *unix.SockaddrUnix:
		return nil
	default:
		return errors.Join(errors.New("what systemd has passed is neither a TCP nor a unix socket"), err)
	}
}

func listens(fd int) bool {
	on, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	return err == nil && on != 0
}

// Names are the names of all, sorted.
func (i *Inherited) Names() []string {
	if i == nil {
		return nil
	}
	return slices.Sorted(maps.Keys(i.byName))
}

// open returns a duplicate of the one that cfg names. What the socket unit has set
// stays: address, mode and options are systemd's. Only O_NONBLOCK is ours.
func (i *Inherited) open(cfg config.Socket) (*Socket, error) {
	var named []int
	if i != nil {
		named = i.byName[cfg.Address.Name]
	}
	switch {
	case len(named) == 0 && len(i.Names()) == 0:
		return nil, errors.New("systemd has passed no socket; is the socket unit active, and has it Service= with this service's name?")
	case len(named) == 0:
		return nil, fmt.Errorf("systemd has passed no socket of this name, only %s (FileDescriptorName= of a socket unit)", quoted(i.Names()))
	case len(named) > 1:
		var at []string
		for _, one := range named {
			at = append(at, address(one))
		}
		return nil, fmt.Errorf("systemd has passed %d sockets of this name (%s); each needs a socket unit of its own with its own FileDescriptorName=",
			len(named), strings.Join(at, ", "))
	}
	if err := unfit(named[0]); err != nil {
		return nil, err
	}
	fd, err := control.Duplicate(named[0])
	if err != nil {
		return nil, err
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	return &Socket{cfg: cfg, fd: fd}, nil
}

func quoted(names []string) string {
	var q []string
	for _, n := range names {
		q = append(q, fmt.Sprintf("%q", n))
	}
	return strings.Join(q, ", ")
}
