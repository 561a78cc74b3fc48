package supervisor

import (
	"context"
	"errors"
	"math"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"time"

	dto "github.com/prometheus/client_model/go"

	"holdfast/internal/metrics"
	"holdfast/internal/version"
)

// What the supervisor counts itself.
var (
	reloads = metrics.Define(metrics.Desc{
		Name: "holdfast_reloads_total", Type: metrics.TypeCounter, Labels: []string{"result"},
		Help: "Reloads, the start of the service among them, by result: done or refused.",
	})
	rollbacks = metrics.Define(metrics.Desc{
		Name: "holdfast_rollbacks_total", Type: metrics.TypeCounter, Labels: []string{"result"},
		Help: "Rollbacks by result: done or refused. They are not counted as reloads.",
	})
	reloadRefusals = metrics.Define(metrics.Desc{
		Name: "holdfast_reload_refusals_total", Type: metrics.TypeCounter, Labels: []string{"step"},
		Help: "Refused reloads by the step that refused them.",
	})
	reloadDuration = metrics.Define(metrics.Desc{
		Name: "holdfast_reload_duration_seconds", Type: metrics.TypeHistogram, Unit: metrics.Seconds,
		Bounds: []float64{0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120},
		Help:   "Time from reading the file until the new generation served and the old one drained, of reloads that were done.",
	})
	lastReload = metrics.Define(metrics.Desc{
		Name: "holdfast_reload_last_timestamp_seconds", Type: metrics.TypeGauge, Unit: metrics.Seconds,
		Help: "When the last reload ended, whether it was done or refused, in Unix time.",
	})
	lastReloadDone = metrics.Define(metrics.Desc{
		Name: "holdfast_reload_last_done_timestamp_seconds", Type: metrics.TypeGauge, Unit: metrics.Seconds,
		Help: "When the last reload that was done ended, in Unix time.",
	})
	lastReloadOK = metrics.Define(metrics.Desc{
		Name: "holdfast_reload_last_successful", Type: metrics.TypeGauge,
		Help: "1 if the last reload was done, 0 if it was refused.",
	})
	probations = metrics.Define(metrics.Desc{
		Name: "holdfast_probations_total", Type: metrics.TypeCounter, Labels: []string{"result"},
		Help: "Ended probations of generations by result: passed, crashed, superseded by another reload.",
	})
	probationActive = metrics.Define(metrics.Desc{
		Name: "holdfast_probation_active", Type: metrics.TypeGauge,
		Help: "1 while the serving generation is on probation.",
	})
	generationDeaths = metrics.Define(metrics.Desc{
		Name: "holdfast_generation_crashes_total", Type: metrics.TypeCounter, Labels: []string{"state"},
		Help: "Generations that ended although they had more to do, killed ones among them, by the state that they were in.",
	})
	generationsStarted = metrics.Define(metrics.Desc{
		Name: "holdfast_generations_started_total", Type: metrics.TypeCounter,
		Help: "Generations that were started.",
	})
	recordsLost = metrics.Define(metrics.Desc{
		Name: "holdfast_access_log_lost_total", Type: metrics.TypeCounter,
		Help: "Records of access logs that were not written yet when their process died.",
	})
	replacements = metrics.Define(metrics.Desc{
		Name: "holdfast_generation_replacements_total", Type: metrics.TypeCounter, Labels: []string{"by"},
		Help: "Serving generations that crashed, were cut off or were told by a signal to end, and were replaced, by what serves in their place: new (a new process) or reinstated (the one before).",
	})
	vaultDeposits = metrics.Define(metrics.Desc{
		Name: "holdfast_vault_deposits", Type: metrics.TypeGauge,
		Help: "Tunnels of which the supervisor holds what another generation needs to go on with them.",
	})
	vaultBereft = metrics.Define(metrics.Desc{
		Name: "holdfast_vault_bereft_tunnels", Type: metrics.TypeGauge,
		Help: "Tunnels whose process has died, and that no other has resumed yet.",
	})
	vaultRefused = metrics.Define(metrics.Desc{
		Name: "holdfast_vault_refused_total", Type: metrics.TypeCounter,
		Help: "Deposits for which the supervisor had no descriptors. The same tunnel counts again every 30 s, when it is tried again.",
	})
	vaultMoved = metrics.Define(metrics.Desc{
		Name: "holdfast_vault_moved_total", Type: metrics.TypeCounter,
		Help: "Tunnels that one living generation has taken over from another.",
	})
	vaultResumptions = metrics.Define(metrics.Desc{
		Name: "holdfast_vault_resumptions_total", Type: metrics.TypeCounter, Labels: []string{"result"},
		Help: "Attempts to have a new generation go on with the tunnels of one that has died, by result: done or failed (there is another one then).",
	})
	tunnelsLost = metrics.Define(metrics.Desc{
		Name: "holdfast_tunnels_lost_total", Type: metrics.TypeCounter,
		Help: "Tunnels that were open when their process died and ended with it, since they were not deposited, or nobody could go on with them. Those that were started are these, the ended and the active ones.",
	})
	replacementFailures = metrics.Define(metrics.Desc{
		Name: "holdfast_generation_replacement_failures_total", Type: metrics.TypeCounter,
		Help: "Attempts to replace a crashed generation that failed.",
	})
	crashesInARow = metrics.Define(metrics.Desc{
		Name: "holdfast_generation_crashes_in_a_row", Type: metrics.TypeGauge,
		Help: "Serving generations that had to be replaced, and replacements that failed, since one last served for 30 seconds.",
	})
	cutOffs = metrics.Define(metrics.Desc{
		Name: "holdfast_generation_cut_offs_total", Type: metrics.TypeCounter,
		Help: "Generations whose control channel was closed because they broke its protocol.",
	})
	generationsAdopted = metrics.Define(metrics.Desc{
		Name: "holdfast_generations_adopted_total", Type: metrics.TypeCounter,
		Help: "Times that a generation was taken over, from an earlier supervisor or because its control channel had broken.",
	})
	supervisorUpgrades = metrics.Define(metrics.Desc{
		Name: "holdfast_supervisor_upgrades_total", Type: metrics.TypeCounter, Labels: []string{"result"},
		Help: "Upgrades of the supervisor by result: done or refused.",
	})
	supervisorEpoch = metrics.Define(metrics.Desc{
		Name: "holdfast_supervisor_epoch", Type: metrics.TypeGauge,
		Help: "The number by which generations know which supervisor to obey. It rises with each one that takes over.",
	})
	rendezvousRefused = metrics.Define(metrics.Desc{
		Name: "holdfast_rendezvous_refused_total", Type: metrics.TypeCounter,
		Help: "Connections to the rendezvous socket that were refused: of another user, without a proof, too slow or too many at a time.",
	})
	generationsByState = metrics.Define(metrics.Desc{
		Name: "holdfast_generations", Type: metrics.TypeGauge, Labels: []string{"state"},
		Help: "Living generations by state.",
	})
	generationInfo = metrics.Define(metrics.Desc{
		Name: "holdfast_generation_info", Type: metrics.TypeGauge, Merge: metrics.PerGeneration, Labels: []string{"state", "version", "config"},
		Help: "1 for each living generation: its state, the build that it is, and the hash of its configuration.",
	})
	listenersOpen = metrics.Define(metrics.Desc{
		Name: "holdfast_listeners", Type: metrics.TypeGauge,
		Help: "Listening sockets of the configuration that serves.",
	})
	listenersAdded = metrics.Define(metrics.Desc{
		Name: "holdfast_listeners_added_total", Type: metrics.TypeCounter,
		Help: "Listening sockets that came with a configuration.",
	})
	listenersRemoved = metrics.Define(metrics.Desc{
		Name: "holdfast_listeners_removed_total", Type: metrics.TypeCounter,
		Help: "Listening sockets that a configuration dropped.",
	})
	logsReopened = metrics.Define(metrics.Desc{
		Name: "holdfast_access_log_reopens_total", Type: metrics.TypeCounter, Labels: []string{"result"},
		Help: "Times that the access logs were opened again by command or signal, by result: done or failed (some went on as they were).",
	})
	runtimeOverrides = metrics.Define(metrics.Desc{
		Name: "holdfast_runtime_overrides", Type: metrics.TypeGauge, Labels: []string{"by"},
		Help: "Runtime keys that are overridden, by what: command, or the file where no command has set the key.",
	})
	runtimeFileLoads = metrics.Define(metrics.Desc{
		Name: "holdfast_runtime_file_loads_total", Type: metrics.TypeCounter, Labels: []string{"result"},
		Help: "Times that the file with runtime values was read because it had changed, by result: done or refused (what it said before holds).",
	})
	ticketRotations = metrics.Define(metrics.Desc{
		Name: "holdfast_tls_ticket_key_rotations_total", Type: metrics.TypeCounter, Labels: []string{"by"},
		Help: "Times that another key was taken for TLS session tickets, by what: schedule, or command.",
	})
	ticketKeyAge = metrics.Define(metrics.Desc{
		Name: "holdfast_tls_ticket_key_age_seconds", Type: metrics.TypeGauge, Unit: metrics.Seconds,
		Help: "For how long TLS session tickets have been made with the present key. Absent while no generation lives that shares keys.",
	})
	ticketKeysLost = metrics.Define(metrics.Desc{
		Name: "holdfast_tls_ticket_keys_lost_total", Type: metrics.TypeCounter,
		Help: "Times that the keys of TLS session tickets which an earlier supervisor had could not be gone on with: sessions are not resumed that were begun before.",
	})
	logLinesDropped = metrics.Define(metrics.Desc{
		Name: "holdfast_supervisor_log_lines_dropped_total", Type: metrics.TypeCounter,
		Help: "Lines of the supervisor's log that nobody took in time.",
	})
	readiness = metrics.Define(metrics.Desc{
		Name: "holdfast_ready", Type: metrics.TypeGauge,
		Help: "1 while /readyz says that new connections are welcome.",
	})
	started = metrics.Define(metrics.Desc{
		Name: "holdfast_start_time_seconds", Type: metrics.TypeGauge, Unit: metrics.Seconds,
		Help: "When the supervisor started, in Unix time.",
	})
	buildInfo = metrics.Define(metrics.Desc{
		Name: "holdfast_build_info", Type: metrics.TypeGauge, Labels: []string{"version", "goversion"},
		Help: "1; which build the supervisor is.",
	})
	configInfo = metrics.Define(metrics.Desc{
		Name: "holdfast_config_info", Type: metrics.TypeGauge, Labels: []string{"hash"},
		Help: "1; the hash of the configuration that serves.",
	})
	configDiffers = metrics.Define(metrics.Desc{
		Name: "holdfast_config_file_differs", Type: metrics.TypeGauge,
		Help: "1 if the configuration file is not, byte for byte, what serves, or cannot be read.",
	})
)

// steps are what a Refusal may name; "stop" is the end of the service.
var steps = []string{"configuration", "proxy binary", "generations", "descriptors", "access logs", "listeners", "admin", "start", "serve", "stop"}

// stats are the supervisor's own counters. They may be used concurrently.
type stats struct {
	registry *metrics.Registry
	file     *metrics.File // that they are in, for a successor

	done, refused                    *metrics.Counter
	rolledBack, notRolledBack        *metrics.Counter
	refusals                         map[string]*metrics.Counter // by step
	duration                         *metrics.Histogram
	last, lastDone, lastOK           *metrics.Gauge
	probations                       map[string]*metrics.Counter // by result
	deaths                           map[state]*metrics.Counter
	started, cutOffs                 *metrics.Counter
	replaced, reinstated             *metrics.Counter
	tunnelsLost, recordsLost         *metrics.Counter
	replacementFailures              *metrics.Counter
	listenersAdded, listenersRemoved *metrics.Counter
	reopened, reopenFailures         *metrics.Counter
	adopted                          *metrics.Counter
	overridesLoaded                  *metrics.Counter
	overridesRefused                 *metrics.Counter
	upgradesDone, upgradesRefused    *metrics.Counter
	ticketsRotated, ticketsReplaced  *metrics.Counter
	ticketsLost                      *metrics.Counter
	resumed, resumeFailures          *metrics.Counter

	// Owned by the supervisor's loop.
	logLinesDropped, strangers follower
	vaultRefused, vaultMoved   follower
}

// newStats returns stats that go on from what a predecessor has counted.
func newStats(previous []metrics.Family) (*stats, error) {
	file, r, err := metrics.NewOwnFile()
	if err != nil {
		return nil, err
	}
	st := &stats{
		registry: r, file: file,
		done: r.Counter(reloads, "done"), refused: r.Counter(reloads, "refused"),
		rolledBack: r.Counter(rollbacks, "done"), notRolledBack: r.Counter(rollbacks, "refused"),
		refusals: make(map[string]*metrics.Counter),
		duration: r.Histogram(reloadDuration),
		last:     r.Gauge(lastReload), lastDone: r.Gauge(lastReloadDone), lastOK: r.Gauge(lastReloadOK),
		probations: make(map[string]*metrics.Counter),
		deaths:     make(map[state]*metrics.Counter),
		started:    r.Counter(generationsStarted),
		cutOffs:    r.Counter(cutOffs),
		replaced:   r.Counter(replacements, "new"), reinstated: r.Counter(replacements, "reinstated"),
		tunnelsLost:         r.Counter(tunnelsLost),
		recordsLost:         r.Counter(recordsLost),
		replacementFailures: r.Counter(replacementFailures),
		listenersAdded:      r.Counter(listenersAdded), listenersRemoved: r.Counter(listenersRemoved),
		reopened: r.Counter(logsReopened, "done"), reopenFailures: r.Counter(logsReopened, "failed"),
		adopted:         r.Counter(generationsAdopted),
		overridesLoaded: r.Counter(runtimeFileLoads, "done"), overridesRefused: r.Counter(runtimeFileLoads, "refused"),
		ticketsRotated: r.Counter(ticketRotations, "schedule"), ticketsReplaced: r.Counter(ticketRotations, "command"),
		ticketsLost:  r.Counter(ticketKeysLost),
		upgradesDone: r.Counter(supervisorUpgrades, "done"), upgradesRefused: r.Counter(supervisorUpgrades, "refused"),
		resumed: r.Counter(vaultResumptions, "done"), resumeFailures: r.Counter(vaultResumptions, "failed"),
		vaultRefused: follower{counter: r.Counter(vaultRefused)}, vaultMoved: follower{counter: r.Counter(vaultMoved)},
		logLinesDropped: follower{counter: r.Counter(logLinesDropped)},
		strangers:       follower{counter: r.Counter(rendezvousRefused)},
	}
	for _, step := range steps {
		st.refusals[step] = r.Counter(reloadRefusals, step)
	}
	for _, result := range []string{"passed", "crashed", "superseded"} {
		st.probations[result] = r.Counter(probations, result)
	}
	for _, s := range []state{starting, ready, serving, draining, stopping} {
		st.deaths[s] = r.Counter(generationDeaths, s.String())
	}
	st.carry(previous)
	return st, nil
}

// carry goes on from what a predecessor has counted, and from what it knew of the last
// reload, unless there was one since.
func (st *stats) carry(previous []metrics.Family) {
	st.registry.Carry(previous)
	if st.last.Value() != 0 {
		return
	}
	for _, f := range previous {
		for d, g := range map[*metrics.Desc]*metrics.Gauge{lastReload: st.last, lastReloadDone: st.lastDone, lastReloadOK: st.lastOK} {
			if f.Desc.Name == d.Name && f.Desc.Type == d.Type && len(f.Series) == 1 {
				g.Set(f.Series[0].Value)
			}
		}
	}
}

// families are the values now. The metric that a memory file brings along is not among
// them: with it, that of the generations would not be shown.
func (st *stats) families() []metrics.Family {
	return slices.DeleteFunc(st.registry.Families(), func(f metrics.Family) bool { return f.Desc.Name == metrics.UnshownSeries })
}

// A follower counts what something else counts that begins at 0 with the process. It may
// be used by several goroutines at once.
type follower struct {
	counter *metrics.Counter
	mu      sync.Mutex
	seen    uint64
}

func (f *follower) follow(total uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if total > f.seen {
		f.counter.Add(total - f.seen)
		f.seen = total
	}
}

// reloaded counts a reload that has ended.
func (st *stats) reloaded(o reloadOutcome) {
	now := time.Now().UnixNano()
	st.last.Set(now)
	if o.err == nil {
		st.done.Inc()
		st.lastDone.Set(now)
		st.lastOK.Set(1)
		st.duration.Observe(int64(o.result.Duration))
		return
	}
	st.refused.Inc()
	st.lastOK.Set(0)
	st.refusals[stepOf(o.err)].Inc()
}

// wentBack counts a rollback that has ended.
func (st *stats) wentBack(o reloadOutcome) {
	if o.err == nil {
		st.rolledBack.Inc()
	} else {
		st.notRolledBack.Inc()
	}
}

// stepOf names the step that refused a reload.
func stepOf(err error) string {
	if r, ok := errors.AsType[*Refusal](err); ok {
		return r.Step
	}
	return "stop"
}

// Metrics implements [Commands]. What a generation has counted is read from the
// memory that it counts in. It is asked for its status beforehand, which has it
// measure what it only knows by looking; what one that does not answer has measured
// last still stands, and is marked as stale.
func (s *Supervisor) Metrics(ctx context.Context) ([]*dto.MetricFamily, error) {
	if err := s.awaitBegin(ctx); err != nil { // what was counted before us is not known yet
		return nil, err
	}
	s.refresh(ctx)
	var stale []int
	var serves string
	var own []metrics.Family
	if err := s.try(ctx, func() {
		for _, g := range s.living {
			if g.silent {
				stale = append(stale, g.number)
			}
		}
		s.followOthers()
		own, serves = append(s.stats.families(), s.gauges()...), s.hash()
	}); err != nil {
		return nil, err
	}
	differs, err := s.fileDiffers(serves)
	own = append(own, one(configDiffers, truth(differs || err != nil)))
	return s.totals.Merge(stale, own), nil
}

// followOthers counts what has happened outside of the loop. Called in the loop.
func (s *Supervisor) followOthers() {
	s.stats.logLinesDropped.follow(s.opts.LogsDropped())
	if s.opts.Rendezvous != nil {
		s.stats.strangers.follow(s.opts.Rendezvous.Refused())
	}
}

// followVault counts what has happened in the vault. It may be called by anybody.
func (s *Supervisor) followVault() {
	kept := s.vault.Totals()
	s.stats.vaultRefused.follow(kept.Refused)
	s.stats.vaultMoved.follow(kept.Moved)
}

// gauges are what stands rather than being counted. Called in the loop.
func (s *Supervisor) gauges() []metrics.Family {
	byState := make(map[state]int64)
	infos := metrics.Family{Desc: *generationInfo}
	for _, g := range s.newestFirst() {
		byState[g.state]++
		infos.Series = append(infos.Series, metrics.Series{
			Labels: []string{g.state.String(), g.versionNow(), g.release.hash, strconv.Itoa(g.number)}, Value: 1,
		})
	}
	states := metrics.Family{Desc: *generationsByState}
	for st := starting; st < ended; st++ {
		states.Series = append(states.Series, metrics.Series{Labels: []string{st.String()}, Value: byState[st]})
	}
	overridden := s.overridden()
	all := []metrics.Family{
		infos, states,
		one(probationActive, truth(s.probation != nil)),
		one(vaultDeposits, int64(s.vault.Totals().Deposits)),
		one(vaultBereft, int64(s.bereft())),
		one(crashesInARow, int64(s.crashesNow())),
		one(listenersOpen, int64(len(s.sockets))),
		one(readiness, truth(s.Ready())),
		{Desc: *runtimeOverrides, Series: []metrics.Series{
			{Labels: []string{"command"}, Value: int64(overridden.ByCommand)}, {Labels: []string{"file"}, Value: int64(overridden.ByFile)},
		}},
		one(started, s.started.UnixNano()),
		one(supervisorEpoch, int64(min(s.epoch, math.MaxInt64))),
		one(buildInfo, 1, version.String(), runtime.Version()),
	}
	if s.tickets.running {
		all = append(all, one(ticketKeyAge, int64(s.tickets.keys.Age(s.kernel.uptime()))))
	}
	if hash := s.hash(); hash != "" {
		all = append(all, one(configInfo, 1, hash))
	}
	return all
}

// one is a family of one series.
func one(d *metrics.Desc, value int64, labels ...string) metrics.Family {
	return metrics.Family{Desc: *d, Series: []metrics.Series{{Labels: slices.Clone(labels), Value: value}}}
}

// losses are what goes with a process that dies.
type losses struct {
	tunnels int64 // that were open
	moved   int64 // of those that went elsewhere, how many it had counted
	records int64 // of access logs, that were not written yet
}

// tunnelsFor returns how many tunnels have ended with the process, of which so many are left
// to be resumed, and so many have gone elsewhere: of some of these it may not have heard
// before it died.
func (l losses) tunnelsFor(left, moved int) uint64 {
	unheard := max(int64(moved)-l.moved, 0)
	return uint64(max(l.tunnels-int64(left)-unheard, 0))
}

// lossesIn returns what was there according to the memory that a generation counted in.
func lossesIn(f *metrics.File) (l losses) {
	if f == nil {
		return l // it is not known
	}
	families, _ := f.Families() // what is wrong there is logged when it is added up
	for i := range families {
		switch families[i].Desc.Name {
		case "holdfast_tunnels_active":
			l.tunnels = gaugeSum(&families[i])
		case "holdfast_tunnels_moved_total":
			l.moved = counted(&families[i], "out")
		case "holdfast_access_log_queued_records":
			l.records = gaugeSum(&families[i])
		}
	}
	return l
}

// counted is the value of a counter's series with one label.
func counted(f *metrics.Family, label string) int64 {
	for _, s := range f.Series {
		if slices.Equal(s.Labels, []string{label}) {
			return min(max(s.Value, 0), mostHeld)
		}
	}
	return 0
}

// mostHeld is more than any process can hold of anything. What a hostile one says that
// it has held must not make our own counters overflow.
const mostHeld = 1 << 32

// gaugeSum is the sum of a gauge that counts things.
func gaugeSum(f *metrics.Family) (sum int64) {
	for _, s := range f.Series {
		sum = min(sum+min(max(s.Value, 0), mostHeld), mostHeld)
	}
	return sum
}

func truth(b bool) int64 {
	if b {
		return 1
	}
	return 0
}
