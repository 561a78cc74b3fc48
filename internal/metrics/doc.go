// Package metrics is what both programs count with, and the memory file through which
// the supervisor sees what a generation has counted, also after it has died.
//
//	var requests = metrics.Define(metrics.Desc{
//		Name:   "holdfast_downstream_requests_total",
//		Help:   "Requests that have arrived.",
//		Type:   metrics.TypeCounter,
//		Labels: []string{"listener"},
//	})
//
//	n := registry.Counter(requests, listener.Name) // once
//	n.Inc()                                        // for each request: one atomic addition
//
// A definition says how the values of several generations become one ([Merge]), which
// the package merge does. Whoever counts finds its series once, where it is built, and
// not for each request. What counts very often on one goroutine does so in a [Batch].
//
// # The memory file
//
// The supervisor makes a file for each generation ([NewFile]) and keeps its descriptor.
// The generation maps it ([Open]) and counts straight in the mapping, so a value is
// outside of the process at the moment at which it changes, or a [Batch] is flushed, and
// nothing has to be saved when the process dies, however it dies. Nobody is asked for
// values, so nobody can be slow to answer.
//
// The file has a fixed size and is sealed against any other: a process that was taken
// over can fill it with nonsense, but cannot take it away under the reader. The reader
// believes nothing of what is in it.
//
// The supervisor counts in such a file, too ([NewOwnFile]), which is sealed against being
// written by others: generations hold it for its successor, who goes on from it
// ([OpenFile], [Registry.Carry]).
//
// All numbers have the machine's byte order, everything begins at a multiple of 8
// bytes, and nothing that was written is moved, changed or removed, except cells and
// the number of bytes in use.
//
//	 0  magic: the 8 bytes HFmetric, written last of the header. 0: nobody counts here yet
//	 8  uint64: version of the layout, 1
//	16  uint64: how many bytes are in use, from the beginning of the file, at least 64
//	24  zero up to 64
//	64  records, one after the other
//
// A record is appended as a whole and becomes visible with the atomic store of the bytes
// in use; a process that dies before has not appended it.
//
//	0  uint32: kind
//	4  uint32: length of the record with this head, a multiple of 8
//	8  what the kind says
//
// Kind 1 is the definition of a metric. They are numbered from 0 as they come. Kind 2 is
// a series. Strings are a uint16, their length, and that many bytes of UTF-8.
//
//	definition: 5 bytes: type, merge kind, unit, number of labels, number of bounds;
//	            string: name; string: help; a string for the name of each label;
//	            8 bytes for each bound, a float64; zero up to the multiple of 8
//
//	series:     uint32: number of its definition; a string for the value of each label;
//	            zero up to the multiple of 8; its cells, which end with the record
//
// A cell is 8 bytes that are only ever accessed atomically: the uint64 of a counter, the
// int64 of a gauge, or of a histogram, a uint64 for each bucket (one more than bounds) and
// one for the sum. What is in seconds is kept in nanoseconds, except bounds.
//
// # What a successor relies on
//
// A file outlives the processes that map it, as long as one holds its descriptor. It
// describes itself, so whoever is handed the descriptors of living generations opens them
// ([OpenFile]) and goes on where another has stopped, without asking anybody. That works
// between versions, if these stay as they are:
//
//   - Magic, version and the bytes in use are where they are. Another layout has another
//     version, and a reader that does not know it leaves the file out.
//   - A reader skips records of a kind that it does not know, so kinds can be added without
//     another version.
//   - The numbers of types, merge kinds and units keep their meaning. A definition with one
//     that is not known is left out, with its series.
package metrics
