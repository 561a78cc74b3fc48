package main

import (
	"bytes"
	"testing"

	"holdfast/internal/metrics"
)

func TestFilesAreWhatIsMadeNow(t *testing.T) {
	t.Parallel()
	for _, f := range files {
		if want := f.make(repository); string(want) != repository.read(f.name) {
			t.Errorf("%s is not up to date; make it again: make generate", f.name)
		}
	}
}

func TestEveryNameInTheComparisonExists(t *testing.T) {
	exists := make(map[string]bool)
	for _, d := range metrics.Catalogue() {
		exists[d.Name] = true
	}
	for _, m := range model {
		for _, name := range m.ours {
			if !exists["holdfast_"+name] {
				t.Errorf("%s is compared with holdfast_%s, which does not exist", m.theirs, name)
			}
		}
	}
}

func TestEveryMetricHasItsSection(t *testing.T) {
	for _, d := range metrics.Catalogue() {
		if !bytes.Contains(reference(), []byte("| `"+d.Name+"` |")) {
			t.Errorf("%s is in no section", d.Name)
		}
	}
}
