package accesslog_test

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"holdfast/internal/accesslog/flags"
	"holdfast/internal/accesslog/format"
)

func TestOperatorsAndFlagsAreDocumented(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../../docs/configuration.md")
	if err != nil {
		t.Fatal(err)
	}
	var operators, all strings.Builder
	for _, o := range format.Operators {
		kind := ""
		if o.Number {
			kind = "number"
		}
		fmt.Fprintf(&operators, "| `%s%s` | %s | %s |\n", o.Name, o.Takes, kind, o.Meaning)
	}
	for _, f := range flags.All {
		fmt.Fprintf(&all, "| `%s` | %s |\n", f.Name, f.Meaning)
	}
	for what, table := range map[string]string{"operator": operators.String(), "flag": all.String()} {
		if !strings.Contains(string(text), table+"\n") {
			t.Errorf("docs/configuration.md should have the %ss\n%s", what, table)
		}
	}
}
