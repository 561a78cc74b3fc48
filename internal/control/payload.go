package control

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

// MaxPayload is the most bytes that a payload may have.
const MaxPayload = 64 << 20

// MaxLearnt is the most bytes that a [Learnt] may have. The supervisor decodes and
// keeps it, whoever sends it, and decoded it may be many times as large.
const MaxLearnt = 8 << 20

const seals = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE

// Payload puts v as JSON into a sealed memory file, which the caller sends beside
// a message and closes. Nobody can change or truncate it any more, so a receiver
// may read it without fear of the sender.
func Payload(v any) (*os.File, error) {
	data, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("payload: %w", err)
	}
	return Bytes(data)
}

// Bytes is [Payload] for what is no JSON.
func Bytes(data []byte) (*os.File, error) {
	if len(data) > MaxPayload {
		return nil, fmt.Errorf("payload: %d bytes are too many (%d)", len(data), MaxPayload)
	}
	fd, err := unix.MemfdCreate("holdfast payload", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("payload: memfd_create: %w", err)
	}
	f := os.NewFile(uintptr(fd), "payload")
	if _, err := f.Write(data); err != nil {
		return nil, errors.Join(fmt.Errorf("payload: %w", err), f.Close())
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals); err != nil {
		return nil, errors.Join(fmt.Errorf("payload: seal: %w", err), f.Close())
	}
	return f, nil
}

// ReadPayload reads what [Payload] has made into v. It closes fd.
func ReadPayload(fd int, v any) error { return readPayload(fd, v, MaxPayload) }

// ReadLearnt is ReadPayload for what a generation sends with [TypeReady], which has at
// most [MaxLearnt] bytes.
func ReadLearnt(fd int) (*Learnt, error) {
	learnt := new(Learnt)
	return learnt, readPayload(fd, learnt, MaxLearnt)
}

func readPayload(fd int, v any, most int64) error {
	data, err := ReadBytes(fd, most)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(data, v); err != nil {
		return fmt.Errorf("payload: %w", err)
	}
	return nil
}

// CheckPayload says whether fd is what [Payload] has made, of at most that many bytes, without
// reading it: whoever only passes it on need not know what is in it.
func CheckPayload(fd int, most int64) error {
	if err := checkSeals(fd); err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("payload: %w", err)
	}
	if st.Size > most {
		return fmt.Errorf("payload: more than %d bytes", most)
	}
	return nil
}

func checkSeals(fd int) error {
	got, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0)
	if err != nil || got&seals != seals {
		return errors.New("payload: not a sealed memory file")
	}
	return nil
}

// ReadBytes reads what [Bytes] has made, of which it takes no more than most. It
// closes fd.
func ReadBytes(fd int, most int64) ([]byte, error) {
	if err := checkSeals(fd); err != nil {
		Discard([]int{fd})
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "payload")
	defer f.Close()
	data, err := io.ReadAll(io.NewSectionReader(f, 0, most+1))
	if err != nil {
		return nil, fmt.Errorf("payload: %w", err)
	}
	if int64(len(data)) > most {
		return nil, fmt.Errorf("payload: more than %d bytes", most)
	}
	return data, nil
}

// Bundle is what a generation is started from. Its bytes are the whole truth: the
// generation opens no file that the configuration names.
type Bundle struct {
	Path       string `json:"path"` // of the configuration, for messages
	Config     []byte `json:"config"`
	Generation int    `json:"generation"`

	// Learnt is what an earlier generation has learnt that was built from the same
	// configuration, where one has. It spares a replacement the questions that may
	// have no answer just now.
	Learnt *Learnt `json:"learnt,omitempty"`

	// Urgent says that the generation is dead that served last. What that knew of its
	// clusters comes beside the bundle: see [TypeBundle].
	Urgent bool `json:"urgent,omitempty"`

	Epoch      uint64 `json:"epoch,omitempty"`      // of the supervisor
	Rendezvous string `json:"rendezvous,omitempty"` // path of the socket where another supervisor can be found; "": there is none
	Key        []byte `json:"key,omitempty"`        // of this generation, for the rendezvous

	// Stores is how many VaultStore packets come over the vault channel before the
	// generation is ready, for the loops of a dead one whose tunnels it is to resume; 0:
	// it makes loops of its own.
	Stores int `json:"stores,omitempty"`

	// Question is for a proxy binary that is to answer it, and no generation.
	Question *RouteQuestion `json:"question,omitempty"`
}

// Learnt is what a generation finds out while it is built, as it reports it when it
// is ready. The supervisor keeps it and does not look into it.
type Learnt struct {
	Addresses map[string][]netip.Addr `json:"addresses,omitempty"` // of the names among the endpoints
}
