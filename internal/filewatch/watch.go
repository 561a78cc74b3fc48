package filewatch

import (
	"context"
	"encoding/binary"
	"os"

	"golang.org/x/sys/unix"
)

// watchDirectories is [Options.Watch] by inotify(7): one instance for all, of which a user has few.
// Directories are watched and not files, which may be replaced; what is behind a symbolic link is
// not.
func watchDirectories(ctx context.Context, directories []string, tell func()) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return
	}
	f := os.NewFile(uintptr(fd), "inotify")
	defer f.Close()
	const changes = unix.IN_CLOSE_WRITE | unix.IN_CREATE | unix.IN_DELETE | unix.IN_MOVED_FROM | unix.IN_MOVED_TO | unix.IN_ATTRIB | unix.IN_DELETE_SELF | unix.IN_MOVE_SELF | unix.IN_ONLYDIR
	some := false
	for _, d := range directories {
		_, err := unix.InotifyAddWatch(fd, d, changes)
		some = some || err == nil // the others are looked at from time to time
	}
	if !some {
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

// ends says whether one of the events is that nothing more will come of a directory.
func ends(events []byte) bool {
	for len(events) >= unix.SizeofInotifyEvent {
		mask := binary.NativeEndian.Uint32(events[4:])
		size := int(binary.NativeEndian.Uint32(events[12:]))
		if mask&(unix.IN_IGNORED|unix.IN_DELETE_SELF|unix.IN_MOVE_SELF|unix.IN_UNMOUNT) != 0 {
			return true
		}
		events = events[min(len(events), unix.SizeofInotifyEvent+size):]
	}
	return false
}
