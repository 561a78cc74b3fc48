package peer

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// The versions that are built. Debian has neither program.
const (
	caddyVersion   = "v2.11.9"
	traefikVersion = "v3.7.13"

	buildTimeout = 30 * time.Minute
)

// A workshop is a folder, of the user's cache, in which a program is built from modules.
type workshop struct {
	dir string
	err error // the first; nothing is done after it
}

// build returns the program that steps leave in the workshop as "program". What is
// there already is not built again.
func build(f Finder, name, version, note string, steps func(*workshop)) (Program, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return Program{}, err
	}
	dir := filepath.Join(cache, "holdfast-bench", name+"-"+version)
	program := Program{filepath.Join(dir, "program"), version[1:], note}
	if exists(program.Path) {
		return program, nil
	}
	f.Say("building %s %s in %s: this takes minutes, once", name, version, dir)
	w := &workshop{dir: dir, err: os.MkdirAll(dir, 0o755)}
	steps(w)
	if w.err != nil {
		return Program{}, fmt.Errorf("%s %s cannot be built: %w", name, version, w.err)
	}
	return program, nil
}

func (w *workshop) path(name string) string { return filepath.Join(w.dir, name) }

func (w *workshop) write(name, text string) {
	if w.err == nil {
		w.err = os.MkdirAll(filepath.Dir(w.path(name)), 0o755)
	}
	if w.err == nil {
		w.err = os.WriteFile(w.path(name), []byte(text), 0o644)
	}
}

// run runs the go command in a folder of the workshop and returns what it printed.
func (w *workshop) run(in string, args ...string) []byte {
	if w.err != nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), buildTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = w.path(in)
	cmd.Env = append(os.Environ(), "GOFLAGS=-mod=mod", "GOWORK=off")
	out, err := cmd.Output()
	if exit, ok := err.(*exec.ExitError); ok {
		err = fmt.Errorf("%w: %s", err, last(exit.Stderr, 400))
	}
	w.err = err
	return out
}

// module copies a module's files into a folder of the workshop.
func (w *workshop) module(in, path, to string) {
	var found struct{ Dir, Error string }
	out := w.run(in, "mod", "download", "-json", path)
	if w.err == nil {
		w.err = json.Unmarshal(out, &found)
	}
	if w.err == nil {
		w.err = os.RemoveAll(w.path(to))
	}
	if w.err == nil {
		w.err = os.CopyFS(w.path(to), os.DirFS(found.Dir))
	}
}

func last(b []byte, n int) []byte { return b[max(0, len(b)-n):] }

// buildHoldfast builds what is measured from this module, as it would be installed.
func buildHoldfast(root, dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	// As the Makefile does.
	version, err := exec.Command("git", "-C", root, "describe", "--tags", "--always", "--dirty").Output()
	if err != nil {
		version = []byte("devel")
	}
	flags := "-X holdfast/internal/version.override=" + strings.TrimSpace(string(version))
	for name, of := range map[string]string{"holdfast": "./cmd/supervisor", "holdfast-proxy": "./cmd/proxy"} {
		build := exec.Command("go", "build", "-ldflags", flags, "-o", filepath.Join(dir, name), of)
		build.Dir = root
		if out, err := build.CombinedOutput(); err != nil {
			return fmt.Errorf("build %s: %w\n%s", name, err, out)
		}
	}
	return nil
}

func buildCaddy(f Finder) (Program, error) {
	return build(f, "caddy", caddyVersion, "", func(w *workshop) {
		w.write("main.go", `package main

import (
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	_ "github.com/caddyserver/caddy/v2/modules/standard"
)

func main() { caddycmd.Main() }
`)
		w.write("go.mod", "module caddy\n")
		w.run(".", "get", "github.com/caddyserver/caddy/v2@"+caddyVersion)
		w.run(".", "mod", "tidy")
		w.run(".", "build", "-o", "program", ".")
	})
}

// buildTraefik builds Traefik without its ACME DNS providers. Its module does not build
// as it is published: a package of empty types has to be put in, because it belongs
// to a module that is not published, and some modules that the DNS providers and the
// basic authentication need are not to be had everywhere. None of this touches a
// request that is passed on.
func buildTraefik(f Finder) (Program, error) {
	const (
		lego = "github.com/go-acme/lego/v5"
		auth = "github.com/abbot/go-http-auth=github.com/containous/go-http-auth@v0.4.1-0.20200324110947-a37a7636d23e"
	)
	return build(f, "traefik", traefikVersion, "built without its ACME DNS providers, whose modules are not to be had everywhere", func(w *workshop) {
		w.write("go.mod", "module traefik\n")
		w.module(".", "github.com/traefik/traefik/v3@"+traefikVersion, "src")
		w.write("src/pkg/config/dynamic/ext/go.mod", "module github.com/traefik/traefik/dynamic/ext\n")
		w.write("src/pkg/config/dynamic/ext/ext.go", "package ext\n\ntype (\n\tHTTP   struct{}\n\tRouter struct{}\n)\n")
		version := w.run("src", "list", "-m", "-f", "{{.Version}}", lego)
		w.module("src", lego+"@"+strings.TrimSpace(string(version)), "lego")
		if w.err == nil {
			w.err = os.RemoveAll(w.path("lego/providers/dns"))
		}
		w.write("lego/providers/dns/dns.go", `package dns

import (
	"errors"

	"`+lego+`/challenge"
)

func NewDNSChallengeProviderByName(string) (challenge.Provider, error) {
	return nil, errors.New("left out of this build")
}
`)
		w.run("src", "mod", "edit", "-replace", lego+"=../lego", "-replace", auth)
		w.run("src", "build", "-o", "../program", "./cmd/traefik")
	})
}
