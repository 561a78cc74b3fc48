package accesslog

// Lines returns the lines of a request, and of a tunnel's opening and end, as no
// output writes them: without a goroutine, so that fuzzing sees the same coverage for
// the same input.
func Lines(format string, r *Record, end End) map[string]string {
	f := jsonFormat
	if format == "text" {
		f = textFormat
	}
	request, opening, closing := encoder{format: f}, encoder{format: f}, encoder{format: f}
	request.record("request", r, 7)
	closing.end(opening.record("tunnel_open", r, 7), end)
	return map[string]string{
		"request": string(request.line), "tunnel_open": string(opening.line), "tunnel_close": string(closing.line),
	}
}
