package filewatch

import (
	"errors"
	"syscall"

	"golang.org/x/sys/unix"
)

// Signature is what a file looks like from outside. Nothing can be written to it without a change
// of this, once the clock of the file system has gone on. The zero value is that of no file, nor
// of one that is missing.
type Signature struct {
	err          syscall.Errno // 0: it is there
	dev, ino     uint64
	size         int64
	mtime, ctime unix.Timespec
}

// SignatureOf looks at a file, or at what a symbolic link leads to.
func SignatureOf(path string) Signature {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		errno, _ := errors.AsType[syscall.Errno](err)
		return Signature{err: errno}
	}
	return Signature{dev: st.Dev, ino: st.Ino, size: st.Size, mtime: st.Mtim, ctime: st.Ctim}
}

// IsThere says whether there was a file.
func (s Signature) IsThere() bool { return s.err == 0 && s != Signature{} }
