package systemd

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// A line is the way to systemd's socket. It stays open, so that a process which has no
// descriptor left can still say that it lives.
type line struct {
	path  string
	conn  *net.UnixConn // nil: none yet
	until time.Time     // by when what is sent must have been taken; zero: no limit
}

// send blocks while systemd's queue is full. fds stay the caller's.
func (l *line) send(text string, fds ...int) error {
	if l.conn != nil {
		if l.write(text, fds) == nil {
			return nil
		}
		l.close() // systemd may have another socket by now
	}
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: l.path, Net: "unixgram"})
	if err != nil {
		return err
	}
	l.conn = conn
	return l.write(text, fds)
}

// write does what WriteMsgUnix does not on a connected socket for datagrams.
func (l *line) write(text string, fds []int) error {
	if err := l.conn.SetWriteDeadline(l.until); err != nil {
		return err
	}
	raw, err := l.conn.SyscallConn()
	if err != nil {
		return err
	}
	var rights []byte
	if len(fds) > 0 {
		rights = unix.UnixRights(fds...)
	}
	outer := raw.Write(func(fd uintptr) bool {
		for {
			err = unix.Sendmsg(int(fd), []byte(text), rights, nil, unix.MSG_NOSIGNAL)
			if !errors.Is(err, unix.EINTR) {
				return !errors.Is(err, unix.EAGAIN)
			}
		}
	})
	if outer != nil {
		return outer
	}
	return err
}

// barrier returns when systemd has dealt with all that was sent: it closes what comes
// with this message, after the ones before it.
func (l *line) barrier() error {
	var ends [2]int
	if err := unix.Pipe2(ends[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return fmt.Errorf("pipe: %w", err)
	}
	ours := os.NewFile(uintptr(ends[0]), "barrier")
	defer ours.Close()
	err := l.send("BARRIER=1", ends[1])
	if err := errors.Join(err, unix.Close(ends[1])); err != nil {
		return err
	}
	if err := ours.SetReadDeadline(l.until); err != nil {
		return err
	}
	if _, err := ours.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		return fmt.Errorf("systemd has not confirmed it: %w", err)
	}
	return nil
}

func (l *line) close() {
	if l.conn != nil {
		_ = l.conn.Close() // nothing is buffered
		l.conn = nil
	}
}
