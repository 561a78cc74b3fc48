package upstream

import (
	"errors"
	"maps"
	"slices"
	"time"

	"holdfast/internal/clienttls"
	"holdfast/internal/control"
	"holdfast/internal/filewatch"
	"holdfast/internal/stream"
)

// A handshake is part of an attempt to connect: of several addresses the first wins with which
// TLS is agreed on. It has the same time, and its failure is one to connect.

// secure makes what the cluster needs to speak TLS, if it does. Its files are added to those that
// are watched.
func (c *Cluster) secure(watcher *filewatch.Watcher) (err error) {
	if c.cfg.TLS == nil {
		return nil
	}
	c.tls, err = clienttls.New(clienttls.Options{
		Config: c.cfg.TLS, Cluster: c.Name, Protocol: c.cfg.Protocol, Log: c.options.Log, Metrics: c.options.Metrics, Urgent: c.options.Urgent, Watcher: watcher,
		Kept: c.options.Kept, Changed: c.options.Changed,
	})
	return err
}

// secure has the next connection of an attempt begin with a handshake, if the endpoint is spoken to
// by TLS. What has become of it secured is to be told.
func (e *Endpoint) secure(a *Attempt, p clienttls.Purpose) (err error) {
	a.tls, a.resumed = nil, false
	if e.peer == nil {
		return nil
	}
	a.tls, err = e.peer.Config(p)
	return err
}

// secured counts the handshake, and says what has gone wrong with it.
func (e *Endpoint) secured(a *Attempt, err error) error {
	if a.tls == nil {
		return err
	}
	if err == nil {
		e.cluster.tls.Succeeded(a.resumed)
		return nil
	}
	if failed, ok := errors.AsType[*stream.HandshakeError](err); ok && a.err == nil {
		why := e.cluster.tls.Failed(failed.Err)
		e.cluster.tlsFailure.Store(&control.TLSFailure{At: time.Now(), Endpoint: e.name, Error: shortened(why.Error())})
		return why
	}
	return err
}

// isHandshake says of a failure to connect that it is TLS that has failed.
func isHandshake(err error) bool {
	_, ok := errors.AsType[*clienttls.Error](err)
	return ok
}

// lookedAtFiles brings up to date what is said of the files of the clusters' TLS.
func (c *Clusters) lookedAtFiles() {
	for _, cluster := range c.byName {
		if cluster.tls != nil {
			cluster.tls.Looked()
		}
	}
}

// Certificates says which certificates clusters show their endpoints, by the clusters' names.
func (c *Clusters) Certificates() (all []control.Certificate) {
	for _, name := range slices.Sorted(maps.Keys(c.byName)) {
		if client := c.byName[name].tls; client != nil {
			if d, ok := client.Certificate(); ok {
				d.Problem = shortened(d.Problem)
				all = append(all, d)
			}
		}
	}
	return all
}

// Keep adds to kept, by path, what the files of clusters' TLS had that holds. There are private keys
// among it.
func (c *Clusters) Keep(kept map[string][]byte) {
	for _, cluster := range c.byName {
		if cluster.tls != nil {
			cluster.tls.Keep(kept)
		}
	}
}

// tlsState says what is known of the cluster's TLS; nil: it has none.
func (c *Cluster) tlsState() *control.TLSState {
	if c.tls == nil {
		return nil
	}
	s := &control.TLSState{Unverified: !c.tls.Verifies(), Problem: shortened(c.tls.Problem()), Failure: c.tlsFailure.Load()}
	s.Expires, _ = c.tls.Expires()
	return s
}
