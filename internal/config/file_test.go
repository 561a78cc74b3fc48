package config_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"holdfast/internal/config"
)

func TestWhatNeverEndsIsNotReadToItsEnd(t *testing.T) {
	t.Parallel()
	_, err := config.ReadFile("/dev/zero")
	if want := "/dev/zero: the file has more than 16 MiB, which is the most that is read"; err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
	if _, ok := errors.AsType[*config.Problem](err); !ok {
		t.Errorf("got %T", err)
	}
}

func TestAPipeThatNobodyWritesToKeepsNobodyWaiting(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "pipe")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	if data, err := config.ReadFile(path); err != nil || len(data) > 0 {
		t.Errorf("got %q, %v", data, err)
	}
}

func TestAFileIsReadWhole(t *testing.T) {
	t.Parallel()
	path, content := filepath.Join(t.TempDir(), "h.toml"), strings.Repeat("# a line\n", 100_000)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	if data, err := config.ReadFile(path); err != nil || string(data) != content {
		t.Errorf("%d of %d bytes, %v", len(data), len(content), err)
	}
	if _, err := config.ReadFile(filepath.Dir(path)); !errors.Is(err, syscall.EISDIR) {
		t.Errorf("a folder: %v", err)
	}
}
