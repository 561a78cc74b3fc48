package discovery

import (
	"context"
	"errors"
	"io/fs"
	"reflect"

	"holdfast/internal/config"
	"holdfast/internal/filewatch"
)

// file finds the endpoints of a cluster in a file. All but resume is done by the goroutine of run.
type file struct {
	s       *Source
	watcher *filewatch.Watcher
	runs    bool // what is found is to be told
	told    []Endpoint
	problem string // of the last time, "" for none
	settled bool
}

func newFile(s *Source) *file {
	f := &file{s: s, told: s.o.Last}
	f.watcher = filewatch.New(filewatch.Options{Watch: s.o.World.Watch, Paused: s.paused.Load})
	f.watcher.Add(filewatch.Files{Paths: []string{s.o.Config.File}, Read: f.read, Refuse: f.refuse})
	return f
}

// begin reads the file at once: whoever writes it had the time to do so.
func (f *file) begin() []Endpoint {
	f.watcher.Read()
	return f.told
}

func (f *file) run(ctx context.Context) {
	f.runs = true
	if f.settled || len(f.told) > 0 {
		f.settled = true
		f.s.o.Settled()
	}
	f.watcher.Run(ctx)
}

func (f *file) resume() { f.watcher.Look() }

// read reads the file.
func (f *file) read() (take func(), err error) {
	path := f.s.o.Config.File
	f.s.o.Counts.Attempts.Inc()
	data, err := config.ReadEndpoints(path)
	if err != nil {
		return nil, err
	}
	endpoints, err := config.ParseEndpoints(path, data)
	if err != nil {
		return nil, err
	}
	return func() { f.take(endpoints) }, nil
}

// take has what the file says hold.
func (f *file) take(endpoints []config.Endpoint) {
	f.s.o.Counts.Successes.Inc()
	if len(endpoints) == 0 {
		f.s.o.Counts.Empty.Inc()
	}
	if f.problem != "" {
		f.problem = ""
		f.s.o.Log.Info("the file with a cluster's endpoints is of use again", "path", f.s.o.Config.File)
	}
	found := []Endpoint{}
	for _, e := range endpoints {
		found = append(found, fixed(e))
	}
	news, first := !reflect.DeepEqual(found, f.told), !f.settled
	f.told, f.settled = found, true
	if news && f.runs {
		f.s.o.Deliver(found)
	}
	if first && f.runs {
		f.s.o.Settled()
	}
}

// refuse tells what is wrong with the file, unless that was known.
func (f *file) refuse(err error) {
	f.s.o.Counts.Failures.Inc()
	problem := err.Error()
	if errors.Is(err, fs.ErrNotExist) {
		problem = "it is not there"
	}
	if problem == f.problem {
		return
	}
	f.problem = problem
	f.s.o.Log.Warn("the file with a cluster's endpoints is of no use: what it said before holds", "path", f.s.o.Config.File, "err", problem)
}
