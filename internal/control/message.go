package control

import (
	"fmt"
	"time"
)

// Core is the version of the core protocol. CoreMin is the oldest that this build
// still speaks. Two builds talk if their ranges meet.
var CoreMin, Core = coreRange(override)

// override is set by the linker, for tests between builds that have little in common:
// -X holdfast/internal/control.override=MIN-MAX
var override string

func coreRange(text string) (least, most int) {
	if n, _ := fmt.Sscanf(text, "%d-%d", &least, &most); n == 2 {
		return least, most
	}
	return 1, 1
}

// Type names a message.
type Type string

// The core. S→G comes from the supervisor, G→S from a generation. A message that
// asks is answered by one whose Re is its ID.
const (
	TypeHello     Type = "hello"     // G→S first of all: Hello
	TypeBundle    Type = "bundle"    // S→G once, with one payload, what to run, one memory file, for what is counted, and where there are some, one payload, the ClusterStates of what serves or has served last
	TypeListeners Type = "listeners" // S→G before ready and before a reinstating serve: Keys, a descriptor each, all that there are
	TypeLogs      Type = "logs"      // S→G before ready and whenever they were opened again: Keys, the paths of access logs, with a descriptor each
	TypeLevel     Type = "level"     // S→G write log lines from Level on
	TypeReadiness Type = "readiness" // S→G Unready, what health checks are answered with from now on; "" to begin with
	TypeProfile   Type = "profile"   // S→G asks for the Profile, of the time Within for one that takes time; answered with one payload, its bytes
	TypeReady     Type = "ready"     // G→S everything is built, with one payload: Learnt; or, with Error, cannot be
	TypeServe     Type = "serve"     // S→G accept; answered when it does
	TypeDrain     Type = "drain"     // S→G stop accepting and end when nothing is left, but not before Within; answered when it accepts no more. The queues of the listeners in Keys are emptied first
	TypeStatus    Type = "status"    // S→G asks for Status; answered
	TypeStop      Type = "stop"      // S→G empty all queues, drain and be gone Within; its end is the answer
	TypeLeaving   Type = "leaving"   // G→S it was told by a signal to end: it accepts no more
	TypeAnswer    Type = "answer"    // G→S to the message Re; with Error, it could not be done

	// Adoption: how a generation gets another supervisor. See the package's remarks.
	TypeKeep    Type = "keep"    // S→G Keys with a descriptor each, to be kept for whoever adopts; they replace those of the same keys
	TypePrepare Type = "prepare" // S→G one end of a channel on which a supervisor of Epoch may adopt, and one of its vault channel, to which all is deposited, too; answered
	TypeAdopt   Type = "adopt"   // S→G asks for all that a supervisor needs: TypeListeners with those that it accepts from and TypeKept come first, then the answer with Report
	TypeKept    Type = "kept"    // G→S Keys with a descriptor each: what TypeKeep has brought
	TypeObey    Type = "obey"    // S→G from now on the supervisor at this channel commands, and Epoch is its number; answered
	TypeDone    Type = "done"    // G→S nothing is left to do: it ends. Its last word

	// The vault, which is no part of the core: see [Vault]. Only a generation that says in
	// Hello and Report to have the same VaultVersion hears of it: the others' tunnels stay
	// where they are. The candidate's vault channel comes with TypePrepare.
	TypeVault  Type = "vault"  // S→G one end of a vault channel, in place of the one before; answered
	TypeResume Type = "resume" // S→G before it has served: drain, with the tunnels that will come over the vault channel. Not over before VaultComplete; answered
	TypeMove   Type = "move"   // S→G while it drains: release the tunnels that are to be moved, with All every one; again and again until none is left; answered at once

	// The passage, which is no part of the core either: see [Passage]. Only a generation
	// that says in Hello and Report to have the same PassageVersion hears of it.
	TypeTake Type = "take" // S→G while it serves: one end of a passage, from which connections are to be taken; answered
	TypeGive Type = "give" // S→G while it drains: one end of a passage, into which idle connections are to be given, in place of the one before; answered

	// Runtime values, which are no part of the core: see [Overrides]. Only a generation that
	// says in Hello and Report to have the same RuntimeVersion hears of them.
	TypeOverride Type = "override" // S→G from its bundle on: one payload, Overrides, all that hold, in place of those before
	TypeValues   Type = "values"   // S→G asks for its runtime values; answered with one payload, RuntimeValues

	// Clusters, which are no part of the core: see [ClusterStates]. Only a generation that
	// says in Hello and Report to have the same ClustersVersion hears of them.
	TypeClusters  Type = "clusters"  // S→G asks for its clusters; answered with one payload, ClusterStates
	TypeLoads     Type = "loads"     // S→G asks for what it has with its clusters; answered with one payload, Loads
	TypeElsewhere Type = "elsewhere" // S→G Keys, numbers of other generations, each with one payload, its Loads: all that there are

	// Session tickets of TLS, which are no part of the core: see [TicketKeys]. Only a generation
	// that says in Hello and Report to have the same TicketsVersion hears of them.
	TypeTickets Type = "tickets" // S→G from its bundle on: one payload, TicketKeys, in place of those before

	// Copies of files, which are no part of the core: see [Copies]. Only a generation that says in
	// Hello and Report to have the same CopiesVersion hears of them.
	TypeCopies Type = "copies" // S→G asks for its copies; answered with one payload, Copies
	TypeCopied Type = "copied" // G→S its copies are others now
	TypeLegacy Type = "legacy" // S→G before its bundle, in the place of a dead one: one payload, the Copies of that

	// Certificates, which are no part of the core: see [Certificates]. A build that does not know
	// of it says so.
	TypeCertificates Type = "certificates" // S→G asks for its certificates; answered with one payload, Certificates

	// Clearing, which is no part of the core: only a generation that says in Hello and Report to
	// have the same ClearVersion hears of it.
	TypeClear Type = "clear" // S→G while it drains: close all tunnels, spread over Within, and end what is left then; only ever sooner; answered at once

	// Between a generation that has lost its supervisor and one that it finds at the
	// rendezvous: each proves to know the generation's key. TypeHello, with a Nonce,
	// comes first.
	TypeChallenge Type = "challenge" // S→G Nonce, and Proof for the one of the hello
	TypeProof     Type = "proof"     // G→S Proof for the one of the challenge
)

// Between a supervisor and the one that is to succeed it, in this order. P is the
// predecessor, C the candidate.
const (
	TypeCandidate Type = "candidate" // C→P first of all: Hello
	TypeInherit   Type = "inherit"   // P→C Keys with a descriptor each
	TypeEstate    Type = "estate"    // P→C one payload: Estate. All descriptors have come
	TypePrepared  Type = "prepared"  // C→P it could command all generations; or, with Error, it refuses
	TypeCommit    Type = "commit"    // P→C it commands no more, the candidate does
	TypeFarewell  Type = "farewell"  // P→C systemd knows; the predecessor ends
)

// FilesPerMessage and KeysPerMessage are how many descriptors with keys travel
// together, and of how many bytes the keys may be: JSON makes at most six of one, and
// a message has room for them.
const (
	FilesPerMessage = 64
	KeysPerMessage  = 4 << 10
)

// How many descriptors a message of a type may carry depends on who sends it.
var (
	filesOfSupervisor  = map[Type]int{TypeBundle: 3, TypeListeners: FilesPerMessage, TypeLogs: FilesPerMessage, TypeKeep: FilesPerMessage, TypePrepare: 2, TypeVault: 1, TypeTake: 1, TypeGive: 1, TypeOverride: 1, TypeTickets: 1, TypeLegacy: 1, TypeElsewhere: FilesPerMessage}
	filesOfGeneration  = map[Type]int{TypeReady: 1, TypeAnswer: 1, TypeListeners: FilesPerMessage, TypeKept: FilesPerMessage}
	filesOfPredecessor = map[Type]int{TypeInherit: FilesPerMessage, TypeEstate: 1}
)

// ClearVersion is that of [TypeClear].
const ClearVersion = 1

// Why new connections are not welcome, although they are accepted.
const (
	UnreadyOff      = "off"      // the operator says so
	UnreadyStopping = "stopping" // the service is about to end
)

// Message is any message; only the fields of its type are set.
type Message struct {
	Type  Type   `json:"type"`
	ID    uint64 `json:"id,omitempty"` // of a question
	Re    uint64 `json:"re,omitempty"` // of an answer: the question's ID
	Error string `json:"error,omitempty"`

	Hello  *Hello        `json:"hello,omitempty"`
	Keys   []string      `json:"keys,omitempty"`   // of listeners, as config.Socket.Key says them; of access logs, their paths
	More   bool          `json:"more,omitempty"`   // another message of the type belongs to this one
	Within time.Duration `json:"within,omitempty"` // nanoseconds
	Status *Status       `json:"status,omitempty"`

	Level   string `json:"level,omitempty"`   // "debug", "info", "warn" or "error"
	Unready string `json:"unready,omitempty"` // why new connections are not welcome: UnreadyOff or UnreadyStopping; "": they are
	Profile string `json:"profile,omitempty"` // as runtime/pprof names it, or "cpu" or "trace"

	All bool `json:"all,omitempty"` // tunnels, also those that are not to be moved by themselves

	// Passage is in TypeDrain how long a passage for idle connections may take to come,
	// in nanoseconds; 0: none comes.
	Passage time.Duration `json:"passage,omitempty"`

	Epoch  uint64  `json:"epoch,omitempty"`
	Report *Report `json:"report,omitempty"`
	Nonce  []byte  `json:"nonce,omitempty"`
	Proof  []byte  `json:"proof,omitempty"`
}

// Hello is how a generation introduces itself.
type Hello struct {
	Core    int    `json:"core"`
	CoreMin int    `json:"core_min"`
	Version string `json:"version"`
	PID     int    `json:"pid"`
	Vault   int    `json:"vault,omitempty"`   // its VaultVersion; 0: it knows no vault
	Passage int    `json:"passage,omitempty"` // its PassageVersion; 0: it knows no passage
	Runtime int    `json:"runtime,omitempty"` // its RuntimeVersion; 0: its numbers cannot be overridden

	Clusters int `json:"clusters,omitempty"` // its ClustersVersion; 0: it says nothing of its clusters
	Tickets  int `json:"tickets,omitempty"`  // its TicketsVersion; 0: it knows no ticket keys
	Copies   int `json:"copies,omitempty"`   // its CopiesVersion; 0: it has none
	Clear    int `json:"clear,omitempty"`    // its ClearVersion; 0: it cannot be cleared

	// At the rendezvous.
	Generation int    `json:"generation,omitempty"`
	Epoch      uint64 `json:"epoch,omitempty"` // of the supervisor that it obeys
}

// Report is what a generation says of itself to whoever adopts it.
type Report struct {
	Generation int       `json:"generation"`
	Epoch      uint64    `json:"epoch"` // of the supervisor that it obeys
	Phase      Phase     `json:"phase"`
	Started    time.Time `json:"started"`             // the process
	Served     time.Time `json:"served,omitzero"`     // when it began to serve, last
	Vault      int       `json:"vault,omitempty"`     // as in Hello
	MovesAll   bool      `json:"moves_all,omitempty"` // somebody wanted all of its tunnels to move
	Passage    int       `json:"passage,omitempty"`   // as in Hello
	Runtime    int       `json:"runtime,omitempty"`   // as in Hello
	Clusters   int       `json:"clusters,omitempty"`  // as in Hello
	Tickets    int       `json:"tickets,omitempty"`   // as in Hello
	Copies     int       `json:"copies,omitempty"`    // as in Hello
	Clear      int       `json:"clear,omitempty"`     // as in Hello
}

// Phase is what a generation is doing, as it sees it.
type Phase string

// The phases of one that can be adopted: one that has never served has nobody to live
// for.
const (
	PhaseServing  Phase = "serving"
	PhaseDraining Phase = "draining"
	PhaseStopping Phase = "stopping" // drains, and ends within a time
)

// The keys of what a supervisor has its generations keep. Log files have the key
// KeptLog and their path.
const (
	KeptBundle  = "bundle"  // what the generation was started from: a payload, [Bundle]
	KeptBinary  = "binary"  // the program that it is
	KeptCounts  = "counts"  // the memory file that it counts in
	KeptLedger  = "ledger"  // of the supervisor: facts
	KeptTotals  = "totals"  // of the supervisor: what ended generations have counted
	KeptStats   = "stats"   // the memory file that the supervisor counts in
	KeptTickets = "tickets" // of the supervisor: the keys of session tickets
	KeptLog     = "log:"

	KeptBackBundle = "back bundle" // as KeptBundle and KeptBinary, of what a rollback puts into service
	KeptBackBinary = "back binary"
)

// Estate is what a supervisor leaves to its successor, besides descriptors. What the
// generations hold themselves they are asked for.
type Estate struct {
	Epoch       uint64             `json:"epoch"` // that the successor is to have
	Last        int                `json:"last"`  // number of the newest generation
	Generations []EstateGeneration `json:"generations"`
	LogLevel    string             `json:"log_level,omitempty"` // that was set by command
	ReadyOff    bool               `json:"ready_off,omitempty"`
}

// EstateGeneration is a living generation. Its channel travels as a descriptor; one
// that did not answer has none.
type EstateGeneration struct {
	Number  int    `json:"number"`
	PID     int    `json:"pid"`
	State   string `json:"state"`
	Version string `json:"version,omitempty"`
}

// Meets says whether two ranges of core versions have one in common.
func (h *Hello) Meets(core, coreMin int) bool { return h.CoreMin <= core && coreMin <= h.Core }

// Status is what a generation holds.
type Status struct {
	Connections   int       `json:"connections"` // downstream, tunnels not among them
	Requests      int       `json:"requests"`    // in flight
	Tunnels       int       `json:"tunnels"`
	OldestTunnel  time.Time `json:"oldest_tunnel,omitzero"`
	RSS           int64     `json:"rss"` // bytes
	Draining      bool      `json:"draining,omitempty"`
	RequestsTotal uint64    `json:"requests_total"`
	TunnelsTotal  uint64    `json:"tunnels_total"`
	LogsDropped   uint64    `json:"logs_dropped"`
	EmptyBy       time.Time `json:"empty_by,omitzero"` // when all that is left will be ended, by command; zero: never
}

// SendFiles sends duplicates of descriptors with their keys, in as many messages as
// that takes, of which the last one is sent even if there are none.
func SendFiles(t Type, named map[string]int, send func(m *Message, fds ...int) error) error {
	m := &Message{Type: t}
	var fds []int
	size := 0
	for key, fd := range named {
		if len(fds) == FilesPerMessage || len(fds) > 0 && size+len(key) > KeysPerMessage {
			m.More = true
			if err := send(m, fds...); err != nil {
				return err
			}
			m, fds, size = &Message{Type: t}, nil, 0
		}
		m.Keys, fds = append(m.Keys, key), append(fds, fd)
		size += len(key)
	}
	return send(m, fds...)
}
