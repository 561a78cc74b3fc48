package proxy

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"

	"holdfast/internal/control"
)

// What a generation tells of its clusters, and hears of those of others. All of it may be large, so
// the loop only has it done.

// mostTelling is how many answers may be under way: nobody needs more.
const mostTelling = 8

// clusterTalk is the part of a generation that talks about clusters.
type clusterTalk struct {
	telling atomic.Int32 // answers that are being made
	making  sync.Mutex   // held while one is: several at once would only take more memory

	// Owned by the loop.
	coming  map[int]int // payloads of TypeElsewhere, by generation, of which more are to come
	arrived uint64      // complete ones

	hearing sync.Mutex
	heard   uint64 // the last of those that arrived and hold now
}

// certificates are those that listeners and clusters work with now.
func (g *generation) certificates() *control.Certificates {
	all := new(control.Certificates)
	for _, name := range slices.Sorted(maps.Keys(g.tls)) {
		all.Certificates = append(all.Certificates, g.tls[name].Certificates()...)
	}
	all.Certificates = append(all.Certificates, g.clusters.Certificates()...)
	return all
}

// sayClusters answers with what make returns.
func (g *generation) sayClusters(r received, what func() any) {
	if g.phase == building {
		g.answer(r, control.Message{}, errors.New("its clusters are being made"))
		return
	}
	t := &g.clusterTalk
	if t.telling.Add(1) > mostTelling {
		t.telling.Add(-1)
		g.answer(r, control.Message{}, errors.New("too many answers about clusters are being made"))
		return
	}
	g.work.Go(func() {
		defer t.telling.Add(-1)
		file, err := t.payload(what)
		if err != nil {
			_ = g.reply(r, control.Message{Error: err.Error()})
			return
		}
		defer file.Close()
		_ = g.reply(r, control.Message{}, int(file.Fd()))
	})
}

func (t *clusterTalk) payload(what func() any) (*os.File, error) {
	t.making.Lock()
	defer t.making.Unlock()
	file, err := control.Payload(what())
	if err != nil {
		return nil, err
	}
	if st, err := file.Stat(); err != nil || st.Size() > control.MaxClusters {
		return nil, errors.Join(fmt.Errorf("the clusters are more than can be told, %d bytes", control.MaxClusters), err, file.Close())
	}
	return file, nil
}

// hearElsewhere takes what other generations have, when all of that has come. It answers.
func (g *generation) hearElsewhere(r received) {
	t := &g.clusterTalk
	if t.coming == nil {
		t.coming = make(map[int]int)
	}
	err := t.gather(r)
	if err == nil && g.phase == building {
		err = errors.New("its clusters are being made")
	}
	if err != nil {
		t.drop()
		g.confirm(r, err)
		return
	}
	if r.m.More {
		g.confirm(r, nil)
		return
	}
	others := t.coming
	t.coming = nil
	t.arrived++
	number := t.arrived
	g.work.Go(func() {
		err := g.setElsewhere(number, others)
		if err != nil {
			g.log.Error("what other generations have is not known in part", "err", err)
		}
		if r.m.ID != 0 {
			_ = g.reply(r, control.Message{})
		}
	})
}

// gather takes the payloads of a message.
func (t *clusterTalk) gather(r received) error {
	if len(r.m.Keys) != len(r.fds) {
		control.Discard(r.fds)
		return fmt.Errorf("%d keys and %d descriptors do not match", len(r.m.Keys), len(r.fds))
	}
	for i, key := range r.m.Keys {
		number, err := strconv.Atoi(key)
		if _, twice := t.coming[number]; err != nil || twice {
			control.Discard(r.fds[i:])
			return fmt.Errorf("%q is no generation, or comes twice", key)
		}
		t.coming[number] = r.fds[i]
	}
	return nil
}

// drop forgets what has come in part.
func (t *clusterTalk) drop() {
	for _, fd := range t.coming {
		control.Discard([]int{fd})
	}
	t.coming = nil
}

// setElsewhere has the clusters reckon with what others have, unless something newer holds
// already. What cannot be read counts as nothing.
func (g *generation) setElsewhere(number uint64, others map[int]int) (err error) {
	t := &g.clusterTalk
	t.hearing.Lock()
	defer t.hearing.Unlock()
	all := make(map[int]*control.Loads, len(others))
	for generation, fd := range others {
		if number < t.heard {
			control.Discard([]int{fd})
			continue
		}
		loads, bad := control.ReadLoads(fd)
		if bad != nil {
			err = errors.Join(err, fmt.Errorf("generation %d: %w", generation, bad))
			continue
		}
		all[generation] = loads
	}
	if number > t.heard {
		t.heard = number
		g.clusters.SetElsewhere(all)
	}
	return err
}
