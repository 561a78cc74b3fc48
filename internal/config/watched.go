package config

import (
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
)

// readWatched returns the content of a file that is read again and again, of at most so many
// bytes, which is size in words. What never ends is cut off, and what is no file is refused
// without waiting for anybody.
func readWatched(path string, most int64, size string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return nil, errors.Join(err, fmt.Errorf("%s is not a regular file", path))
	}
	data, err := io.ReadAll(io.LimitReader(f, most+1))
	if err == nil && int64(len(data)) > most {
		err = &Problem{File: path, Text: "the file has more than " + size + ", which is the most that is read"}
	}
	return data, err
}

// ReadTLS returns the content of a file with certificates or a key, of which it takes no more
// than 1 MiB.
func ReadTLS(path string) ([]byte, error) { return readWatched(path, 1<<20, "1 MiB") }
