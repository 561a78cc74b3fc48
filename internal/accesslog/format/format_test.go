package format_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"holdfast/internal/accesslog/flags"
	"holdfast/internal/accesslog/format"
)

func TestWhatIsNoFormat(t *testing.T) {
	t.Parallel()
	for s, want := range map[string]string{
		"":                                "there is nothing in it",
		"\n":                              "there is nothing in it",
		"100% sure":                       "has no percent sign at its end",
		"%":                               "has no percent sign at its end",
		"%PROTOCOL":                       "the operator %PROTOCOL has no percent sign at its end",
		"%PROTOCOL%%":                     "has no percent sign at its end",
		"%PROTOKOL%":                      "unknown operator PROTOKOL",
		"%protocol%":                      "unknown operator protocol",
		"%PROTOCOL()%":                    "%PROTOCOL% takes nothing in parentheses",
		"%PROTOCOL:5%":                    "%PROTOCOL% takes no :MAX",
		"%START_TIME:5%":                  "%START_TIME% takes no :MAX",
		"%REQ(X%":                         "the parenthesis of %REQ( is not closed",
		"%REQ%":                           "%REQ()% names no field",
		"%REQ()%":                         "%REQ()% names no field",
		"%REQ(?X)%":                       "names no field",
		"%REQ(X?)%":                       "names no field",
		"%REQ(X?Y?Z)%":                    "names no field",
		"%REQ(X Y)%":                      "names no field",
		"%REQ(é)%":                        "names no field",
		"%REQ(:PAHT)%":                    "unknown name :PAHT",
		"%RESP(:PATH)%":                   "names no field",
		"%REQ(X):%":                       "the :MAX of %REQ% must be a number from 1 to 1024",
		"%REQ(X):0%":                      "must be a number from 1 to 1024",
		"%REQ(X):1025%":                   "must be a number from 1 to 1024",
		"%REQ(X):99999999999999999999%":   "must be a number from 1 to 1024",
		"%START_TIME()%":                  "there is no format in it",
		"%START_TIME(%Q)%":                "unknown part %Q",
		"%START_TIME(%3)%":                "unknown part %3",
		"%START_TIME(%)%":                 "it ends with a percent sign",
		`%START_TIME("%Y")%`:              "neither quotes, backslashes nor tabs",
		"a\x00b":                          "it holds the character U+0000",
		"a\nb":                            "it holds the character U+000A",
		"a\u202eb":                        "it holds the character U+202E",
		"a\xffb":                          "it holds the character U+FFFD",
		strings.Repeat("x", 2049):         "it has 2049 bytes, 2048 are the most",
		strings.Repeat("%DURATION%", 200): "a line would be too long",
		"%START_TIME(" + strings.Repeat("%A", 900) + ")%": "a line would be too long",
	} {
		if f, err := format.Text(s); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.60q is %v, %v, want an error with %q", s, f, err, want)
		}
	}
}

func TestAnUnknownOperatorNamesTheKnown(t *testing.T) {
	t.Parallel()
	_, err := format.Text("%RESPONSE_FLAG%")
	unknown, ok := errors.AsType[*format.UnknownError](err)
	if !ok || unknown.Name != "RESPONSE_FLAG" || len(unknown.Known) != len(format.Operators) {
		t.Errorf("got %v", err)
	}
}

func TestWhatIsNoTable(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		table     map[string]string
		key, want string
	}{
		"empty":                        {map[string]string{}, "", "there is no key in it"},
		"an empty key":                 {map[string]string{"": "x"}, "", "it is empty"},
		"a key that cannot be printed": {map[string]string{"\x1b": "x"}, "\x1b", "U+001B"},
		"a value that is none":         {map[string]string{"a": "%PROTOCOL%", "b": "%X%"}, "b", "unknown operator X"},
		"more than fits":               {map[string]string{"a": strings.Repeat("x", 2000), "b": strings.Repeat("x", 100)}, "", "it has 2102 bytes"},
	} {
		_, err := format.JSON(tt.table)
		k, ofKey := errors.AsType[*format.KeyError](err)
		if err == nil || !strings.Contains(err.Error(), tt.want) || ofKey != (name != "empty" && name != "more than fits") || ofKey && k.Key != tt.key {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestTimes(t *testing.T) {
	t.Parallel()
	at := time.Date(2026, 9, 2, 4, 5, 6, 7_089_000, time.FixedZone("CEST", 7200))
	for s, want := range map[string]string{
		"%START_TIME%":                          "2026-09-02T02:05:06.007Z",
		"%START_TIME(%Y/%m/%d %H:%M:%S)%":       "2026/09/02 02:05:06",
		"%START_TIME(%F %T.%6f %z %Z)%":         "2026-09-02 02:05:06.007089 +0000 UTC",
		"%START_TIME(%s.%3f)%":                  "1788314706.007",
		"%START_TIME(%f|%1f|%9f)%":              "007089000|0|007089000",
		"%START_TIME(%a %A %b %B %e %j %y %%)%": "Wed Wednesday Sep September  2 245 26 %",
		"%START_TIME(%D %R %I%p)%":              "09/02/26 02:05 02AM",
		"%START_TIME(2006 Monday)%":             "2006 Monday", // which package time would understand
	} {
		f, err := format.Text(s)
		if err != nil {
			t.Errorf("%s: %v", s, err)
			continue
		}
		p := &f.Pieces[0]
		if got := string(p.AppendTime(nil, at)); got != want {
			t.Errorf("%s is %q, want %q", s, got, want)
		}
	}
}

func TestFlagsHaveRoom(t *testing.T) {
	t.Parallel()
	f, err := format.Text("x%RESPONSE_FLAGS%")
	if n := len(`""` + flags.Known.String()); err != nil || f.Pieces[0].Rest < n {
		t.Errorf("%v; %d bytes are left to %d", err, f.Pieces[0].Rest, n)
	}
}
