package route

import (
	"regexp"
	"strconv"
	"strings"

	"holdfast/internal/config"
)

// mostMatches is how many matches in a path are replaced: each takes memory.
const mostMatches = 256

// mostSearched is how many bytes all searches for matches in a path may go over: each may go
// to its end, whoever sends requests chooses the path, and the loop waits for it.
const mostSearched = 128 << 10

// mostTarget is how long a rewritten target may be: as long as those that clients may send.
const mostTarget = 8 << 10

// regexRewrite is a config.RegexRewrite, compiled.
type regexRewrite struct {
	pattern  *regexp.Regexp
	template string
}

func newRegexRewrite(c *config.RegexRewrite) *regexRewrite {
	if c == nil {
		return nil
	}
	template, _, err := config.Expansion(c.Substitution)
	if err != nil {
		panic("route: a substitution that config has not validated: " + err.Error())
	}
	return &regexRewrite{regexp.MustCompile(c.Pattern), template}
}

// path returns the path with every match replaced, from the left, none within another. ok is
// false if no path comes of that, or one that is too long, or if there are too many.
func (x *regexRewrite) path(path string) (rewritten string, ok bool) {
	most := min(mostMatches, mostSearched/max(len(path), 1))
	matches := x.pattern.FindAllStringSubmatchIndex(path, most+1)
	switch {
	case len(matches) == 0:
		return path, true
	case len(matches) > most:
		return "", false
	}
	var b []byte
	end := 0
	for _, m := range matches {
		b = append(b, path[end:m[0]]...)
		b = x.pattern.ExpandString(b, x.template, path, m)
		if end = m[1]; len(b) > mostTarget {
			return "", false
		}
	}
	b = append(b, path[end:]...)
	return string(b), isTargetPath(b)
}

// isTargetPath says whether b may stand as the path of a target.
func isTargetPath(b []byte) bool {
	if len(b) == 0 || b[0] != '/' || len(b) > mostTarget {
		return false
	}
	for _, c := range b {
		if c <= ' ' || c >= 0x7f || c == '?' || c == '#' {
			return false
		}
	}
	return true
}

// Rewrite returns the target that the upstream gets: see [Route.Target]. A regex rewrite
// replaces what it matches in the path, and never looks at the query. ok is false if no
// target comes of it that could be sent.
func (r *Route) Rewrite(target string) (rewritten string, ok bool) {
	if r.regexRewrite == nil {
		return r.Target(target), true
	}
	path := pathOf(target)
	rewritten, ok = r.regexRewrite.path(path)
	if rewritten == path {
		return target, ok
	}
	rewritten += target[len(path):]
	return rewritten, ok && len(rewritten) <= mostTarget
}

// matched returns how much of a path the route has matched.
func (r *Route) matched() int { return len(r.pattern.text) }

// redirect is a config.Redirect, compiled.
type redirect struct {
	config.Redirect
	regex *regexRewrite
}

func newRedirect(c *config.Redirect) *redirect {
	if c == nil {
		return nil
	}
	return &redirect{*c, newRegexRewrite(c.RegexRewrite)}
}

// Redirects says whether the route answers by itself with a redirect.
func (r *Route) Redirects() bool { return r.redirect != nil }

// Redirect returns the status and the Location of a redirecting route's answer to
// a request. ok is false if the request names no host and the route does not
// either: a Location without a host would leave it to the target which host
// that is ("//elsewhere.example"). So it is if a regex rewrite makes no path of
// the request's.
//
// When the scheme changes and the host stays, the old scheme's default port is
// dropped, for it would be wrong under the new one.
func (r *Route) Redirect(scheme, authority, target string) (status int, location string, ok bool) {
	to := r.redirect
	if to.Host != "" {
		authority = to.Host
	} else if to.Scheme != "" && to.Scheme != scheme {
		authority = strings.TrimSuffix(authority, defaultPort[scheme])
	}
	if to.Scheme != "" {
		scheme = to.Scheme
	}
	ok = authority != ""
	if to.Port != 0 {
		authority = withPort(authority, to.Port, scheme)
	}
	target, valid := to.target(r, target)
	return to.Status, scheme + "://" + authority + target, ok && valid
}

// target returns the path and query that the client is sent to.
func (to *redirect) target(r *Route, target string) (_ string, ok bool) {
	if to.Path != "" {
		return to.Path, true
	}
	path := pathOf(target)
	query := target[len(path):]
	ok = true
	switch {
	case to.PrefixRewrite != "":
		path = to.PrefixRewrite + path[r.matched():]
	case to.regex != nil:
		path, ok = to.regex.path(path)
	}
	if to.StripQuery {
		query = ""
	}
	return path + query, ok
}

// withPort returns an authority with another port, and without one where that is the
// scheme's own.
func withPort(authority string, port int, scheme string) string {
	if i := strings.LastIndexByte(authority, ':'); i > strings.LastIndexByte(authority, ']') {
		authority = authority[:i]
	}
	suffix := ":" + strconv.Itoa(port)
	if suffix == defaultPort[scheme] {
		return authority
	}
	return authority + suffix
}

var defaultPort = map[string]string{"http": ":80", "https": ":443"}
