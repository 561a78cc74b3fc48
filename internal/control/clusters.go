package control

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"time"
)

// ClustersVersion is that of the payloads below. Two builds with different ones know nothing of
// what the other's clusters have. It has no part in whether a supervisor can command a
// generation.
const ClustersVersion = 1

// MaxClusters is the most bytes that [ClusterStates] and [Loads] may have.
const MaxClusters = 16 << 20

// ClusterStates are the clusters of a generation as it sees them: for those who look, and for
// the next generation, which begins with them.
type ClusterStates struct {
	Clusters []ClusterState `json:"clusters"`
}

// ClusterState is one cluster.
type ClusterState struct {
	Name      string          `json:"name"`
	Policy    string          `json:"policy,omitempty"`    // how it balances
	Endpoints []EndpointState `json:"endpoints,omitempty"` // also those that have left and hold something still
	Breakers  []BreakerState  `json:"breakers,omitempty"`
	TLS       *TLSState       `json:"tls,omitempty"` // nil: its endpoints are spoken to without
}

// TLSState is how the endpoints of a cluster are spoken to by TLS.
type TLSState struct {
	Unverified bool      `json:"unverified,omitempty"` // anybody is believed to be an endpoint
	Expires    time.Time `json:"certificate_expires,omitzero"`
	Problem    string    `json:"problem,omitempty"` // what was wrong with the files when they were read last

	Failure *TLSFailure `json:"last_failure,omitempty"` // nil: no handshake has failed
}

// TLSFailure is a handshake that has failed.
type TLSFailure struct {
	At       time.Time `json:"at"`
	Endpoint string    `json:"endpoint"`
	Error    string    `json:"error"`
}

// EndpointState is one endpoint.
type EndpointState struct {
	Address  string            `json:"address"`        // as configured, or as whoever was asked has it
	At       netip.AddrPort    `json:"at,omitzero"`    // zero for a unix socket, and where there are Addresses
	Name     string            `json:"name,omitempty"` // At or the path, for people
	Weight   int64             `json:"weight,omitempty"`
	Priority int               `json:"priority,omitempty"`
	Metadata map[string]string `json:"metadata,omitempty"`

	Addresses []netip.AddrPort `json:"addresses,omitempty"` // of a name that is one endpoint, whatever addresses it has

	Healthy    bool     `json:"healthy"`
	Conditions []string `json:"conditions,omitempty"` // why it gets no new work
	Reason     string   `json:"reason,omitempty"`     // of the last failed check, or of the ejection

	Ejections    int       `json:"ejections,omitempty"`     // as many as the next ejection's time is multiplied by
	EjectedUntil time.Time `json:"ejected_until,omitzero"`  // zero: it is not
	HealthySince time.Time `json:"healthy_since,omitzero"`  // for slow start
	LastCheck    time.Time `json:"last_check,omitzero"`     // zero: never
	SuccessRate  *float64  `json:"success_rate,omitempty"`  // of requests, in percent, in the last interval; nil: too few
	Connects     uint64    `json:"connects,omitempty"`      // that worked
	ConnectSum   float64   `json:"connect_sum,omitempty"`   // seconds that these took
	ConnectFails uint64    `json:"connect_fails,omitempty"` // that did not work
	Requests     int64     `json:"requests,omitempty"`      // in flight
	RequestsSum  uint64    `json:"requests_total,omitempty"`
	Tunnels      int64     `json:"tunnels,omitempty"`
	Elsewhere    int64     `json:"elsewhere,omitempty"` // requests and tunnels that other generations have, as this one was told
	Connections  int64     `json:"connections,omitempty"`
}

// BreakerState is the circuit breakers of a cluster for one priority: what is in use here, what
// elsewhere, and the limit; 0: none.
type BreakerState struct {
	Priority string                 `json:"priority"`
	Limits   map[string]BreakerUsed `json:"limits"` // by what is limited
}

// BreakerUsed is one limit.
type BreakerUsed struct {
	Limit     int64  `json:"limit,omitempty"` // 0: none
	Here      int64  `json:"here,omitempty"`
	Elsewhere int64  `json:"elsewhere,omitempty"`
	Open      bool   `json:"open,omitempty"` // nothing more is let through
	Overflows uint64 `json:"overflows,omitempty"`
}

// Loads are what a generation has with its clusters, as other generations have to know it:
// nothing that is zero.
type Loads struct {
	Clusters []ClusterLoad `json:"clusters,omitempty"`
}

// ClusterLoad is what it has with one cluster.
type ClusterLoad struct {
	Name      string         `json:"name"`
	Endpoints []EndpointLoad `json:"endpoints,omitempty"`
	Used      []BreakerLoad  `json:"used,omitempty"`
}

// EndpointLoad is what it has with one endpoint: requests and tunnels.
type EndpointLoad struct {
	Address string         `json:"address"`
	At      netip.AddrPort `json:"at,omitzero"`
	Load    int64          `json:"load"`
}

// BreakerLoad is what it has of what breakers of a priority limit.
type BreakerLoad struct {
	Priority string           `json:"priority"`
	Used     map[string]int64 `json:"used"`
}

// How much of what is read is taken at the most, whoever has sent it: decoded it is many times as
// large, so it is decoded piece by piece.
const (
	mostClusters       = 20_000
	mostEndpointStates = 100_000 // of all clusters
	mostOfEndpoint     = 64 << 10
	mostOfBreakers     = 64 << 10
	mostOfTLS          = 4 << 10
)

// ReadClusterStates is [ReadPayload] for what a generation answers to [TypeClusters].
func ReadClusterStates(fd int) (*ClusterStates, error) {
	s := new(ClusterStates)
	err := EachClusterState(fd, func(c *ClusterState) { s.Clusters = append(s.Clusters, *c) })
	if err != nil {
		return nil, err
	}
	return s, nil
}

// EachClusterState reads what a generation answers to [TypeClusters] one cluster after the
// other. With an error some may have been read. It closes fd.
func EachClusterState(fd int, f func(*ClusterState)) error {
	endpoints := 0
	return eachCluster(fd, func(d *json.Decoder) error {
		var raw struct {
			Name      string          `json:"name"`
			Policy    string          `json:"policy"`
			Endpoints json.RawMessage `json:"endpoints"`
			Breakers  json.RawMessage `json:"breakers"`
			TLS       json.RawMessage `json:"tls"`
		}
		if err := d.Decode(&raw); err != nil {
			return err
		}
		c := &ClusterState{Name: raw.Name, Policy: raw.Policy}
		if err := boundedJSON(raw.Breakers, mostOfBreakers, &c.Breakers); err != nil {
			return err
		}
		if err := boundedJSON(raw.TLS, mostOfTLS, &c.TLS); err != nil {
			return err
		}
		err := eachElement(raw.Endpoints, func(d *json.Decoder) error {
			if endpoints++; endpoints > mostEndpointStates {
				return fmt.Errorf("more than %d endpoints", mostEndpointStates)
			}
			var one json.RawMessage
			if err := d.Decode(&one); err != nil {
				return err
			}
			c.Endpoints = append(c.Endpoints, EndpointState{})
			return boundedJSON(one, mostOfEndpoint, &c.Endpoints[len(c.Endpoints)-1])
		})
		if err == nil {
			f(c)
		}
		return err
	})
}

// ReadLoads is [ReadPayload] for what a generation answers to [TypeLoads].
func ReadLoads(fd int) (*Loads, error) {
	l := new(Loads)
	endpoints := 0
	err := eachCluster(fd, func(d *json.Decoder) error {
		var raw struct {
			Name      string          `json:"name"`
			Endpoints json.RawMessage `json:"endpoints"`
			Used      json.RawMessage `json:"used"`
		}
		if err := d.Decode(&raw); err != nil {
			return err
		}
		c := ClusterLoad{Name: raw.Name}
		if err := boundedJSON(raw.Used, mostOfBreakers, &c.Used); err != nil {
			return err
		}
		l.Clusters = append(l.Clusters, c)
		of := &l.Clusters[len(l.Clusters)-1]
		return eachElement(raw.Endpoints, func(d *json.Decoder) error {
			if endpoints++; endpoints > mostEndpointStates {
				return fmt.Errorf("more than %d endpoints", mostEndpointStates)
			}
			var e EndpointLoad
			if err := d.Decode(&e); err != nil {
				return err
			}
			of.Endpoints = append(of.Endpoints, e)
			return nil
		})
	})
	if err != nil {
		return nil, err
	}
	return l, nil
}

// eachCluster has f decode each of the clusters that a payload has. It closes fd.
func eachCluster(fd int, f func(*json.Decoder) error) error {
	data, err := ReadBytes(fd, MaxClusters)
	if err != nil {
		return err
	}
	var all struct {
		Clusters json.RawMessage `json:"clusters"`
	}
	if err := json.Unmarshal(data, &all); err != nil {
		return fmt.Errorf("payload: %w", err)
	}
	data = nil // two of them are too many
	n := 0
	err = eachElement(all.Clusters, func(d *json.Decoder) error {
		if n++; n > mostClusters {
			return fmt.Errorf("more than %d clusters", mostClusters)
		}
		return f(d)
	})
	if err != nil {
		return fmt.Errorf("payload: %w", err)
	}
	return nil
}

// eachElement has f decode each element of an array, which may be missing.
func eachElement(array json.RawMessage, f func(*json.Decoder) error) error {
	if len(array) == 0 || string(array) == "null" {
		return nil
	}
	d := json.NewDecoder(bytes.NewReader(array))
	if open, err := d.Token(); err != nil || open != json.Delim('[') {
		return errors.Join(errors.New("no array where one belongs"), err)
	}
	for d.More() {
		if err := f(d); err != nil {
			return err
		}
	}
	return nil
}

// boundedJSON decodes what has at most that many bytes, and may be missing.
func boundedJSON(data json.RawMessage, most int, into any) error {
	switch {
	case len(data) == 0:
		return nil
	case len(data) > most:
		return fmt.Errorf("%d bytes where at most %d belong", len(data), most)
	}
	return json.Unmarshal(data, into)
}
