package control

import (
	"time"
)

// Core is the version of the core protocol. CoreMin is the oldest that this build
// still speaks. Two builds talk if their ranges meet.
const (
	Core    = 1
	CoreMin = 1
)

// Type names a message.
type Type string

// The core. S→G comes from the supervisor, G→S from a generation. A message that
// asks is answered by one whose Re is its ID.
const (
	TypeHello     Type = "hello"     // G→S first of all: Hello
	TypeBundle    Type = "bundle"    // S→G once, with one payload, what to run, and one memory file, for what is counted
	TypeListeners Type = "listeners" // S→G before ready and before a reinstating serve: Keys, a descriptor each, all that there are
	TypeLogs      Type = "logs"      // S→G before ready and whenever they were opened again: Keys, the paths of access logs, with a descriptor each
	TypeLevel     Type = "level"     // S→G write log lines from Level on
	TypeProfile   Type = "profile"   // S→G asks for the Profile, of the time Within for one that takes time; answered with one payload, its bytes
	TypeReady     Type = "ready"     // G→S everything is built, with one payload: Learnt; or, with Error, cannot be
	TypeServe     Type = "serve"     // S→G accept; answered when it does
	TypeDrain     Type = "drain"     // S→G stop accepting and end when nothing is left, but not before Within; answered when it accepts no more. The queues of the listeners in Keys are emptied first
	TypeStatus    Type = "status"    // S→G asks for Status; answered
	TypeStop      Type = "stop"      // S→G empty all queues, drain and be gone Within; its end is the answer
	TypeLeaving   Type = "leaving"   // G→S it was told by a signal to end: it accepts no more
	TypeAnswer    Type = "answer"    // G→S to the message Re; with Error, it could not be done
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
	filesOfSupervisor = map[Type]int{TypeBundle: 2, TypeListeners: FilesPerMessage, TypeLogs: FilesPerMessage}
	filesOfGeneration = map[Type]int{TypeReady: 1, TypeAnswer: 1}
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
	Profile string `json:"profile,omitempty"` // as runtime/pprof names it, or "cpu" or "trace"
}

// Hello is how a generation introduces itself.
type Hello struct {
	Core    int    `json:"core"`
	CoreMin int    `json:"core_min"`
	Version string `json:"version"`
	PID     int    `json:"pid"`
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
}
