package service

import (
	"os"
	"strconv"
	"time"
)

// pauseVariable is set by the linker, for tests: the environment variable that names a
// file with the point of an upgrade at which a process pauses, so that something can
// happen to it, or to the other one, right there. It goes on when the file is gone.
// -X holdfast/internal/service.pauseVariable=NAME
var pauseVariable string

// point is where an upgrade is; the predecessor's come first.
type point string

const (
	starts     point = "starts"     // tableflip, the candidate
	greeted    point = "greeted"    // the candidate has said what it is
	offered    point = "offered"    // it has got everything
	agreed     point = "agreed"     // it has said that it could command
	committed  point = "committed"  // it was told to
	relieved   point = "relieved"   // it has said that it does
	dismissed  point = "dismissed"  // it was told that the service manager knows
	born       point = "born"       // the candidate's first moment
	introduced point = "introduced" // it has said what it is
	endowed    point = "endowed"    // it has got everything
	prepared   point = "prepared"   // it is about to say that it could command
	told       point = "told"       // it was told to
	commands   point = "commands"   // every generation obeys it
	ready      point = "ready"      // it has said so
)

// at pauses where the test wants it, and says which process does.
func at(p point) {
	if pauseVariable == "" {
		return
	}
	file := os.Getenv(pauseVariable)
	said := false
	for {
		wanted, err := os.ReadFile(file)
		if err != nil || string(wanted) != string(p) {
			return
		}
		if !said {
			said = os.WriteFile(file+".reached", []byte(strconv.Itoa(os.Getpid())+"\n"), 0o600) == nil
		}
		time.Sleep(5 * time.Millisecond)
	}
}
