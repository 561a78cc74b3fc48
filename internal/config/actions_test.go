package config_test

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"holdfast/internal/config"
)

func TestBodiesComeFromFiles(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	write := func(name, content string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	pipe := filepath.Join(dir, "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	tests := []struct{ name, path, body, err string }{
		{"a file", write("a", "sorry\x00"), "sorry\x00", ""},
		{"an empty one", write("b", ""), "", ""},
		{"as large as may be", write("c", strings.Repeat("x", 64<<10)), strings.Repeat("x", 64<<10), ""},
		{"too large", write("d", strings.Repeat("x", 64<<10+1)), "", "more than 64 KiB"},
		{"none", filepath.Join(dir, "none"), "", "no such file"},
		{"a directory", dir, "", "no regular file"},
		{"a pipe that nobody writes into", pipe, "", "no regular file"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			c, err := config.Parse("f.toml", []byte("[[listeners]]\nname = \"a\"\naddress = \"127.0.0.1:80\"\n[[virtual_hosts]]\nname = \"h\"\ndomains = [\"*\"]\n"+
				"[[virtual_hosts.routes]]\nmatch = { prefix = \"/\" }\ndirect_response = { status = 200, file = \""+tt.path+"\" }\n"))
			if err != nil {
				t.Fatal(err)
			}
			err = c.ReadBodies()
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) || !strings.Contains(err.Error(), "virtual_hosts[0].routes[0].direct_response.file") {
					t.Errorf("error %v, want %q", err, tt.err)
				}
				return
			}
			if got := c.VirtualHosts[0].Routes[0].Direct.Body; err != nil || got != tt.body {
				t.Errorf("got %d bytes, error %v", len(got), err)
			}
		})
	}
}
