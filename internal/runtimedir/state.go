package runtimedir

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math"

	"golang.org/x/sys/unix"

	"holdfast/internal/pidfd"
)

const (
	// stateVersion is the version of the state file that this build writes and reads.
	stateVersion = 1

	// maxState is the most bytes that a state file may have: ten thousands of
	// generations.
	maxState = 4 << 20
)

// State is what a supervisor notes for a successor that has nobody to ask: which
// generations lived last.
type State struct {
	Version     int          `json:"version"` // of the format; SaveState sets it
	Epoch       uint64       `json:"epoch"`
	Last        int          `json:"last"` // number of the newest generation
	Generations []Generation `json:"generations"`
}

// Generation is one that lived.
type Generation struct {
	Number int `json:"number"`
	pidfd.Identity
	State string `json:"state"`
}

// LoadState returns what was saved last, nil if nothing was. The error is about what is
// there and cannot be it. That the processes live is for the caller to find out
// ([pidfd.Open]).
func (d *Dir) LoadState() (*State, error) {
	data, _, err := d.read("state", maxState)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("state: %w", err)
	}
	// The version comes first: another one may have other types.
	var head struct{ Version int }
	if err := json.Unmarshal(data, &head); err != nil {
		return nil, fmt.Errorf("state: %s is damaged: %w", d.file("state"), err)
	}
	if head.Version != stateVersion {
		return nil, fmt.Errorf("state: %s is of version %d, and this build reads version %d", d.file("state"), head.Version, stateVersion)
	}
	s := new(State)
	if err := errors.Join(json.Unmarshal(data, s), s.check()); err != nil {
		return nil, fmt.Errorf("state: %s is damaged: %w", d.file("state"), err)
	}
	return s, nil
}

// check finds what no supervisor has saved.
func (s *State) check() error {
	if s.Epoch > math.MaxInt64 {
		return fmt.Errorf("epoch %d", s.Epoch)
	}
	if s.Last < 0 || s.Last > math.MaxInt32 {
		return fmt.Errorf("last generation %d", s.Last)
	}
	seen := map[int]bool{}
	for _, g := range s.Generations {
		if g.Number < 1 || g.Number > s.Last || seen[g.Number] {
			return fmt.Errorf("generation %d, where the last one is %d", g.Number, s.Last)
		}
		if g.PID < 1 || g.PID > math.MaxInt32 {
			return fmt.Errorf("generation %d with pid %d", g.Number, g.PID)
		}
		seen[g.Number] = true
	}
	return nil
}

// SaveState replaces what was saved. It is for whoever holds the lock.
func (d *Dir) SaveState(s *State) error {
	saved := *s
	saved.Version = stateVersion
	data, err := json.Marshal(&saved)
	if err == nil && len(data) > maxState {
		err = fmt.Errorf("%d bytes are too many (%d)", len(data), maxState)
	}
	if err == nil {
		if err = d.replace("state", data); err != nil {
			_ = unix.Unlink(d.file("state")) // none is better than one that leaves out who serves
		}
	}
	if err != nil {
		return fmt.Errorf("save the state: %w", err)
	}
	return nil
}
