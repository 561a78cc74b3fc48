package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"holdfast/bench/load"
	"holdfast/bench/proc"
)

// A profile is of profiledFor, and begins after the warm-up. Load that is watched is made
// for longer, since the program that takes the profile has to start.
const (
	profiledFor = time.Second
	watchedFor  = profiledFor + time.Second/2
)

// watched has load made. Where profiles are wanted, one is taken meanwhile, and system
// calls are counted.
func (b *bench) watched(c *contestant, key string, cmd load.Command) (load.Answer, error) {
	if b.profiles == "" || c.kind == nil {
		return b.client.Do(cmd)
	}
	cmd.For = max(cmd.For, watchedFor)
	profiled := make(chan error, 1)
	go func() {
		time.Sleep(cmd.Warm)
		profiled <- b.profile(c, key)
	}()
	counted := make(chan proc.Calls, 1)
	go func() {
		time.Sleep(cmd.Warm)
		counted <- b.calls(cmd.PIDs)
	}()
	a, err := b.client.Do(cmd)
	err = errors.Join(err, <-profiled)
	if calls := <-counted; err == nil && a.Count > 0 && len(calls) > 0 {
		err = b.noteCalls(c, key, calls.Each(float64(a.Count)/a.Measured.Seconds()))
	}
	return a, err
}

// profile takes a CPU profile of Holdfast. One of a later round takes its place.
func (b *bench) profile(c *contestant, key string) error {
	if !c.kind.Ours {
		return nil
	}
	name, err := filepath.Abs(filepath.Join(b.profiles, key+"."+c.name+".pprof"))
	if err == nil {
		err = c.instance.Profile(name, profiledFor)
	}
	if err == nil {
		b.say("    go tool pprof -top %s", name)
	}
	return err
}

// calls counts the system calls of processes for a while. What the machine has no means
// for is left out: it is no reason to measure nothing.
func (b *bench) calls(pids []int) proc.Calls {
	calls, err := proc.CountCalls(pids, profiledFor)
	if err != nil {
		b.say("    system calls are not counted: %v", err)
	}
	return calls
}

func (b *bench) noteCalls(c *contestant, key, each string) error {
	text := fmt.Sprintf("%s, %s: %s", key, c.name, each)
	b.say("    %s", text)
	f, err := os.OpenFile(filepath.Join(b.profiles, "calls.txt"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	_, err = f.WriteString(strings.TrimSpace(text) + "\n")
	return errors.Join(err, f.Close())
}
