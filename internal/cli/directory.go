package cli

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

const systemRuntimeDir = "/run/holdfast"

var errNoRuntimeDir = errors.New("there is no runtime directory")

// runtimeDir returns the absolute path of the runtime directory: what the flag
// says, or else the environment, or else the usual places. It is no key of the
// configuration, so that a broken file never hides a running supervisor.
func runtimeDir(flag string) (string, error) {
	return chooseDir(flag, systemRuntimeDir, os.Getenv)
}

func chooseDir(flag, system string, env func(string) string) (string, error) {
	if flag != "" {
		return filepath.Abs(flag)
	}
	if dir := env("HOLDFAST_RUNTIME_DIR"); dir != "" {
		return filepath.Abs(dir)
	}
	// systemd separates several by colons, and gives absolute paths (systemd.exec(5)).
	if dir, _, _ := strings.Cut(env("RUNTIME_DIRECTORY"), ":"); dir != "" {
		return filepath.Abs(dir)
	}
	if usable(system) {
		return system, nil
	}
	// Absolute, or else it is to be ignored (XDG Base Directory Specification).
	if dir := env("XDG_RUNTIME_DIR"); filepath.IsAbs(dir) {
		return filepath.Join(dir, "holdfast"), nil
	}
	return "", fmt.Errorf("%w: %s is not this user's, and $HOLDFAST_RUNTIME_DIR and $XDG_RUNTIME_DIR are not set", errNoRuntimeDir, system)
}

// usable says whether dir is this user's, or could be made. Root commands the
// services of others too.
func usable(dir string) bool {
	info, err := os.Stat(dir)
	if errors.Is(err, os.ErrNotExist) {
		return unix.Access(filepath.Dir(dir), unix.W_OK|unix.X_OK) == nil
	}
	if err != nil || !info.IsDir() {
		return false
	}
	return os.Geteuid() == 0 || int(info.Sys().(*syscall.Stat_t).Uid) == os.Geteuid()
}
