package peer

import (
	"errors"
	"strconv"
	"time"
)

// Profile writes a CPU profile of the generation that serves into a file, by Holdfast's own
// command. No other proxy has one.
func (i *Instance) Profile(name string, over time.Duration) error {
	var status struct {
		Generations []generation `json:"generations"`
	}
	if err := i.ask("GET", "/status", &status); err != nil {
		return err
	}
	for _, g := range status.Generations {
		if g.State == "serving" {
			return i.holdfast("profile", "cpu", "--generation", strconv.Itoa(g.Number), "--over", over.String(), "--output", name)
		}
	}
	return errors.New("no generation serves")
}
