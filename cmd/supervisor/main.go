// Command holdfast is the supervisor, and the command line that commands it. This
// file is the only one that puts its parts together.
package main

import (
	"io"
	"os"

	"holdfast/internal/cli"
	"holdfast/internal/demo"
	"holdfast/internal/drill"
	"holdfast/internal/service"
)

func main() {
	program := cli.Program{
		Run: func(configPath, runtimeDir string, log io.Writer) error {
			return service.Run(service.Options{ConfigPath: configPath, RuntimeDir: runtimeDir, Log: log})
		},
		Check: service.Check,
		Route: service.Route,
		Tools: append(demo.Commands(), drill.Commands()...),
	}
	os.Exit(program.Main(os.Args[1:], os.Stdout, os.Stderr))
}
