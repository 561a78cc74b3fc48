package main

import (
	"os/exec"
	"strings"
	"testing"
)

func TestThePagesHaveEverything(t *testing.T) {
	t.Parallel()
	commands := repository.read("deploy/man/holdfast.1")
	for _, cmd := range leaves(program()) {
		if !strings.Contains(commands, escape(strings.TrimSuffix(cmd.UseLine(), " [flags]"))) {
			t.Errorf("holdfast(1) lacks %s", cmd.CommandPath())
		}
	}
	configuration := repository.read("deploy/man/holdfast.toml.5")
	for _, s := range repository.sections {
		for _, k := range s.keys {
			if !strings.Contains(configuration, ".TP\n\\fB"+k.name+"\\fR (") {
				t.Errorf("holdfast.toml(5) lacks %s", join(s.name, k.name))
			}
		}
	}
}

// What is Markdown stays behind, and nothing begins a line that roff would take for a request.
func TestPagesAreRoff(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"deploy/man/holdfast.1", "deploy/man/holdfast.toml.5"} {
		for i, line := range strings.Split(repository.read(name), "\n") {
			for _, left := range []string{"](", "`", "**"} {
				if strings.Contains(line, left) {
					t.Errorf("%s:%d: %q has %q", name, i+1, line, left)
				}
			}
			if macro, _, _ := strings.Cut(line, " "); strings.HasPrefix(line, ".") && !strings.Contains(" .\\\" .TH .SH .SS .TP .PP .IP .RS .RE .nf .fi .br ", " "+macro+" ") {
				t.Errorf("%s:%d: %q", name, i+1, line)
			}
		}
	}
}

func TestMarkdownBecomesRoff(t *testing.T) {
	t.Parallel()
	for markdown, want := range map[string]string{
		"A `code-word` and **more**, see [there](x.md#y) and [`[a.b]`](#ab).": `A \fBcode\-word\fR and \fBmore\fR, see there and \fB[a.b]\fR.`,
		".hidden 'file' \\ `a\\b`": "\\&.hidden \\(aqfile\\(aq \\e \\fBa\\eb\\fR",
		"Write 0. That is all.":    "Write 0. That is all.",
		"Enough. A second one.":    "Enough.\nA second one.",
	} {
		p := new(page)
		p.flow(markdown)
		if got := strings.TrimSuffix(p.String(), "\n"); got != want {
			t.Errorf("%s\n got %s\nwant %s", markdown, got, want)
		}
	}
	p := new(page)
	p.markdown("# Title\n\n## Part one\n\nText\ngoes on.\n\n- a\n  b\n- c\n\n```sh\n.x\n\n  'y\n```\n\n    z\n\n| a | b |\n| --- | --- |\n| `k` | x \\| y |\n")
	want := ".SH \"PART ONE\"\nText goes on.\n.IP \\(bu 2\na b\n.IP \\(bu 2\nc\n.PP\n.RS 4\n.nf\n\\&.x\n\\&\n  \\(aqy\n.fi\n.RE\n.PP\n.RS 4\n.nf\nz\n.fi\n.RE\n.TP\n\\fBk\\fR\nx | y\n"
	if got := p.String(); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// Where the machine has them, those who know the format have nothing to say. No date is wanted:
// the pages are the same whenever they are made.
func TestFormattersHaveNothingToSay(t *testing.T) {
	t.Parallel()
	for _, page := range []string{"../../deploy/man/holdfast.1", "../../deploy/man/holdfast.toml.5"} {
		for _, command := range [][]string{{"mandoc", "-T", "lint", "-W", "warning"}, {"groff", "-man", "-ww", "-z", "-K", "utf8"}} {
			if _, err := exec.LookPath(command[0]); err != nil {
				continue
			}
			out, _ := exec.Command(command[0], append(command[1:], page)...).CombinedOutput()
			for line := range strings.Lines(string(out)) {
				if !strings.Contains(line, "missing date") {
					t.Errorf("%s: %s", command[0], line)
				}
			}
		}
	}
}
