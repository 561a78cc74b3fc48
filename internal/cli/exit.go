package cli

import (
	"errors"
	"fmt"
	"io"
	"io/fs"

	"holdfast/internal/admin"
	"holdfast/internal/supervisor"
)

// The exit codes. Scripts and systemd decide by them, so they never change meaning.
const (
	exitDone    = 0 // what was asked for is so
	exitFailed  = 1 // it was refused or did not work, and the message says why
	exitWrong   = 2 // the configuration or the command line is wrong: trying again is of no use
	exitUnknown = 3 // it was asked for, and how it ended was not seen: `holdfast status` shows what is so
	exitDiffers = 4 // `holdfast diff --exit-code` has worked, and found a difference
)

// The voice, for everything that a person reads from this program:
//
//   - stdout has what was asked for, in a whole sentence without "successfully";
//     stderr has what went wrong.
//   - An error says what is so now, then why: "holdfast: the reload was refused and
//     nothing has changed: …". No exclamation, no apology, no "failed to".
//   - Mistakes in a configuration stand on lines of their own and begin with
//     "file:line:", so that an editor can go there.
//   - Where the reader can do something about it, the last line is "  try: …", and
//     a command in it stands in backquotes and can be typed as it stands.
//   - One thing has one name, that of the documentation: generation, drain, tunnel.

// usageError is a command line that was not understood.
type usageError struct{ err error }

func (e *usageError) Error() string { return e.err.Error() }

// commandError is what a command could not do.
type commandError struct {
	what string // what is so now
	err  error
}

func (e *commandError) Error() string { return e.what + ": " + e.err.Error() }
func (e *commandError) Unwrap() error { return e.err }

func exitCode(err error) int {
	if err == nil {
		return exitDone
	}
	if errors.Is(err, errDiffers) {
		return exitDiffers
	}
	if _, ok := errors.AsType[*usageError](err); ok {
		return exitWrong
	}
	if refusal, ok := errors.AsType[*supervisor.Refusal](err); ok && refusal.Step == "configuration" {
		return exitWrong
	}
	if notSeen(err) {
		return exitUnknown
	}
	return exitFailed
}

// notSeen says whether what was asked for may have been done, or may go on.
func notSeen(err error) bool {
	_, left := errors.AsType[*leftError](err)
	return left || errors.Is(err, admin.ErrUnknown)
}

// complain writes err, if there is one, in the voice described above.
func complain(w io.Writer, err error) {
	if err == nil || errors.Is(err, errDiffers) { // what differs stands on stdout
		return
	}
	refusal, refused := errors.AsType[*supervisor.Refusal](err)
	command, ok := errors.AsType[*commandError](err)
	if refused && ok {
		fmt.Fprintf(w, "holdfast: %s (%s)\n", command.what, refusal.Step)
		for _, problem := range refusal.Problems {
			fmt.Fprintln(w, problem)
		}
	} else {
		fmt.Fprintf(w, "holdfast: %v\n", err)
	}
	if hint := hintFor(err); hint != "" {
		fmt.Fprintf(w, "  try: %s\n", hint)
	}
}

func hintFor(err error) string {
	_, usage := errors.AsType[*usageError](err)
	_, crashed := errors.AsType[*crashError](err)
	switch {
	case usage:
		return "`holdfast --help`, or `holdfast COMMAND --help`"
	case errors.Is(err, errNoRuntimeDir):
		return "--runtime-dir DIR, with a directory that only you can write to"
	case errors.Is(err, admin.ErrNotRunning):
		return "`holdfast run -c FILE` starts one; --runtime-dir DIR finds one that runs elsewhere"
	case errors.Is(err, errSupervised):
		return "`holdfast stop`, which ends it with all generations"
	case crashed:
		return "the log of the service, which says how it ended; `holdfast status` shows what serves"
	case notSeen(err):
		return "`holdfast status`"
	case errors.Is(err, fs.ErrPermission):
		return "the same as the user of the service, or as root"
	}
	return ""
}
