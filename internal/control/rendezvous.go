package control

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	keySize   = sha256.Size // of a generation's key, and of the secret that it comes from
	nonceSize = 32

	// stepTimeout bounds the wait for one message of the handshake, and greetTimeout
	// all of it.
	stepTimeout  = 2 * time.Second
	greetTimeout = 5 * time.Second

	// maxStrangers is how many connections there are at a time that have not proved yet
	// who they are, and maxPerProcess how many of them come from one process. More are
	// closed at once: no process alone keeps all others out.
	maxStrangers  = 32
	maxPerProcess = 4

	// acceptPause is how long nothing is accepted when the kernel has no descriptors or
	// memory for it.
	acceptPause = 100 * time.Millisecond

	// refusalPause is the least time between two lines of the log about strangers.
	refusalPause = time.Second
)

// GenerationKey derives the key of a generation from the secret of the service.
func GenerationKey(secret []byte, generation int) []byte {
	return mac(secret, []byte("generation "+strconv.Itoa(generation)))
}

func mac(key []byte, parts ...[]byte) []byte {
	h := hmac.New(sha256.New, key)
	for _, p := range parts {
		h.Write(p)
	}
	return h.Sum(nil)
}

// proof is what a role ("supervisor" or "generation") shows to know the key. The
// nonces, one of each side, make it good for this handshake only; what the generation
// says of itself is part of it, so that nobody in between can say something else. What
// comes first has a fixed size, so that no two handshakes look the same.
func proof(key []byte, role string, generations, supervisors []byte, hello *Hello) []byte {
	var fields []byte
	for _, n := range []uint64{uint64(hello.Core), uint64(hello.CoreMin), uint64(hello.PID), uint64(hello.Generation), hello.Epoch} {
		fields = binary.BigEndian.AppendUint64(fields, n)
	}
	return mac(key, []byte(role+"\x00"), generations, supervisors, fields, []byte(hello.Version))
}

// Reunite looks once for a supervisor at the rendezvous, for a generation that has lost
// its own. It returns the generation's end of a control channel after both have proved
// to know the key. hello has its own number, its process's and the epoch that it obeys.
// It blocks at most some seconds.
func Reunite(ctx context.Context, path string, key []byte, hello Hello) (*Conn, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, greetTimeout, os.ErrDeadlineExceeded)
	defer cancel()
	c, err := new(net.Dialer).DialContext(ctx, "unixpacket", path)
	if err != nil {
		return nil, fmt.Errorf("rendezvous: %w", err)
	}
	conn := &Conn{c: c.(*net.UnixConn)}
	err = conn.until(ctx, func() error { return conn.introduce(key, &hello) })
	if err != nil {
		conn.abandon()
		return nil, fmt.Errorf("rendezvous: %w", err)
	}
	conn.sends, conn.takes = filesOfGeneration, filesOfSupervisor
	return conn, nil
}

// until runs f, which sends and receives, and ends it when ctx ends. Close would end it
// too, and might block.
func (c *Conn) until(ctx context.Context, f func() error) error {
	stop := context.AfterFunc(ctx, func() {
		c.c.CloseRead()
		c.c.CloseWrite()
	})
	err := f()
	if !stop() {
		return errors.Join(context.Cause(ctx), err)
	}
	return err
}

// abandon is Close for the channel to a stranger, and waits for nothing: see [Discard].
func (c *Conn) abandon() { go c.Close() }

// introduce is the generation's side of the handshake.
func (c *Conn) introduce(key []byte, hello *Hello) error {
	if _, err := Peer(c.c); err != nil {
		return err
	}
	nonce := make([]byte, nonceSize)
	rand.Read(nonce) // never fails
	if err := c.Send(&Message{Type: TypeHello, Hello: hello, Nonce: nonce}, stepTimeout); err != nil {
		return err
	}
	challenge, err := c.expect(TypeChallenge, greetTimeout) // may have to wait until it is accepted
	if err != nil {
		return err
	}
	if !hmac.Equal(challenge.Proof, proof(key, "supervisor", nonce, challenge.Nonce, hello)) {
		return errors.New("who listens there does not know this generation's key")
	}
	return c.Send(&Message{Type: TypeProof, Proof: proof(key, "generation", nonce, challenge.Nonce, hello)}, stepTimeout)
}

// greet is the supervisor's side of the handshake, with process peer.
func (c *Conn) greet(peer int, key func(generation int) []byte) (*Hello, error) {
	first, err := c.expect(TypeHello, stepTimeout)
	if err != nil {
		return nil, err
	}
	hello := first.Hello
	if hello == nil || len(first.Nonce) != nonceSize {
		return nil, fmt.Errorf("%w: a hello that lacks something", ErrProtocol)
	}
	// Somebody in between could pass on everything else that a generation sends.
	if hello.PID != peer {
		return nil, fmt.Errorf("process %d says that it is process %d", peer, hello.PID)
	}
	k := key(hello.Generation)
	if len(k) != keySize {
		return nil, fmt.Errorf("process %d says that it is generation %d, which has no key", hello.PID, hello.Generation)
	}
	nonce := make([]byte, nonceSize)
	rand.Read(nonce) // never fails
	answer := &Message{Type: TypeChallenge, Nonce: nonce, Proof: proof(k, "supervisor", first.Nonce, nonce, hello)}
	if err := c.Send(answer, stepTimeout); err != nil {
		return nil, err
	}
	last, err := c.expect(TypeProof, stepTimeout)
	if err != nil {
		return nil, err
	}
	if !hmac.Equal(last.Proof, proof(k, "generation", first.Nonce, nonce, hello)) {
		return nil, fmt.Errorf("process %d does not know the key of generation %d", hello.PID, hello.Generation)
	}
	return hello, nil
}

// expect receives a message, which must be of the type, without descriptors: c takes
// none yet.
func (c *Conn) expect(kind Type, within time.Duration) (*Message, error) {
	if err := c.c.SetReadDeadline(time.Now().Add(within)); err != nil {
		return nil, err
	}
	m, _, err := c.Receive()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", kind, err)
	}
	if m.Type != kind {
		return nil, fmt.Errorf("%w: %q where %s belongs", ErrProtocol, m.Type, kind)
	}
	return m, c.c.SetReadDeadline(time.Time{})
}

// Peer lets in who may command: the user of this process, and root. The mode of a socket
// says the same; this holds where it was changed. It returns the credentials of the
// process that has connected to a unix socket, or of the one that has begun to listen,
// which need not be the one that listens now.
func Peer(c syscall.Conn) (peer *unix.Ucred, err error) {
	err = onDescriptor(c, func(fd int) (err error) {
		peer, err = unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("peer's credentials: %w", err)
	}
	return peer, mayCommand(peer, os.Geteuid())
}

func mayCommand(peer *unix.Ucred, self int) error {
	if peer.Uid == 0 || int(peer.Uid) == self {
		return nil
	}
	return fmt.Errorf("user %d (pid %d) is neither this service's user nor root", peer.Uid, peer.Pid)
}

// onDescriptor runs f on the descriptor of c and returns the first error.
func onDescriptor(c syscall.Conn, f func(fd int) error) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	if outer := raw.Control(func(fd uintptr) { err = f(int(fd)) }); outer != nil {
		return outer
	}
	return err
}

// Rendezvous is the socket at which generations find a supervisor that have lost
// theirs.
type Rendezvous struct {
	listener *net.UnixListener
	path     string
	inode    fs.FileInfo // of the path

	refused atomic.Uint64

	mu        sync.Mutex
	strangers map[int]int // process → its connections that have proved nothing yet
	all       int         // of them
	reported  time.Time   // when a line of the log was about a refusal, last
}

// ListenRendezvous makes the socket at path, which only this user (and root) may
// connect to. One that a killed supervisor has left there is replaced, so it must be
// called by whoever has the lock of the runtime directory.
func ListenRendezvous(path string) (*Rendezvous, error) {
	fd, err := listenPrivately(path)
	if err != nil {
		return nil, fmt.Errorf("rendezvous %s: %w", path, err)
	}
	return NewRendezvous(fd, path)
}

func listenPrivately(path string) (int, error) {
	if most := len(unix.RawSockaddrUnix{}.Path) - 1; len(path) > most {
		return -1, fmt.Errorf("a unix socket's path has at most %d bytes", most)
	}
	if err := RemoveStale(path); err != nil {
		return -1, err
	}
	fd, err := packetSocket()
	if err != nil {
		return -1, err
	}
	// The kernel gives the path the mode of the unbound socket, so it is never open to
	// others, whatever the umask.
	err = unix.Fchmod(fd, 0o600)
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrUnix{Name: path})
	}
	if err == nil {
		err = unix.Listen(fd, 4096) // the kernel takes what net.core.somaxconn allows of it
	}
	if err != nil {
		return -1, errors.Join(err, unix.Close(fd))
	}
	return fd, nil
}

func packetSocket() (int, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, fmt.Errorf("socket: %w", err)
	}
	return fd, nil
}

// RemoveStale removes a unix socket, of whatever type, that nobody listens on: what a
// process that was killed has left. Only a refused connection proves that; anything else
// at the path is an error. It does not block.
func RemoveStale(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode().Type() != fs.ModeSocket {
		return errors.New("the path exists and is no socket")
	}
	fd, err := packetSocket()
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); !errors.Is(err, unix.ECONNREFUSED) {
		return fmt.Errorf("%w: another process listens there", unix.EADDRINUSE)
	}
	return os.Remove(path)
}

// NewRendezvous takes over the descriptor of a socket that listens at path, of a
// predecessor, also when it fails.
func NewRendezvous(fd int, path string) (*Rendezvous, error) {
	f := os.NewFile(uintptr(fd), "rendezvous")
	if f == nil {
		return nil, fmt.Errorf("rendezvous %s: no descriptor %d", path, fd)
	}
	defer f.Close()
	if err := checkRendezvous(fd, path); err != nil {
		return nil, fmt.Errorf("rendezvous %s: descriptor %d: %w", path, fd, err)
	}
	l, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("rendezvous %s: %w", path, err)
	}
	inode, err := os.Lstat(path)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("rendezvous: %w", err), l.Close())
	}
	listener := l.(*net.UnixListener) // which leaves the path alone when it is closed
	return &Rendezvous{listener: listener, path: path, inode: inode, strangers: map[int]int{}}, nil
}

func checkRendezvous(fd int, path string) error {
	name, err := unix.Getsockname(fd)
	if err != nil {
		return err
	}
	if at, ok := name.(*unix.SockaddrUnix); !ok || at.Name != path {
		return errors.New("it is bound elsewhere")
	}
	for option, want := range map[int]int{unix.SO_TYPE: unix.SOCK_SEQPACKET, unix.SO_ACCEPTCONN: 1} {
		if got, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, option); err != nil || got != want {
			return errors.Join(errors.New("no listening SOCK_SEQPACKET socket"), err)
		}
	}
	return nil
}

// Path is where the socket is.
func (r *Rendezvous) Path() string { return r.path }

// FD is the socket's descriptor. It stays r's.
func (r *Rendezvous) FD() int {
	fd := -1
	onDescriptor(r.listener, func(n int) error { fd = n; return nil }) // an error is that r is closed
	return fd
}

// Refused counts the connections that were not admitted.
func (r *Rendezvous) Refused() uint64 { return r.refused.Load() }

// Close ends Serve. With unlink nobody finds the way here any more; a successor that
// has the descriptor wants it to stay.
func (r *Rendezvous) Close(unlink bool) error {
	err := r.listener.Close()
	if now, e := os.Lstat(r.path); unlink && e == nil && os.SameFile(now, r.inode) {
		err = errors.Join(err, os.Remove(r.path))
	}
	return err
}

// Serve gives to admit every generation that proves to know its key, with the
// supervisor's end of a control channel, which is admit's from then on. admit may be
// called concurrently, and not after Serve has returned. key returns nil for a number
// that no generation has. Serve blocks until ctx ends or r is closed; after the former
// it can be called again. Whoever connects meanwhile waits.
func (r *Rendezvous) Serve(ctx context.Context, key func(generation int) []byte, log *slog.Logger, admit func(*Conn, *Hello)) {
	var greetings sync.WaitGroup
	defer greetings.Wait()
	r.listener.SetDeadline(time.Time{}) // an error is that it is closed, which Accept says too
	wake := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(wake)
		r.listener.SetDeadline(time.Unix(1, 0))
	})
	defer func() {
		if !stop() {
			<-wake // or it would end the next Serve
		}
	}()
	for troubled := false; ; {
		c, err := r.listener.AcceptUnix()
		switch {
		case ctx.Err() != nil || errors.Is(err, net.ErrClosed):
			if err == nil {
				(&Conn{c: c}).abandon()
			}
			return
		case err != nil:
			if !troubled {
				log.Error("the rendezvous accepts nothing for the moment", "err", err)
			}
			select {
			case <-time.After(acceptPause):
			case <-ctx.Done():
			}
		default:
			r.meet(ctx, &Conn{c: c}, key, log, admit, &greetings)
		}
		troubled = err != nil
	}
}

// meet has a stranger prove who it is, beside whatever else goes on here.
func (r *Rendezvous) meet(ctx context.Context, c *Conn, key func(generation int) []byte, log *slog.Logger, admit func(*Conn, *Hello), greetings *sync.WaitGroup) {
	peer, err := Peer(c.c)
	if err == nil {
		err = r.enter(int(peer.Pid))
	}
	if err != nil {
		r.refuse(c, err, log)
		return
	}
	greetings.Go(func() {
		hello, err := greetWithin(ctx, c, int(peer.Pid), key)
		r.leave(int(peer.Pid))
		switch {
		case ctx.Err() != nil:
			c.abandon()
		case err != nil:
			r.refuse(c, err, log)
		default:
			admit(c, hello)
		}
	})
}

func greetWithin(ctx context.Context, c *Conn, peer int, key func(generation int) []byte) (hello *Hello, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, greetTimeout, os.ErrDeadlineExceeded)
	defer cancel()
	err = c.until(ctx, func() error {
		hello, err = c.greet(peer, key)
		return err
	})
	c.sends, c.takes = filesOfSupervisor, filesOfGeneration
	return hello, err
}

// enter finds a place for a stranger of the process.
func (r *Rendezvous) enter(pid int) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.all == maxStrangers || r.strangers[pid] == maxPerProcess {
		return fmt.Errorf("%d connections that have not proved who they are, %d of them of process %d", r.all, r.strangers[pid], pid)
	}
	r.all++
	r.strangers[pid]++
	return nil
}

func (r *Rendezvous) leave(pid int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.all--
	if r.strangers[pid]--; r.strangers[pid] == 0 {
		delete(r.strangers, pid)
	}
}

// refuse counts a connection and closes it. The log hears of one in a while: whoever
// floods the rendezvous shall not flood the log.
func (r *Rendezvous) refuse(c *Conn, why error, log *slog.Logger) {
	c.abandon()
	total := r.refused.Add(1)
	r.mu.Lock()
	quiet := time.Since(r.reported) < refusalPause
	if !quiet {
		r.reported = time.Now()
	}
	r.mu.Unlock()
	if !quiet {
		log.Warn("connection at the rendezvous refused", "err", why, "refused_total", total)
	}
}
