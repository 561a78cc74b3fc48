package config

import "fmt"

// Problem is one mistake in a file.
type Problem struct {
	File string
	Line int    // counted from 1; 0 where no line can be blamed
	Key  string // the key's path, like "listeners[0].address"; "" for a mistake of syntax
	Text string // what is wrong, and what would be right
}

// Error says it in one line: "holdfast.toml:12: listeners[0].address: …".
func (p *Problem) Error() string {
	s := p.File
	if p.Line > 0 {
		s = fmt.Sprintf("%s:%d", s, p.Line)
	}
	if p.Key != "" {
		s += ": " + p.Key
	}
	return s + ": " + p.Text
}
