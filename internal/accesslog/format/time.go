package format

import (
	"errors"
	"strconv"
	"strings"
	"time"
)

// Time is a part of a time, as strftime(3) names them.
type Time struct {
	text   string // that stands for itself, or a layout of package time
	layout bool
	unix   bool // the seconds since 1970
	digits int  // of the fraction of a second
}

// layouts are those of package time for what strftime has.
var layouts = map[byte]string{
	'Y': "2006", 'y': "06", 'm': "01", 'd': "02", 'e': "_2", 'j': "002", 'H': "15", 'I': "03", 'M': "04", 'S': "05", 'p': "PM",
	'a': "Mon", 'A': "Monday", 'b': "Jan", 'B': "January", 'z': "-0700", 'Z': "MST", 'F': "2006-01-02", 'T': "15:04:05", 'R': "15:04", 'D': "01/02/06",
}

// usual is the time of an operator without a format.
var usual = []Time{{text: "2006-01-02T15:04:05.000Z", layout: true}}

// parseTime reads a format for times.
func parseTime(s string) ([]Time, error) {
	if s == "" {
		return nil, errors.New("there is no format in it")
	}
	if strings.ContainsAny(s, "\"\\\t") {
		return nil, errors.New("neither quotes, backslashes nor tabs may be in a time")
	}
	var parts []Time
	for s != "" {
		before, rest, found := strings.Cut(s, "%")
		if before != "" {
			parts = append(parts, Time{text: before})
		}
		if !found {
			break
		}
		if rest == "" {
			return nil, errors.New("it ends with a percent sign")
		}
		c := rest[0]
		s = rest[1:]
		switch {
		case c == '%':
			parts = append(parts, Time{text: "%"})
		case c == 's':
			parts = append(parts, Time{unix: true})
		case c == 'f':
			parts = append(parts, Time{digits: 9})
		case '1' <= c && c <= '9' && strings.HasPrefix(s, "f"):
			parts = append(parts, Time{digits: int(c - '0')})
			s = s[1:]
		case layouts[c] != "":
			parts = append(parts, Time{text: layouts[c], layout: true})
		default:
			return nil, errors.New("unknown part %" + printable(string(rune(c))) + "; known are those of strftime(3) such as %Y %m %d %H %M %S, %3f for milliseconds, %s for seconds since 1970")
		}
	}
	return parts, nil
}

// AppendTime appends a time.
func (p *Piece) AppendTime(b []byte, at time.Time) []byte {
	at = at.UTC()
	parts := p.Time
	if parts == nil {
		parts = usual
	}
	for i := range parts {
		switch part := &parts[i]; {
		case part.layout:
			b = at.AppendFormat(b, part.text)
		case part.unix:
			b = strconv.AppendInt(b, at.Unix(), 10)
		case part.digits > 0:
			fraction := at.Nanosecond()
			for digit := 100_000_000; part.digits > 0 && digit >= scale[part.digits]; digit /= 10 {
				b = append(b, byte('0'+fraction/digit%10))
			}
		default:
			b = append(b, part.text...)
		}
	}
	return b
}

// scale is how many nanoseconds the last of so many digits stands for.
var scale = [10]int{9: 1, 8: 10, 7: 100, 6: 1e3, 5: 1e4, 4: 1e5, 3: 1e6, 2: 1e7, 1: 1e8}

// lengthOf returns the most bytes of such a time, in years of four digits.
func lengthOf(parts []Time) (n int) {
	if parts == nil {
		parts = usual
	}
	for _, p := range parts {
		switch {
		case p.layout && p.text == "Monday", p.layout && p.text == "January":
			n += len("Wednesday")
		case p.unix:
			n += mostNumber
		default:
			n += len(p.text) + p.digits
		}
	}
	return n
}
