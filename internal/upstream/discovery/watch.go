package discovery

import (
	"context"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// watchDirectory is [World.Watch] by inotify(7). The directory is watched and not the file, which
// may be replaced; what is behind a symbolic link is not.
func watchDirectory(ctx context.Context, path string, tell func()) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return
	}
	f := os.NewFile(uintptr(fd), "inotify")
	defer f.Close()
	const changes = unix.IN_CLOSE_WRITE | unix.IN_CREATE | unix.IN_DELETE | unix.IN_MOVED_FROM | unix.IN_MOVED_TO | unix.IN_ATTRIB | unix.IN_DELETE_SELF | unix.IN_MOVE_SELF | unix.IN_ONLYDIR
	if _, err := unix.InotifyAddWatch(fd, filepath.Dir(path), changes); err != nil {
		return
	}
	defer context.AfterFunc(ctx, func() { f.Close() })()
	tell()
	events := make([]byte, 4096)
	for {
		n, err := f.Read(events)
		if err != nil {
			return
		}
		tell()
		if ends(events[:n]) {
			return // it is another directory now
		}
	}
}

// ends says whether one of the events is that nothing more will come.
func ends(events []byte) bool {
	for len(events) >= unix.SizeofInotifyEvent {
		mask := uint32(events[4]) | uint32(events[5])<<8 | uint32(events[6])<<16 | uint32(events[7])<<24
		size := int(events[12]) | int(events[13])<<8 | int(events[14])<<16
		if mask&(unix.IN_IGNORED|unix.IN_DELETE_SELF|unix.IN_MOVE_SELF|unix.IN_UNMOUNT) != 0 {
			return true
		}
		events = events[min(len(events), unix.SizeofInotifyEvent+size):]
	}
	return false
}
