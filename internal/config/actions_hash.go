package config

import (
	"errors"
	"strings"
	"time"
)

func readHashPolicy(route *table) []HashPolicy {
	if !route.asked("hash_policy") {
		return nil
	}
	var policies []HashPolicy
	tables := route.tables("hash_policy")
	for _, t := range tables {
		policies = append(policies, readHashOf(t))
	}
	const most = 16
	if len(tables) > most {
		route.at("hash_policy").fail("has %d elements; %d are enough", len(tables), most)
	}
	if route.empty("hash_policy") {
		route.at("hash_policy").fail(`must have at least one element like { header = "X-User" }`)
	}
	return policies
}

func readHashOf(t *table) HashPolicy {
	var p HashPolicy
	read(t, "header", &p.Header, askedField)
	if t.asked("cookie") {
		p.Cookie = readHashCookie(t.table("cookie"))
	}
	if n, ok := t.get("source_address"); ok {
		if t.boolean("source_address", &p.SourceAddress); n.raw == false {
			n.fail("is true, or is left out")
		}
	}
	t.boolean("terminal", &p.Terminal)
	t.strict()
	if given := t.given("header", "cookie", "source_address"); len(given) != 1 {
		t.fail("must have exactly one of header, cookie and source_address")
	}
	return p
}

func readHashCookie(t *table) *HashCookie {
	var c HashCookie
	need(t, "name", &c.Name, cookieName)
	if t.asked("ttl") {
		c.Make = true
		read(t, "ttl", &c.TTL, wholeSecondsOrZero)
	}
	if read(t, "path", &c.Path, cookiePath); c.Path != "" && !c.Make {
		t.at("path").fail("is that of a cookie which is made; it needs ttl")
	}
	t.strict()
	return &c
}

var cookieName = form[string]{`the name of a cookie like "session"`, func(s string) (string, error) {
	if !isToken(s) || len(s) > 128 {
		return "", errForm
	}
	return s, nil
}, asIs}

var cookiePath = form[string]{`a path like "/chat"`, func(s string) (string, error) {
	if err := checkTarget(s); err != nil {
		return "", err
	}
	if strings.ContainsAny(s, "?;") {
		return "", errors.New(`it has neither "?" nor ";"`)
	}
	return s, nil
}, asIs}

var wholeSecondsOrZero = form[time.Duration]{`a duration of whole seconds like "24h", or "0s" for as long as the browser runs`, func(s string) (time.Duration, error) {
	d, err := parseDuration(s)
	if err == nil && d%time.Second != 0 {
		err = errForm
	}
	return d, err
}, writeDuration}

// readSplit reads whether equal hashes get the same one of several clusters. It belongs
// behind what the hash is made of.
func readSplit(t *table, r *Route) {
	t.boolean("split_by_hash", &r.SplitByHash)
	switch {
	case !t.has("weighted_clusters"):
		t.inapplicable("split_by_hash", "goes with weighted_clusters only")
	case r.SplitByHash && !t.has("hash_policy"):
		t.at("split_by_hash").fail("needs a hash_policy, which says what the hash is made of")
	}
}
