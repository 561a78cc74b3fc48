// Package runtimedir is the runtime directory of a service: the one place by which a
// supervisor, its generations and the commands find each other, and what a supervisor
// leaves there for one that comes after it was killed.
//
//	lock          held by the supervisor; has the number of its process
//	secret        from which the keys of the generations come
//	state         which generations lived last: [State]
//	control.sock  where generations look for a supervisor
//	admin.sock    where commands do
//
// Only its user can write to it. Nothing in it is meant to outlive a start of the
// system.
package runtimedir

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// temporary is how the names of files begin that are to replace another when they are
// complete.
const temporary = ".new-"

// Dir is a runtime directory. Its methods may be called concurrently.
type Dir struct{ path string }

// Prepare makes the directory if it is not there, and opens it.
func Prepare(path string) (*Dir, error) {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return nil, fmt.Errorf("runtime directory: %w", err)
	}
	return Open(path)
}

// Open refuses a directory in which somebody else could put something in place of
// ours.
func Open(path string) (*Dir, error) {
	info, err := os.Stat(path) // systemd's may be a symbolic link
	if err != nil {
		return nil, fmt.Errorf("runtime directory: %w", err)
	}
	owner := int(info.Sys().(*syscall.Stat_t).Uid)
	switch {
	case !info.IsDir():
		return nil, fmt.Errorf("runtime directory %s: not a directory", path)
	case owner != os.Geteuid():
		return nil, fmt.Errorf("runtime directory %s: belongs to user %d, and this is user %d", path, owner, os.Geteuid())
	case info.Mode().Perm()&0o022 != 0:
		return nil, fmt.Errorf("runtime directory %s: mode %04o lets others write to it; chmod go-w it", path, info.Mode().Perm())
	}
	return &Dir{path: path}, nil
}

// Path is where it is.
func (d *Dir) Path() string { return d.path }

// Rendezvous is where generations look for a supervisor.
func (d *Dir) Rendezvous() string { return d.file("control.sock") }

func (d *Dir) file(name string) string { return filepath.Join(d.path, name) }

// errUnfit is wrapped where something else has the name than a file that we could have
// written.
var errUnfit = errors.New("no file of a supervisor")

// read returns what a regular file contains, of at most so many bytes. It follows no
// link and waits for nothing: the name may have come to mean anything.
func (d *Dir) read(name string, most int64) ([]byte, fs.FileInfo, error) {
	path := d.file(name)
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.ELOOP) {
		return nil, nil, fmt.Errorf("%s is a symbolic link: %w", path, errUnfit)
	}
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	switch {
	case err != nil:
		return nil, nil, err
	case !info.Mode().IsRegular():
		return nil, nil, fmt.Errorf("%s has the mode %s: %w", path, info.Mode(), errUnfit)
	case info.Size() > most:
		return nil, nil, fmt.Errorf("%s has %d bytes: %w", path, info.Size(), errUnfit)
	}
	data, err := io.ReadAll(io.LimitReader(f, most))
	return data, info, err
}

// replace puts a file of this user alone in the place of the one that has the name, if
// there is one: whoever opens it finds all of either. Nothing is synced to a disk: it is
// for those who come after a process that was killed, not after a power cut.
func (d *Dir) replace(name string, data []byte) error {
	f, err := os.CreateTemp(d.path, temporary+name+"-*") // 0600
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Rename(f.Name(), d.file(name))
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}

// tidy removes what somebody has left who was killed while replacing a file.
func (d *Dir) tidy() {
	entries, _ := os.ReadDir(d.path) // an error costs no more than a file that stays
	for _, entry := range entries {
		if strings.HasPrefix(entry.Name(), temporary) {
			os.Remove(d.file(entry.Name()))
		}
	}
}
