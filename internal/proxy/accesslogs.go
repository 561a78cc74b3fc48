package proxy

import (
	"errors"
	"os"

	"holdfast/internal/accesslog"
	"holdfast/internal/config"
	"holdfast/internal/control"
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
	for _, l := range g.cfg.AccessLogs {
		if files[l.Path] == nil {
			g.log.Error("no file for an access log: it is not written", "path", l.Path)
			continue
		}
		outputs = append(outputs, accesslog.Output{Path: l.Path, Format: l.Format, File: files[l.Path], Log: g.log})
		delete(files, l.Path)
	}
	delete(files, config.Stdout)
	closeFiles(files)
	if len(outputs) > 0 {
		g.accessLog = accesslog.New(outputs, g.number, g.registry)
		g.manager.options.AccessLog = g.accessLog
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
