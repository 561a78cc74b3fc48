# A thin face over plain commands: each target can be run by hand as it stands here.
# `make demo` and `make test` are all that a newcomer needs.

GO ?= go
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
LDFLAGS = -X holdfast/internal/version.override=$(VERSION)
STATICCHECK = $(GO) tool -modfile=tools.mod staticcheck

# A test that misses a tool of the machine skips by default; here it fails.
export HOLDFAST_TEST_REQUIRE_TOOLS ?= 1

.PHONY: build deb demo test tools format vet staticcheck unit e2e generate bench bench-http bench-tls bench-vault bench-routes bench-balance bench-checks bench-smoke soak soak-vault drill drill-long fuzz mutations clean

build:
	$(GO) build -ldflags '$(LDFLAGS)' -o bin/holdfast ./cmd/supervisor
	$(GO) build -ldflags '$(LDFLAGS)' -o bin/holdfast-proxy ./cmd/proxy

# The Debian package, in bin/. Who builds it to give it away sets DEBFULLNAME and DEBEMAIL.
deb:
	GO='$(GO)' deploy/deb/build $(VERSION)

# Serves until Ctrl-C.
demo: build
	bin/holdfast demo

# Everything that CI runs.
test: tools format vet staticcheck unit e2e bench-smoke

# What the tests need of the machine, by Debian's package names.
tools:
	test/install-tools

format:
	@test -z "$$(gofmt -l bench cmd internal test | tee /dev/stderr)"

vet:
	$(GO) vet ./...

staticcheck:
	$(STATICCHECK) ./...

unit:
	$(GO) test -race $$($(GO) list ./... | grep -v '/test/')

# Real processes and real clients, as an unprivileged user where we are root.
e2e:
	$(GO) test -race -count=1 -timeout 20m ./test/...

# Makes docs/metrics.md, and of deploy/ the manual pages, the scripts for shells, the schema of the
# configuration and the dashboard. Tests say when they are not up to date.
generate:
	$(GO) run ./test/reference -write

# Measures Holdfast beside other proxies and writes the table of docs/performance.md.
# Wants an otherwise idle machine for some twenty minutes.
bench:
	$(GO) run ./bench -docs docs

# Measures requests beside other proxies, for another table of docs/performance.md. Wants
# the same for some six minutes. A look at a part of it, that writes nothing, is
#	make bench-http BENCH_HTTP='-rounds 1 -proxies holdfast,haproxy,nginx -modes small'
BENCH_HTTP ?= -docs docs
bench-http:
	$(GO) run ./bench -http $(BENCH_HTTP)

# Measures TLS beside HAProxy and nginx, for its table of docs/performance.md. Wants the same
# for some four minutes.
bench-tls:
	$(GO) run ./bench -tls -docs docs

# Measures what the vault costs and does, for its table of docs/performance.md.
# Wants the same for some ten minutes.
bench-vault:
	$(GO) run ./bench -vault -docs docs

# What many routes and filters cost a request, and what loading them takes, for the figures in
# docs/performance.md. These are Go benchmarks: the differences are lost in the kernel's work.
bench-routes:
	$(GO) test -run '^$$' -bench '^Benchmark(Load|Match|Request)$$' -cpu 1 ./internal/route ./internal/proxy

# What the choice of an endpoint costs, by policy, with ten endpoints and a thousand.
bench-balance:
	$(GO) test -run '^$$' -bench . -cpu 1,2 ./internal/upstream/balance

# What 10,000 endpoints cost that are checked, in percent of a core, for the figures in
# docs/performance.md. Takes some three minutes.
bench-checks:
	ulimit -n 20000 && $(GO) test -run '^$$' -bench '^BenchmarkChecks$$' -benchtime 1x ./internal/upstream

# Shows that the tool still works. Its figures mean nothing.
bench-smoke:
	$(GO) run ./bench -smoke -proxies holdfast,httputil
	$(GO) run ./bench -smoke -http -proxies holdfast,httputil,iocopy
	$(GO) run ./bench -smoke -tls -proxies holdfast-tls
	$(GO) run ./bench -smoke -http -proxies holdfast -modes httpconns -profile bin/profiles
	$(GO) run ./bench -smoke -vault

# Some thousand reloads, and nothing may be left of them. Takes some minutes.
SOAK_RELOADS ?= 5000
soak:
	HOLDFAST_SOAK_RELOADS=$(SOAK_RELOADS) $(GO) test -race -count=1 -timeout 2h -v -run TestReloadsWithoutEnd ./test/e2e

# Some thousand kills of generations, at all kinds of moments, and thousands of tunnels
# that are moved again and again; none may lose a byte. Takes most of an hour.
SOAK_KILLS ?= 5000
SOAK_MOVED ?= 5000
STORM = --only 'generations killed in a storm'
soak-vault: build
	test/unprivileged bin/holdfast drill --kills $(SOAK_KILLS) $(STORM) $(STORM) $(STORM) $(STORM) \
		--only 'generation killed while tunnels are moved' --only 'supervisor killed during an upgrade' --only 'tunnels moved'
	HOLDFAST_SOAK_MOVED=$(SOAK_MOVED) $(GO) test -count=1 -timeout 1h -v -run TestTunnelsAreMovedAtEveryReload ./test/e2e

# Reloads, upgrades and kills an instance under load and counts what clients notice; every
# kind of round twice. The unit tests have each once.
drill: build
	bin/holdfast drill --rounds 32

# What is to be all zeros before a release. Takes some eight minutes.
drill-long: build
	bin/holdfast drill --rounds 500 --verbose

# Every fuzz target for a while: make fuzz FUZZTIME=1m
FUZZTIME ?= 10s
fuzz:
	test/fuzz-all $(FUZZTIME)

# Breaks each promise on purpose and shows which test notices. Takes long.
mutations:
	$(GO) run ./test/mutations

clean:
	rm -rf bin
