package control_test

import (
	"strings"
	"testing"
	"time"

	"holdfast/internal/control"
)

func TestCertificatesAreReadWithinBounds(t *testing.T) {
	t.Parallel()
	read := func(text string) (*control.Certificates, error) {
		f, err := control.Bytes([]byte(text))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		fd, err := control.Duplicate(int(f.Fd()))
		if err != nil {
			t.Fatal(err)
		}
		return control.ReadCertificates(fd)
	}
	all, err := read(`{"certificates":[{"listener":"web","file":"/a.pem","expires":"2027-01-02T03:04:05Z"},{"cluster":"app"}]}`)
	if err != nil || len(all.Certificates) != 2 || all.Certificates[0].Expires != time.Date(2027, 1, 2, 3, 4, 5, 0, time.UTC) || all.Certificates[1].Cluster != "app" {
		t.Errorf("%+v, %v", all, err)
	}
	for name, text := range map[string]string{
		"no JSON":             `{`,
		"no array":            `{"certificates":{}}`,
		"too many":            `{"certificates":[` + strings.Repeat("{},", 20_000) + `{}]}`,
		"one that is large":   `{"certificates":[{"file":"` + strings.Repeat("x", 70_000) + `"}]}`,
		"too long altogether": `{"certificates":[]}` + strings.Repeat(" ", control.MaxCertificates),
	} {
		if _, err := read(text); err == nil {
			t.Errorf("%s: it is read", name)
		}
	}
}
