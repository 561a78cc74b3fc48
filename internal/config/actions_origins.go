package config

import (
	"errors"
	"slices"
	"strings"
	"time"

	"holdfast/internal/headers"
)

func isToken(s string) bool { return headers.IsName(s) } // they have the same grammar (RFC 9110 §5.6.2)

// readTokens reads the protocols that upgrades may be to.
func readTokens(t *table, r *Route) {
	if !t.asked("upgrades") {
		return
	}
	listed := list(t, "upgrades", upgradeToken)
	webSocket := false
	for i, e := range listed {
		switch {
		case slices.ContainsFunc(listed[:i], func(o entry[string]) bool { return o.value == e.value }):
			e.fail("%s is listed twice", quote(e.value))
		case e.value == "websocket":
			webSocket = true
		default:
			r.Upgrades = append(r.Upgrades, e.value)
		}
	}
	if t.empty("upgrades") {
		t.at("upgrades").fail(`must name a protocol, as in ["websocket"]; leave the key out for none`)
	}
	if webSocket && t.has("websocket") && !r.WebSocket {
		t.at("websocket").fail(`is false, but upgrades has "websocket"; drop one of the two`)
	}
	if webSocket && !r.WebSocket {
		r.WebSocket = true
		for i, s := range t.settings {
			if s.key == "websocket" {
				t.settings[i].value = "true"
			}
		}
	}
}

// upgradeToken is a protocol as an Upgrade field names it (RFC 9110 §7.8).
var upgradeToken = form[string]{`the name of a protocol like "websocket"`, func(s string) (string, error) {
	s = strings.ToLower(s)
	name, version, hasVersion := strings.Cut(s, "/")
	switch {
	case !isToken(name) || hasVersion && !isToken(version) || len(s) > 64:
		return "", errForm
	case slices.Contains([]string{"h2c", "h2", "h3", "http", "tls"}, name):
		return "", errors.New("a change to that would have to be made with each side by itself")
	case name == "connect" || strings.HasPrefix(name, "connect-"):
		return "", errors.New("CONNECT is no upgrade, and is never passed on")
	}
	return s, nil
}, asIs}

// readOrigins reads from which pages upgrades may come.
func readOrigins(t *table, r *Route) {
	missing := true
	if t.asked("origins") {
		r.Origins = readOriginList(t, "origins", false)
	}
	if t.boolean("allow_missing_origin", &missing); !t.has("origins") {
		t.inapplicable("allow_missing_origin", "has a meaning only beside origins")
	}
	r.RefuseWithoutOrigin = !missing
	if _, itself := r.answersItself(); !itself && !r.MakesTunnels() {
		t.inapplicable("origins", "is about upgrades, and this route takes none; it needs websocket = true or upgrades")
	}
}

// readOriginList reads origins; with a star, all of them can be meant.
func readOriginList(t *table, key string, star bool) []string {
	f := origin
	if star {
		f = originOrStar
	}
	var origins []string
	for _, e := range list(t, key, f) {
		if slices.Contains(origins, e.value) {
			e.fail("%s is listed twice", quote(e.value))
		}
		origins = append(origins, e.value)
	}
	if t.has(key) && t.empty(key) {
		t.at(key).fail("must have at least one; nobody could come from none")
	}
	return origins
}

// origin is what browsers say a page comes from (RFC 6454 §7): scheme, host and port, where
// that is not the scheme's own.
var origin = form[string]{`an origin like "https://app.example.com" or "https://*.example.com"`, parseOrigin, asIs}

var originOrStar = form[string]{`"*", or an origin like "https://app.example.com" or "https://*.example.com"`, func(s string) (string, error) {
	if s == "*" {
		return s, nil
	}
	return parseOrigin(s)
}, asIs}

func parseOrigin(s string) (string, error) {
	scheme, host, ok := strings.Cut(strings.ToLower(s), "://")
	if !ok || scheme == "" || strings.Trim(scheme, "abcdefghijklmnopqrstuvwxyz0123456789+-.") != "" {
		return "", errForm
	}
	if strings.ContainsAny(host, "/?#@") {
		return "", errors.New("it ends with the host, or its port")
	}
	rest, wild := strings.CutPrefix(host, "*.")
	if strings.Contains(rest, "*") {
		return "", errors.New(`a star stands in front of the host, as in "https://*.example.com"`)
	}
	name, port, err := splitAuthority(rest)
	switch {
	case err != nil:
		return "", err
	case wild && isAddress(name):
		return "", errors.New("a star goes with a name, not with an address")
	case wild:
		name = "*." + name
	}
	if port != "" && !(scheme == "http" && port == "80") && !(scheme == "https" && port == "443") {
		name += ":" + port
	}
	return scheme + "://" + name, nil
}

func readCORS(route *table) *CORS {
	if !route.asked("cors") {
		return nil
	}
	t := route.table("cors")
	var c CORS
	if c.AllowOrigins = readOriginList(t, "allow_origins", true); !t.has("allow_origins") {
		t.at("allow_origins").fail("missing; must be an array with %s", originOrStar.is)
	}
	c.AllowMethods = tokens(t, "allow_methods", method)
	c.AllowHeaders = tokens(t, "allow_headers", fieldName)
	c.ExposeHeaders = tokens(t, "expose_headers", fieldName)
	if t.asked("max_age") {
		read(t, "max_age", &c.MaxAge, wholeSeconds)
	}
	t.boolean("allow_credentials", &c.AllowCredentials)
	if c.AllowCredentials && slices.Contains(c.AllowOrigins, "*") {
		t.at("allow_credentials").fail(`with "*" in allow_origins any page could act as the user who looks at it; name the origins`)
	}
	t.strict()
	return &c
}

// tokens reads words of which each stands once.
func tokens(t *table, key string, f form[string]) []string {
	var words []string
	for _, e := range optional(t, key, f) {
		if slices.ContainsFunc(words, func(w string) bool { return strings.EqualFold(w, e.value) }) {
			e.fail("%s is listed twice", quote(e.value))
		}
		words = append(words, e.value)
	}
	return words
}

var wholeSeconds = form[time.Duration]{`a duration of whole seconds like "10m"`, func(s string) (time.Duration, error) {
	d, err := positive(s)
	if err == nil && d%time.Second != 0 {
		err = errForm
	}
	return d, err
}, writeDuration}
