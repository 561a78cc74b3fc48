package control

// CopiesVersion is that of [Copies]. Two builds with different ones have nothing of the other's. It
// has no part in whether a supervisor can command a generation.
const CopiesVersion = 1

// MaxCopies is the most bytes that [Copies] may have.
const MaxCopies = MaxPayload

// Copies are the contents of files that a generation works with, as it has read them last: where
// it dies and they are of no use by then, the next one begins with these. There are private keys
// among them. The supervisor passes them on as they came, in their memory file, and never reads
// them.
type Copies struct {
	Files map[string][]byte `json:"files"` // by path
}

// ReadCopies is [ReadPayload] for what comes with [TypeLegacy].
func ReadCopies(fd int) (*Copies, error) {
	c := new(Copies)
	return c, readPayload(fd, c, MaxCopies)
}
