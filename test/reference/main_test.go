package main

import (
	"bytes"
	"os"
	"testing"

	"holdfast/internal/metrics"
)

func TestTheReferenceIsWhatTheProgramsDefine(t *testing.T) {
	have, err := os.ReadFile("../../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	if want := reference(); !bytes.Equal(have, want) {
		t.Error("docs/metrics.md is not up to date; make it again: go run ./test/reference > docs/metrics.md")
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
