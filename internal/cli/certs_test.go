package cli_test

import (
	"errors"
	"testing"
	"time"

	"holdfast/internal/admin/admintest"
	"holdfast/internal/cli"
	"holdfast/internal/control"
	"holdfast/internal/supervisor"
)

func TestCertificates(t *testing.T) {
	t.Parallel()
	in := func(d time.Duration) time.Time { return time.Now().Add(d + 30*time.Second) }
	all := &supervisor.Certificates{Generation: 3, Certificates: []control.Certificate{
		{Cluster: "api", File: "/etc/holdfast/api.pem", Problem: "open /etc/holdfast/api.pem: permission denied"},
		{Listener: "old", File: "/etc/holdfast/old.pem", Key: "RSA 2048", Names: []string{"old.test"}, Expires: in(-50 * time.Hour)},
		{Listener: "web", File: "/etc/holdfast/web.pem", Key: "ECDSA P-256", Names: []string{"*.example.com", "example.com", "www.example.org"}, Expires: in(50 * time.Hour)},
		{Listener: "web", File: "/etc/holdfast/soon.pem", Key: "Ed25519", Subject: "CN=soon", ValidFrom: in(time.Hour), Expires: in(90 * time.Hour)},
		{Listener: "web", Authority: true, File: "/etc/holdfast/clients.pem", Key: "ECDSA P-256", Subject: "CN=Clients", Names: []string{"x"}, Expires: in(2400 * time.Hour)},
	}}
	for name, test := range map[string]struct {
		shown          *supervisor.Certificates
		err            error
		code           int
		stdout, stderr string
	}{
		"nothing":      {&supervisor.Certificates{}, nil, 0, "there are no certificates\n", ""},
		"nobody knows": {nil, errors.New("no generation serves"), 1, "", "holdfast: nothing can be shown: no generation serves\n"},
		"all that there can be": {all, nil, 0, `EXPIRES                  OF                       KEY          NAMES
-                        cluster api              -            -
    /etc/holdfast/api.pem
    the file is of no use as it is now: open /etc/holdfast/api.pem: permission denied
EXPIRED 2d 1h ago        listener old             RSA 2048     old.test
    /etc/holdfast/old.pem
in 2d 2h                 listener web             ECDSA P-256  *.example.com, example.com, www.e…
    /etc/holdfast/web.pem
not valid for 1h 0m yet  listener web             Ed25519      CN=soon
    /etc/holdfast/soon.pem
in 100d 0h               listener web, client ca  ECDSA P-256  CN=Clients
    /etc/holdfast/clients.pem
`, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir, _ := serve(t, &admintest.Supervisor{OnCertificates: func() (*supervisor.Certificates, error) { return test.shown, test.err }})
			execute(&cli.Program{}, "certs --runtime-dir "+dir).want(t, test.code, test.stdout, test.stderr)
		})
	}
}
