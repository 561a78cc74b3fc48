package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"holdfast/internal/cli"
	"holdfast/internal/demo"
	"holdfast/internal/drill"
)

// program is the tree of commands, as cmd/supervisor has it.
func program() *cobra.Command {
	p := cli.Program{Tools: append(demo.Commands(), drill.Commands()...)}
	return p.Command()
}

// manCommands is holdfast(1): commands and options are those of the command line itself, exit
// codes and signals are the tables of docs/operations.md.
func manCommands(t *tree) []byte {
	root := program()
	operations := t.read("docs/operations.md")
	p := newPage("holdfast", 1, "Holdfast")
	p.section("Name")
	p.WriteString("holdfast \\- a reverse proxy that reloads without dropping a connection\n")
	p.section("Synopsis")
	p.WriteString("\\fBholdfast run \\-c\\fR \\fIFILE\\fR\n.br\n\\fBholdfast\\fR [\\fIOPTION\\fR]...\\& \\fICOMMAND\\fR [\\fIARGUMENT\\fR]...\\&\n")
	p.section("Description")
	p.help("`holdfast` serves HTTP, WebSockets and other connections, and commands the service that does.\n\n" +
		"`holdfast run` is the supervisor. It holds the listening sockets and starts `holdfast-proxy`, which carries the traffic: a generation of it for each configuration. " +
		"A reload starts another generation; the one before ends when nothing holds it any more. Both programs belong into the same folder.\n\n" +
		"All other commands speak to a running supervisor over a socket in its runtime directory, or work on files. `holdfast COMMAND --help` says what stands here.")
	p.section("Commands")
	for _, cmd := range leaves(root) {
		p.command(root, cmd)
	}
	p.section("Options of all commands")
	p.options(root.PersistentFlags())
	p.tagged("`-h`, `--help`", "Says what the command does, and which options it has.")
	p.section("Exit status")
	p.markdown(tableOf(operations, "| exit code | meaning |"))
	p.section("Signals")
	p.paragraph("To the process of `holdfast run`:")
	p.markdown(tableOf(operations, "| signal to the supervisor | meaning |"))
	p.section("Environment")
	p.tagged("`HOLDFAST_RUNTIME_DIR`", "The runtime directory, where `--runtime-dir` is not given.")
	p.tagged("`RUNTIME_DIRECTORY`", "The same, as systemd sets it for the service (`RuntimeDirectory=`).")
	p.tagged("`XDG_RUNTIME_DIR`", "Where neither is set and `/run/holdfast` cannot be used, the runtime directory is `holdfast` in this one.")
	p.tagged("`NOTIFY_SOCKET`, `WATCHDOG_USEC`, `FDSTORE`, `LISTEN_FDS`, `LISTEN_PID`, `LISTEN_FDNAMES`, `JOURNAL_STREAM`", "What systemd tells the service; see sd_notify(3), sd_listen_fds(3) and systemd.exec(5).")
	p.section("Files")
	p.tagged("`/etc/holdfast/holdfast.toml`", "The configuration of the service that a package installs; see holdfast.toml(5).")
	p.tagged("`/run/holdfast`", "The runtime directory: `admin.sock`, which commands are given over, and what a supervisor needs that follows one that was killed.")
	p.section("Examples")
	for _, e := range examples {
		p.paragraph(e.says)
		p.verbatim(strings.Split(e.command, "\n"))
	}
	p.section("See also")
	p.paragraph("`holdfast.toml`(5), `systemctl`(1), `journalctl`(1)")
	return p.Bytes()
}

var examples = []struct{ says, command string }{
	{"Try a configuration, put it into service, and go back to nothing if it does not hold:", "holdfast check -c /etc/holdfast/holdfast.toml\nholdfast diff\nholdfast reload --wait"},
	{"See what runs and what holds old generations:", "holdfast status"},
	{"Find out where a request goes:", "holdfast route -c /etc/holdfast/holdfast.toml GET http://www.example.com/api/users"},
	{"Take the traffic away, wait for a load balancer to see it, and end:", "holdfast ready off\nsleep 30\nholdfast stop"},
}

// leaves are the commands that do something, in the order of the alphabet.
func leaves(cmd *cobra.Command) (all []*cobra.Command) {
	for _, c := range cmd.Commands() {
		switch {
		case c.Hidden || c.Name() == "help" || c.Name() == "completion":
		case c.HasAvailableSubCommands():
			if c.Runnable() {
				all = append(all, c)
			}
			all = append(all, leaves(c)...)
		default:
			all = append(all, c)
		}
	}
	return all
}

func (p *page) command(root, cmd *cobra.Command) {
	cmd.InitDefaultHelpFlag()
	p.subsection("`" + strings.TrimSuffix(cmd.UseLine(), " [flags]") + "`")
	p.help(sentence(cmd.Short))
	if cmd.Long != "" && cmd.Long != cmd.Short {
		p.help(cmd.Long)
	}
	if cmd.Example != "" {
		p.verbatim(unindented(strings.Split(strings.Trim(cmd.Example, "\n"), "\n")))
	}
	p.options(cmd.LocalNonPersistentFlags())
	if cmd != root {
		p.options(cmd.PersistentFlags())
	}
}

func (p *page) options(flags *pflag.FlagSet) {
	flags.VisitAll(func(f *pflag.Flag) {
		if f.Hidden || f.Name == "help" {
			return
		}
		name, usage := pflag.UnquoteUsage(f)
		tag := "`--" + f.Name + "`"
		if f.Shorthand != "" {
			tag = "`-" + f.Shorthand + "`, " + tag
		}
		if name != "" {
			tag += " " + name
		}
		if !slices.Contains([]string{"", "false", "0", "0s", "[]"}, f.DefValue) {
			usage += fmt.Sprintf(" (default `%s`)", f.DefValue)
		}
		if f.Annotations[cobra.BashCompOneRequiredFlag] != nil {
			usage += "; required"
		}
		p.tagged(tag, sentence(usage))
	})
}

// sentence makes one of the words that a list of options has.
func sentence(s string) string {
	if s == "" {
		return s
	}
	return strings.ToUpper(s[:1]) + strings.TrimSuffix(s[1:], ".") + "."
}

// tableOf is the table that begins with a line.
func tableOf(markdown, head string) string {
	_, rest, ok := strings.Cut(markdown, "\n"+head+"\n")
	if !ok {
		panic("no table begins with " + head)
	}
	table, _, _ := strings.Cut(rest, "\n\n")
	return head + "\n" + table
}

// manConfiguration is holdfast.toml(5): docs/configuration.md.
func manConfiguration(t *tree) []byte {
	p := newPage("holdfast.toml", 5, "Holdfast")
	p.section("Name")
	p.WriteString("holdfast.toml \\- the configuration of holdfast(1)\n")
	p.section("Description")
	text := t.read("docs/configuration.md")
	for _, contents := range []string{"- [How the file", "- [In an editor", "- [How values", "- The process:", "- The traffic:", "- [A longer sample"} {
		text = withoutLine(text, contents)
	}
	p.markdown(text)
	p.section("See also")
	p.paragraph("`holdfast`(1). The other documents that are named here come with Holdfast, as `docs/NAME.md`.")
	return p.Bytes()
}

func withoutLine(text, prefix string) string {
	before, rest, ok := strings.Cut(text, "\n"+prefix)
	if !ok {
		panic("docs/configuration.md has no line that begins with " + prefix)
	}
	_, after, _ := strings.Cut(rest, "\n")
	return before + "\n" + after
}
