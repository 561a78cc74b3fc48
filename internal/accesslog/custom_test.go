package accesslog_test

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"holdfast/internal/accesslog"
	"holdfast/internal/accesslog/flags"
	"holdfast/internal/accesslog/format"
	"holdfast/internal/dynamic"
)

func textFormat(t testing.TB, s string) *format.Format {
	t.Helper()
	f, err := format.Text(s)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func jsonFormat(t testing.TB, table map[string]string) *format.Format {
	t.Helper()
	f, err := format.JSON(table)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// heads are what requests of these tests have.
type heads struct{ request, response map[string]string }

// fill gives a record the values that a log wants to know.
func (h heads) fill(l *accesslog.Log, r *accesslog.Record) *accesslog.Record {
	values := func(names []string, head map[string]string) (values []accesslog.Value) {
		for _, name := range names {
			text, ok := head[name]
			values = append(values, accesslog.Value{Text: text, Present: ok})
		}
		return values
	}
	r.RequestFields, r.ResponseFields = values(l.RequestFields(), h.request), values(l.ResponseFields(), h.response)
	return r
}

// output opens a log of one output.
func output(t testing.TB, o accesslog.Output) (l *accesslog.Log, lines func() []string) {
	t.Helper()
	o.Path = filepath.Join(t.TempDir(), "log")
	o.File = appending(t, o.Path)
	l = accesslog.New([]accesslog.Output{o}, 7, nil)
	return l, func() []string {
		l.Close(20 * time.Second)
		return linesOf(t, o.Path)
	}
}

var sent = heads{
	request:  map[string]string{"user-agent": `curl "8"`, "x-a": "first", "x-long": strings.Repeat("x", 300), "x-evil": "a b\n\"|]"},
	response: map[string]string{"content-type": "text/plain", "x-empty": ""},
}

// A connection that is relayed as it is has no request: what would be said of one is not there.
func TestAConnectionThatIsRelayedHasOneRecordOfItsEndWhateverBecomesOfIt(t *testing.T) {
	t.Parallel()
	l, lines := output(t, accesslog.Output{Custom: textFormat(t, "%EVENT% %PROTOCOL% %REQUESTED_SERVER_NAME% %REQ(:METHOD)% %REQ(:PATH)% %RESPONSE_CODE% %REASON% %RESPONSE_FLAGS%"), Events: accesslog.TunnelsClosed})
	r := &accesslog.Record{Start: opened, Protocol: accesslog.TCP, Authority: "a.example", Reason: "slow", Flags: flags.StreamIdle}
	l.TunnelRefused(r)
	r.Authority, r.Reason, r.Flags = "", "", 0
	l.TunnelClosed(l.TunnelOpened(r), accesslog.End{At: opened, Reason: "idle", Flags: flags.LocalReset})
	want := []string{"tunnel_close TCP a.example - - 0 slow SI", "tunnel_close TCP - - - 0 idle LR"}
	if got := lines(); !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestWhyTLSHasFailedStandsByItself(t *testing.T) {
	t.Parallel()
	l, lines := output(t, accesslog.Output{Custom: textFormat(t, `"%UPSTREAM_TRANSPORT_FAILURE_REASON%"`), Events: accesslog.TunnelsClosed})
	for _, reason := range []string{"connect to 10.0.0.1:443: TLS error: it does not speak TLS", "connect to 10.0.0.1:443: connection refused", ""} {
		l.TunnelRefused(&accesslog.Record{Start: opened, Protocol: accesslog.TCP, Reason: reason})
	}
	if got, want := lines(), []string{`"it does not speak TLS"`, `"-"`, `"-"`}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestOperators(t *testing.T) {
	t.Parallel()
	request := upgrade()
	request.Status, request.Received, request.Sent, request.Reason = 200, 3, 1<<40, "no byte moved"
	request.Flags = flags.UpstreamTimeout | flags.StreamIdle
	nothing := &accesslog.Record{Start: opened}
	relayed := upgrade()
	for name, tt := range map[string]struct {
		format, request, nothing string
	}{
		"START_TIME":            {"%START_TIME%", "2026-07-27T18:04:05.999Z", "2026-07-27T18:04:05.999Z"},
		"its format":            {"%START_TIME(%s)%", "1785175445", "1785175445"},
		"EVENT":                 {"%EVENT%", "request", "request"},
		"REQ":                   {"%REQ(X-A)%", "first", "-"},
		"its other":             {"%REQ(X-B?X-A)%", "first", "-"},
		"its first":             {"%REQ(X-A?X-B)%", "first", "-"},
		"its most":              {"%REQ(X-A):4%", "f…", "-"},
		"too little for a mark": {"%REQ(X-A):2%", "fi", "-"},
		"the usual most":        {"%REQ(X-LONG)%", strings.Repeat("x", 253) + "…", "-"},
		"more than usual":       {"%REQ(X-LONG):1024%", strings.Repeat("x", 300), "-"},
		"the method":            {"%REQ(:METHOD)%", "GET", "-"},
		"the path":              {"%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%", "/socket?room=1", "-"},
		"without its query":     {"%REQ_WITHOUT_QUERY(:path)%", "/socket", "-"},
		"the authority":         {"%REQ(Host)%", "chat.example", "-"},
		"the scheme":            {"%REQ(:SCHEME)%", "https", "-"},
		"RESP":                  {"%RESP(Content-Type)%", "text/plain", "-"},
		"one that is empty":     {"%RESP(X-Empty)%", "-", "-"},
		"the response's other":  {"%RESP(X-Empty?Content-Type)%", "text/plain", "-"},
		"PROTOCOL":              {"%PROTOCOL%", "HTTP/1.1", "-"},
		"no TLS server's name":  {"%REQUESTED_SERVER_NAME%", "-", "-"},
		"RESPONSE_CODE":         {"%RESPONSE_CODE%", "200", "0"},
		"details":               {"%RESPONSE_CODE_DETAILS%", "no_byte_moved", "-"},
		"RESPONSE_FLAGS":        {"%RESPONSE_FLAGS%", "UT,SI", "-"},
		"REASON":                {`"%REASON%"`, `"no byte moved"`, `"-"`},
		"a reason unquoted":     {"%REASON%", `no\u0020byte\u0020moved`, "-"},
		"BYTES_RECEIVED":        {"%BYTES_RECEIVED%", "3", "0"},
		"BYTES_SENT":            {"%BYTES_SENT%", "1099511627776", "0"},
		"DURATION":              {"%DURATION%", "12", "0"},
		"RESPONSE_DURATION":     {"%RESPONSE_DURATION%", "1", "-"},
		"UPSTREAM_HOST":         {"%UPSTREAM_HOST%", "10.0.0.1:8080", "-"},
		"UPSTREAM_CLUSTER":      {"%UPSTREAM_CLUSTER%", "chat", "-"},
		"ROUTE_NAME":            {`"%ROUTE_NAME%"`, `"prefix \"/socket\""`, `"-"`},
		"VIRTUAL_HOST_NAME":     {"%VIRTUAL_HOST_NAME%", "chat", "-"},
		"LISTENER_NAME":         {"%LISTENER_NAME%", "public", "-"},
		"the client":            {"%DOWNSTREAM_REMOTE_ADDRESS%", "[2001:db8::1]:40000", "unix"},
		"behind proxies":        {"%CLIENT_ADDRESS%", "203.0.113.9", "-"},
		"without port":          {"%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%", "2001:db8::1", "unix"},
		"its port":              {"%DOWNSTREAM_REMOTE_PORT%", "40000", "-"},
		"REQUEST_ID":            {"%REQUEST_ID%", "9f2c", "-"},
		"GENERATION":            {"%GENERATION%", "7", "7"},
		"text":                  {"100%% [%PROTOCOL%]\t→", "100% [HTTP/1.1]\t→", "100% [-]\t→"},
		"with a line's end":     {"%PROTOCOL%\n", "HTTP/1.1", "-"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l, lines := output(t, accesslog.Output{Custom: textFormat(t, tt.format)})
			a, b := *request, *nothing
			l.Request(sent.fill(l, &a))
			l.Request(&b)
			if got := lines(); len(got) != 2 || got[0] != tt.request || got[1] != tt.nothing {
				t.Errorf("got %q, want %q and %q", got, tt.request, tt.nothing)
			}
		})
	}
	for name, tt := range map[string]struct {
		change func(*accesslog.Record)
		want   string
	}{
		"the upstream's":    {func(*accesslog.Record) {}, "via_upstream"},
		"our own":           {func(r *accesslog.Record) { r.Upstream = 0 }, "direct_response"},
		"nobody's":          {func(r *accesslog.Record) { r.Upstream, r.Status = 0, 0 }, "-"},
		"cut":               {func(r *accesslog.Record) { r.Reason = strings.Repeat("x ", 100) }, strings.Repeat("x_", 62) + "x"},
		"cut within a word": {func(r *accesslog.Record) { r.Reason = "a " + strings.Repeat("x", 200) }, "a_" + strings.Repeat("x", 123) + "…"},
	} {
		t.Run("details of a response that is "+name, func(t *testing.T) {
			t.Parallel()
			l, lines := output(t, accesslog.Output{Custom: textFormat(t, "%RESPONSE_CODE_DETAILS%")})
			r := *relayed
			tt.change(&r)
			l.Request(&r)
			if got := lines(); len(got) != 1 || got[0] != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}

func TestATableMakesAnObject(t *testing.T) {
	t.Parallel()
	l, lines := output(t, accesslog.Output{Custom: jsonFormat(t, map[string]string{
		"status": "%RESPONSE_CODE%", "ms": "%DURATION%", "upstream_ms": "%RESPONSE_DURATION%", "port": "%DOWNSTREAM_REMOTE_PORT%",
		"line": "%REQ(:METHOD)% %REQ(:PATH)%", "agent": "%REQ(User-Agent)%", "none": "%REQ(X-None)%", "mixed": "<%RESPONSE_CODE%|%REQ(X-None)%>",
		"text": `a "b" \ 100%%`, `k"\`: "%EVENT%", "nothing": "", "flags": "%RESPONSE_FLAGS%", "time": "%START_TIME(%s)%", "client": "%DOWNSTREAM_REMOTE_ADDRESS%",
	})})
	l.Request(sent.fill(l, upgrade()))
	l.Request(&accesslog.Record{Start: opened, Flags: flags.NoRoute | flags.DelayInjected})
	want := []string{
		`{"agent":"curl \"8\"","client":"[2001:db8::1]:40000","flags":null,"k\"\\":"request","line":"GET /socket?room=1","mixed":"<101|->","ms":12,"none":null,` +
			`"nothing":"","port":40000,"status":101,"text":"a \"b\" \\ 100%","time":"1785175445","upstream_ms":1}`,
		`{"agent":null,"client":"unix","flags":"NR,DI","k\"\\":"request","line":"- -","mixed":"<0|->","ms":0,"none":null,` +
			`"nothing":"","port":null,"status":0,"text":"a \"b\" \\ 100%","time":"1785175445","upstream_ms":null}`,
	}
	for i, line := range lines() {
		if line != want[i] || !json.Valid([]byte(line)) {
			t.Errorf("line %d\n got %s\nwant %s", i, line, want[i])
		}
	}
}

// What a client sends cannot end its field, whatever ends that in a format.
func TestAValueCannotEndItsField(t *testing.T) {
	t.Parallel()
	for f, want := range map[string]string{
		`%REQ(X-EVIL)%`:            `a\u0020b\u000a\"|]`,
		`"%REQ(X-EVIL)%"`:          `"a b\u000a\"|]"`,
		`|%REQ(X-EVIL)%|`:          `|a\u0020b\u000a\"\u007c]|`,
		`[%REQ(X-EVIL)%] `:         `[a\u0020b\u000a\"|\u005d] `,
		`"a %REQ(X-EVIL)% b"`:      `"a a\u0020b\u000a\"|] b"`,
		`"x" %REQ(X-EVIL)% "x"`:    `"x" a\u0020b\u000a\"|] "x"`,
		`→%REQ(X-WIDE)%`:           `→\u2192`,
		`%REQ(X-WIDE)%`:            `→`,
		`%REQ(:METHOD)%%REQ(X-A)%`: `GETfirst`,
	} {
		l, lines := output(t, accesslog.Output{Custom: textFormat(t, f)})
		h := heads{request: map[string]string{"x-evil": sent.request["x-evil"], "x-wide": "→", "x-a": "first"}}
		l.Request(h.fill(l, upgrade()))
		if got := lines(); len(got) != 1 || got[0] != want {
			t.Errorf("%s\n got %q\nwant %q", f, got, want)
		}
	}
}

func TestALineInACustomFormatIsNeverTooLong(t *testing.T) {
	t.Parallel()
	var all strings.Builder
	table := map[string]string{}
	for i, o := range format.Operators {
		operator := "%" + o.Name + "%"
		if strings.Contains(o.Takes, "NAME") {
			operator = "%" + o.Name + "(X-A):1024%"
		}
		all.WriteString(operator + " ")
		table[fmt.Sprint(i)], table[fmt.Sprint("x", i)] = operator, "<"+operator+">"
	}
	for range 6 {
		all.WriteString(`"%REQ(:PATH):1024%" %REQ(X-A):1024% `)
	}
	for _, c := range []string{"x", `"`, " ", "\x00", "\xff", "é", "\U000e0001"} {
		for _, f := range []*format.Format{textFormat(t, all.String()), jsonFormat(t, table)} {
			l, lines := output(t, accesslog.Output{Custom: f})
			r := everywhere(strings.Repeat(c, 1<<13))
			r.TLS = tlsEverywhere(strings.Repeat(c, 1<<13))
			r.Received, r.Sent, r.Duration, r.Upstream, r.Status, r.Flags = 1<<64-1, 1<<64-1, 1<<63-1, 1<<63-1, 1<<31, flags.Known
			h := heads{map[string]string{"x-a": strings.Repeat(c, 1<<13)}, map[string]string{"x-a": strings.Repeat(c, 1<<13)}}
			l.TunnelClosed(l.TunnelOpened(h.fill(l, r)), accesslog.End{At: opened, Duration: 1<<63 - 1, ToUpstream: 1<<64 - 1, ToDownstream: 1<<64 - 1, Reason: r.Reason})
			r.Client = netip.MustParseAddrPort("[::ffff:255.255.255.255]:65535")
			l.Request(r)
			for _, line := range lines() {
				if len(line)+1 > 4096 || len(line) < 3000 {
					t.Errorf("%q: a line of %d bytes", c, len(line)+1)
				}
				if line[0] == '{' && !json.Valid([]byte(line)) {
					t.Errorf("%q: this is no object: %s", c, line)
				}
			}
		}
	}
}

func TestEvents(t *testing.T) {
	t.Parallel()
	for want, events := range map[string]accesslog.Events{
		"request tunnel_open tunnel_close": 0, "request": accesslog.Requests, "tunnel_open": accesslog.TunnelsOpened,
		"tunnel_close": accesslog.TunnelsClosed, "request tunnel_close": accesslog.Requests | accesslog.TunnelsClosed,
	} {
		l, lines := output(t, accesslog.Output{Custom: textFormat(t, "%EVENT%"), Events: events})
		l.Request(upgrade())
		l.TunnelClosed(l.TunnelOpened(upgrade()), end())
		if got := strings.Join(lines(), " "); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

func percent(n int64) *dynamic.Value { return dynamic.Fixed(n * dynamic.Whole / 100) }

func TestFilters(t *testing.T) {
	t.Parallel()
	is := func(name string, how accesslog.How, text string) accesslog.Header {
		return accesslog.Header{Name: name, How: how, Text: text}
	}
	not := func(h accesslog.Header) accesslog.Header { h.Invert = true; return h }
	headers := func(h ...accesslog.Header) accesslog.Filter { return accesslog.Filter{Headers: h} }
	server := []accesslog.Statuses{{From: 500, To: 599}, {From: 404, To: 404}}
	for name, tt := range map[string]struct {
		filter accesslog.Filter
		passes bool
	}{
		"no condition":                 {accesslog.Filter{}, true},
		"no condition, any":            {accesslog.Filter{Any: true}, true},
		"within a range of status":     {accesslog.Filter{Statuses: []accesslog.Statuses{{From: 404, To: 404}, {From: 500, To: 503}}}, true},
		"no status":                    {accesslog.Filter{Statuses: []accesslog.Statuses{{From: 500, To: 502}, {From: 504, To: 600}}}, false},
		"as long":                      {accesslog.Filter{MinDuration: time.Second}, true},
		"shorter":                      {accesslog.Filter{MinDuration: time.Second + 1}, false},
		"a flag":                       {accesslog.Filter{Flags: flags.UpstreamReset | flags.NoRoute}, true},
		"no flag":                      {accesslog.Filter{Flags: flags.UpstreamReset}, false},
		"a field":                      {headers(is("X-A", accesslog.Present, "")), true},
		"no field":                     {headers(is("X-None", accesslog.Present, "")), false},
		"not a field":                  {headers(not(is("X-A", accesslog.Present, ""))), false},
		"an empty field":               {headers(is("X-Empty", accesslog.Present, "")), true},
		"exact":                        {headers(is("x-a", accesslog.Exact, "first")), true},
		"not exact":                    {headers(is("x-a", accesslog.Exact, "firs")), false},
		"prefix":                       {headers(is("x-a", accesslog.Prefix, "fi")), true},
		"no prefix":                    {headers(is("x-a", accesslog.Prefix, "ir")), false},
		"suffix":                       {headers(is("x-a", accesslog.Suffix, "st")), true},
		"no suffix":                    {headers(is("x-a", accesslog.Suffix, "rs")), false},
		"contains":                     {headers(is("x-a", accesslog.Contains, "irs")), true},
		"does not contain":             {headers(is("x-a", accesslog.Contains, "x")), false},
		"what is not there is no text": {headers(not(is("x-none", accesslog.Exact, "x"))), true},
		"two fields":                   {headers(is("x-a", accesslog.Exact, "first"), is("x-none", accesslog.Present, "")), false},
		"the whole":                    {accesslog.Filter{Sample: percent(100)}, true},
		"nothing of it":                {accesslog.Filter{Sample: percent(0)}, false},
		"all of several":               {accesslog.Filter{Statuses: server, MinDuration: time.Second, Flags: flags.NoRoute, Sample: percent(100)}, true},
		"one fails":                    {accesslog.Filter{Statuses: server, MinDuration: time.Minute, Flags: flags.NoRoute}, false},
		"the last fails":               {accesslog.Filter{Statuses: server, Headers: []accesslog.Header{is("x-none", accesslog.Present, "")}}, false},
		"any of several":               {accesslog.Filter{Any: true, Statuses: server, Sample: percent(0)}, true},
		"any, the last":                {accesslog.Filter{Any: true, Sample: percent(0), Headers: []accesslog.Header{is("x-a", accesslog.Present, "")}}, true},
		"any, none":                    {accesslog.Filter{Any: true, MinDuration: time.Minute, Sample: percent(0)}, false},
		"a health check":               {accesslog.Filter{NoHealthChecks: true}, false},
		"any, but a health check":      {accesslog.Filter{Any: true, NoHealthChecks: true, Sample: percent(100)}, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l, lines := output(t, accesslog.Output{Filter: &tt.filter})
			h := heads{request: map[string]string{"x-a": "first", "x-empty": ""}}
			r := &accesslog.Record{Start: opened, Status: 503, Duration: time.Second, Flags: flags.NoRoute | flags.UpstreamTermination, HealthCheck: tt.filter.NoHealthChecks}
			l.Request(h.fill(l, r))
			if got := lines(); (len(got) == 1) != tt.passes {
				t.Errorf("there are %d lines", len(got))
			}
		})
	}
}

// A sample is about as large as it says, has a tunnel's end if it has its opening, and is
// another one as soon as the percentage is.
func TestASample(t *testing.T) {
	t.Parallel()
	set := new(dynamic.Set)
	sample := set.New("log.sample", dynamic.Percent, 10*dynamic.Whole/100, 0, dynamic.Whole)
	l, lines := output(t, accesslog.Output{Custom: textFormat(t, "%EVENT% %REQUEST_ID%"), Filter: &accesslog.Filter{Sample: sample}})
	use := func(first int) {
		for i := range 2000 {
			r := upgrade()
			r.RequestID = "0000-" + string(rune('a'+i%26)) + time.Duration(first+i).String()
			l.TunnelClosed(l.TunnelOpened(r), end())
		}
	}
	use(0)
	set.Apply(map[string]float64{"log.sample": 0})
	use(10_000)
	set.Apply(map[string]float64{"log.sample": 100})
	use(20_000)
	counted := map[string]int{}
	ends := map[string]int{}
	for _, line := range lines() {
		event, id, _ := strings.Cut(line, " ")
		counted[event]++
		ends[id]++
	}
	if n := counted["tunnel_open"] - 2000; n < 120 || n > 280 || counted["tunnel_close"] != n+2000 {
		t.Errorf("of 10, 0 and 100 percent of 2000 there are %v", counted)
	}
	for id, n := range ends {
		if n != 2 {
			t.Errorf("%d records of tunnel %s", n, id)
		}
	}
}

// What a log wants to know of a tunnel when it ends is known, also in another process.
func TestFieldsOfATunnelAreKnownAtItsEnd(t *testing.T) {
	t.Parallel()
	closing := accesslog.Output{
		Custom: textFormat(t, "%EVENT% %REQ(X-A)% %RESP(Content-Type)% %REQ(X-Other)% %RESPONSE_FLAGS% %DURATION% %START_TIME%"),
		Filter: &accesslog.Filter{Headers: []accesslog.Header{{Name: "X-Long", How: accesslog.Prefix, Text: "xxx"}}},
	}
	l, lines := output(t, closing)
	r := sent.fill(l, upgrade())
	r.Flags = flags.DelayInjected
	tunnel := l.TunnelOpened(r)
	e := end()
	e.Flags = flags.UpstreamReset
	l.TunnelClosed(tunnel, e)
	elsewhere, linesElsewhere := output(t, closing)
	elsewhere.TunnelClosed(passedOn(t, tunnel), e)
	const want = "tunnel_close first text/plain - UR,DI 3600000 2026-07-27T18:04:05.999Z"
	if got := lines(); len(got) != 2 || got[1] != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := linesElsewhere(); len(got) != 1 || got[0] != want {
		t.Errorf("elsewhere %q, want %q", got, want)
	}
	data, _ := tunnel.AppendBinary(nil)
	if strings.Contains(string(data), "curl") {
		t.Error("it carries a field that nobody wants to know at its end")
	}
}

// Lines in any format cost nothing but what it takes to queue them.
func TestCustomLinesAllocateNothing(t *testing.T) { // not parallel: it counts allocations
	null := func() accesslog.Output {
		return accesslog.Output{File: appending(t, "/dev/null")}
	}
	text, object, filtered := null(), null(), null()
	text.Path, object.Path, filtered.Path = "a", "b", "c"
	text.Custom = textFormat(t, `[%START_TIME(%F %T.%3f)%] "%REQ(:METHOD)% %REQ(:PATH)% %PROTOCOL%" %RESPONSE_CODE_DETAILS% %RESPONSE_FLAGS% %REQ(X-A)% %DOWNSTREAM_REMOTE_ADDRESS% %RESP(Content-Type)%`)
	object.Custom = jsonFormat(t, map[string]string{"a": "%RESPONSE_CODE%", "b": "%REQ(X-A)%", "c": "<%REASON%>"})
	filtered.Filter = &accesslog.Filter{Any: true, Sample: percent(10), Headers: []accesslog.Header{{Name: "x-a", How: accesslog.Contains, Text: "z"}}}
	l := accesslog.New([]accesslog.Output{text, object, filtered}, 7, nil)
	defer l.Close(time.Second)
	r := sent.fill(l, upgrade())
	r.Reason = "no byte moved"
	l.Request(r)
	if n := testing.AllocsPerRun(500, func() { l.Request(r) }); n > 1 { // buffers of the queue
		t.Errorf("%v allocations", n)
	}
}

// FuzzCustom: whatever is a format makes a line of the right length, and an object where it
// is to be one.
func FuzzCustom(f *testing.F) {
	for _, s := range []string{
		`[%START_TIME%] "%REQ(:METHOD)% %REQ(X-A?:PATH):20% %PROTOCOL%" %RESPONSE_CODE% %RESPONSE_FLAGS%`, "%START_TIME(%Y %3f %s)%", "%%", "%REQ(", `"\`, "%RESP(a):1%|",
		"%REASON%%DURATION%", "é%RESPONSE_CODE_DETAILS%é", "%DOWNSTREAM_REMOTE_ADDRESS%\n", "%REQ_WITHOUT_QUERY(:path)%",
	} {
		f.Add(s, "value\n\" |")
	}
	f.Fuzz(func(t *testing.T, s, value string) {
		text, err := format.Text(s)
		object, errObject := format.JSON(map[string]string{"k": s, s: "%EVENT%"})
		for _, custom := range []*format.Format{text, object} {
			if custom == nil {
				continue
			}
			r := everywhere(value)
			r.Flags = flags.Known
			for _, line := range accesslog.CustomLines(custom, r, accesslog.Value{Text: value, Present: true}) {
				if len(line) > 4096 || strings.Count(line, "\n") != 1 || !strings.HasSuffix(line, "\n") {
					t.Fatalf("%q makes %q", s, line)
				}
				if custom == object && !json.Valid([]byte(line)) {
					t.Fatalf("%q makes %q, which is no object", s, line)
				}
			}
		}
		if err == nil && errObject != nil && !strings.Contains(errObject.Error(), "bytes") && !strings.Contains(errObject.Error(), "too long") && !strings.HasSuffix(s, "\n") {
			t.Fatalf("%q is a text, but: %v", s, errObject)
		}
	})
}
