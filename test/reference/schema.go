package main

import (
	"bytes"
	"encoding/json"
	"maps"
	"slices"
	"strings"

	"github.com/BurntSushi/toml"
)

// configurationSchema is deploy/holdfast.schema.json: keys and descriptions are those of
// docs/configuration.md, what fits is what the loader says.
func configurationSchema(t *tree) []byte {
	var out bytes.Buffer
	e := json.NewEncoder(&out)
	e.SetEscapeHTML(false)
	e.SetIndent("", " ")
	if err := e.Encode(schemaOf(t)); err != nil {
		panic(err)
	}
	return out.Bytes()
}

func schemaOf(t *tree) schema {
	bySection := map[string]*docSection{"": {}}
	for i := range t.sections {
		bySection[t.sections[i].name] = &t.sections[i]
	}
	for _, key := range topKeys(t.sections) {
		bySection[""].keys = append(bySection[""].keys, docKey{name: key, meaning: bySection[key].about})
	}
	m := schemaMaker{bySection, t.asked()}
	root := m.section("")
	root["$schema"] = "http://json-schema.org/draft-07/schema#"
	root["title"] = "holdfast.toml"
	root["description"] = "The configuration of Holdfast. This finds unknown keys and values of the wrong kind; `holdfast check -c FILE` finds everything."
	root["required"] = []string{"listeners"}
	return root
}

type schemaMaker struct {
	sections map[string]*docSection
	asked    map[string]map[string]*fits
}

// section makes the schema of a table of the file.
func (m *schemaMaker) section(name string) schema {
	properties := schema{}
	var required []string
	for _, k := range m.sections[name].keys {
		properties[k.name] = m.key(name, k)
		if k.fallback == "required" {
			required = append(required, k.name)
		}
	}
	s := schema{"type": "object", "additionalProperties": false, "properties": properties}
	if required != nil {
		s["required"] = required
	}
	return s
}

func (m *schemaMaker) key(section string, k docKey) schema {
	var inner *schema
	if name := join(section, k.name); m.sections[name] != nil {
		inner = new(m.section(name))
	}
	s := maps.Clone(m.asked[section][k.name].shape(inner))
	literal, ok := strings.CutPrefix(k.fallback, "`")
	var v map[string]any
	if _, err := toml.Decode("v = "+strings.TrimSuffix(literal, "`"), &v); ok && err == nil {
		s["default"] = v["v"]
	}
	s["description"] = describe(k)
	return s
}

// plain are the types of which a schema says as much.
var plain = []string{"", "string", "boolean", "integer", "number", "table", "array of strings", "array of tables", "table of names and values"}

// describe is what an editor shows.
func describe(k docKey) string {
	parts := []string{unlinked(k.meaning)}
	if !slices.Contains(plain, k.kind) {
		parts = append(parts, "Type: "+unlinked(k.kind)+".")
	}
	if k.fallback != "" && k.fallback != "none" && k.fallback != "required" {
		parts = append(parts, "Default: "+unlinked(k.fallback)+".")
	}
	return strings.Join(slices.DeleteFunc(parts, func(p string) bool { return p == "" }), "\n\n")
}
