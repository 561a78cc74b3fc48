// Command badproxy is a proxy binary that is broken in the way that the file
// "mood" beside it says.
package main

import (
	"os"
	"path/filepath"
	"syscall"
	"time"
)

func main() {
	mood, _ := os.ReadFile(filepath.Join(filepath.Dir(os.Args[0]), "mood"))
	const controlFD = 4
	if len(os.Args) > 1 && os.Args[1] == "check" {
		if string(mood) == "crash in check" {
			panic("crash in check")
		}
		return
	}
	switch string(mood) {
	case "crash":
		panic("crash")
	case "hang":
		time.Sleep(time.Hour)
	case "foreign":
		hello := `{"type":"hello","hello":{"core":99,"core_min":90,"version":"9.9","pid":1}}`
		_ = syscall.Sendmsg(controlFD, []byte(hello), nil, nil, 0)
		time.Sleep(time.Hour)
	case "rubbish":
		_ = syscall.Sendmsg(controlFD, []byte("\x00rubbish"), nil, nil, 0)
		time.Sleep(time.Hour)
	}
}
