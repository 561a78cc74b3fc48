// Package inflight is what a relay has taken from one socket and not yet given to the
// other, kept where another process finds it if this one dies: in a memory file
// ([NewFile]) and in pipes ([NewPipes]), of which somebody else holds descriptors, too.
// A [Store] is both, for the tunnels of one loop.
//
//	fd, err := inflight.NewFile(20_000, 64)
//	store, err := inflight.Open(fd, inflight.NewPipes(16, 1<<20))
//	...
//	b := store.Buffer()
//	b.Claim(d)                      // then read into b.Bytes, and send
//	store.Complete(d, n)            // all of it was sent
//
// A buffer that was sent as a whole can be claimed by the next direction as it is. It
// stays with its direction only while the receiver is slow.
//
// # The memory file
//
// It is sealed against any other size, and costs what is touched. All numbers are
// uint64, in the machine's byte order. Words are only ever accessed atomically.
//
//	header         one page (4,096 bytes)
//	buffer claims  one word for each buffer, up to a multiple of a page
//	pipe claims    one page, a word for each pipe
//	counts         one word for each direction, up to a multiple of 65,536 from the beginning
//	buffers        65,536 bytes each
//
// The header is written once, before anybody else has the file:
//
//	 0  magic: the 8 bytes HFflight
//	 8  version of the layout, 1
//	16  directions
//	24  buffers
//	32  bytes of a buffer, 65,536
//	40  words for pipe claims, 512
//
// A direction is a number below that of the header. A claim is 0, or the direction whose
// bytes are in the buffer or pipe, plus 1. The pipe of a claim is the one that has its
// number in the order in which pipes were handed to [Open].
//
// # What a successor relies on
//
// The process may die between any two machine instructions; the kernel's queues, the file
// and the pipes are then as it has left them. Stores are seen in the order in which they
// were made. A successor knows, from elsewhere, the two sockets of each direction, and
// from two counters of the kernel, less what they were when the direction began,
//
//	C  how many bytes were taken from the source's queue
//	W  how many bytes were put into the receiver's queue
//
// and from the file, for each direction, its count
//
//	T  how many bytes were completed: taken and put
//
// The following holds at all times. Who uses a [Store] does what is said here, in this
// order.
//
//  1. A direction begins with T = 0 ([Store.Begin]), and its C and W are counted from a
//     moment at which nothing of it is in this process.
//  2. A direction that takes or puts anything has claimed a buffer or a pipe before. One
//     without a claim has C = W = T, and nobody needs to look at its sockets.
//  3. A direction has one claim at most: that of a buffer is cleared before that of a pipe
//     is stored, and the other way round. (Who breaks this panics.)
//  4. Copying: the claim of a buffer is stored; bytes are read to the beginning of the
//     buffer; all are sent; T grows by their number. Only then more is read into the
//     buffer, or the claim of another direction stored. So if C > W, the bytes from W to C
//     of the direction are in the buffer from W-T to C-T.
//  5. Peeking: the claim of a buffer is stored; bytes are peeked at; some are sent; as many
//     are discarded from the source; T grows by their number. So if W > C, the first W-C
//     bytes in the source's queue were sent already.
//  6. Splicing: the claim of a pipe is stored; bytes are spliced into the pipe, and out of
//     it; T grows as they leave. The claim is cleared when the pipe is empty. So what is in
//     the pipe comes before what is in the source's queue.
//  7. Bytes that nobody will ever get are given up by clearing the claim, after their
//     receiver was reset.
//
// A successor waits until the predecessor's death is certain and then looks at each claim
// that is not 0. If it is of a pipe, it moves what is in there (FIONREAD) to the receiver.
// If it is of a buffer, it sends the bytes W-T to C-T of it if C > W, or discards W-C bytes
// from the source if W > C. Then it stores T = C, and after that 0 for the claim. [Open]
// takes no file with a claim, and no pipe with bytes.
package inflight
