package config

import (
	"fmt"
	"strings"
	"testing"
)

// A key that is not there costs nothing that is allocated: there may be a hundred thousand
// routes, each of which could have any.
func TestWhatARouteDoesNotHaveIsNotPaidFor(t *testing.T) { // not parallel: it counts allocations
	read := func(routes int) float64 {
		var b strings.Builder
		b.WriteString("[[listeners]]\nname = \"a\"\naddress = \"127.0.0.1:0\"\n[[clusters]]\nname = \"c\"\nendpoints = [\"127.0.0.1:80\"]\n[[virtual_hosts]]\nname = \"h\"\ndomains = [\"*\"]\n")
		for i := range routes {
			fmt.Fprintf(&b, "[[virtual_hosts.routes]]\nmatch = { prefix = \"/%d/\" }\ncluster = \"c\"\n", i)
		}
		doc, root, err := open("f", []byte(b.String()))
		if err != nil {
			t.Fatal(err)
		}
		doc.terse = true
		allocated := testing.AllocsPerRun(10, func() { doc.config(root) })
		if err := doc.err(); err != nil {
			t.Fatal(err)
		}
		return allocated
	}
	const few, many = 10, 1010
	each := (read(many) - read(few)) / (many - few)
	t.Logf("%.2f allocations for each route", each)
	if each > 1.5 { // the table of its match
		t.Errorf("%.2f allocations for each route", each)
	}
}
