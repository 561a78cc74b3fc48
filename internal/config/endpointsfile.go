package config

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"
)

// maxEndpointsSize is how long a file with endpoints may be.
const maxEndpointsSize = 4 << 20

// ReadEndpoints returns the content of a file with endpoints. What never ends is cut off, and
// what is no file is refused without waiting for anybody.
func ReadEndpoints(path string) ([]byte, error) {
	return readWatched(path, maxEndpointsSize, fmt.Sprintf("%d MiB", maxEndpointsSize>>20))
}

// ParseEndpoints reads a file with the endpoints of a cluster: its key endpoints, as a cluster
// has it, in JSON where the name ends so, and in TOML otherwise. An array with nothing in it is
// a cluster without endpoints; without the key the file is not complete. The error joins one
// [*Problem] for each mistake, as that of [Parse] does, but not more than are of use.
func ParseEndpoints(name string, data []byte) ([]Endpoint, error) {
	doc, root, err := openListed(name, data)
	if err != nil {
		return nil, err
	}
	doc.terse = true
	var endpoints []Endpoint
	if array := root.array("endpoints"); len(array) > MostDiscovered {
		root.at("endpoints").fail("%s", tooManyEndpoints(len(array)))
	} else {
		endpoints = readEndpoints(root)
	}
	if !root.has("endpoints") {
		root.at("endpoints").fail("missing; must be an array, which may be empty")
	}
	for i := range endpoints {
		if err := checkListed(&endpoints[i]); err != nil {
			root.at("endpoints").fail("%s: %v", quote(endpoints[i].Address), err)
		}
	}
	for key := range root.keys {
		if key != "endpoints" {
			root.at(key).fail("unknown key; known is endpoints")
		}
	}
	if doc.unknown {
		root.at("endpoints").fail("an element has an unknown key")
	}
	if more := len(doc.problems) - maxMistakes; more > 0 {
		doc.problems = append(doc.problems[:maxMistakes], &Problem{File: name, Line: math.MaxInt32, Text: fmt.Sprintf("and %d mistakes more", more)})
	}
	if err := doc.err(); err != nil {
		return nil, err
	}
	return endpoints, nil
}

// openListed is open for either syntax.
func openListed(name string, data []byte) (*document, *table, error) {
	if !strings.HasSuffix(name, ".json") {
		return open(name, data)
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber()
	var keys map[string]any
	err := d.Decode(&keys)
	if err == nil && d.Decode(new(any)) != io.EOF {
		err = errors.New("something follows behind its end")
	}
	if err == nil && keys == nil {
		err = errors.New("it is no object")
	}
	if err != nil {
		return nil, nil, &Problem{File: name, Text: "not valid JSON: " + printable(err.Error())}
	}
	doc := newDocument(name, "")
	doc.lines = map[string]int{}
	return doc, newTable(node{doc: doc, raw: asTOML(keys)}), nil
}

// asTOML has the types that the TOML library would have made of a value.
func asTOML(v any) any {
	switch v := v.(type) {
	case map[string]any:
		for key := range v {
			v[key] = asTOML(v[key])
		}
	case []any:
		for i := range v {
			v[i] = asTOML(v[i])
		}
	case json.Number:
		if n, err := v.Int64(); err == nil {
			return n
		}
		f, _ := v.Float64()
		return f
	}
	return v
}
