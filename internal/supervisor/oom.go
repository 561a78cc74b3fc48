package supervisor

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// mostOOMScore is what oom_score_adj may be at the most (proc(5)): whoever has it goes
// first when memory runs out, however little it uses.
const mostOOMScore = 1000

// oomRanks is what the kernel was told about which generation to end first when memory
// runs out. The supervisor's loop owns it. The zero value has told nothing.
//
// The serving generation has the score that the supervisor itself has, and the oldest
// that drains the highest, so that what is ended holds the fewest connections and new ones are
// served. No score is below the supervisor's own: a process without privileges may raise
// one and take that back, but not go below what it was given by one that has them
// (oom_score_adj_min in the kernel).
type oomRanks struct {
	told   map[int]int // scores, by number
	failed bool        // that was said
}

// rankForOOM tells the kernel what has changed. Called in the loop, after each change of
// a generation's state.
func (s *Supervisor) rankForOOM() {
	if s.kernel.setOOMScore == nil {
		return
	}
	own, err := ownOOMScore()
	if err != nil {
		s.rankFailed(err)
		return
	}
	generations := s.newestFirst()
	scores := oomScores(own, generations)
	told := make(map[int]int, len(scores))
	for _, g := range generations {
		score := scores[g.number]
		if g.state == ended {
			continue
		}
		if before, ok := s.oom.told[g.number]; !ok || before != score {
			err := s.kernel.setOOMScore(g.proc, score)
			if errors.Is(err, os.ErrProcessDone) {
				continue
			}
			if err != nil {
				s.rankFailed(err)
			}
		}
		told[g.number] = score // also what could not be told: it would fail again
	}
	s.oom.told = told
}

// rankFailed says so once. Called in the loop.
func (s *Supervisor) rankFailed(err error) {
	if !s.oom.failed {
		s.oom.failed = true
		s.log.Warn("the kernel cannot be told which generation to end first when memory runs out", "err", err)
	}
}

// oomScores returns the score of each generation, of which the newest comes first: own
// for one that serves or is about to, and for those that end equal steps from there to
// the highest.
func oomScores(own int, newestFirst []*generation) map[int]int {
	scores := make(map[int]int, len(newestFirst))
	var ending []int
	for _, g := range newestFirst {
		scores[g.number] = own
		if g.state == draining || g.state == stopping {
			ending = append(ending, g.number)
		}
	}
	for i, number := range ending {
		scores[number] = own + (mostOOMScore-own)*(i+1)/len(ending)
	}
	return scores
}

func ownOOMScore() (int, error) {
	text, err := os.ReadFile("/proc/self/oom_score_adj")
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(text)))
}

// setOOMScore sets oom_score_adj of p. The error wraps os.ErrProcessDone if p has ended.
func setOOMScore(p process, score int) error {
	err := writeOOMScore(p, score)
	if err != nil && (errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) || hasExited(p.PID())) {
		return fmt.Errorf("%w: %w", os.ErrProcessDone, err)
	}
	return err
}

// The number is p's as long as p lives, and the kernel knows by the open file which
// process is meant: so p must live after it was opened.
func writeOOMScore(p process, score int) (err error) {
	f, err := os.OpenFile(fmt.Sprintf("/proc/%d/oom_score_adj", p.PID()), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := p.Signal(syscall.Signal(0)); err != nil {
		return err
	}
	_, err = f.WriteString(strconv.Itoa(score))
	return err
}

// hasExited says of a process that is there still whether it has ended all the same, and
// waits to be waited for. It has no memory then, and what it has in /proc belongs to root.
func hasExited(pid int) bool {
	const virtualSize = 23 - 3 // proc_pid_stat(5), behind the name, which may hold anything
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return errors.Is(err, fs.ErrNotExist)
	}
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	return len(fields) > virtualSize && fields[virtualSize] == "0"
}
