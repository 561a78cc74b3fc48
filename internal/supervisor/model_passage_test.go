package supervisor

import (
	"errors"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/control"
)

// The idle connections of the model, with what generations do about them. Passages are
// real pairs of sockets; what is in them is a descriptor of each connection and no more.

// simClient is somebody who is connected and sends nothing.
type simClient struct {
	of      *simGeneration // that has accepted it
	end     *travelling    // of the connection; the world watches for its last close
	excused bool           // that it was closed: who had it was killed, or told to stop
}

// passing is the part of a generation that has clients.
type passing struct {
	clients map[int]*simClient // by descriptor
	waits   time.Time          // until when it expects a passage
	gives   int                // its end of the one into which it gives; 0: there is none
	takes   []int              // its ends of those from which it takes
}

// passageVersion is what generations say of themselves.
func (w *simWorld) passageVersion() int {
	if w.scenario.clients {
		return control.PassageVersion
	}
	return 0
}

// accept has a client come.
func (g *simGeneration) accept() {
	if !g.w.scenario.clients {
		return
	}
	c := &simClient{of: g}
	var fd int
	c.end, fd = g.w.travel(nil)
	g.w.clients = append(g.w.clients, c)
	g.clients = map[int]*simClient{fd: c}
}

// keepClients is the part of drain that is about clients: without a passage to come they
// are closed.
func (g *simGeneration) keepClients(wait time.Duration) {
	for len(g.takes) > 0 {
		unix.Shutdown(g.takes[0], unix.SHUT_RDWR)
		g.takeClients()
	}
	if g.phase != simDraining {
		return
	}
	g.waits = time.Now().Add(wait)
	if wait == 0 {
		g.dropClients(false)
	}
}

// waitsWithClients says whether somebody may still take them.
func (g *simGeneration) waitsWithClients(now time.Time) bool {
	return len(g.clients) > 0 && now.Before(g.waits)
}

// connect takes one end of a passage over, unless there is an error.
func (g *simGeneration) connect(t control.Type, fd int) error {
	switch {
	case t == control.TypeTake && g.phase == simServing:
		g.takes = append(g.takes, fd)
		return nil
	case t == control.TypeGive && g.phase == simDraining:
		if g.gives > 0 {
			control.CloseAll([]int{g.gives})
		}
		g.gives = fd
		for fd := range g.clients {
			g.give(fd)
		}
		return nil
	}
	return errors.New("not possible now")
}

func (g *simGeneration) give(fd int) {
	if unix.Sendmsg(g.gives, []byte("c"), unix.UnixRights(fd), nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL) == nil {
		delete(g.clients, fd)
		control.CloseAll([]int{fd})
		g.w.changes++
	}
}

// takeClients takes all that are in passages, and lets go of those that have ended.
func (g *simGeneration) takeClients() {
	g.takes = slices.DeleteFunc(g.takes, func(passage int) bool {
		for {
			fd, ok := receiveClient(passage)
			if !ok {
				control.CloseAll([]int{passage})
				return true
			}
			if fd < 0 {
				return false
			}
			for _, c := range g.w.clients {
				if c.end.ino == inode(fd) {
					g.clients[fd] = c
				}
			}
			g.w.changes++
			g.w.tell("    %s has %s", g, g.clients[fd])
		}
	})
}

// receiveClient returns the next one in a passage, -1 if there is none at present. ok:
// the passage has not ended.
func receiveClient(passage int) (fd int, ok bool) {
	data, oob := make([]byte, 1), make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := unix.Recvmsg(passage, data, oob, unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
	if err == unix.EAGAIN {
		return -1, true
	}
	if err != nil || n == 0 {
		return -1, false
	}
	all, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		panic(err)
	}
	fds, err := unix.ParseUnixRights(&all[0])
	if err != nil {
		panic(err)
	}
	return fds[0], true
}

func (c *simClient) String() string { return "the client of " + c.of.String() }

// dropClients closes all, also those that are on their way to it, and its ends of
// passages. excused: they have no reason to complain.
func (g *simGeneration) dropClients(excused bool) {
	g.takeClients()
	for fd, c := range g.clients {
		c.excused = c.excused || excused
		control.CloseAll([]int{fd})
	}
	clear(g.clients)
	control.CloseAll(g.takes)
	g.takes = nil
	if g.gives > 0 {
		control.CloseAll([]int{g.gives})
		g.gives = 0
	}
}

// checkClients: nobody sees the end of a connection because of what a supervisor does.
// Called with mu held.
func (w *simWorld) checkClients() {
	for _, c := range w.clients {
		if c.end.gone() && !c.excused {
			w.fail("10: %s sees its connection end", c)
		}
	}
}

// checkPassed: in the end all are where they are served by the configuration that serves.
// Called with mu held.
func (w *simWorld) checkPassed() {
	w.checkClients()
	for _, g := range w.generations {
		if g.phase == simServing {
			continue
		}
		for _, c := range g.clients {
			w.fail("10: %s is with %s, which does not serve", c, g)
		}
	}
}
