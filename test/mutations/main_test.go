package main

import "testing"

// A mutation that does not apply any more shows nothing; running them takes too
// long for every test run, but this can be seen at once.
func TestEveryMutationApplies(t *testing.T) {
	root, err := moduleRoot()
	if err != nil {
		t.Fatal(err)
	}
	names := map[string]bool{}
	for _, m := range all {
		if names[m.name] {
			t.Errorf("two mutations are called %s", m.name)
		}
		names[m.name] = true
		if text, err := m.apply(root); err != nil {
			t.Errorf("%s: %v", m.name, err)
		} else if text == "" || m.promise == "" || m.tests == "" || m.old == m.new {
			t.Errorf("%s is incomplete", m.name)
		}
	}
}
