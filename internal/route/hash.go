package route

import (
	"encoding/binary"
	"encoding/hex"
	"math/bits"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"holdfast/internal/config"
)

// hashPolicy is one thing that a hash is made of.
type hashPolicy struct {
	header   string
	cookie   *hashCookie
	terminal bool
}

// hashCookie is a config.HashCookie with what is said when one is made.
type hashCookie struct {
	name  string
	made  bool
	attrs string // behind its value, from the "; " on
}

func newHashPolicies(policies []config.HashPolicy) []hashPolicy {
	var all []hashPolicy
	for _, p := range policies {
		all = append(all, hashPolicy{p.Header, newHashCookie(p.Cookie), p.Terminal})
	}
	return all
}

func newHashCookie(c *config.HashCookie) *hashCookie {
	if c == nil {
		return nil
	}
	h := &hashCookie{name: c.Name, made: c.Make}
	if c.Path != "" {
		h.attrs = "; Path=" + c.Path
	}
	if c.TTL > 0 {
		h.attrs += "; Max-Age=" + strconv.FormatInt(int64(c.TTL/time.Second), 10)
	}
	h.attrs += "; HttpOnly"
	return h
}

// HasHash says whether the route has requests hashed.
func (r *Route) HasHash() bool { return len(r.hash) > 0 }

// Hash returns the hash of a request: equal ones for what is equal in all that the route's
// policies look at. ok is false if there is nothing of that. client is the client's address,
// invalid where it has none.
//
// Where a policy has a cookie made, and the client has none, setCookies has the values of
// Set-Cookie fields that give it one; its value is of random numbers.
func (r *Route) Hash(fields Fields, client netip.Addr, random func() uint64) (hash uint64, setCookies []string, ok bool) {
	for i := range r.hash {
		p := &r.hash[i]
		var h uint64
		var found bool
		switch {
		case p.header != "":
			h, found = hashField(fields, p.header)
		case p.cookie != nil:
			value, has := cookie(fields, p.cookie.name)
			if !has && p.cookie.made {
				value, has = newCookie(random), true
				setCookies = append(setCookies, p.cookie.name+"="+value+p.cookie.attrs)
			}
			h, found = finish(hashText(hashSeed, value)), has
		case client.IsValid():
			address := client.Unmap().As16()
			h, found = finish(hashBytes(hashSeed, address[:])), true
		}
		if found {
			hash, ok = bits.RotateLeft64(hash, 1)^h, true
		}
		if ok && p.terminal {
			break
		}
	}
	return hash, setCookies, ok
}

// hashField returns the hash of all lines of a field.
func hashField(fields Fields, name string) (hash uint64, found bool) {
	hash = hashSeed
	for value := range valuesOf(fields, name) {
		if found {
			hash = hashText(hash, "\n") // which is in no value
		}
		hash, found = hashText(hash, value), true
	}
	return finish(hash), found
}

// cookie returns the first cookie of a name (RFC 6265 §4.2).
func cookie(fields Fields, name string) (value string, ok bool) {
	for line := range valuesOf(fields, "Cookie") {
		for pair := range strings.SplitSeq(line, ";") {
			n, v, has := strings.Cut(strings.Trim(pair, " \t"), "=")
			if has && n == name {
				return strings.Trim(v, `"`), true
			}
		}
	}
	return "", false
}

// newCookie returns 128 random bits, as text.
func newCookie(random func() uint64) string {
	var b [16]byte
	binary.BigEndian.PutUint64(b[:8], random())
	binary.BigEndian.PutUint64(b[8:], random())
	return hex.EncodeToString(b[:])
}

// The hash is FNV-1a of 64 bits, which is the same in every process and on every machine,
// behind which finish spreads what differs over all bits.
const (
	hashSeed  = 14695981039346656037
	hashPrime = 1099511628211
)

func hashText(h uint64, s string) uint64 {
	for i := range len(s) {
		h = (h ^ uint64(s[i])) * hashPrime
	}
	return h
}

func hashBytes(h uint64, b []byte) uint64 {
	for _, c := range b {
		h = (h ^ uint64(c)) * hashPrime
	}
	return h
}

// finish is the finalizer of MurmurHash3.
func finish(h uint64) uint64 {
	h = (h ^ h>>33) * 0xff51afd7ed558ccd
	h = (h ^ h>>33) * 0xc4ceb9fe1a85ec53
	return h ^ h>>33
}

// Spread returns another number that is as evenly spread as a hash, so that what is chosen
// by one says nothing of what is chosen by the other.
func Spread(hash uint64) uint64 { return finish(hash + 0x9e3779b97f4a7c15) }
