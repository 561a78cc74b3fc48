package config

import (
	"errors"
	"fmt"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// form is a way to write a value as a string.
type form[T any] struct {
	is    string // what fits, to follow "must be"
	parse func(string) (T, error)
	write func(T) string // what parse makes the same value of; "" for one that a file can only leave out
}

// asIs is write for a value that is a string itself.
func asIs(s string) string { return s }

// errForm is what a form's parse returns unless it says what is wrong in particular: the form
// itself explains it.
var errForm = errors.New("does not fit the form")

// understand reads a string and notes where it does not fit.
func understand[T any](n node, f form[T]) (v T, ok bool) {
	s, isString := n.raw.(string)
	if !isString {
		n.fail("must be %s, found %s", f.is, describe(n.raw))
		return v, false
	}
	v, err := f.parse(s)
	switch err {
	case nil:
		return v, true
	case errForm:
		n.fail("must be %s, found %s", f.is, describe(s))
	default:
		n.fail("must be %s, found %s: %v", f.is, describe(s), err)
	}
	return v, false
}

// read sets dst if the key is there.
func read[T any](t *table, key string, dst *T, f form[T]) {
	if n, ok := t.get(key); ok {
		if v, ok := understand(n, f); ok {
			*dst = v
		}
	}
	if t.doc.terse {
		return
	}
	if s := f.write(*dst); s != "" {
		t.set(key, strconv.Quote(s))
	}
}

// need is read for a key that must be there.
func need[T any](t *table, key string, dst *T, f form[T]) {
	if read(t, key, dst, f); !t.has(key) {
		t.at(key).fail("missing; must be %s", f.is)
	}
}

// entry is an element of an array, understood.
type entry[T any] struct {
	node
	value T
}

// list returns those elements of the array under a key that fit the form.
func list[T any](t *table, key string, f form[T]) []entry[T] {
	var entries []entry[T]
	var written []string
	for _, n := range t.array(key) {
		if v, ok := understand(n, f); ok {
			entries = append(entries, entry[T]{n, v})
			written = append(written, f.write(v))
		}
	}
	if !t.doc.terse {
		t.set(key, quoteAll(written))
	}
	return entries
}

func quoteAll(words []string) []string {
	quoted := make([]string, len(words))
	for i, w := range words {
		quoted[i] = strconv.Quote(w)
	}
	return quoted
}

func (t *table) boolean(key string, dst *bool) {
	if n, ok := t.get(key); ok {
		v, ok := n.raw.(bool)
		if !ok {
			n.fail("must be true or false, found %s", describe(n.raw))
			return
		}
		*dst = v
	}
	if !t.doc.terse {
		t.set(key, strconv.FormatBool(*dst))
	}
}

func (t *table) integer(key string, dst *int64, least, most int64) {
	if n, ok := t.get(key); ok {
		v, ok := n.raw.(int64)
		if !ok || v < least || v > most {
			n.fail("must be an integer from %d to %d, found %s", least, most, describe(n.raw))
			return
		}
		*dst = v
	}
	if !t.doc.terse {
		t.set(key, strconv.FormatInt(*dst, 10))
	}
}

// limit reads a number of things, or the word for no limit, which becomes 0.
func (t *table) limit(key string, dst *int, least int64) {
	if n, ok := t.get(key); ok {
		v, ok := n.raw.(int64)
		if s, word := n.raw.(string); word && isUnlimited(s) {
			v = 0
		} else if !ok || v < least || v > math.MaxInt32 {
			n.fail(`must be an integer from %d to %d, or "unlimited", found %s`, least, math.MaxInt32, describe(n.raw))
			return
		}
		*dst = int(v)
	}
	if t.doc.terse {
		return
	}
	if *dst == 0 {
		t.set(key, `"unlimited"`)
	} else {
		t.set(key, strconv.Itoa(*dst))
	}
}

// isUnlimited knows the words for a number or size without a limit.
func isUnlimited(s string) bool { return s == "unlimited" || s == "off" }

// Durations. One that has no other word for "never" must be positive; one for
// which no time at all makes sense may be "0s".
var (
	duration       = form[time.Duration]{`a duration like "30s"`, positive, writeDuration}
	durationOrZero = form[time.Duration]{`a duration like "30s" or "0s"`, parseDuration, writeDuration}
	durationOrOff  = form[time.Duration]{`a duration like "30s", or "off"`, positiveOrOff, durationOrWord}
)

// The range of a duration. Timers are not finer than a millisecond, and ten
// years can be added to any time of day.
const (
	shortest = time.Millisecond
	longest  = 10 * 365 * 24 * time.Hour
)

func parseDuration(s string) (time.Duration, error) {
	if s == "" || s[0] < '0' || s[0] > '9' { // time.ParseDuration takes signs
		return 0, errForm
	}
	if strings.Trim(s, "0123456789") == "" {
		return 0, errors.New("it has no unit (ms, s, m, h)")
	}
	d, err := time.ParseDuration(s)
	switch {
	case err != nil:
		return 0, errors.New("a duration is a number and a unit (ms, s, m, h), once or more")
	case d > longest:
		return 0, errors.New("the longest is ten years, 87600h")
	case d > 0 && d < shortest:
		return 0, errors.New("the shortest is 1ms")
	}
	return d, nil
}

func positive(s string) (time.Duration, error) {
	d, err := parseDuration(s)
	if err == nil && d == 0 {
		err = errors.New("it must be longer than 0")
	}
	return d, err
}

func positiveOrOff(s string) (time.Duration, error) {
	if s == "off" {
		return 0, nil
	}
	d, err := parseDuration(s)
	if err == nil && d == 0 {
		err = errors.New(`write "off" for none`)
	}
	return d, err
}

// writeDuration leaves out the units of which there is nothing: "24h" for 24h0m0s.
func writeDuration(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

func durationOrWord(d time.Duration) string {
	if d == 0 {
		return "off"
	}
	return writeDuration(d)
}

// sizeOrUnlimited is a size from 1 byte, or the word for no limit, which becomes 0.
var sizeOrUnlimited = form[int64]{`a size like "64KiB", or "unlimited"`, func(s string) (int64, error) {
	if isUnlimited(s) {
		return 0, nil
	}
	n, err := parseSize(s)
	if err == nil && n == 0 {
		err = errors.New(`write "unlimited" for no limit`)
	}
	return n, err
}, func(n int64) string {
	if n == 0 {
		return "unlimited"
	}
	return writeSize(n)
}}

// rate is a size per second. Whatever the time, it can be multiplied with a duration.
var rate = form[int64]{`a size per second up to "1GiB", like "64B", or "0B"`, func(s string) (int64, error) {
	n, err := parseSize(s)
	if err == nil && n > 1<<30 {
		err = errForm
	}
	return n, err
}, writeSize}

// sizeBetween is a size within bounds, the lower in KiB, the upper in MiB.
func sizeBetween(leastKiB, mostMiB int64) form[int64] {
	is := fmt.Sprintf(`a size from "%dKiB" to "%dMiB"`, leastKiB, mostMiB)
	return form[int64]{is, func(s string) (int64, error) {
		n, err := parseSize(s)
		if err == nil && (n < leastKiB<<10 || n > mostMiB<<20) {
			err = errForm
		}
		return n, err
	}, writeSize}
}

var (
	sizes = regexp.MustCompile(`^([0-9]+)( ?[A-Za-z]*)$`)
	units = map[string]int64{"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
)

func parseSize(s string) (int64, error) {
	m := sizes.FindStringSubmatch(s)
	if m == nil {
		return 0, errForm
	}
	unit, ok := units[m[2]]
	if !ok {
		return 0, errors.New("the units are B, KiB, MiB and GiB, right behind the number")
	}
	n, err := strconv.ParseInt(m[1], 10, 64)
	if err != nil || n > math.MaxInt64/unit {
		return 0, errors.New("it is too large")
	}
	return n * unit, nil
}

// writeSize uses the largest unit that needs no fraction.
func writeSize(n int64) string {
	for _, unit := range []string{"GiB", "MiB", "KiB"} {
		if n > 0 && n%units[unit] == 0 {
			return strconv.FormatInt(n/units[unit], 10) + unit
		}
	}
	return strconv.FormatInt(n, 10) + "B"
}

// oneOf is one of a few words.
func oneOf(words ...string) form[string] {
	return form[string]{alternatives(words), func(s string) (string, error) {
		if slices.Contains(words, s) {
			return s, nil
		}
		if near := nearest(s, words); near != "" {
			return "", fmt.Errorf("did you mean %q?", near)
		}
		return "", errForm
	}, asIs}
}

// either is a choice between two words, of which the second one is true.
func either(no, yes string) form[bool] {
	f := oneOf(no, yes)
	return form[bool]{f.is, func(s string) (bool, error) {
		word, err := f.parse(s)
		return word == yes, err
	}, func(b bool) string {
		if b {
			return yes
		}
		return no
	}}
}

// alternatives lists words as a sentence does.
func alternatives(words []string) string {
	quoted := quoteAll(words)
	last := len(quoted) - 1
	if last == 0 {
		return quoted[0]
	}
	return strings.Join(quoted[:last], ", ") + " or " + quoted[last]
}

// identifier is what listeners, virtual hosts and clusters are called, here, in logs
// and in metrics.
var identifier = form[string]{"a name of 1 to 128 letters, digits, dots, dashes and underscores", func(s string) (string, error) {
	if !names.MatchString(s) {
		return "", errForm
	}
	return s, nil
}, asIs}

var names = regexp.MustCompile(`^[A-Za-z0-9._-]{1,128}$`)

// needName reads the name of one of several things of a kind, each with another.
// declared maps the names so far to their places.
func needName(t *table, dst *string, declared map[string]node) {
	need(t, "name", dst, identifier)
	n := t.at("name")
	s, ok := n.raw.(string)
	if !ok {
		return
	}
	if other, taken := declared[s]; taken {
		n.fail("%s is already the name of another one (%s)", quote(s), other)
		return
	}
	declared[s] = n
	// An unfit name still counts as declared, so that those who refer to it are
	// not reported as well.
	*dst = s
}
