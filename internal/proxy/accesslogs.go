package proxy

import (
	"errors"
	"os"

	"holdfast/internal/accesslog"
	"holdfast/internal/config"
	"holdfast/internal/control"
	"holdfast/internal/dynamic"
	"holdfast/internal/exchange"
)

// takeLogs takes files of access logs. Until the generation serves it keeps them;
// afterwards what is recorded goes there.
func (g *generation) takeLogs(m *control.Message, fds []int) error {
	if len(m.Keys) != len(fds) {
		control.CloseAll(fds)
		return errors.New("access logs and descriptors do not match")
	}
	files := make(map[string]*os.File, len(fds))
	for i, path := range m.Keys {
		if old := files[path]; old != nil {
			old.Close()
		}
		// A FIFO is non-blocking, and shared: Fd, which clears that, is not called.
		files[path] = os.NewFile(uintptr(fds[i]), path)
	}
	if g.logFiles == nil {
		if g.accessLog == nil { // nothing that could be opened is configured
			closeFiles(files)
			return nil
		}
		g.accessLog.Reopen(files)
		return nil
	}
	for path, f := range files {
		if old := g.logFiles[path]; old != nil {
			old.Close()
		}
		g.logFiles[path] = f
	}
	return nil
}

// openAccessLogs begins to record. It comes before the first request.
func (g *generation) openAccessLogs() {
	if g.logFiles == nil {
		return // it was done when the generation served first
	}
	files := g.logFiles
	g.logFiles = nil
	if g.stdout != nil {
		files[config.Stdout] = g.stdout
	}
	var outputs []accesslog.Output
	for i, l := range g.cfg.AccessLogs {
		if files[l.Path] == nil {
			g.log.Error("no file for an access log: it is not written", "path", l.Path)
			continue
		}
		output := recording(&g.cfg.Recordings[i], &g.values)
		output.Path, output.File, output.Log = l.Path, files[l.Path], g.log
		outputs = append(outputs, output)
		delete(files, l.Path)
	}
	delete(files, config.Stdout)
	closeFiles(files)
	if len(outputs) > 0 {
		g.accessLog = accesslog.New(outputs, g.number, g.registry)
		g.manager.options.AccessLog = g.accessLog
	}
}

// recording is what an access log has, and how. values has the runtime value of its sample.
func recording(r *config.Recording, values *dynamic.Set) accesslog.Output {
	o := accesslog.Output{Format: r.Format, Custom: r.Custom}
	for _, name := range r.Events {
		e, _ := accesslog.EventOf(name)
		o.Events |= e
	}
	f := &r.Filter
	if len(f.Statuses) == 0 && f.MinDuration == 0 && f.Flags == 0 && len(f.Headers) == 0 && f.Sample == nil && f.HealthChecks {
		return o
	}
	o.Filter = &accesslog.Filter{Any: f.Any, MinDuration: f.MinDuration, Flags: f.Flags, NoHealthChecks: !f.HealthChecks}
	for _, s := range f.Statuses {
		o.Filter.Statuses = append(o.Filter.Statuses, accesslog.Statuses(s))
	}
	for _, h := range f.Headers {
		o.Filter.Headers = append(o.Filter.Headers, accesslog.Header{Name: h.Name, How: comparisons[h.How], Text: h.Text, Invert: h.Invert})
	}
	if f.Sample != nil {
		o.Filter.Sample = values.New(f.Sample.Key, dynamic.Percent, f.Sample.Value, 0, dynamic.Whole)
	}
	return o
}

var comparisons = map[string]accesslog.How{
	"present": accesslog.Present, "exact": accesslog.Exact, "prefix": accesslog.Prefix, "suffix": accesslog.Suffix, "contains": accesslog.Contains,
}

// logged is what a request keeps for its record in memory that the next one uses again.
type logged struct {
	request, response []accesslog.Value
	texts             []byte
}

// mostLogged is how many bytes of a response's field are kept.
const mostLogged = 1024

// ofRequest returns the fields of the request that logs want to have, as they are now.
func (l *logged) ofRequest(log *accesslog.Log, head *exchange.Request) []accesslog.Value {
	l.request = l.request[:0]
	for _, name := range log.RequestFields() {
		text, ok := head.Fields.Get(name)
		l.request = append(l.request, accesslog.Value{Text: text, Present: ok})
	}
	return l.request
}

// keepResponse keeps the fields of a response that logs want to have: the head is gone when
// the request is over. It comes once for each request.
func (l *logged) keepResponse(log *accesslog.Log, resp *exchange.Response) {
	names := log.ResponseFields()
	if len(names) == 0 {
		return
	}
	if l.texts == nil {
		l.texts = make([]byte, mostLogged)
	}
	var texts exchange.Texts
	texts.Use(l.texts)
	for _, name := range names {
		text, ok := resp.Fields.Get(name)
		l.response = append(l.response, accesslog.Value{Text: texts.Join(text[:min(len(text), mostLogged)]), Present: ok})
	}
}

// closeAccessLogs writes the last records.
func (g *generation) closeAccessLogs() {
	closeFiles(g.logFiles)
	g.accessLog.Close(logTime)
}

func closeFiles(files map[string]*os.File) {
	for _, f := range files {
		f.Close() // nothing was written to it
	}
}
