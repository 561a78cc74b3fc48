package accesslog

import "holdfast/internal/accesslog/format"

// Lines returns the lines of a request, and of a tunnel's opening and end, as no
// output writes them: without a goroutine, so that fuzzing sees the same coverage for
// the same input.
func Lines(style string, r *Record, end End) map[string]string {
	return map[string]string{
		"request":      lineOf(style, &occasion{r, request, r.Start, r.Duration, r.Received, r.Sent, r.Reason, r.Flags}),
		"tunnel_open":  lineOf(style, &occasion{r, tunnelOpen, r.Start, r.Duration, r.Received, r.Sent, r.Reason, r.Flags}),
		"tunnel_close": EndOf(style, &Tunnel{new(Log).appendOpening(nil, r), r.TLS}, end),
	}
}

// EndOf is the line of a tunnel's end.
func EndOf(style string, t *Tunnel, end End) string {
	opening, _, err := parseOpening(t.opening)
	if err != nil {
		panic(err)
	}
	opening.TLS = t.tls
	return lineOf(style, &occasion{opening, tunnelClose, end.At.Add(-end.Duration), end.Duration, end.ToUpstream, end.ToDownstream, end.Reason, opening.Flags | end.Flags})
}

func lineOf(style string, o *occasion) string {
	e := encoder{format: jsonFormat}
	if style == "text" {
		e.format = textFormat
	}
	e.standard(o, 7)
	return string(e.line)
}

// CustomLines returns the lines of a request and of a tunnel's end in a format, when every
// field of their heads has this value.
func CustomLines(f *format.Format, r *Record, v Value) []string {
	var names, others names
	c := newCustom(f, &names, &others)
	for range names {
		r.RequestFields = append(r.RequestFields, v)
	}
	for range others {
		r.ResponseFields = append(r.ResponseFields, v)
	}
	var lines []string
	for _, o := range []*occasion{
		{r, request, r.Start, r.Duration, r.Received, r.Sent, r.Reason, r.Flags},
		{r, tunnelClose, r.Start, 1 << 62, 1<<64 - 1, 1<<64 - 1, r.Reason, r.Flags},
	} {
		e := encoder{format: customFormat}
		e.custom(c, o, 7)
		lines = append(lines, string(e.line))
	}
	return lines
}
