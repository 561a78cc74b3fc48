package supervisor

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"sync"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/control"
)

// OverrideResult is what came of a command about runtime values.
type OverrideResult struct {
	Reset    []string `json:"reset,omitempty"` // keys
	Warnings []string `json:"warnings,omitempty"`
}

// Overridden is how much is overridden at present.
type Overridden struct {
	ByCommand int    `json:"by_command,omitempty"`
	ByFile    int    `json:"by_file,omitempty"` // and not by command
	FileError string `json:"file_error,omitempty"`
}

// Runtime is all that is known of runtime values.
type Runtime struct {
	File      string         `json:"file,omitempty"` // that is watched
	FileError string         `json:"file_error,omitempty"`
	Values    []RuntimeValue `json:"values"` // by key
	Warnings  []string       `json:"warnings,omitempty"`
}

// RuntimeValue is a key that a generation knows, or that is overridden. What is said of its
// numbers is so in the serving generation, or, where that does not know it, in the newest that does.
type RuntimeValue struct {
	Key         string    `json:"key"`
	Unit        string    `json:"unit,omitempty"`       // "count" or "percent"; "": no generation knows the key
	Configured  []float64 `json:"configured,omitempty"` // several, where numbers that differ have the key
	Effective   []float64 `json:"effective,omitempty"`
	Least       float64   `json:"least"`
	Most        float64   `json:"most"`
	File        *float64  `json:"file,omitempty"`    // what the file says
	Command     *float64  `json:"command,omitempty"` // what was set by command, which counts more
	Places      []string  `json:"places,omitempty"`  // tables of the configuration that have the key
	Generations []int     `json:"generations,omitempty"`
}

// admits says whether the value can be set to this.
func (v *RuntimeValue) admits(to float64) error {
	switch {
	case to < v.Least || to > v.Most:
		return fmt.Errorf("%s is out of range: from %s to %s", plain(to), plain(v.Least), plain(v.Most))
	case v.Unit != "percent" && to != math.Trunc(to):
		return fmt.Errorf("%s is no whole number", plain(to))
	}
	return nil
}

// plain is a number as people write it.
func plain(v float64) string { return strconv.FormatFloat(v, 'f', -1, 64) }

// valuesTimeout bounds how long a generation may take to say which values it has.
const valuesTimeout = 3 * time.Second

// askValues returns what generations say of their runtime values. One that does not answer is
// left out, and named in silent.
func (s *Supervisor) askValues(ctx context.Context) (known map[string]*RuntimeValue, silent []string) {
	var all []*generation
	s.do(func() {
		all = slices.DeleteFunc(s.newestFirst(), func(g *generation) bool { return g.state == starting || !g.overridable() })
		slices.SortStableFunc(all, func(a, b *generation) int { // the serving one first
			switch s.serving {
			case a:
				return -1
			case b:
				return 1
			}
			return 0
		})
	})
	said := make([]*control.RuntimeValues, len(all))
	var asked sync.WaitGroup
	for i, g := range all {
		asked.Go(func() {
			values, err := g.runtimeValues(ctx)
			if err != nil {
				g.log.Warn("generation does not say which runtime values it has", "err", err)
				return
			}
			said[i] = values
		})
	}
	asked.Wait()
	known = make(map[string]*RuntimeValue)
	for i, g := range all {
		if said[i] == nil {
			silent = append(silent, fmt.Sprintf("generation %d does not say which numbers it has", g.number))
			continue
		}
		for _, v := range said[i].Values {
			if config.CheckRuntimeKey(v.Key) != nil || v.Unit != "count" && v.Unit != "percent" {
				continue // it says what it likes
			}
			if known[v.Key] == nil {
				known[v.Key] = &RuntimeValue{
					Key: v.Key, Unit: v.Unit, Configured: v.Configured, Effective: v.Effective, Least: v.Least, Most: v.Most, Places: presentables(v.Places),
				}
			}
			known[v.Key].Generations = append(known[v.Key].Generations, g.number)
		}
	}
	return known, silent
}

// presentables are words of a generation that can be shown.
func presentables(words []string) []string {
	return slices.DeleteFunc(words, func(w string) bool { return !presentable(w) })
}

func (g *generation) runtimeValues(ctx context.Context) (*control.RuntimeValues, error) {
	a, err := g.question(ctx, control.Message{Type: control.TypeValues}, valuesTimeout)
	if err != nil {
		return nil, err
	}
	if len(a.fds) != 1 {
		control.Discard(a.fds)
		return nil, errors.New("an answer without values")
	}
	return control.ReadRuntimeValues(a.fds[0])
}

// Runtime implements [Commands].
func (s *Supervisor) Runtime(ctx context.Context) (*Runtime, error) {
	if err := s.awaitBegin(ctx); err != nil {
		return nil, err
	}
	known, silent := s.askValues(ctx)
	r := &Runtime{Values: []RuntimeValue{}, Warnings: silent}
	var file, command map[string]float64
	if err := s.try(ctx, func() {
		o := &s.overrides
		r.File, r.FileError, file, command = o.file.path, o.file.problem, o.file.values, o.command
		for _, g := range s.newestFirst() {
			if g.state != starting && !g.overridable() {
				r.Warnings = append(r.Warnings, fmt.Sprintf("generation %d is of a build whose numbers cannot be overridden, or has not said which build it is", g.number))
			}
		}
	}); err != nil {
		return nil, err
	}
	lay := func(layer map[string]float64, of func(*RuntimeValue) **float64) {
		for key, v := range layer {
			if known[key] == nil {
				known[key] = &RuntimeValue{Key: key}
			}
			*of(known[key]) = &v
		}
	}
	lay(file, func(v *RuntimeValue) **float64 { return &v.File })
	lay(command, func(v *RuntimeValue) **float64 { return &v.Command })
	for _, key := range slices.Sorted(maps.Keys(known)) {
		v := known[key]
		r.Values = append(r.Values, *v)
		if v.Unit == "" {
			r.Warnings = append(r.Warnings, unknownKey(key))
		}
	}
	return r, nil
}

// overridden is for the status. Called in the loop.
func (s *Supervisor) overridden() Overridden {
	o := &s.overrides
	all := o.with(nil)
	return Overridden{ByCommand: len(o.command), ByFile: len(all) - len(o.command), FileError: o.file.problem}
}
