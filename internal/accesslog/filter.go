package accesslog

import (
	"strings"
	"time"

	"holdfast/internal/accesslog/flags"
	"holdfast/internal/dynamic"
)

// Filter says which records an output has. What is left at zero is no condition; without
// any, it has them all.
type Filter struct {
	// Any has a record pass for which one of the conditions below holds; otherwise all must.
	Any bool

	Statuses    []Statuses // one of them
	MinDuration time.Duration
	Flags       flags.Set // one of them
	Headers     []Header  // of the request; each is a condition
	Sample      *dynamic.Value

	// NoHealthChecks leaves out what a health-check responder has answered, whatever else.
	NoHealthChecks bool
}

// Statuses is a range of them, with both ends.
type Statuses struct{ From, To int }

// Header is a condition about a field of a request.
type Header struct {
	Name   string
	How    How
	Text   string // to compare with; not of Present
	Invert bool   // it holds if it would not
}

// How a field is compared. One that is not there is like none of the texts.
type How uint8

// The ways of comparing.
const (
	Present How = iota
	Exact
	Prefix
	Suffix
	Contains
)

// filter is a Filter in a Log.
type filter struct {
	Filter
	fields []int // of Headers, in the Log's
}

func newFilter(f *Filter, request *names) *filter {
	if f == nil {
		return nil
	}
	own := &filter{Filter: *f}
	for _, h := range f.Headers {
		own.fields = append(own.fields, request.number(strings.ToLower(h.Name)))
	}
	return own
}

// passes says whether an output has a record.
func (f *filter) passes(o *occasion) bool {
	if f == nil {
		return true
	}
	if f.NoHealthChecks && o.HealthCheck {
		return false
	}
	conditions := 0
	decided := func(is, holds bool) bool {
		if is {
			conditions++
		}
		return is && holds == f.Any
	}
	switch {
	case decided(len(f.Statuses) > 0, f.status(o.Status)),
		decided(f.MinDuration > 0, o.took >= f.MinDuration),
		decided(f.Flags != 0, o.flags&f.Flags != 0),
		decided(f.Sample != nil, f.sample(o)):
		return f.Any
	}
	for i := range f.Headers {
		if decided(true, f.header(i, o)) {
			return f.Any
		}
	}
	return !f.Any || conditions == 0
}

func (f *filter) status(status int) bool {
	for _, s := range f.Statuses {
		if s.From <= status && status <= s.To {
			return true
		}
	}
	return false
}

// sample draws by the request's id, so that a tunnel's end is there if its opening is, also
// in another process, and that logs with samples of one size have the same records.
func (f *filter) sample(o *occasion) bool {
	if f.Sample == nil {
		return false
	}
	n := uint64(o.start.UnixNano())
	if o.RequestID != "" {
		n = 14695981039346656037 // FNV-1a
		for i := range len(o.RequestID) {
			n = (n ^ uint64(o.RequestID[i])) * 1099511628211
		}
	}
	// What differs in few bits only is to be spread evenly (the end of MurmurHash3).
	n = (n ^ n>>33) * 0xff51afd7ed558ccd
	n = (n ^ n>>33) * 0xc4ceb9fe1a85ec53
	return f.Sample.Hits(n ^ n>>33)
}

func (f *filter) header(i int, o *occasion) bool {
	h := &f.Headers[i]
	var v Value
	if n := f.fields[i]; n < len(o.RequestFields) {
		v = o.RequestFields[n]
	}
	holds := v.Present
	switch h.How {
	case Exact:
		holds = holds && v.Text == h.Text
	case Prefix:
		holds = holds && strings.HasPrefix(v.Text, h.Text)
	case Suffix:
		holds = holds && strings.HasSuffix(v.Text, h.Text)
	case Contains:
		holds = holds && strings.Contains(v.Text, h.Text)
	}
	return holds != h.Invert
}
