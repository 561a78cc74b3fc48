// Package inflight is what a relay has taken from one socket and not yet given to the
// other, kept where another process finds it if this one dies: in a memory file
// ([NewFile]) and in pipes ([NewPipes]), of which somebody else holds descriptors, too.
// A [Store] is both, for the tunnels of one loop.
//
//	fd, err := inflight.NewFile(20_000, 64)
//	store, err := inflight.Open(fd, inflight.NewPipes(16, 1<<20))
//	...
//	b := store.Buffer()
//	b.Claim(d)                      // then read n bytes into b.Bytes
//	b.Filled(n)                     // then send them
//	b.Release()                     // all were sent
//	store.Complete(d, n)
//
// A buffer stays with its direction only while the receiver is slow. When the process has
// died, another one goes on in the same file:
//
//	store, err := inflight.Reopen(fd, pipes, killed)
//	src, err := inflight.Look(source)
//	dst, err := inflight.Look(receiver)
//	rest, err := store.Settle(d, source, src.Since(...), dst.Since(...))
//	...
//	store.Settled()
//
// # The memory file
//
// It is sealed against any other size, and costs what is touched. All numbers are
// uint64, in the machine's byte order. Words that change are only ever accessed
// atomically.
//
//	header         one page (4,096 bytes)
//	buffer claims  one word for each buffer, up to a multiple of a page
//	pipe claims    one page, a word for each pipe
//	counts         one word for each direction, up to a multiple of 65,536 from the beginning
//	buffers        65,536 bytes each
//
// The header begins with what is written once, before anybody else has the file:
//
//	 0  magic: the 8 bytes HFflight
//	 8  version of the layout, 2
//	16  directions
//	24  buffers
//	32  bytes of a buffer, 65,536
//	40  words for pipe claims, 512
//
// and has two words that name a tunnel, or are 0. In their low 32 bits is the number of
// its slot plus 1, in the others the low 32 bits of its own number:
//
//	64  working: whose sockets are being worked on
//	72  suspect: who was worked on when a predecessor died by itself
//
// A direction is a number below that of the header, that of a slot twice or one more. The
// low 32 bits of a claim are 0, or the direction whose bytes are in the buffer or pipe,
// plus 1. Its other bits are how many bytes were read into the buffer, of a pipe 0. The
// pipe of a claim is the one that has its number in the order in which pipes were handed
// to [Open]. The low 56 bits of a count are one, the others are marks: the highest is
// [MarkLost], the next [MarkFin]; the others are the caller's.
//
// # What a successor relies on
//
// The process may die between any two machine instructions; the kernel's queues, the file
// and the pipes are then as it has left them. Stores are seen in the order in which they
// were made. A successor knows, from elsewhere, the two sockets of each direction, and
// from two counters of the kernel ([Look]), less what they were when the direction began,
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
//     moment at which nothing of it is in this process. Or bytes of it are, in a buffer
//     that is claimed and filled with them: C is counted as if they were still to be read.
//  2. A direction that takes or puts anything has claimed a buffer or a pipe before, when
//     T was C and W. One without a claim has C = W. T may still be less, by no more than a
//     buffer has.
//  3. A direction has one claim at most: that of a buffer is cleared before that of a pipe
//     is stored, and the other way round. (Who breaks this panics.)
//  4. Copying: the claim of a buffer is stored; n bytes are read to the beginning of the
//     buffer; n is stored with the claim; all are sent; the claim is cleared; T grows by n.
//     So with n stored C is T+n, and the bytes from W to C of the direction are in the
//     buffer from W-T to n. With 0 stored they are there from 0 to C-T, since T = W: it is
//     the kernel that knows how many.
//  5. Peeking: the claim of a buffer is stored; bytes are peeked at; some are sent; as many
//     are discarded from the source; the claim is cleared; T grows by their number. So if
//     0 is stored with the claim and W > C, the first W-C bytes in the source's queue were
//     sent already.
//  6. Splicing: the claim of a pipe is stored; bytes are spliced into the pipe, and out of
//     it; T grows after they have left. The claim is cleared when the pipe is empty. So
//     what is in the pipe comes before what is in the source's queue, and C-W is how much.
//  7. Bytes that nobody will ever get are given up by clearing the claim, after their
//     receiver was reset.
//  8. After our FIN was sent to the receiver, bytes are only thrown away, without a claim,
//     and are counted in C alone. MarkFin is stored before.
//  9. Before the error of a source is taken by SO_ERROR, MarkLost is stored; if a read or a
//     write has taken it, that is done at once afterwards. Neither happens while a buffer
//     is claimed with 0 in which something is, or from which something was sent.
//  10. A tunnel is named by the word working before its sockets are touched.
//
// # Sockets that are gone
//
// The kernel counts a FIN as a byte. It also says by the state of a connection whether one
// was sent, or has come; but not in the state CLOSE, in which a connection is after both
// FINs were acknowledged, and after it was reset or given up. C and W may be one too high
// then.
//
// Of a receiver that is gone nothing needs to be known. Of a source, C is needed only if a
// buffer is claimed with 0, since otherwise the file and W tell. If it has come to its end
// by both FINs, one is counted. Otherwise what is in the buffer cannot be known, and the
// direction ends: by a reset of the receiver, as it would soon have ended anyway.
//
// It was not by both FINs if the kernel holds an error, or MarkLost is there, or the
// MarkFin of the opposite direction is not, or if C shows that no FIN was counted.
//
// # Recovery
//
// A successor waits until the predecessor's death is certain. Then it opens the file with
// [Reopen] and looks at the sockets, and lets [Store.Settle] find out what is in flight
// of each direction ([Recover]): bytes of a buffer, bytes of a pipe, or nothing, after what
// was sent already has been discarded from the source. It stores the number of bytes in
// the buffer with the claim, so that C is not needed any more; or T = W, for a pipe with
// its claim, and otherwise after clearing the claim. Then it relays on. So it may die
// itself at any moment, and the next successor does the same.
//
// What is in the file and in the kernel may contradict the rules, although it should not:
// then the tunnel is not continued, and both its sockets are reset.
//
// Who was being worked on when a process died, though nobody has killed it, is suspect;
// who was so twice in a row ([Store.Suspect]) is not touched any more.
package inflight
