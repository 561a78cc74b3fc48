package route

import (
	"slices"
	"strconv"
	"strings"
	"time"

	"holdfast/internal/config"
)

// Origins is a set of origins (RFC 6454).
type Origins struct {
	all   bool
	exact []string
	wild  []wildOrigin
}

// wildOrigin is every name that stands in front of a suffix.
type wildOrigin struct{ scheme, suffix string } // "https://", ".example.com:8443"

func newOrigins(written []string) *Origins {
	o := new(Origins)
	for _, s := range written {
		scheme, host, _ := strings.Cut(s, "://")
		suffix, wild := strings.CutPrefix(host, "*")
		switch {
		case s == "*":
			o.all = true
		case wild:
			o.wild = append(o.wild, wildOrigin{scheme + "://", suffix})
		default:
			o.exact = append(o.exact, s)
		}
	}
	return o
}

// Has says whether an origin, as a browser sends it, is one of them. "null", which is the
// origin of whatever has none of its own, never is.
func (o *Origins) Has(origin string) bool {
	if origin == "null" || origin == "" {
		return false
	}
	origin = lower(origin)
	if o.all || slices.Contains(o.exact, origin) {
		return true
	}
	for _, w := range o.wild {
		if rest, ok := strings.CutPrefix(origin, w.scheme); ok {
			if name, ok := strings.CutSuffix(rest, w.suffix); ok && isHostPart(name) {
				return true
			}
		}
	}
	return false
}

// isHostPart says whether s may stand in front of the suffix of a host, in lower case.
func isHostPart(s string) bool {
	for i := range len(s) {
		c := s[i]
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' && c != '_' && c != '.' {
			return false
		}
	}
	return s != ""
}

// MayComeFrom says whether the route takes upgrades from the page that has asked for it. There
// is no page where no browser is, and then nobody says from where. Drafts of WebSocket had a
// name of their own for the field.
func (r *Route) MayComeFrom(fields Fields) bool {
	if r.Origins == nil {
		return true
	}
	said := false
	for i := range fields.Len() {
		name, value := fields.Line(i)
		if strings.EqualFold(name, "Origin") || strings.EqualFold(name, "Sec-WebSocket-Origin") {
			if said = true; !r.Origins.Has(value) {
				return false
			}
		}
	}
	return said || !r.RefuseWithoutOrigin
}

// CORS is what pages of other origins are told. Fields that say nothing are "".
type CORS struct {
	Origins       *Origins
	AllowMethods  string
	AllowHeaders  string
	ExposeHeaders string
	MaxAge        string // in seconds
	Credentials   bool
}

// Page returns the page that has sent a request and may read the answer, "" if there is none,
// and whether that asks what it may do (the Fetch standard, CORS-preflight request).
func (c *CORS) Page(method string, fields Fields) (origin string, preflight bool) {
	origin, _ = first(fields, "Origin")
	if !c.Origins.Has(origin) {
		return "", false
	}
	asked, _ := first(fields, "Access-Control-Request-Method")
	return origin, method == "OPTIONS" && asked != ""
}

// first returns the first value of a field.
func first(fields Fields, name string) (value string, ok bool) {
	for v := range valuesOf(fields, name) {
		return v, true
	}
	return "", false
}

func newCORS(c *config.CORS) *CORS {
	if c == nil {
		return nil
	}
	cors := &CORS{
		Origins:       newOrigins(c.AllowOrigins),
		AllowMethods:  strings.Join(c.AllowMethods, ", "),
		AllowHeaders:  strings.Join(c.AllowHeaders, ", "),
		ExposeHeaders: strings.Join(c.ExposeHeaders, ", "),
		Credentials:   c.AllowCredentials,
	}
	if c.MaxAge > 0 {
		cors.MaxAge = strconv.FormatInt(int64(c.MaxAge/time.Second), 10)
	}
	return cors
}
