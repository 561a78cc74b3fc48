package config

import (
	"fmt"
	"io"
	"os"
	"syscall"
	"time"
)

// pipePatience bounds the wait for whoever writes into a pipe.
const pipePatience = 10 * time.Second

// ReadFile returns the content of a configuration file. What never ends is cut off:
// a file of more than 16 MiB is a *[Problem] and takes no more memory than that,
// and a pipe (`holdfast check -c <(…)`) into which nobody writes is an error after
// ten seconds.
func ReadFile(path string) ([]byte, error) {
	// With O_NONBLOCK the open of a pipe waits for nobody (open(2)); for files it
	// means nothing.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	_ = f.SetReadDeadline(time.Now().Add(pipePatience)) // files have none and need none
	data, err := io.ReadAll(io.LimitReader(f, maxFileSize+1))
	if err == nil && len(data) > maxFileSize {
		return nil, &Problem{File: path, Text: fmt.Sprintf("the file has more than %d MiB, which is the most that is read", maxFileSize>>20)}
	}
	return data, err
}
