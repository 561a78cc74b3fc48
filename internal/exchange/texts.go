package exchange

import "unsafe"

// Texts makes strings in memory that lives as long as the exchange that it belongs to, so
// that a request in steady state allocates nothing. The zero value is ready.
type Texts struct{ free []byte }

// Use has strings made in p, until that is full. Nobody else may write there.
func (t *Texts) Use(p []byte) { t.free = p[:0] }

// Join returns the parts as one string.
func (t *Texts) Join(parts ...string) string {
	n := 0
	for _, p := range parts {
		n += len(p)
	}
	t.make(n)
	begin := len(t.free)
	for _, p := range parts {
		t.free = append(t.free, p...)
	}
	made := t.free[begin:]
	return unsafe.String(unsafe.SliceData(made), len(made))
}

// Make returns memory for a text of up to n bytes, which is empty.
func (t *Texts) Make(n int) []byte {
	t.make(n)
	begin := len(t.free)
	t.free = t.free[:begin+n]
	return t.free[begin : begin : begin+n]
}

// make has n bytes be free.
func (t *Texts) make(n int) {
	if n > cap(t.free)-len(t.free) {
		t.free = make([]byte, 0, max(n, 512)) // what was made before stays where it is
	}
}
