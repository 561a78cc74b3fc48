package cli

import (
	"testing"
	"time"
)

func TestFiguresForAPerson(t *testing.T) {
	t.Parallel()
	for got, want := range map[string]string{
		age(-time.Second):                                "0s",
		age(59*time.Second + 999*time.Millisecond):       "59s",
		age(time.Minute):                                 "1m 0s",
		age(time.Hour - 1):                               "59m 59s",
		age(3*time.Hour + 4*time.Minute + 5*time.Second): "3h 4m",
		age(40*24*time.Hour + 90*time.Minute):            "40d 1h",
		size(0):                                          "0 KiB",
		size(10<<20 - 1):                                 "10239 KiB",
		size(10 << 20):                                   "10 MiB",
		size(10<<30 - 1):                                 "10239 MiB",
		size(10 << 30):                                   "10 GiB",
		number(0):                                        "0",
		number(999):                                      "999",
		number(1204):                                     "1,204",
		number(1234567):                                  "1,234,567",
		number(-100):                                     "-100",
		number(-1000):                                    "-1,000",
		count(0, "tunnel"):                               "0 tunnels",
		count(1, "tunnel"):                               "1 tunnel",
		count(1204, "tunnel"):                            "1,204 tunnels",
	} {
		if got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}
