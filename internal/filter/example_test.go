package filter_test

import (
	"fmt"
	"time"

	"holdfast/internal/exchange"
	"holdfast/internal/filter"
)

// keyed lets requests pass that bring one of some keys, and holds up the others for a
// moment, so that nobody tries many.
type keyed struct {
	keys  map[string]bool
	delay time.Duration
}

var wrongKey = &filter.Answer{
	Status: 401, Fields: exchange.Fields{{Name: "WWW-Authenticate", Value: "Key"}},
	Cause: filter.Unauthorized, Reason: "there is no key, or a wrong one",
}

// Filter implements [filter.Filter].
func (k *keyed) Filter(r *filter.Request) *filter.Answer {
	key, _ := r.Head.Fields.Get("X-Key")
	r.Head.Fields.Del("X-Key") // the upstream is not to learn it
	if k.keys[key] {
		r.Response.Add("X-Key-Status", "valid")
		return nil
	}
	if !r.Sleep(k.delay) {
		return nil // the client has gone: nobody is answered
	}
	return wrongKey
}

func Example() {
	chain := filter.Chain{&keyed{keys: map[string]bool{"secret": true}, delay: time.Second}}
	r := &filter.Request{Head: &exchange.Request{Method: "GET", Target: "/", Fields: exchange.Fields{{Name: "X-Key", Value: "secret"}}}}
	answer := chain.Filter(r)
	fmt.Println(answer == nil, r.Head.Fields, r.Response)
	// Output: true [] [{X-Key-Status valid}]
}
