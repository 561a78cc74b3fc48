package main

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"sync"
)

// A docSection is a table of docs/configuration.md with the keys of one section. That page has
// every key that the loader knows and no other, with its default: tests of internal/config see
// to that. So it is what everything else about keys is made of.
type docSection struct {
	name  string // without indices, as "virtual_hosts.routes.match"
	about string // the first paragraph below the heading; "" if there is none
	keys  []docKey
}

// A docKey is a row.
type docKey struct{ name, kind, fallback, meaning string }

var (
	sectionHeading = regexp.MustCompile("^#+ `\\[+([a-z_.]+)\\]+`$")
	keyRow         = regexp.MustCompile("^\\| `([a-z0-9_]+)` \\| (.*?) \\| (.*?) \\| (.*) \\|$")
)

// documentedSections reads the page.
func documentedSections(page string) (all []docSection) {
	var at *docSection
	for line := range strings.Lines(page) {
		line = strings.TrimSuffix(line, "\n")
		if m := sectionHeading.FindStringSubmatch(line); m != nil {
			all = append(all, docSection{name: m[1]})
			at = &all[len(all)-1]
			continue
		}
		if strings.HasPrefix(line, "#") {
			at = nil
		}
		if at == nil {
			continue
		}
		if m := keyRow.FindStringSubmatch(line); m != nil {
			at.keys = append(at.keys, docKey{m[1], m[2], m[3], m[4]})
			continue
		}
		if at.keys == nil && !strings.HasPrefix(line, "|") && !strings.HasPrefix(line, "```") && !strings.HasSuffix(at.about, "\n") {
			if at.about += line + " "; line == "" {
				at.about = strings.TrimSpace(at.about)
				if at.about != "" {
					at.about += "\n" // it is complete
				}
			}
		}
	}
	for i := range all {
		all[i].about = strings.TrimSpace(all[i].about)
	}
	return all
}

// A tree is what the generators read of the repository.
type tree struct {
	root     string
	sections []docSection
	asked    func() map[string]map[string]*fits // what the loader says, found out once
}

// sample is a configuration that has every key.
const sample = "internal/config/testdata/good.toml"

func newTree(root string) *tree {
	t := &tree{root: root}
	t.sections = documentedSections(t.read("docs/configuration.md"))
	t.asked = sync.OnceValue(func() map[string]map[string]*fits { return askLoader(t.read(sample), t.sections) })
	return t
}

func (t *tree) read(name string) string {
	data, err := os.ReadFile(t.root + "/" + name)
	if err != nil {
		panic(fmt.Sprintf("the repository is read from its root: %v", err))
	}
	return string(data)
}

var links = regexp.MustCompile("\\[((?:`[^`]*`|[^\\[\\]`])+)\\]\\([^()]*\\)")

// unlinked leaves of each link the text.
func unlinked(markdown string) string { return links.ReplaceAllString(markdown, "$1") }
