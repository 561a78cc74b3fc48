package control

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"slices"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// VaultVersion is that of the packets below, and of what generations put into records.
// Where two builds have different ones, tunnels stay where they are. It has no part in
// whether a supervisor can command a generation.
const VaultVersion = 2

// VaultType names a packet of a vault channel.
type VaultType uint8

// S→G comes from the supervisor, G→S from a generation. A tunnel is named by the
// generation that has it, which the channel tells, and its number there.
const (
	_ VaultType = iota

	// Deposits.
	VaultStore    // G→S before the first deposit, for each Loop: Files are its memory file and then both ends of each pipe, R first. S→G before VaultResume, the same; VaultKilled: their process was killed from outside
	VaultDeposit  // G→S tunnels, each with two descriptors, the client's first, and a Record. One of the same number replaces it. With a Stand: it was released and nobody has said what became of that
	VaultWithdraw // G→S tunnels that have ended
	VaultComplete // G→S all tunnels were deposited that there were when the channel was given. S→G all were sent that are to be resumed
	VaultRefused  // S→G tunnels of which there is no room for a deposit: they live without

	// Crash. To a generation that has none of its own.
	VaultResume // S→G tunnels of a dead generation, each with two descriptors and its Record; they keep number and store

	// Move.
	VaultRelease  // G→S tunnels that may go on elsewhere, with a Stand and a State each and what descriptors that needs. They stand still until an answer comes
	VaultTake     // S→G tunnels that may go on here: From, Record and State, with two descriptors and those of the State
	VaultTaken    // G→S tunnels that go on here from now on: From, and the number and Record that they have here
	VaultDeclined // G→S tunnels that do not: From
	VaultGone     // S→G tunnels that go on elsewhere
	VaultReturned // S→G tunnels that do not: they go on where they are, if it is still this Stand
	numVaultTypes
)

// Flags of a packet.
const (
	VaultKilled    = 1 << iota
	VaultCandidate // VaultComplete over the channel of a supervisor that does not command yet
)

const (
	// VaultBatch is how many tunnels travel in one packet at most.
	VaultBatch = 16

	// MaxVaultRecord and MaxVaultState are the most bytes that belong to a tunnel, and
	// MaxVaultPacket the most of a packet. It fits into a default send buffer.
	MaxVaultRecord = 4 << 10
	MaxVaultState  = 129 << 10 // a buffer for each direction
	MaxVaultPacket = 168 << 10

	// MaxVaultNumbers is how many tunnels a packet names that carries nothing of them.
	MaxVaultNumbers = 4096

	// sendBuffer is what may wait for the supervisor, as far as net.core.wmem_max allows.
	sendBuffer = 256 << 10

	vaultHeader = 8
	vaultEntry  = 40
)

// VaultPacket is what a vault channel carries.
type VaultPacket struct {
	Type    VaultType
	Flags   uint8
	Loop    int // of VaultStore
	Entries []VaultEntry
	Files   []int // of VaultStore; of an entry, those are there
}

// VaultEntry is one tunnel in a packet.
type VaultEntry struct {
	Number uint64
	From   VaultTunnel // where it was before, or is: see the types

	// Stand tells one standing still of the tunnel from all others in its generation: an
	// answer may meet another one on its way. 0: it does not stand.
	Stand uint64

	Record []byte // only generations know what is in it
	State  []byte // the same
	Files  []int  // at most 4
}

// VaultTunnel names a tunnel of any generation. The zero value is none.
type VaultTunnel struct {
	Generation int
	Number     uint64
}

// maxEntryFiles are both sockets, and for each flow a pipe.
const maxEntryFiles = 4

// Vault is one end of a vault channel: SOCK_SEQPACKET, binary, and apart from the control
// channel, so that no crowd of tunnels delays a command. One goroutine at a time may
// receive; any number may send.
//
// It waits in system calls, not in Go's poller, which would be woken by every packet,
// also by those that nobody wants to hear of yet: see Receive.
type Vault struct {
	fd *heldFile

	data []byte // of Receive
	oob  []byte
}

// NewVault takes over the descriptor of an end, which [Ends] has made, also when it
// fails.
func NewVault(fd int) (*Vault, error) {
	if err := wantSeqpacket(fd); err != nil {
		Discard([]int{fd})
		return nil, fmt.Errorf("vault: %w", err)
	}
	// Loops should not have to wait for a reader that lets packets gather.
	if n, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF); err == nil && n < 2*sendBuffer {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, max(sendBuffer, n/2)) // the kernel doubles it
	}
	return &Vault{fd: &heldFile{fd: fd}, data: make([]byte, MaxVaultPacket+1), oob: make([]byte, unix.CmsgSpace(MaxFiles*4))}, nil
}

// Close ends the channel and unblocks Send and Receive. What was sent is still received
// by the other side; what was not received here is lost. That is so whoever has duplicates
// of the descriptor. It waits for nothing, and may be called again.
func (v *Vault) Close() {
	if v.fd.hold() {
		_ = unix.Shutdown(v.fd.fd, unix.SHUT_RDWR) // an error is that the other side is gone
		v.fd.close()
		v.fd.release()
	}
}

// CloseRead ends the channel for the other side: what it has sent is still received, then
// comes io.EOF, and what it sends from now on fails there.
func (v *Vault) CloseRead() error {
	if !v.fd.hold() {
		return fmt.Errorf("vault: %w", net.ErrClosed)
	}
	defer v.fd.release()
	return vaultError(unix.Shutdown(v.fd.fd, unix.SHUT_RD))
}

// Send sends a packet with duplicates of its descriptors, which stay the caller's. It
// blocks while the peer's queue is full, or too many descriptors are on their way (unix(7),
// ETOOMANYREFS), at most for within. The error wraps [os.ErrDeadlineExceeded] then.
func (v *Vault) Send(p *VaultPacket, within time.Duration) error {
	deadline := time.Now().Add(within)
	return vaultError(persist(deadline, func() error { return v.sendBy(p, deadline) }))
}

// sendBy sends a packet once there is room for it.
func (v *Vault) sendBy(p *VaultPacket, deadline time.Time) error {
	for {
		err := v.send(p)
		if err != unix.EAGAIN {
			return err
		}
		left := time.Until(deadline)
		if left <= 0 {
			return os.ErrDeadlineExceeded
		}
		if err := v.await(unix.POLLOUT, left); err != nil {
			return err
		}
	}
}

// ErrVaultBusy says that the peer's queue is full, or that too many descriptors are on
// their way (unix(7), ETOOMANYREFS): it is a matter of time.
var ErrVaultBusy = errors.New("the vault channel is full")

// TrySend is Send for a loop: it waits for nothing, neither for the peer nor for another
// sender.
func (v *Vault) TrySend(p *VaultPacket) error {
	err := v.send(p)
	if err == unix.EAGAIN || crowded(err) {
		return ErrVaultBusy
	}
	return vaultError(err)
}

func vaultError(err error) error {
	if err != nil {
		return fmt.Errorf("vault: %w", err)
	}
	return nil
}

// packing is memory for one packet after the other, which the loops of a generation send
// with every few tunnels.
type packing struct {
	data, oob []byte
	fds       []int
}

var packings = sync.Pool{New: func() any { return new(packing) }}

// send sends a packet if there is room for it.
func (v *Vault) send(p *VaultPacket) (err error) {
	m := packings.Get().(*packing)
	defer packings.Put(m)
	if m.data, m.fds, err = p.encode(m.data[:0], m.fds[:0]); err != nil {
		return err
	}
	m.oob = appendRights(m.oob[:0], m.fds)
	if !v.fd.hold() {
		return net.ErrClosed
	}
	defer v.fd.release()
	return unix.Sendmsg(v.fd.fd, m.data, m.oob, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
}

// appendRights appends the control message that passes descriptors on (unix(7),
// SCM_RIGHTS); without any, none.
func appendRights(b []byte, fds []int) []byte {
	if len(fds) == 0 {
		return b
	}
	b = slices.Grow(b, unix.CmsgSpace(4*len(fds)))[:unix.CmsgSpace(4*len(fds))]
	clear(b) // the padding
	h := (*unix.Cmsghdr)(unsafe.Pointer(&b[0]))
	h.Level, h.Type = unix.SOL_SOCKET, unix.SCM_RIGHTS
	h.SetLen(unix.CmsgLen(4 * len(fds)))
	for i, fd := range fds {
		binary.NativeEndian.PutUint32(b[unix.CmsgLen(4*i):], uint32(fd))
	}
	return b
}

// await waits until the socket is what events say, or has ended. within: 0 is for ever.
func (v *Vault) await(events int16, within time.Duration) error {
	if !v.fd.hold() {
		return net.ErrClosed
	}
	defer v.fd.release()
	timeout := -1
	if within > 0 {
		timeout = int(within.Milliseconds()) + 1
	}
	_, err := unix.Poll([]unix.PollFd{{Fd: int32(v.fd.fd), Events: events}}, timeout)
	if err == unix.EINTR { // whoever waits tries again
		return nil
	}
	return err
}

// Receive blocks until a packet has come. Its descriptors are the caller's to close; all
// else is good until the next call. io.EOF: the other side is gone, and all that it had
// sent was received.
//
// While none is there it lets packets gather for so long before it waits for the next
// one: to be woken costs more than to receive. It holds up nobody else.
//
// An error that wraps [ErrProtocol] is of one packet; others may follow it. With such an
// error comes the packet where there was no room for its descriptors, and nothing else is
// wrong with it. It has none then.
func (v *Vault) Receive(gather time.Duration) (*VaultPacket, error) {
	n, oobn, flags, err := v.receive(gather)
	if err == unix.ECONNRESET { // see Conn.Receive
		n, oobn, flags, err = v.receive(0)
	}
	if err != nil && err != unix.ECONNRESET {
		return nil, vaultError(err)
	}
	fds, rightsErr := parseRights(v.oob[:oobn])
	if n <= 0 { // also what has descriptors and no byte: there is no such packet
		Discard(fds)
		return nil, io.EOF
	}
	p, err := judge(v.data[:n], fds, flags, rightsErr)
	if err != nil {
		Discard(fds)
		return p, fmt.Errorf("%w: vault: %w", ErrProtocol, err)
	}
	return p, nil
}

// receive receives what comes next.
func (v *Vault) receive(gather time.Duration) (n, oobn, flags int, err error) {
	for {
		n, oobn, flags, err = v.tryReceive()
		switch {
		case err == unix.EINTR:
		case err != unix.EAGAIN:
			return n, oobn, flags, err
		case gather > 0:
			time.Sleep(gather)
			gather = 0
		default:
			if err := v.await(unix.POLLIN, 0); err != nil {
				return 0, 0, 0, err
			}
		}
	}
}

func (v *Vault) tryReceive() (n, oobn, flags int, err error) {
	if !v.fd.hold() {
		return 0, 0, 0, net.ErrClosed
	}
	defer v.fd.release()
	n, oobn, flags, _, err = unix.Recvmsg(v.fd.fd, v.data, v.oob, unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
	return max(n, 0), max(oobn, 0), flags, err
}

// judge makes a packet of what was received.
func judge(data []byte, fds []int, flags int, err error) (*VaultPacket, error) {
	if err != nil {
		return nil, err
	}
	if flags&unix.MSG_CTRUNC == 0 {
		return decodeVault(data, fds, false)
	}
	p, err := decodeVault(data, nil, true)
	if err != nil {
		return nil, err
	}
	return p, os.NewSyscallError("recvmsg", unix.EMFILE) // the kernel has closed the others
}

// Takes says whether the packet has room for another tunnel.
func (p *VaultPacket) Takes(t *VaultEntry) bool {
	size, files := p.size()
	return size+t.size() <= MaxVaultPacket && files+len(t.Files) <= MaxFiles && len(p.Entries) < MaxVaultNumbers
}

// size is how many bytes and descriptors the packet has.
func (p *VaultPacket) size() (size, files int) {
	size, files = vaultHeader, len(p.Files)
	for i := range p.Entries {
		size += p.Entries[i].size()
		files += len(p.Entries[i].Files)
	}
	return size, files
}

func (t *VaultEntry) size() int { return vaultEntry + len(t.Record) + len(t.State) }

// encode appends the bytes and the descriptors of the packet. Layout, in the machine's
// byte order: type, flags, loop (2 bytes), entries (2), files (2); then of each entry
// number (8), from (4 and 8), files (4: how many), stand (8), record and state (4 each: how
// many bytes), record, state.
func (p *VaultPacket) encode(b []byte, fds []int) ([]byte, []int, error) {
	size, files := p.size()
	if size > MaxVaultPacket || files > MaxFiles || len(p.Entries) > MaxVaultNumbers || uint(p.Loop) > math.MaxUint16 {
		return b, fds, fmt.Errorf("vault: loop %d: a packet of %d bytes with %d tunnels and %d descriptors", p.Loop, size, len(p.Entries), files)
	}
	b, fds = slices.Grow(b, size), append(slices.Grow(fds, files), p.Files...)
	e := binary.NativeEndian
	b = append(b, byte(p.Type), p.Flags)
	b = e.AppendUint16(b, uint16(p.Loop))
	b = e.AppendUint16(b, uint16(len(p.Entries)))
	b = e.AppendUint16(b, uint16(len(p.Files)))
	for i := range p.Entries {
		t := &p.Entries[i]
		if len(t.Record) > MaxVaultRecord || len(t.State) > MaxVaultState || len(t.Files) > maxEntryFiles {
			return b, fds, fmt.Errorf("vault: a tunnel with %d and %d bytes and %d descriptors", len(t.Record), len(t.State), len(t.Files))
		}
		b = e.AppendUint64(b, t.Number)
		b = e.AppendUint32(b, uint32(t.From.Generation))
		b = e.AppendUint64(b, t.From.Number)
		b = e.AppendUint32(b, uint32(len(t.Files)))
		b = e.AppendUint64(b, t.Stand)
		b = e.AppendUint32(b, uint32(len(t.Record)))
		b = e.AppendUint32(b, uint32(len(t.State)))
		b = append(append(b, t.Record...), t.State...)
		fds = append(fds, t.Files...)
	}
	return b, fds, nil
}

// decodeVault makes a packet of what was received. It refuses one that is not, to the
// byte and the descriptor, what encode makes. With lost, no descriptor has come.
func decodeVault(b []byte, fds []int, lost bool) (*VaultPacket, error) {
	if len(b) < vaultHeader || len(b) > MaxVaultPacket {
		return nil, fmt.Errorf("a packet of %d bytes", len(b))
	}
	e := binary.NativeEndian
	p := &VaultPacket{Type: VaultType(b[0]), Flags: b[1], Loop: int(e.Uint16(b[2:]))}
	entries, files := int(e.Uint16(b[4:])), vaultFiles{fds, lost}
	ok := p.Type != 0 && p.Type < numVaultTypes && entries <= MaxVaultNumbers
	if p.Files, ok = files.take(int(e.Uint16(b[6:])), MaxFiles, ok); !ok {
		return nil, fmt.Errorf("type %d with %d entries, and %d descriptors have come", p.Type, entries, len(fds))
	}
	b = b[vaultHeader:]
	if entries*vaultEntry > len(b) {
		return nil, errors.New("a packet that ends too early")
	}
	p.Entries = make([]VaultEntry, entries)
	for i := range p.Entries {
		if len(b) < vaultEntry {
			return nil, errors.New("a packet that ends too early")
		}
		t := &p.Entries[i]
		t.Number = e.Uint64(b)
		t.From = VaultTunnel{Generation: int(e.Uint32(b[8:])), Number: e.Uint64(b[12:])}
		t.Stand = e.Uint64(b[24:])
		record, state := uint64(e.Uint32(b[32:])), uint64(e.Uint32(b[36:]))
		ok := record <= MaxVaultRecord && state <= MaxVaultState && record+state <= uint64(len(b)-vaultEntry)
		if t.Files, ok = files.take(int(e.Uint32(b[20:])), maxEntryFiles, ok); !ok {
			return nil, errors.New("an entry that is larger than the packet, or than it may be")
		}
		b = b[vaultEntry:]
		t.Record, t.State, b = b[:record:record], b[record:record+state:record+state], b[record+state:]
	}
	if len(b) > 0 || len(files.fds) > 0 {
		return nil, fmt.Errorf("%d bytes and %d descriptors too many", len(b), len(files.fds))
	}
	return p, nil
}

// vaultFiles are descriptors that came with a packet, or were lost.
type vaultFiles struct {
	fds  []int
	lost bool
}

// take returns the next n, of which there may be most. It fails where they are not
// there, or something else was wrong before.
func (f *vaultFiles) take(n, most int, ok bool) ([]int, bool) {
	switch {
	case !ok || n > most:
		return nil, false
	case n == 0 || f.lost:
		return nil, true
	case n > len(f.fds):
		return nil, false
	}
	taken := f.fds[:n:n]
	f.fds = f.fds[n:]
	return taken, true
}

// CloseFiles closes all descriptors of a packet that was received, and waits for nothing.
func (p *VaultPacket) CloseFiles() {
	Discard(p.Files)
	for i := range p.Entries {
		Discard(p.Entries[i].Files)
	}
}
