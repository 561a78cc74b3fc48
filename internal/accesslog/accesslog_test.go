package accesslog_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"holdfast/internal/accesslog"
	"holdfast/internal/accesslog/flags"
	"holdfast/internal/metrics"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var formats = []string{"json", "text"}

// appending opens a file as the supervisor does.
func appending(t testing.TB, path string) *os.File {
	t.Helper()
	file, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	return file
}

// written returns what a Log writes while it is used, line by line.
func written(t testing.TB, format string, use func(*accesslog.Log)) []string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "access.log")
	l := accesslog.New([]accesslog.Output{{Path: path, Format: format, File: appending(t, path)}}, 7, nil)
	use(l)
	l.Close(20 * time.Second)
	return linesOf(t, path)
}

func linesOf(t testing.TB, path string) []string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return split(t, string(text))
}

func split(t testing.TB, text string) []string {
	t.Helper()
	if text == "" {
		return nil
	}
	whole, ok := strings.CutSuffix(text, "\n")
	if !ok {
		t.Fatalf("the last line has no end: %q", text)
	}
	return strings.Split(whole, "\n")
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); {
		if time.Now().After(deadline) {
			t.Fatalf("still not so: %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

// program is the log of the program.
type program struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (p *program) Write(line []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.text.Write(line)
}

func (p *program) log() *slog.Logger { return slog.New(slog.NewTextHandler(p, nil)) }

// wantLast checks how many lines there are and what the last one contains.
func (p *program) wantLast(t *testing.T, lines int, parts ...string) {
	t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	said := split(t, p.text.String())
	if len(said) != lines {
		t.Fatalf("the program's log is %q, want %d lines", said, lines)
	}
	for _, part := range parts {
		if !strings.Contains(said[lines-1], part) {
			t.Errorf("the program's log ends with %q, want it to contain %q", said[lines-1], part)
		}
	}
}

// value returns a series of the metrics in m whose labels are these.
func value(t *testing.T, m *metrics.Registry, name string, labels ...string) int64 {
	t.Helper()
	for _, f := range m.Families() {
		for _, s := range f.Series {
			if f.Desc.Name == name && slices.Equal(s.Labels, labels) {
				return s.Value
			}
		}
	}
	t.Fatalf("there is no %s%q", name, labels)
	return 0
}

var opened = time.Date(2026, 7, 27, 20, 4, 5, 999_999_999, time.FixedZone("CEST", 7200))

func upgrade() *accesslog.Record {
	return &accesslog.Record{
		Start: opened, Duration: 12345678 * time.Nanosecond, Upstream: 1500 * time.Microsecond,
		RequestID: "9f2c", Listener: "public", VirtualHost: "chat", Route: `prefix "/socket"`, Cluster: "chat", Endpoint: "10.0.0.1:8080",
		Client: netip.MustParseAddrPort("[2001:db8::1]:40000"), Method: "GET", Scheme: "https", Authority: "chat.example", Target: "/socket?room=1", Protocol: "HTTP/1.1",
		Status: 101, UserAgent: "Mozilla/5.0 (X11)", Referer: "https://chat.example/", ForwardedFor: "203.0.113.9",
		ClientAddress: netip.MustParseAddr("203.0.113.9"),
	}
}

func end() accesslog.End {
	return accesslog.End{At: opened.Add(time.Hour), Duration: time.Hour + 1500*time.Nanosecond, ToUpstream: 120, ToDownstream: 5 << 32, Reason: "upstream closed"}
}

func TestWhatLinesLookLike(t *testing.T) {
	t.Parallel()
	request := upgrade()
	request.Status, request.Received, request.Sent, request.Reason = 200, 3, 1<<40, "no byte moved"
	request.Flags = flags.UpstreamTimeout | flags.StreamIdle
	for format, want := range map[string][]string{
		"json": {
			`{"time":"2026-07-27T18:04:06.012345Z","event":"request","duration_seconds":0.012345,"received_bytes":3,"sent_bytes":1099511627776,"reason":"no byte moved","flags":"UT,SI",` +
				`"status":200,"upstream_seconds":0.001500,"method":"GET","target":"/socket?room=1","protocol":"HTTP/1.1","scheme":"https","authority":"chat.example","client":"[2001:db8::1]:40000","client_address":"203.0.113.9",` +
				`"listener":"public","virtual_host":"chat","route":"prefix \"/socket\"","cluster":"chat","endpoint":"10.0.0.1:8080","generation":7,"request_id":"9f2c",` +
				`"user_agent":"Mozilla/5.0 (X11)","referer":"https://chat.example/","forwarded_for":"203.0.113.9"}`,
			`{"time":"2026-07-27T18:04:06.012345Z","event":"tunnel_open","duration_seconds":0.012345,"received_bytes":0,"sent_bytes":0,"reason":"","flags":"",` +
				`"status":101,"upstream_seconds":0.001500,"method":"GET","target":"/socket?room=1","protocol":"HTTP/1.1","scheme":"https","authority":"chat.example","client":"[2001:db8::1]:40000","client_address":"203.0.113.9",` +
				`"listener":"public","virtual_host":"chat","route":"prefix \"/socket\"","cluster":"chat","endpoint":"10.0.0.1:8080","generation":7,"request_id":"9f2c",` +
				`"user_agent":"Mozilla/5.0 (X11)","referer":"https://chat.example/","forwarded_for":"203.0.113.9"}`,
			`{"time":"2026-07-27T19:04:05.999999Z","event":"tunnel_close","duration_seconds":3600.000001,"received_bytes":120,"sent_bytes":21474836480,"reason":"upstream closed","flags":"",` +
				`"status":101,"upstream_seconds":0.001500,"method":"GET","target":"/socket?room=1","protocol":"HTTP/1.1","scheme":"https","authority":"chat.example","client":"[2001:db8::1]:40000","client_address":"203.0.113.9",` +
				`"listener":"public","virtual_host":"chat","route":"prefix \"/socket\"","cluster":"chat","endpoint":"10.0.0.1:8080","generation":7,"request_id":"9f2c"}`,
			`{"time":"0000-12-31T23:59:59.998500Z","event":"request","duration_seconds":0.000000,"received_bytes":0,"sent_bytes":0,"reason":"","flags":"",` +
				`"status":0,"upstream_seconds":null,"method":"","target":"","protocol":"","scheme":"","authority":"","client":"unix","client_address":"",` +
				`"listener":"","virtual_host":"","route":"","cluster":"","endpoint":"","generation":7,"request_id":"",` +
				`"user_agent":"","referer":"","forwarded_for":""}`,
		},
		"text": {
			`2026-07-27T18:04:06.012345Z request 0.012345 3 1099511627776 "no byte moved" "UT,SI" 200 0.001500 "GET /socket?room=1 HTTP/1.1" "https" "chat.example" "[2001:db8::1]:40000" "203.0.113.9" ` +
				`"public" "chat" "prefix \"/socket\"" "chat" "10.0.0.1:8080" 7 "9f2c" "Mozilla/5.0 (X11)" "https://chat.example/" "203.0.113.9"`,
			`2026-07-27T18:04:06.012345Z tunnel_open 0.012345 0 0 "" "" 101 0.001500 "GET /socket?room=1 HTTP/1.1" "https" "chat.example" "[2001:db8::1]:40000" "203.0.113.9" ` +
				`"public" "chat" "prefix \"/socket\"" "chat" "10.0.0.1:8080" 7 "9f2c" "Mozilla/5.0 (X11)" "https://chat.example/" "203.0.113.9"`,
			`2026-07-27T19:04:05.999999Z tunnel_close 3600.000001 120 21474836480 "upstream closed" "" 101 0.001500 "GET /socket?room=1 HTTP/1.1" "https" "chat.example" "[2001:db8::1]:40000" "203.0.113.9" ` +
				`"public" "chat" "prefix \"/socket\"" "chat" "10.0.0.1:8080" 7 "9f2c" "" "" ""`,
			`0000-12-31T23:59:59.998500Z request 0.000000 0 0 "" "" 0 - "  " "" "" "unix" "" "" "" "" "" "" 7 "" "" "" ""`,
		},
	} {
		t.Run(format, func(t *testing.T) {
			t.Parallel()
			got := written(t, format, func(l *accesslog.Log) {
				l.Request(request)
				l.TunnelClosed(l.TunnelOpened(upgrade()), end())
				l.Request(&accesslog.Record{Duration: -1500 * time.Microsecond}) // the clock was set back
			})
			if len(got) != len(want) {
				t.Fatalf("%d lines, want %d:\n%s", len(got), len(want), strings.Join(got, "\n"))
			}
			for i := range want {
				if got[i] != want[i] {
					t.Errorf("line %d\ngot  %s\nwant %s", i, got[i], want[i])
				}
			}
		})
	}
}

func TestEveryFieldIsDocumentedInItsPlace(t *testing.T) {
	t.Parallel()
	source, err := os.ReadFile("accesslog.go")
	if err != nil {
		t.Fatal(err)
	}
	_, table, _ := strings.Cut(string(source), "with a space between two.\n//\n")
	table, _, _ = strings.Cut(table, "//\n")
	var documented []string
	for _, row := range regexp.MustCompile(`(?m)^//\t([a-z_]+(?:, [a-z_]+)*)(?:  |$)`).FindAllStringSubmatch(table, -1) {
		documented = append(documented, strings.Split(row[1], ", ")...)
	}
	lines := written(t, "json", func(l *accesslog.Log) { l.Request(upgrade()) })
	var keys []string
	for _, key := range regexp.MustCompile(`[{,]"([a-z_]+)":`).FindAllStringSubmatch(lines[0], -1) {
		keys = append(keys, key[1])
	}
	if !slices.Equal(documented, keys) {
		t.Errorf("documented %q\nwritten    %q", documented, keys)
	}
}

// tlsEverywhere is TLS in which every string is s.
func tlsEverywhere(s string) *accesslog.TLS {
	return &accesslog.TLS{Version: s, Cipher: s, ServerName: s, Peer: &accesslog.Peer{Subject: s, Issuer: s, Serial: s, Fingerprint: s, URIs: s, DNSNames: s}}
}

// everywhere returns a record in which every string is s.
func everywhere(s string) *accesslog.Record {
	r := upgrade()
	v := reflect.ValueOf(r).Elem()
	for i := range v.NumField() {
		if f := v.Field(i); f.Kind() == reflect.String {
			f.SetString(s)
		}
	}
	r.Client = netip.AddrPortFrom(netip.MustParseAddr("fe80::1").WithZone(s), 65535)
	r.ClientAddress = netip.MustParseAddr("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff")
	return r
}

// The worst that every field may be, at once.
func TestALineIsNeverLongerThanAPipeKeepsTogether(t *testing.T) {
	t.Parallel()
	huge := uint64(1<<64 - 1)
	for _, c := range []string{"x", `"`, "\\", " ", "\x00", "\x1b", "\xff", "é", "\u2028", "…", "\U0001f600", "\U000e0001"} {
		r := everywhere(strings.Repeat(c, 1<<13))
		r.TLS = tlsEverywhere(strings.Repeat(c, 1<<13))
		r.Received, r.Sent, r.Duration, r.Upstream, r.Status, r.Flags = huge, huge, 1<<63-1, 1<<63-1, 1<<31, flags.Known
		for _, format := range formats {
			lines := written(t, format, func(l *accesslog.Log) {
				l.Request(r)
				l.TunnelClosed(l.TunnelOpened(r), accesslog.End{Duration: 1<<63 - 1, ToUpstream: huge, ToDownstream: huge, Reason: r.Reason})
			})
			if len(lines) != 3 {
				t.Fatalf("%q in %s: %d lines, want 3", c, format, len(lines))
			}
			for _, line := range lines {
				if len(line)+1 > 4096 {
					t.Errorf("%q in %s: a line of %d bytes", c, format, len(line)+1)
				}
				checkLine(t, format, line)
			}
		}
	}
}

func TestALongStringIsCutBetweenTwoCharacters(t *testing.T) {
	t.Parallel()
	const limit = 1024 // of the target, in the bytes of the line
	for _, test := range []struct{ name, target, want string }{
		{"it just fits", strings.Repeat("x", limit), strings.Repeat("x", limit)},
		{"it is one too long", strings.Repeat("x", limit+1), strings.Repeat("x", limit-3) + "…"},
		{"an escaped character would be cut", strings.Repeat("x", limit-8) + "\x00\x00\x00", strings.Repeat("x", limit-8) + "…"},
		{"an escaped character just fits", strings.Repeat("x", limit-9) + "\x00\x00\x00", strings.Repeat("x", limit-9) + "\x00…"},
		{"a character of several bytes would be cut", strings.Repeat("x", limit-1) + "é", strings.Repeat("x", limit-3) + "…"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			line := written(t, "json", func(l *accesslog.Log) { l.Request(&accesslog.Record{Target: test.target}) })[0]
			var got struct{ Target string }
			if err := json.Unmarshal([]byte(line), &got); err != nil || got.Target != test.want {
				t.Errorf("%d bytes ending in %q (%v), want %d ending in %q",
					len(got.Target), got.Target[len(got.Target)-10:], err, len(test.want), test.want[len(test.want)-10:])
			}
		})
	}
}

// checkLine takes a line apart and fails if its fields are not those that a line of
// the format has.
func checkLine(t testing.TB, format, line string) {
	t.Helper()
	for _, r := range line {
		if !strconv.IsPrint(r) {
			t.Fatalf("character %U in %q", r, line)
		}
	}
	if format == "json" {
		checkObject(t, line)
		return
	}
	var all []string
	for rest := line + " "; rest != ""; {
		field, after, ok := strings.Cut(rest, " ")
		if rest[0] == '"' {
			var s json.RawMessage
			d := json.NewDecoder(strings.NewReader(rest))
			if err := d.Decode(&s); err != nil {
				t.Fatalf("%v in %q", err, rest)
			}
			field = string(s)
			after, ok = strings.CutPrefix(rest[len(field):], " ")
		}
		if !ok {
			t.Fatalf("no space behind a field in %q", rest)
		}
		all = append(all, field)
		rest = after
	}
	if len(all) != 24 {
		t.Fatalf("%d fields in %q", len(all), line)
	}
	if requestLine := all[9]; strings.Count(requestLine, " ") != 2 {
		t.Fatalf("request line is %s", requestLine)
	}
}

func checkObject(t testing.TB, line string) {
	t.Helper()
	d := json.NewDecoder(strings.NewReader(line))
	d.UseNumber()
	keys := map[string]bool{}
	for i := 0; ; i++ {
		token, err := d.Token()
		switch {
		case err == io.EOF:
			if n := len(keys); n != 26 && n != 23 && n != 26+4 && n != 23+4 { // with TLS, and without
				t.Fatalf("%d keys in %q", n, line)
			}
			return
		case err != nil:
			t.Fatalf("%v in %q", err, line)
		case token == json.Delim('{') || token == json.Delim('}'):
		case i%2 == 1:
			key := token.(string)
			if keys[key] {
				t.Fatalf("%q twice in %q", key, line)
			}
			keys[key] = true
		}
	}
}

// FuzzRecord shows that no string of a record reaches beyond its field.
func FuzzRecord(f *testing.F) {
	f.Add("GET", "/x?y=1", "curl/8", "a.example", "")
	f.Add("", "\" \" \"", "\\", "\\\"", "\n")
	f.Add("A B", "/ HTTP/1.1\" 200", "\x00\x1b[2J\x7f\u0085\u2028\u2029\u202e", "\xff\xfe\xc3", "\",\"event\":\"request")
	f.Add("\U0001f600", strings.Repeat("é", 600), strings.Repeat("\U000e0001", 100), "\r", "\ud7ff\ue000\ufffd")
	f.Fuzz(func(t *testing.T, method, target, agent, authority, other string) {
		r := everywhere(other)
		r.Method, r.Target, r.UserAgent, r.Authority = method, target, agent, authority
		for _, format := range formats {
			for event, text := range accesslog.Lines(format, r, accesslog.End{Reason: other}) {
				lines := split(t, text)
				if len(lines) != 1 || len(text) > 4096 || !strings.Contains(text[:60], event) {
					t.Fatalf("%s in %s is %q", event, format, text)
				}
				checkLine(t, format, lines[0])
			}
		}
		var got struct {
			Authority string
			UserAgent string `json:"user_agent"`
		}
		if err := json.Unmarshal([]byte(accesslog.Lines("json", r, accesslog.End{})["request"]), &got); err != nil {
			t.Fatal(err)
		}
		wantText(t, got.Authority, authority)
		wantText(t, got.UserAgent, agent)
	})
}

// wantText checks that got is s, or where it was cut begins as s does.
func wantText(t *testing.T, got, s string) {
	t.Helper()
	want := string([]rune(s)) // each byte that is no character becomes U+FFFD
	begin, cut := strings.CutSuffix(got, "…")
	if got != want && (!cut || !strings.HasPrefix(want, begin)) {
		t.Fatalf("got %q, want %q", got, want)
	}
}

func TestGenerationsShareAFileAndAPipe(t *testing.T) {
	t.Parallel()
	const generations, each = 4, 300
	use := func(files []*os.File) {
		var running sync.WaitGroup
		for g, file := range files {
			running.Go(func() {
				l := accesslog.New([]accesslog.Output{{Path: "x", Format: "json", File: file}}, g, nil)
				for i := range each {
					r := upgrade()
					r.Target = "/" + strings.Repeat("x", i%1000)
					l.Request(r)
				}
				l.Close(20 * time.Second)
			})
		}
		running.Wait()
	}
	check := func(t *testing.T, lines []string) {
		t.Helper()
		if len(lines) != generations*each {
			t.Fatalf("%d lines, want %d", len(lines), generations*each)
		}
		of := make([]int, generations)
		for _, line := range lines {
			var got struct {
				Generation int
				Target     string
			}
			if err := json.Unmarshal([]byte(line), &got); err != nil {
				t.Fatalf("line %q: %v", line, err)
			}
			if len(got.Target) != 1+of[got.Generation]%1000 {
				t.Fatalf("the records of a generation are not in order")
			}
			of[got.Generation]++
		}
	}
	t.Run("file", func(t *testing.T) {
		t.Parallel()
		path := filepath.Join(t.TempDir(), "access.log")
		var files []*os.File
		for range generations {
			files = append(files, appending(t, path))
		}
		use(files)
		check(t, linesOf(t, path))
	})
	t.Run("pipe", func(t *testing.T) {
		t.Parallel()
		r, pipe, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		var files []*os.File
		for range generations {
			files = append(files, appending(t, fmt.Sprintf("/proc/self/fd/%d", pipe.Fd())))
		}
		pipe.Close()
		go use(files)
		text, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		check(t, split(t, string(text)))
	})
}

func TestAReaderThatNeverReadsHoldsUpNothing(t *testing.T) {
	t.Parallel()
	r, pipe, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	var program program
	m := metrics.NewRegistry()
	l := accesslog.New([]accesslog.Output{{
		Path: "/run/pipe", Format: "text", File: pipe, Log: program.log(),
	}}, 7, m)
	const n = 20_000
	recorded := make(chan struct{})
	go func() {
		defer close(recorded)
		tunnel := l.TunnelOpened(upgrade())
		for range n - 2 {
			l.Request(upgrade())
		}
		l.TunnelClosed(tunnel, end())
	}()
	select {
	case <-recorded:
	case <-time.After(20 * time.Second):
		t.Fatal("recording waits for the reader")
	}
	dropped := value(t, m, "holdfast_access_log_dropped_total", "/run/pipe")
	if dropped == 0 {
		t.Errorf("none of %d records is dropped", n)
	}
	// What is neither written nor dropped is what is lost if the process dies now.
	eventually(t, "every record is counted as written, dropped or queued, and some wait", func() bool {
		queued := value(t, m, "holdfast_access_log_queued_records", "/run/pipe")
		return queued > 0 && value(t, m, "holdfast_access_log_records_total", "/run/pipe")+dropped+queued == n
	})
	program.wantLast(t, 1, "level=ERROR", "records are being dropped", "path=/run/pipe", "faster")
	l.Close(time.Millisecond)
	program.wantLast(t, 2, "level=WARN", "before its last records", "path=/run/pipe")
	l.Request(upgrade()) // after Close
	r.Close()
	l.Close(20 * time.Second) // waits
	written := value(t, m, "holdfast_access_log_records_total", "/run/pipe")
	dropped = value(t, m, "holdfast_access_log_dropped_total", "/run/pipe")
	if written+dropped != n+1 {
		t.Errorf("%d written and %d dropped of %d", written, dropped, n+1)
	}
	if queued := value(t, m, "holdfast_access_log_queued_records", "/run/pipe"); queued != 0 {
		t.Errorf("%d records wait in the end", queued)
	}
}

func TestAFullDiskIsCountedAndSaidOnce(t *testing.T) {
	t.Parallel()
	file, err := os.OpenFile("/dev/full", os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Skip(err)
	}
	var program program
	m := metrics.NewRegistry()
	path := filepath.Join(t.TempDir(), "access.log")
	l := accesslog.New([]accesslog.Output{{
		Path: path, Format: "json", File: file, Log: program.log(),
	}}, 7, m)
	for i := range 3 {
		l.Request(upgrade())
		eventually(t, "the record is counted as dropped", func() bool {
			return value(t, m, "holdfast_access_log_dropped_total", path) == int64(i+1)
		})
	}
	program.wantLast(t, 1, "level=ERROR", "no space left on device")
	// Somebody has made room.
	l.Reopen(map[string]*os.File{path: appending(t, path)})
	l.Request(upgrade())
	l.Close(20 * time.Second)
	if got := len(linesOf(t, path)); got != 1 {
		t.Errorf("%d lines, want 1", got)
	}
	for name, want := range map[string]int64{
		"holdfast_access_log_write_errors_total":  3,
		"holdfast_access_log_records_total":       1,
		"holdfast_access_log_written_bytes_total": int64(len(linesOf(t, path)[0]) + 1),
		"holdfast_access_log_queued_records":      0,
	} {
		if got := value(t, m, name, path); got != want {
			t.Errorf("%s is %d, want %d", name, got, want)
		}
	}
	program.wantLast(t, 2, "level=WARN", "records=3")
}

func TestRecordsGoToTheFileOfTheirTime(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path, other := filepath.Join(dir, "access.log"), filepath.Join(dir, "other.log")
	l := accesslog.New([]accesslog.Output{
		{Path: path, Format: "json", File: appending(t, path)},
		{Path: other, Format: "text", File: appending(t, other)},
	}, 7, nil)
	tunnel := l.TunnelOpened(upgrade())
	l.Request(upgrade())
	if err := os.Rename(path, path+".1"); err != nil {
		t.Fatal(err)
	}
	unknown := appending(t, filepath.Join(dir, "unknown"))
	l.Reopen(map[string]*os.File{path: appending(t, path), "nobody's": unknown})
	l.TunnelClosed(tunnel, end())
	l.Close(20 * time.Second)
	for name, want := range map[string]int{path + ".1": 2, path: 1, other: 3} {
		if got := len(linesOf(t, name)); got != want {
			t.Errorf("%s has %d lines, want %d", filepath.Base(name), got, want)
		}
	}
	if _, err := unknown.Write([]byte("x")); err == nil {
		t.Error("a file for no output stays open")
	}
}

func TestEverythingMayHappenAtOnce(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "access.log")
	m := metrics.NewRegistry()
	l := accesslog.New([]accesslog.Output{
		{Path: path, Format: "json", File: appending(t, path)},
		{Path: path + ".txt", Format: "text", File: appending(t, path+".txt")},
	}, 7, m)
	const goroutines, each = 4, 200
	var running sync.WaitGroup
	for range goroutines {
		running.Go(func() {
			for range each {
				l.TunnelClosed(l.TunnelOpened(upgrade()), end())
				l.Request(upgrade())
			}
		})
	}
	running.Go(func() {
		for i := range 20 {
			l.Reopen(map[string]*os.File{path: appending(t, fmt.Sprint(path, i))})
		}
	})
	running.Wait()
	l.Close(20 * time.Second)
	names, err := filepath.Glob(path + "*")
	if err != nil {
		t.Fatal(err)
	}
	lines := map[string]int{}
	for _, name := range names {
		format := "json"
		if filepath.Ext(name) == ".txt" {
			format = "text"
		}
		for _, line := range linesOf(t, name) {
			checkLine(t, format, line)
			lines[format]++
		}
	}
	for format, path := range map[string]string{"json": path, "text": path + ".txt"} {
		// On a slow disk some find no room.
		dropped := value(t, m, "holdfast_access_log_dropped_total", path)
		if want := goroutines * each * 3; lines[format]+int(dropped) != want {
			t.Errorf("%d lines and %d dropped in %s, want %d", lines[format], dropped, format, want)
		}
	}
}

func TestALogWithoutOutputsDoesNothing(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for _, l := range []*accesslog.Log{nil, accesslog.New(nil, 7, nil)} {
		file := appending(t, filepath.Join(dir, "x"))
		l.Request(upgrade())
		tunnel := l.TunnelOpened(upgrade())
		if tunnel != nil {
			t.Error("a tunnel is kept for nobody")
		}
		l.TunnelClosed(tunnel, end())
		l.Reopen(map[string]*os.File{"x": file})
		l.Close(time.Second)
		if _, err := file.Write([]byte("x")); err == nil {
			t.Error("a file for no output stays open")
		}
	}
}

// discarding returns a Log of both formats that writes to nowhere.
func discarding(t testing.TB) *accesslog.Log {
	t.Helper()
	l := accesslog.New([]accesslog.Output{
		{Path: "a", Format: "json", File: appending(t, os.DevNull)},
		{Path: "b", Format: "text", File: appending(t, os.DevNull)},
	}, 7, nil)
	t.Cleanup(func() { l.Close(20 * time.Second) })
	return l
}

// Not parallel: allocations are counted for the whole process.
func TestARequestCostsNoAllocation(t *testing.T) {
	l := discarding(t)
	r := upgrade()
	if got := testing.AllocsPerRun(1000, func() { l.Request(r) }); got > 0 {
		t.Errorf("%v allocations", got)
	}
}

func BenchmarkRequest(b *testing.B) {
	for _, format := range formats {
		b.Run(format, func(b *testing.B) {
			l := accesslog.New([]accesslog.Output{{Path: "a", Format: format, File: appending(b, os.DevNull)}}, 7, nil)
			defer l.Close(20 * time.Second)
			r := upgrade()
			b.ReportAllocs()
			for b.Loop() {
				l.Request(r)
			}
		})
	}
}

func BenchmarkTunnel(b *testing.B) {
	l := discarding(b)
	r := upgrade()
	b.ReportAllocs()
	for b.Loop() {
		l.TunnelClosed(l.TunnelOpened(r), end())
	}
}

// Of TLS the JSON format and operators tell, also at the end of a tunnel.
func TestTLSIsRecorded(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name, json, custom string
		tls                *accesslog.TLS
	}{
		{"none", ``, "- - - - - - - - -", nil},
		{"without a certificate", `"tls_version":"TLSv1.2","server_name":"a.test"`, "TLSv1.2 C a.test - - - - - -", &accesslog.TLS{Version: "TLSv1.2", Cipher: "C", ServerName: "a.test"}},
		{"with one", `"tls_version":"TLSv1.3","server_name":"","peer_subject":"CN=\"x\"","peer_fingerprint":"ab"`, `TLSv1.3 C - CN=\"x\" CN=y 1f ab a://b,c://d e.test`, &accesslog.TLS{
			Version: "TLSv1.3", Cipher: "C", Peer: &accesslog.Peer{Subject: `CN="x"`, Issuer: "CN=y", Serial: "1f", Fingerprint: "ab", URIs: "a://b,c://d", DNSNames: "e.test"},
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			r := upgrade()
			r.TLS = test.tls
			record := func(l *accesslog.Log) {
				l.Request(r)
				l.TunnelClosed(l.TunnelOpened(r), end())
			}
			for _, line := range written(t, "json", record) {
				if !strings.Contains(line, test.json) || strings.Contains(line, "tls_version") != (test.tls != nil) {
					t.Errorf("got  %s\nwant %s", line, test.json)
				}
			}
			f := "%DOWNSTREAM_TLS_VERSION% %DOWNSTREAM_TLS_CIPHER% %REQUESTED_SERVER_NAME% %DOWNSTREAM_PEER_SUBJECT% %DOWNSTREAM_PEER_ISSUER% " +
				"%DOWNSTREAM_PEER_SERIAL% %DOWNSTREAM_PEER_FINGERPRINT_256% %DOWNSTREAM_PEER_URI_SAN% %DOWNSTREAM_PEER_DNS_SAN%"
			l, lines := output(t, accesslog.Output{Custom: textFormat(t, f)})
			record(l)
			got := lines()
			if len(got) != 3 {
				t.Fatalf("%q", got)
			}
			for _, line := range got {
				if line != test.custom {
					t.Errorf("got  %s\nwant %s", line, test.custom)
				}
			}
		})
	}
}
