package runtimedir_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"holdfast/internal/pidfd"
	"holdfast/internal/runtimedir"
)

// The test binary runs itself as another supervisor of a directory.
func TestMain(m *testing.M) {
	path := os.Getenv("HOLDFAST_TEST_DIR")
	if path == "" {
		goleak.VerifyTestMain(m)
		return
	}
	dir, err := runtimedir.Prepare(path)
	if err != nil {
		fmt.Println(err)
		return
	}
	_, err = dir.Lock()
	fmt.Println(err)
	os.Stdin.Read(make([]byte, 1)) // until it is killed, with the lock
}

func prepare(t testing.TB) *runtimedir.Dir {
	t.Helper()
	dir, err := runtimedir.Prepare(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func wantError(t *testing.T, err error, text string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), text) {
		t.Errorf("got %v, want %q", err, text)
	}
}

func write(t *testing.T, dir *runtimedir.Dir, name string, data []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir.Path(), name), data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// wantEntries says which files are in a directory.
func wantEntries(t *testing.T, dir *runtimedir.Dir, want ...string) {
	t.Helper()
	entries, err := os.ReadDir(dir.Path())
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, entry := range entries {
		got = append(got, entry.Name())
	}
	if strings.Join(got, " ") != strings.Join(want, " ") {
		t.Errorf("the directory has %q, want %q", got, want)
	}
}

func TestTheDirectory(t *testing.T) {
	t.Parallel()
	t.Run("is made for its user only", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "a", "b")
		dir, err := runtimedir.Prepare(path)
		if err != nil {
			t.Fatal(err)
		}
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o700 {
			t.Errorf("got %v, %v", info.Mode(), err)
		}
		if dir.Path() != path || dir.Rendezvous() != path+"/control.sock" {
			t.Errorf("got %s, %s", dir.Path(), dir.Rendezvous())
		}
	})
	t.Run("is not made to look into it", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "missing")
		if _, err := runtimedir.Open(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("got %v", err)
		}
		if _, err := os.Stat(path); err == nil {
			t.Error("it was made")
		}
	})
	t.Run("may be a link, as systemd makes them", func(t *testing.T) {
		path := t.TempDir()
		if err := os.Symlink(t.TempDir(), path+"/link"); err != nil {
			t.Fatal(err)
		}
		if _, err := runtimedir.Prepare(path + "/link"); err != nil {
			t.Error(err)
		}
	})
	for name, mode := range map[string]os.FileMode{"its group": 0o770, "everybody": 0o707} {
		t.Run("is refused where "+name+" can write", func(t *testing.T) {
			path := t.TempDir()
			if err := os.Chmod(path, mode); err != nil {
				t.Fatal(err)
			}
			_, err := runtimedir.Prepare(path)
			wantError(t, err, "lets others write")
		})
	}
	t.Run("is refused where it belongs to somebody else", func(t *testing.T) {
		path := "/usr" // root's
		if os.Geteuid() == 0 {
			path = t.TempDir()
			if err := os.Chown(path, 65534, -1); err != nil {
				t.Fatal(err)
			}
		}
		_, err := runtimedir.Prepare(path)
		wantError(t, err, "belongs to user")
	})
	t.Run("is refused where it is a file", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(file, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := runtimedir.Prepare(file)
		wantError(t, err, "not a directory")
		_, err = runtimedir.Open(file)
		wantError(t, err, "not a directory")
	})
}

func TestASecondSupervisorIsRefused(t *testing.T) {
	t.Parallel()
	dir := prepare(t)
	lock, err := dir.Lock()
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	_, err = dir.Lock()
	held, ok := errors.AsType[*runtimedir.HeldError](err)
	if !ok || held.PID != fmt.Sprint(os.Getpid()) || held.Path != dir.Path() {
		t.Errorf("got %v", err)
	}
	wantError(t, err, fmt.Sprintf("another supervisor (pid %d) runs with this runtime directory: %s", os.Getpid(), dir.Path()))
	if err := lock.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := dir.Lock()
	if err != nil {
		t.Fatal(err)
	}
	again.Close()
}

func TestOneOfManyTakesTheLock(t *testing.T) {
	t.Parallel()
	dir := prepare(t)
	locks := make(chan *runtimedir.Lock, 20)
	var tries sync.WaitGroup
	for range cap(locks) {
		tries.Go(func() {
			lock, err := dir.Lock()
			if err == nil {
				locks <- lock
			} else if _, ok := errors.AsType[*runtimedir.HeldError](err); !ok {
				t.Error(err)
			}
		})
	}
	tries.Wait()
	if len(locks) != 1 {
		t.Errorf("%d have the lock", len(locks))
	}
	for len(locks) > 0 {
		(<-locks).Close()
	}
}

func TestTheLockOfAKilledSupervisorIsFree(t *testing.T) {
	t.Parallel()
	dir := prepare(t)
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "HOLDFAST_TEST_DIR="+dir.Path())
	if _, err := cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	said := make([]byte, 1<<10)
	n, err := out.Read(said)
	if err != nil || string(said[:n]) != "<nil>\n" {
		t.Fatalf("it said %q, %v", said[:n], err)
	}
	_, err = dir.Lock()
	wantError(t, err, fmt.Sprintf("(pid %d)", cmd.Process.Pid))
	cmd.Process.Kill()
	cmd.Wait()
	lock, err := dir.Lock()
	if err != nil {
		t.Fatal(err)
	}
	lock.Close()
}

func dup(t *testing.T, fd int) int {
	t.Helper()
	fd, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return fd
}

func TestALockIsHandedOn(t *testing.T) {
	t.Parallel()
	dir := prepare(t)
	old, err := dir.Lock()
	if err != nil {
		t.Fatal(err)
	}
	if flags, err := unix.FcntlInt(uintptr(old.FD()), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("a child would inherit it: %#x, %v", flags, err)
	}
	write(t, dir, "lock", []byte("123456789\n"))
	heir, err := runtimedir.InheritLock(dup(t, old.FD()), dir)
	if err != nil {
		t.Fatal(err)
	}
	defer heir.Close()
	if err := old.Close(); err != nil {
		t.Fatal(err)
	}
	_, err = dir.Lock()
	wantError(t, err, "(pid 123456789)")
	if err := heir.Sign(); err != nil {
		t.Fatal(err)
	}
	_, err = dir.Lock()
	wantError(t, err, fmt.Sprintf("(pid %d)", os.Getpid()))
	if err := heir.Close(); err != nil {
		t.Fatal(err)
	}
	next, err := dir.Lock()
	if err != nil {
		t.Fatal(err)
	}
	next.Close()
}

func TestALockThatCannotBeInherited(t *testing.T) {
	t.Parallel()
	dir, other := prepare(t), prepare(t)
	lock, err := dir.Lock()
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	inherit := func(fd int, dir *runtimedir.Dir, text string) {
		t.Helper()
		l, err := runtimedir.InheritLock(fd, dir)
		if err == nil {
			l.Close()
		}
		wantError(t, err, text)
	}
	inherit(-1, dir, "no descriptor")
	inherit(dup(t, lock.FD()), other, "no such file")
	theirs, err := other.Lock()
	if err != nil {
		t.Fatal(err)
	}
	defer theirs.Close()
	inherit(dup(t, lock.FD()), other, "another file's")
	opened, err := unix.Open(filepath.Join(dir.Path(), "lock"), unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	inherit(opened, dir, unix.EWOULDBLOCK.Error())
	if _, err := dir.Lock(); err == nil {
		t.Error("the lock was lost")
	}
}

// What a killed supervisor was just starting holds the lock until it executes its program.
func TestALockThatIsFreeInAMomentIsTaken(t *testing.T) {
	t.Parallel()
	dir := prepare(t)
	held, err := dir.Lock()
	if err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(20*time.Millisecond, func() { held.Close() })
	lock, err := dir.Lock()
	if err != nil {
		t.Fatal(err)
	}
	lock.Close()
}

func TestALinkIsNotLocked(t *testing.T) {
	t.Parallel()
	dir := prepare(t)
	if err := os.Symlink(filepath.Join(t.TempDir(), "elsewhere"), filepath.Join(dir.Path(), "lock")); err != nil {
		t.Fatal(err)
	}
	if lock, err := dir.Lock(); err == nil {
		lock.Close()
		t.Error("the lock is a link's")
	}
}

// A supervisor that was killed leaves what it was just writing, and no more of it than
// that piles up.
func TestWhatAKilledSupervisorLeavesIsRemoved(t *testing.T) {
	t.Parallel()
	dir := prepare(t)
	for _, name := range []string{".new-state-1", ".new-state-2", ".new-secret-3"} {
		write(t, dir, name, []byte("{"))
	}
	write(t, dir, "of-the-operator", nil)
	if err := os.Mkdir(filepath.Join(dir.Path(), ".new-dir"), 0o700); err != nil {
		t.Fatal(err)
	}
	write(t, dir, ".new-dir/inside", nil) // not ours
	// One that prepares, but has not the lock, may be a candidate beside one that writes.
	if _, err := runtimedir.Prepare(dir.Path()); err != nil {
		t.Fatal(err)
	}
	wantEntries(t, dir, ".new-dir", ".new-secret-3", ".new-state-1", ".new-state-2", "of-the-operator")
	lock, err := dir.Lock()
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	wantEntries(t, dir, ".new-dir", "lock", "of-the-operator")
}

func TestTheSecret(t *testing.T) {
	t.Parallel()
	t.Run("is made once, for its user only", func(t *testing.T) {
		dir := prepare(t)
		secret, fresh, err := dir.Secret()
		if err != nil || !fresh || len(secret) != 32 || bytes.Equal(secret, make([]byte, 32)) {
			t.Fatalf("got %x, %v, %v", secret, fresh, err)
		}
		if info, err := os.Stat(dir.Path() + "/secret"); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("got %v, %v", info.Mode(), err)
		}
		again, fresh, err := dir.Secret()
		if err != nil || fresh || !bytes.Equal(again, secret) {
			t.Errorf("got %x, %v, %v, want %x", again, fresh, err, secret)
		}
		wantEntries(t, dir, "secret")
		other, _, err := prepare(t).Secret()
		if err != nil || bytes.Equal(other, secret) {
			t.Errorf("two services have one secret: %v", err)
		}
	})
	elsewhere := filepath.Join(t.TempDir(), "elsewhere")
	if err := os.WriteFile(elsewhere, make([]byte, 32), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, spoil := range map[string]func(path string) error{
		"it is empty":          func(path string) error { return os.WriteFile(path, nil, 0o600) },
		"it is too short":      func(path string) error { return os.WriteFile(path, make([]byte, 31), 0o600) },
		"it is too long":       func(path string) error { return os.WriteFile(path, make([]byte, 33), 0o600) },
		"others could read it": func(path string) error { return os.WriteFile(path, make([]byte, 32), 0o644) },
		"it is a link":         func(path string) error { return os.Symlink(elsewhere, path) },
		"it is a pipe":         func(path string) error { return unix.Mkfifo(path, 0o600) },
	} {
		t.Run("is made anew where "+name, func(t *testing.T) {
			dir := prepare(t)
			if err := spoil(dir.Path() + "/secret"); err != nil {
				t.Fatal(err)
			}
			secret, fresh, err := dir.Secret()
			if err != nil || !fresh || len(secret) != 32 || bytes.Equal(secret, make([]byte, 32)) {
				t.Errorf("got %x, %v, %v", secret, fresh, err)
			}
			if info, err := os.Lstat(dir.Path() + "/secret"); err != nil || info.Mode() != 0o600 {
				t.Errorf("got %v, %v", info.Mode(), err)
			}
			if data, err := os.ReadFile(elsewhere); err != nil || !bytes.Equal(data, make([]byte, 32)) {
				t.Errorf("what the link points to was touched: %v", err)
			}
		})
	}
	t.Run("is not made anew where that cannot be known", func(t *testing.T) {
		dir := prepare(t)
		// A socket cannot be opened: an error of the same kind as when there is no memory.
		if err := unix.Mknod(dir.Path()+"/secret", unix.S_IFSOCK|0o600, 0); err != nil {
			t.Fatal(err)
		}
		if _, _, err := dir.Secret(); err == nil {
			t.Error("no error")
		}
	})
	t.Run("is an error where it is a directory", func(t *testing.T) {
		dir := prepare(t)
		if err := os.Mkdir(dir.Path()+"/secret", 0o700); err != nil {
			t.Fatal(err)
		}
		_, _, err := dir.Secret()
		wantError(t, err, "secret: ")
		wantEntries(t, dir, "secret")
	})
}

func example(t *testing.T) *runtimedir.State {
	t.Helper()
	self, err := pidfd.Of(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	return &runtimedir.State{Epoch: 5, Last: 9, Generations: []runtimedir.Generation{
		{Number: 7, Identity: self, State: "draining"}, {Number: 9, Identity: self, State: "serving"},
	}}
}

func TestTheStateIsSavedAndLoaded(t *testing.T) {
	t.Parallel()
	dir := prepare(t)
	if s, err := dir.LoadState(); s != nil || err != nil {
		t.Fatalf("got %+v, %v where nothing was saved", s, err)
	}
	want := example(t)
	if err := dir.SaveState(want); err != nil {
		t.Fatal(err)
	}
	if want.Version != 0 {
		t.Error("SaveState has changed what it was given")
	}
	got, err := dir.LoadState()
	if err != nil {
		t.Fatal(err)
	}
	want.Version = 1
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if info, err := os.Stat(dir.Path() + "/state"); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("got %v, %v", info.Mode(), err)
	}
	for range 100 {
		if err := dir.SaveState(want); err != nil {
			t.Fatal(err)
		}
	}
	wantEntries(t, dir, "state")
}

func TestAStateThatCannotBeUnderstood(t *testing.T) {
	t.Parallel()
	whole := func(t *testing.T) []byte {
		dir := prepare(t)
		if err := dir.SaveState(example(t)); err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(dir.Path() + "/state")
		if err != nil {
			t.Fatal(err)
		}
		return data
	}(t)
	replaced := func(old, new string) []byte {
		if !bytes.Contains(whole, []byte(old)) {
			t.Fatalf("%s does not contain %s", whole, old)
		}
		return bytes.Replace(whole, []byte(old), []byte(new), 1)
	}
	for name, test := range map[string]struct {
		data []byte
		want string
	}{
		"empty":                       {nil, "damaged"},
		"zeros":                       {make([]byte, 100), "damaged"},
		"rubbish":                     {[]byte("rubbish"), "damaged"},
		"cut off":                     {whole[:len(whole)-1], "damaged"},
		"with more behind":            {append(bytes.Clone(whole), whole...), "damaged"},
		"of a later version":          {[]byte(`{"version":2,"epoch":{"of":"another type"}}`), "is of version 2, and this build reads version 1"},
		"of no version":               {[]byte(`{}`), "is of version 0"},
		"nothing":                     {[]byte(`null`), "is of version 0"},
		"with another type":           {replaced(`"epoch":5`, `"epoch":"5"`), "damaged"},
		"with an epoch that is last":  {replaced(`"epoch":5`, `"epoch":18446744073709551615`), "epoch"},
		"with a generation 0":         {replaced(`"number":7`, `"number":0`), "generation 0"},
		"with one number twice":       {replaced(`"number":7`, `"number":9`), "generation 9"},
		"with one after the last":     {replaced(`"last":9`, `"last":8`), "generation 9"},
		"with a process group":        {replaced(`"pid":`, `"pid":-`), "with pid -"},
		"with the process of nobody":  {replaced(`"pid":`, `"pid":0,"other":`), "with pid 0"},
		"with a number that is huge":  {replaced(`"pid":`, `"pid":999999999`), "with pid 999999999"},
		"with a negative start":       {replaced(`"start":`, `"start":-`), "damaged"},
		"huge":                        {bytes.Repeat([]byte("["), 4<<20+1), "bytes"},
		"as deep as JSON may not be":  {bytes.Repeat([]byte("["), 1<<20), "damaged"},
		"with generations of no kind": {[]byte(`{"version":1,"generations":[1]}`), "damaged"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := prepare(t)
			write(t, dir, "state", test.data)
			s, err := dir.LoadState()
			if s != nil {
				t.Errorf("got %+v", s)
			}
			wantError(t, err, "state")
			wantError(t, err, test.want)
			// The next one that is saved is good.
			if err := dir.SaveState(example(t)); err != nil {
				t.Fatal(err)
			}
			if _, err := dir.LoadState(); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestAStateThatIsNoFile(t *testing.T) {
	t.Parallel()
	elsewhere := prepare(t)
	if err := elsewhere.SaveState(example(t)); err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile(elsewhere.Path() + "/state")
	if err != nil {
		t.Fatal(err)
	}
	for name, place := range map[string]func(path string) error{
		"symbolic link": func(path string) error { return os.Symlink(elsewhere.Path()+"/state", path) },
		"no file":       func(path string) error { return unix.Mkfifo(path, 0o600) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := prepare(t)
			if err := place(dir.Path() + "/state"); err != nil {
				t.Fatal(err)
			}
			s, err := dir.LoadState()
			if s != nil {
				t.Errorf("got %+v", s)
			}
			wantError(t, err, name)
			if err := dir.SaveState(new(runtimedir.State)); err != nil {
				t.Fatal(err)
			}
			if info, err := os.Lstat(dir.Path() + "/state"); err != nil || !info.Mode().IsRegular() {
				t.Errorf("got %v, %v", info.Mode(), err)
			}
		})
	}
	if after, err := os.ReadFile(elsewhere.Path() + "/state"); err != nil || !bytes.Equal(before, after) {
		t.Errorf("what the link pointed to was touched: %q, %v", after, err)
	}
}

func TestAStateThatCannotBeSaved(t *testing.T) {
	t.Parallel()
	dir := prepare(t)
	if err := dir.SaveState(example(t)); err != nil {
		t.Fatal(err)
	}
	long := example(t)
	long.Generations[0].State = strings.Repeat("x", 4<<20)
	wantError(t, dir.SaveState(long), "too many")
	if s, err := dir.LoadState(); err != nil || len(s.Generations) != 2 {
		t.Errorf("the former one is gone: %+v, %v", s, err)
	}
	if err := os.RemoveAll(dir.Path() + "/state"); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(dir.Path()+"/state", 0o700); err != nil {
		t.Fatal(err)
	}
	wantError(t, dir.SaveState(example(t)), "save the state")
	wantEntries(t, dir, "state")
}

// A reader finds all of one state or all of another, whenever it looks.
func TestAStateIsNeverHalfWritten(t *testing.T) {
	t.Parallel()
	dir := prepare(t)
	long, short := example(t), example(t)
	for n := 10; n < 300; n++ {
		long.Generations = append(long.Generations, runtimedir.Generation{Number: n, Identity: long.Generations[0].Identity, State: "draining"})
	}
	long.Last = 300
	if err := dir.SaveState(short); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for range 50 {
			if err := errors.Join(dir.SaveState(long), dir.SaveState(short)); err != nil {
				t.Error(err)
			}
		}
	}()
	for {
		s, err := dir.LoadState()
		if err != nil || len(s.Generations) != len(long.Generations) && len(s.Generations) != len(short.Generations) {
			t.Errorf("got %+v, %v", s, err)
		}
		select {
		case <-ended:
			return
		default:
		}
	}
}
