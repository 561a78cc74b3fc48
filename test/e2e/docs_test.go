package e2e

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
)

// docPage is a page of the documentation; main_test.go puts it beside the programs.
func docPage(t *testing.T, name string) string {
	t.Helper()
	data, err := os.ReadFile(program(name))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// fenced returns the first block of a language below a heading.
func fenced(t *testing.T, page, heading, language string) string {
	t.Helper()
	_, section, ok := strings.Cut(page, "\n"+heading+"\n")
	section, _, _ = strings.Cut(section, "\n"+strings.Repeat("#", strings.Count(heading, "#"))+" ")
	_, block, found := strings.Cut(section, "\n```"+language+"\n")
	block, _, closed := strings.Cut(block, "\n```\n")
	if !ok || !found || !closed {
		t.Fatalf("no block of %s below %q", language, heading)
	}
	return block + "\n"
}

// replaceOnce takes the place of something that the page must have exactly once.
func replaceOnce(t *testing.T, text, old, new string) string {
	t.Helper()
	if n := strings.Count(text, old); n != 1 {
		t.Fatalf("%q stands there %d times, want once:\n%s", old, n, text)
	}
	return strings.Replace(text, old, new, 1)
}

// What README.md shows below "In front of your own server" works as it stands there,
// typed by somebody who waits for the service as the page says. Only addresses
// differ: fixed ports belong to somebody else.
func TestTheReadmeWorksAsItStands(t *testing.T) {
	t.Parallel()
	const heading = "## In front of your own server"
	readme := docPage(t, "README.md")
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "hello from "+r.URL.Path) }))
	t.Cleanup(server.Close)

	home := newInstance(t, "").dir
	listening := filepath.Join(home, "public.sock") // a port that is free now may be taken a moment later
	config := fenced(t, readme, heading, "toml")
	config = replaceOnce(t, config, `"127.0.0.1:3000"`, `"`+server.Listener.Addr().String()+`"`)
	config = replaceOnce(t, config, `"127.0.0.1:8080"`, `"unix:`+listening+`"`)
	if err := os.WriteFile(filepath.Join(home, "holdfast.toml"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Dir(program("holdfast")), filepath.Join(home, "bin")); err != nil {
		t.Fatal(err)
	}

	// The service is asked for a page before it is stopped. Waiting for it takes as
	// long as it takes on this machine, not a second.
	script := fenced(t, readme, heading, "sh")
	script = replaceOnce(t, script, "make build\n", "")
	script = replaceOnce(t, script, "\nsleep 1 ", "\nuntil bin/holdfast status 2>/dev/null | grep -q ' serving '; do sleep 0.1; done ")
	script = replaceOnce(t, script, "\nbin/holdfast stop ", "\nread go\nbin/holdfast stop ")
	shell := exec.Command("sh", "-e", "-c", script)
	shell.Dir, shell.Env = home, append(os.Environ(), "HOME="+home)
	shell.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	var said lockedBuffer
	shell.Stdout, shell.Stderr = &said, &said
	stop, err := shell.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := shell.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // finds nothing where all went well
		_ = exec.Command(program("holdfast"), "--runtime-dir", filepath.Join(home, ".holdfast"), "stop", "--now").Run()
		syscall.Kill(-shell.Process.Pid, syscall.SIGKILL)
	})
	ended := make(chan error, 1)
	go func() { ended <- shell.Wait() }()

	eventually(t, func() bool { return len(ended) > 0 || strings.Contains(said.String(), "generation 2 serves") }, func() string {
		return "the reload of the README; so far:\n" + said.String()
	})
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", listening)
		},
	}}
	response, err := client.Get("http://site/page")
	if err != nil {
		t.Fatalf("%v\n%s", err, said.String())
	}
	body, err := io.ReadAll(response.Body)
	response.Body.Close()
	if string(body) != "hello from /page" || err != nil {
		t.Errorf("got %q, %v", body, err)
	}
	io.WriteString(stop, "go\n")
	eventually(t, func() bool { return len(ended) == 1 }, func() string { return "the end of the README; so far:\n" + said.String() })
	if err := <-ended; err != nil {
		t.Errorf("%v\n%s", err, said.String())
	}
	for _, want := range []string{"holdfast.toml is good\n", "generation 2 serves after ", "the service has ended\n"} {
		if !strings.Contains(said.String(), want) {
			t.Errorf("%q is missing in:\n%s", want, said.String())
		}
	}
}

// Every command of the operations page is in the help, with each flag that the page
// gives it; and the page leaves no command out.
// The lines with curl work as they stand, but for where the service is.
func TestTheLinesWithCurlWork(t *testing.T) {
	t.Parallel()
	curl := requireTool(t, "curl")
	// On this address nobody else is given a port that is free now.
	ln, err := net.Listen("tcp", "127.0.0.9:0")
	if err != nil {
		t.Fatal(err)
	}
	address := ln.Addr().String()
	ln.Close()
	i := serve(t, simple(newBackend(t), fmt.Sprintf("[admin]\nhttp = %q\nallow_actions = true\n", address)))
	lines := regexp.MustCompile(`(?m)^ *curl (.*)$`).FindAllStringSubmatch(docPage(t, "operations.md")+docPage(t, "metrics.md"), -1)
	if len(lines) < 3 {
		t.Fatalf("the pages have %d lines with curl", len(lines))
	}
	for _, line := range lines {
		args := strings.NewReplacer("/run/holdfast/admin.sock", filepath.Join(i.runtime(), "admin.sock"), "127.0.0.1:9901", address).Replace(line[1])
		out, err := exec.Command("sh", "-c", curl+" -sS --fail "+args).CombinedOutput()
		if err != nil || len(out) == 0 {
			t.Errorf("curl %s: %v\n%s", line[1], err, out)
		}
	}
}

func TestTheOperationsPageNamesTheCommandsThatThereAre(t *testing.T) {
	t.Parallel()
	_, table, _ := strings.Cut(docPage(t, "operations.md"), "\n## Commands\n")
	table, _, _ = strings.Cut(table, "\n| exit code |")
	named := map[string]bool{}
	for _, m := range regexp.MustCompile("`holdfast ([a-z-]+)([^`]*)`").FindAllStringSubmatch(table, -1) {
		command := m[1]
		named[command] = true
		help := helpOf(t, command)
		for _, flag := range regexp.MustCompile(`(^|[ \[])(--?[a-z-]+)`).FindAllStringSubmatch(m[2], -1) {
			if !regexp.MustCompile(`(?m)(^|\s)` + flag[2] + `[ ,\n]`).MatchString(help) {
				t.Errorf("`holdfast %s` has no %s:\n%s", command, flag[2], help)
			}
		}
	}
	_, list, _ := strings.Cut(helpOf(t, ""), "Available Commands:\n")
	list, _, _ = strings.Cut(list, "\n\n")
	there := map[string]bool{}
	for line := range strings.Lines(list) {
		there[strings.Fields(line)[0]] = true
	}
	delete(there, "help")
	if fmt.Sprint(named) != fmt.Sprint(there) { // maps print sorted
		t.Errorf("the page names %v, the help %v", named, there)
	}
}

func helpOf(t *testing.T, command string) string {
	t.Helper()
	var out bytes.Buffer
	cmd := exec.CommandContext(t.Context(), program("holdfast"), strings.Fields(command+" --help")...)
	cmd.Stdout = &out
	if err := cmd.Run(); err != nil {
		t.Fatalf("holdfast %s --help: %v", command, err)
	}
	return out.String()
}

// The operations page tells how to look for generations whose supervisor was killed. Its
// command was of no use once: the kernel called them "3", by the descriptor that the
// supervisor executes.
func TestGenerationsHaveTheNameThatTheOperatorLooksFor(t *testing.T) {
	t.Parallel()
	m := regexp.MustCompile(`(?m)^pgrep -a -x (\S+) `).FindStringSubmatch(fenced(t, docPage(t, "operations.md"), "### The supervisor was killed", "sh"))
	if m == nil {
		t.Fatal("the page does not say how to find an orphan")
	}
	i := serve(t, "[[listeners]]\nname = \"public\"\naddress = \"127.0.0.1:0\"\n")
	name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", i.pids()[0]))
	if err != nil || strings.TrimSpace(string(name)) != m[1] {
		t.Errorf("the kernel calls it %q (%v), the page %q", name, err, m[1])
	}
}
