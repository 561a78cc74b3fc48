package drill

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// socketsOf returns a process's TCP connections over IPv4, each as its address and that
// of the other end. Left out are those that both ends have closed already.
func socketsOf(pid int) ([]string, error) {
	inodes := make(map[string]bool)
	if err := addSockets(inodes, pid); err != nil {
		return nil, err
	}
	// The table is shown in pieces, between which it changes, so that a line may be
	// left out; hardly twice.
	var sockets []string
	for range 2 {
		table, err := os.ReadFile("/proc/net/tcp")
		if err != nil {
			return nil, err
		}
		sockets = append(sockets, socketsIn(table, inodes, true)...)
	}
	return sockets, nil
}

// socketsOfNobody returns the accepted connections at an address that none of the processes
// has, in the form of socketsOf: they are on their way from one to another. One that is
// passed on just then may be among them.
func socketsOfNobody(address string, pids []int) []string {
	table, _ := os.ReadFile("/proc/net/tcp") // it is there; and before what is compared with it
	inodes := map[string]bool{"0": true}     // nobody has accepted them
	for _, pid := range pids {
		_ = addSockets(inodes, pid) // it may have ended
	}
	return slices.DeleteFunc(socketsIn(table, inodes, false), func(s string) bool {
		return !strings.HasPrefix(s, address+" ")
	})
}

// addSockets adds the inodes of a process's sockets.
func addSockets(inodes map[string]bool, pid int) error {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		if to, err := os.Readlink(filepath.Join(dir, e.Name())); err == nil {
			if inode, ok := strings.CutPrefix(to, "socket:["); ok {
				inodes[strings.TrimSuffix(inode, "]")] = true
			}
		}
	}
	return err
}

// socketsIn reads a table like /proc/net/tcp: the number of the line, our address, the
// other's, the state, five fields more, and in the tenth the inode of the socket. It returns
// those that are among the inodes, or those that are not.
func socketsIn(table []byte, inodes map[string]bool, among bool) (sockets []string) {
	for lines := bufio.NewScanner(bytes.NewReader(table)); lines.Scan(); {
		fields := strings.Fields(lines.Text())
		if len(fields) < 10 || inodes[fields[9]] != among {
			continue
		}
		ours, err := parseAddress(fields[1])
		if err != nil {
			continue
		}
		if other, err := parseAddress(fields[2]); err == nil && other.Port() != 0 {
			sockets = append(sockets, ours.String()+" "+other.String())
		}
	}
	return sockets
}

// parseAddress reads "0100007F:1F90": the address as the machine stores it, the port
// as one writes it.
func parseAddress(s string) (netip.AddrPort, error) {
	address, port, _ := strings.Cut(s, ":")
	b, err := hex.DecodeString(address)
	if err != nil || len(b) != 4 {
		return netip.AddrPort{}, fmt.Errorf("no IPv4 address: %q", s)
	}
	n, err := strconv.ParseUint(port, 16, 16)
	if err != nil {
		return netip.AddrPort{}, err
	}
	var ip [4]byte
	binary.NativeEndian.PutUint32(ip[:], binary.BigEndian.Uint32(b))
	return netip.AddrPortFrom(netip.AddrFrom4(ip), uint16(n)), nil
}

// childrenOf returns the processes that a process is the parent of and that run.
func childrenOf(parent int) (children []int) {
	all, _ := filepath.Glob("/proc/[0-9]*/stat") // the pattern is good
	for _, path := range all {
		stat, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		// The state and the parent follow the name, which may itself contain parentheses.
		fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
		if len(fields) > 1 && fields[0] != "Z" && fields[1] == strconv.Itoa(parent) {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
			children = append(children, pid)
		}
	}
	return children
}

// stopped says whether all threads of a process stand still.
func stopped(pid int) bool {
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	if err != nil || len(tasks) == 0 {
		return false
	}
	for _, task := range tasks {
		stat, err := os.ReadFile(task)
		if err != nil {
			return false
		}
		// The state follows the name, which may itself contain parentheses.
		if state := stat[bytes.LastIndexByte(stat, ')')+1:]; len(state) < 2 || state[1] != 'T' {
			return false
		}
	}
	return true
}
