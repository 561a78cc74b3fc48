package peer

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"

	"holdfast/bench/load"
)

// holdfast is built from this tree, in three forms: as it is by default, and with what
// the vault is for said in so many words. Probation is short in these, so that tunnels can
// move soon after a reload.
var (
	holdfast = ours("holdfast", "Holdfast", "")
	vault    = ours("vault", "Deposits on", fmt.Sprintf(vaultSettings, true))
	noVault  = ours("no-vault", "Deposits off", fmt.Sprintf(vaultSettings, false))
)

const vaultSettings = `
[reload]
probation = "100ms"

[tunnels]
survive_crash = %t
`

func ours(name, title, settings string) *Kind {
	return &Kind{
		Name: name, Title: title, Descriptors: 2, Ours: true,
		find:  findHoldfast,
		files: func(s Site) []File { return []File{{"holdfast.toml", holdfastConfig(s, settings)}} },
		arguments: func(p Program, s Site) []string {
			return []string{p.Path, "run", "-c", filepath.Join(s.Dir, "holdfast.toml"), "--runtime-dir", filepath.Join(s.Dir, "run")}
		},
		reload: func(i *Instance) error { return i.holdfast("reload") },
	}
}

func findHoldfast(f Finder) (Program, error) {
	dir := f.Holdfast
	if dir == "" {
		dir = filepath.Join(f.Temp, "holdfast")
		if err := buildHoldfast(f.Root, dir); err != nil {
			return Program{}, err
		}
	}
	path := filepath.Join(dir, "holdfast")
	version, err := say(path, "version")
	return Program{Path: path, Version: strings.TrimPrefix(version, "holdfast ")}, err
}

func holdfastConfig(s Site, settings string) string {
	return fmt.Sprintf(`[log]
level = "warn"

[stop]
timeout = "1s"
%s
[[listeners]]
name = "bench"
address = %q

[[virtual_hosts]]
name = "bench"
domains = ["*"]

[[virtual_hosts.routes]]
match = { path = %q }
redirect = { path = %q }

[[virtual_hosts.routes]]
match = { prefix = "/" }
websocket = true
cluster = "upstream"

[[clusters]]
name = "upstream"
endpoints = [%q]
`, settings, s.Listen, RevisionPath, s.RevisionTarget(), s.Upstream)
}

// holdfast has a command of Holdfast's carried out.
func (i *Instance) holdfast(args ...string) error {
	return command(i.program.Path, append(args, "--runtime-dir", i.runtimeDir())...)
}

func (i *Instance) runtimeDir() string { return filepath.Join(i.site.Dir, "run") }

var haproxy = &Kind{
	Name: "haproxy", Title: "HAProxy", Descriptors: 2, restarted: true,
	find: func(Finder) (Program, error) {
		return installed("haproxy", regexp.MustCompile(`(?i)version (\S+)`), "-v")
	},
	files: func(s Site) []File {
		return []File{{"haproxy.cfg", fmt.Sprintf(`global
  nbthread %d
  maxconn %d
  maxpipes 300
  tune.pool-low-fd-ratio 95
  tune.pool-high-fd-ratio 95

defaults
  mode http
  timeout connect 5s
  timeout client 1h
  timeout server 1h
  timeout tunnel 24h

frontend bench
  bind %s
  http-request redirect location %s if { path %s }
  use_backend bodies if { path_beg %s }
  default_backend upstream

backend upstream
  server upstream %[7]s

backend bodies
  http-reuse always
  option splice-response
  server upstream %[7]s
`, s.Cores, s.Tunnels+100, s.Listen, s.RevisionTarget(), RevisionPath, load.BodyPath, s.Upstream)}}
	},
	arguments: func(p Program, s Site) []string {
		return []string{p.Path, "-W", "-q", "-f", filepath.Join(s.Dir, "haproxy.cfg")}
	},
	reload: func(i *Instance) error { return i.signal(syscall.SIGUSR2) },
}

var nginx = &Kind{
	Name: "nginx", Title: "nginx", Descriptors: 2,
	find: func(Finder) (Program, error) {
		return installed("nginx", regexp.MustCompile(`nginx/(\S+)`), "-v")
	},
	// All connections may come to one worker. A tunnel is two.
	files: func(s Site) []File {
		return []File{{"nginx.conf", fmt.Sprintf(`daemon off;
%sworker_processes %d;
pid nginx.pid;
error_log stderr warn;

events {
  worker_connections %d;
}

http {
  access_log off;
  keepalive_requests 1000000000;
  client_body_temp_path tmp-body;
  proxy_temp_path tmp-proxy;
  fastcgi_temp_path tmp-fastcgi;
  uwsgi_temp_path tmp-uwsgi;
  scgi_temp_path tmp-scgi;

  map $http_upgrade $connection_upgrade {
    default upgrade;
    '' '';
  }
  upstream upstream {
    server %s;
    keepalive %d;
    keepalive_requests 1000000000;
  }
  server {
    listen %s;
    location = %s {
      absolute_redirect off;
      return 302 %s;
    }
    location / {
      proxy_pass http://upstream;
      proxy_http_version 1.1;
      proxy_set_header Upgrade $http_upgrade;
      proxy_set_header Connection $connection_upgrade;
      proxy_read_timeout 24h;
      proxy_send_timeout 24h;
    }
    location %s {
      proxy_pass http://upstream;
      proxy_http_version 1.1;
      proxy_set_header Connection '';
      proxy_buffer_size 64k;
      proxy_buffers 16 64k;
      proxy_busy_buffers_size 256k;
    }
  }
}
`, workersUser(), s.Cores, 2*s.Tunnels+500, s.Upstream, kept, s.Listen, RevisionPath, s.RevisionTarget(), load.BodyPath)}}
	},
	arguments: func(p Program, s Site) []string {
		return []string{p.Path, "-p", s.Dir, "-e", "stderr", "-c", filepath.Join(s.Dir, "nginx.conf")}
	},
	reload: func(i *Instance) error { return i.signal(syscall.SIGHUP) },
}

var caddy = &Kind{
	Name: "caddy", Title: "Caddy", Descriptors: 2, restarted: true,
	find: buildCaddy,
	// Without stream_close_delay every reload closes all tunnels.
	files: func(s Site) []File {
		return []File{{"Caddyfile", fmt.Sprintf(`{
	admin unix//%s
	auto_https off
	persist_config off
	log {
		level WARN
	}
}

http://%s {
	redir %s %s
	reverse_proxy %s {
		stream_close_delay 24h
		transport http {
			keepalive_idle_conns_per_host %d
		}
	}
}
`, filepath.Join(s.Dir, "admin.sock"), s.Listen, RevisionPath, s.RevisionTarget(), s.Upstream, kept)}}
	},
	arguments: func(p Program, s Site) []string {
		return []string{p.Path, "run", "--config", filepath.Join(s.Dir, "Caddyfile"), "--adapter", "caddyfile"}
	},
	reload: func(i *Instance) error {
		return command(i.program.Path, "reload", "--config", filepath.Join(i.site.Dir, "Caddyfile"), "--adapter", "caddyfile",
			"--address", "unix//"+filepath.Join(i.site.Dir, "admin.sock"))
	},
}

var traefik = &Kind{
	Name: "traefik", Title: "Traefik", Descriptors: 2, restarted: true,
	find: buildTraefik,
	files: func(s Site) []File {
		return []File{{"dynamic/bench.yml", fmt.Sprintf(`http:
  routers:
    revision:
      rule: Path(%[1]q)
      middlewares: [revision]
      service: upstream
    all:
      rule: PathPrefix("/")
      service: upstream
  middlewares:
    revision:
      redirectRegex:
        regex: "^.*$"
        replacement: "http://%[2]s%[3]s"
  services:
    upstream:
      loadBalancer:
        servers:
          - url: "http://%[4]s"
`, RevisionPath, s.Listen, s.RevisionTarget(), s.Upstream)}}
	},
	arguments: func(p Program, s Site) []string {
		return []string{p.Path, "--entrypoints.bench.address=" + s.Listen,
			"--entrypoints.bench.transport.respondingtimeouts.readtimeout=0",
			fmt.Sprintf("--serverstransport.maxidleconnsperhost=%d", kept),
			"--providers.file.directory=" + filepath.Join(s.Dir, "dynamic"), "--providers.file.watch=true",
			"--log.level=WARN", "--global.checknewversion=false", "--global.sendanonymoususage=false"}
	},
	reload: func(*Instance) error { return nil }, // it watches its file
}

// httputilProxy is what a Go programmer would write in ten lines.
var httputilProxy = &Kind{
	Name: "httputil", Title: "Go's ReverseProxy", Descriptors: 2, restarted: true,
	find:      ourselves,
	arguments: func(p Program, s Site) []string { return []string{p.Path, "role", "httputil", s.Listen, s.Upstream} },
}

// ioCopy relays TCP without looking at it. Its tunnels pin a pipe for each direction.
var ioCopy = &Kind{
	Name: "iocopy", Title: "Go's io.Copy (TCP)", Descriptors: 6, restarted: true,
	find:      ourselves,
	arguments: func(p Program, s Site) []string { return []string{p.Path, "role", "iocopy", s.Listen, s.Upstream} },
}

func ourselves(f Finder) (Program, error) {
	return Program{Path: f.Self, Version: runtime.Version()}, nil
}

// installed finds a program of the machine. Debian keeps servers where not every
// user's PATH looks.
func installed(name string, version *regexp.Regexp, flag string) (Program, error) {
	path, err := exec.LookPath(name)
	if err != nil {
		if path = filepath.Join("/usr/sbin", name); !exists(path) {
			return Program{}, fmt.Errorf("not installed (Debian's package %s)", name)
		}
	}
	said, err := say(path, flag)
	if err != nil {
		return Program{}, err
	}
	found := version.FindStringSubmatch(said)
	if found == nil {
		return Program{}, fmt.Errorf("%s %s says no version: %q", path, flag, said)
	}
	return Program{Path: path, Version: found[1]}, nil
}

// say returns the first line that a command prints.
func say(path string, args ...string) (string, error) {
	out, err := exec.Command(path, args...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s: %w\n%s", path, err, out)
	}
	line, _, _ := strings.Cut(string(out), "\n")
	return strings.TrimSpace(line), nil
}

// workersUser makes nginx's workers run as who started it, as all others do.
func workersUser() string {
	if os.Geteuid() == 0 {
		return "user root;\n"
	}
	return ""
}
