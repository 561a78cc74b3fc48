package http2

import (
	"encoding/xml"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// knownFailures are the cases of h2spec that fail, by section and description, and why. Whatever
// else fails is a fault, and so is one of these that does not.
var knownFailures = map[string]string{
	"http2/6.5.3: Sends multiple values of SETTINGS_INITIAL_WINDOW_SIZE": "the library ends a connection on which one setting comes twice in a frame, as no client sends it: https://github.com/golang/go/issues/56760",
}

// h2spec is what it has to say, in the form of JUnit.
type h2specReport struct {
	Suites []struct {
		Package string `xml:"package,attr"`
		Cases   []struct {
			Package   string  `xml:"package,attr"`
			ClassName string  `xml:"classname,attr"`
			Failure   *string `xml:"failure"`
			Error     *string `xml:"error"`
			Skipped   *string `xml:"skipped"`
		} `xml:"testcase"`
	} `xml:"testsuite"`
}

// Over a connection that begins with HTTP/2 every case of h2spec passes that is not known to fail.
func TestH2spec(t *testing.T) {
	t.Parallel()
	s := startServer(t, ServerOptions{Limits: limitsForTests(), Handler: handlerFunc(echoing)})
	report := runH2spec(t, s.addr)
	failed := map[string]string{}
	cases, skipped := 0, 0
	for _, suite := range report.Suites {
		for _, c := range suite.Cases {
			cases++
			if c.Skipped != nil {
				skipped++
			}
			if c.Failure != nil || c.Error != nil {
				text := c.Failure
				if text == nil {
					text = c.Error
				}
				failed[strings.TrimSpace(c.Package)+": "+c.ClassName] = *text
			}
		}
	}
	t.Logf("%d cases, %d fail", cases, len(failed))
	if cases < 140 || skipped > 0 {
		t.Errorf("h2spec has had %d cases, and skipped %d of them", cases, skipped)
	}
	for _, name := range slices.Sorted(maps.Keys(failed)) {
		if knownFailures[name] == "" {
			t.Errorf("%s: %s", name, failed[name])
		}
	}
	for _, name := range slices.Sorted(maps.Keys(knownFailures)) {
		if _, ok := failed[name]; !ok {
			t.Errorf("%s: passes, although it is known to fail: %s", name, knownFailures[name])
		}
	}
}

// runH2spec builds and runs the tool, which tools.mod pins.
func runH2spec(t *testing.T, addr string) (report h2specReport) {
	t.Helper()
	dir := t.TempDir()
	tool, out := filepath.Join(dir, "h2spec"), filepath.Join(dir, "report.xml")
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	build := exec.CommandContext(t.Context(), "go", "build", "-modfile="+filepath.Join(root, "tools.mod"), "-o", tool, "github.com/summerwind/h2spec/cmd/h2spec")
	build.Dir = root
	if text, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build h2spec: %v\n%s", err, text)
	}
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		t.Fatal(err)
	}
	run := exec.CommandContext(t.Context(), tool, "-h", host, "-p", port, "-j", out, "-o", "2")
	text, err := run.CombinedOutput() // it fails where a case does
	xmlText, missing := os.ReadFile(out)
	if missing != nil {
		t.Fatalf("run h2spec: %v\n%s", err, text)
	}
	if err := xml.Unmarshal(xmlText, &report); err != nil {
		t.Fatal(err, fmt.Sprintf("%.500s", xmlText))
	}
	return report
}
