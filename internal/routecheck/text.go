package routecheck

import (
	"fmt"
	"strconv"
	"strings"
)

// text is the finding for a person.
func (f *finding) text() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s on listener %s\n", f.Method, f.URL, f.Listener)
	if f.Normal != "" {
		fmt.Fprintf(&b, "  normalised: %s\n", f.Normal)
	}
	switch {
	case f.early:
		fmt.Fprintf(&b, "  answer: %d, %s; no route is looked for\n", f.Outcomes[0].Status, f.Outcomes[0].Why)
		return b.String()
	case f.VirtualHost == "":
		b.WriteString("  virtual host: none has its host\n")
	default:
		fmt.Fprintf(&b, "  virtual host: %s, which has %q\n", f.VirtualHost, f.Domain)
	}
	for _, o := range f.Outcomes {
		b.WriteString(o.text())
	}
	list(&b, "routes that come before and were not taken:", f.Routes)
	list(&b, "virtual hosts that were not taken:", f.Hosts)
	return b.String()
}

func (o *outcome) text() string {
	name := o.Route
	if name == "" {
		name = "none"
	}
	s := "  route: " + name
	if o.Share < 1 {
		s += ", by chance: " + percent(o.Share)
	}
	s += "\n"
	for i := range o.Filters {
		s += "    filter: " + o.Filters[i].text() + "\n"
	}
	if o.Status != 0 {
		s += fmt.Sprintf("    answer: %d", o.Status)
		if o.Location != "" {
			s += " to " + o.Location
		}
		if o.Why != "" {
			s += ", " + o.Why
		}
		return s + "\n"
	}
	words := make([]string, len(o.Clusters))
	for i, c := range o.Clusters {
		words[i] = c.Cluster
		if len(o.Clusters) > 1 {
			words[i] += " " + percent(c.Share)
		}
	}
	s += "    cluster: " + strings.Join(words, ", ") + "\n"
	if o.Hash != "" {
		s += "    hash: " + o.Hash + "\n"
	}
	s += "    target: " + o.Target + "\n"
	switch o.Host {
	case "":
		s += "    host: that of the endpoint\n"
	default:
		s += "    host: " + o.Host + "\n"
	}
	if o.Upgrade != "" {
		s += "    upgrade: " + o.Upgrade + "\n"
	}
	if o.Tunnel {
		s += "    a tunnel, if the upstream agrees\n"
	}
	if o.Retry != "" {
		s += "    retry: " + o.Retry + "\n"
	}
	if o.Mirror != nil {
		s += "    mirror: " + o.Mirror.Cluster + " " + percent(o.Mirror.Share) + "\n"
	}
	return s
}

func list(b *strings.Builder, title string, all []notTaken) {
	if len(all) == 0 {
		return
	}
	fmt.Fprintln(b, title)
	for _, n := range all {
		fmt.Fprintf(b, "  %s: %s\n", n.Name, n.Why)
	}
}

// percent writes a share of 1.
func percent(share float64) string { return strconv.FormatFloat(share*100, 'g', 6, 64) + "%" }
