package stream

// The sizes of private buffers. A usual head fits the smallest; the largest is what a
// connection reads at once.
var bufferSizes = [...]int{4 << 10, 16 << 10, readSize}

// mostFree is how many bytes of a size are kept: what many slow peers have needed goes back
// to the garbage collector. Each request that is under way needs one of the smallest.
const mostFree = 8 << 20

// buffers are those of a loop that nobody uses.
type buffers [len(bufferSizes)][][]byte

// get returns a buffer of n bytes or more; its length is its capacity.
func (b *buffers) get(n int) []byte {
	for class, size := range bufferSizes {
		if n > size {
			continue
		}
		if last := len(b[class]) - 1; last >= 0 {
			p := b[class][last]
			b[class][last] = nil
			b[class] = b[class][:last]
			return p
		}
		return make([]byte, size)
	}
	return make([]byte, n)
}

// put takes back what get gave, of which nobody has a part any more.
func (b *buffers) put(p []byte) {
	p = p[:cap(p)]
	for class, size := range bufferSizes {
		if len(p) == size && len(b[class]) < mostFree/size {
			b[class] = append(b[class], p)
		}
	}
}

// trim lets go of all.
func (b *buffers) trim() { clear(b[:]) }
