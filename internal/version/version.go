// Package version says which build this is.
package version

import "runtime/debug"

// override is set by the linker: -X holdfast/internal/version.override=1.2.3
var override string

// String returns the version: what the linker was told, or what the build
// information knows, or "devel".
func String() string {
	if override != "" {
		return override
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" && info.Main.Version != "(devel)" {
		return info.Main.Version
	}
	return "devel"
}
