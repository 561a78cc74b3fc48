package proxy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"runtime/pprof"
	"runtime/trace"
	"time"

	"holdfast/internal/control"
	"holdfast/internal/logs"
)

// maxProfileTime is the longest time that a profile may cover.
const maxProfileTime = time.Minute

// setLevel has lines of the log written from that level on.
func (g *generation) setLevel(name string) error {
	level, err := logs.ParseLevel(name)
	if err != nil {
		return err
	}
	g.level.Set(level)
	return nil
}

// profile answers with a profile, in a goroutine: the loop goes on. One is made at a
// time.
func (g *generation) profile(ctx context.Context, r received) {
	if g.profiling.Swap(true) {
		g.answer(r, control.Message{}, errors.New("another profile is being made"))
		return
	}
	g.work.Go(func() {
		file, err := makeProfile(ctx, r.m.Profile, r.m.Within)
		g.profiling.Store(false) // before the answer: who has it may ask for the next one
		if err != nil {
			_ = g.reply(r, control.Message{Error: err.Error()})
			return
		}
		defer file.Close()
		_ = g.reply(r, control.Message{}, int(file.Fd()))
	})
}

// makeProfile returns a profile in a sealed memory file. Of those that cover a time
// it blocks that long, or until ctx is done.
func makeProfile(ctx context.Context, name string, over time.Duration) (*os.File, error) {
	var out boundedBuffer
	err := writeProfile(ctx, &out, name, over)
	switch {
	case err != nil:
		return nil, fmt.Errorf("profile %q: %w", name, err)
	case out.cut:
		return nil, fmt.Errorf("profile %q: more than %d bytes", name, control.MaxPayload)
	}
	return control.Bytes(out.Bytes())
}

func writeProfile(ctx context.Context, out *boundedBuffer, name string, over time.Duration) error {
	switch name {
	case "cpu":
		return overTime(ctx, over, func() error { return pprof.StartCPUProfile(out) }, pprof.StopCPUProfile)
	case "trace":
		return overTime(ctx, over, func() error { return trace.Start(out) }, trace.Stop)
	}
	p := pprof.Lookup(name)
	if p == nil {
		return errors.New("there is none of that name")
	}
	return p.WriteTo(out, 0)
}

// overTime runs what lies between start and stop for that long.
func overTime(ctx context.Context, over time.Duration, start func() error, stop func()) error {
	if over <= 0 || over > maxProfileTime {
		return fmt.Errorf("it covers more than nothing and at most %v", maxProfileTime)
	}
	if err := start(); err != nil {
		return err
	}
	defer stop()
	select {
	case <-time.After(over):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// boundedBuffer takes as much as fits into a payload: a trace grows with the traffic.
type boundedBuffer struct {
	bytes.Buffer
	cut bool
}

func (b *boundedBuffer) Write(p []byte) (int, error) {
	if b.cut = b.cut || b.Len()+len(p) > control.MaxPayload; b.cut {
		return 0, errors.New("the profile is too large")
	}
	return b.Buffer.Write(p)
}
