package cli

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// In-package: which of the usual places is usable depends on the machine and the user.
func TestWhichRuntimeDirectoryIsMeant(t *testing.T) {
	t.Parallel()
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	ours := t.TempDir()
	unusable := filepath.Join(ours, "file")
	if err := os.WriteFile(unusable, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	all := map[string]string{"HOLDFAST_RUNTIME_DIR": "/env", "RUNTIME_DIRECTORY": "/systemd:/second", "XDG_RUNTIME_DIR": "/xdg"}
	for name, test := range map[string]struct {
		flag, system string
		env          map[string]string
		want         string // "" is an error
	}{
		"the flag beats everything":                           {"/flag", ours, all, "/flag"},
		"a relative flag is made absolute":                    {"run", ours, nil, filepath.Join(here, "run")},
		"then the variable":                                   {"", ours, all, "/env"},
		"then the first directory of systemd":                 {"", ours, map[string]string{"RUNTIME_DIRECTORY": "/systemd:/second", "XDG_RUNTIME_DIR": "/xdg"}, "/systemd"},
		"then the directory of the system, if it is ours":     {"", ours, map[string]string{"XDG_RUNTIME_DIR": "/xdg"}, ours},
		"or if it can be made":                                {"", ours + "/new", map[string]string{"XDG_RUNTIME_DIR": "/xdg"}, ours + "/new"},
		"then the user's":                                     {"", unusable, map[string]string{"XDG_RUNTIME_DIR": "/xdg"}, "/xdg/holdfast"},
		"what cannot be made is not used":                     {"", unusable + "/below", map[string]string{"XDG_RUNTIME_DIR": "/xdg"}, "/xdg/holdfast"},
		"a relative XDG_RUNTIME_DIR does not count":           {"", unusable, map[string]string{"XDG_RUNTIME_DIR": "xdg"}, ""},
		"with nothing that says where, there is none to take": {"", unusable, nil, ""},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := chooseDir(test.flag, test.system, func(key string) string { return test.env[key] })
			if got != test.want || (err != nil) != (test.want == "") || err != nil && !errors.Is(err, errNoRuntimeDir) {
				t.Errorf("got %q, %v, want %q", got, err, test.want)
			}
		})
	}
}
