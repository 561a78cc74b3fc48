package filter_test

import (
	"os"
	"regexp"
	"strings"
	"testing"
)

// The example in the documentation is the one that is compiled and tested.
func TestTheDocumentedExampleIsTheOneThatIsTested(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile("../../docs/filters.md")
	if err != nil {
		t.Fatal(err)
	}
	code, err := os.ReadFile("example_test.go")
	if err != nil {
		t.Fatal(err)
	}
	blocks := regexp.MustCompile("(?s)```go\n(.*?)```").FindAllSubmatch(page, -1)
	if len(blocks) == 0 {
		t.Error("there is no example")
	}
	for _, b := range blocks {
		if !strings.Contains(string(code), string(b[1])) {
			t.Errorf("not in example_test.go:\n%s", b[1])
		}
	}
}
