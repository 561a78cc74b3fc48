package accesslog

// Lines returns the lines of a request, and of a tunnel's opening and end, as no
// output writes them: without a goroutine, so that fuzzing sees the same coverage for
// the same input.
func Lines(format string, r *Record, end End) map[string]string {
	f := formatOf(format)
	request, opening := encoder{format: f}, encoder{format: f}
	request.record("request", r, 7)
	opening.record("tunnel_open", r, 7)
	return map[string]string{
		"request": string(request.line), "tunnel_open": string(opening.line),
		"tunnel_close": EndOf(format, &Tunnel{appendOpening(nil, r)}, end),
	}
}

// EndOf is the line of a tunnel's end.
func EndOf(format string, t *Tunnel, end End) string {
	opening, err := parseOpening(t.opening)
	if err != nil {
		panic(err)
	}
	e := encoder{format: formatOf(format)}
	e.end(opening, end, 7)
	return string(e.line)
}

func formatOf(name string) format {
	if name == "text" {
		return textFormat
	}
	return jsonFormat
}
