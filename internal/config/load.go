package config

// Parse reads a whole configuration. name is the file's name for messages. It
// does no I/O and resolves no name. The error joins one [*Problem] for each
// mistake, in the order of the file. Where Parse succeeds, [ParseSupervisor]
// succeeds with the same Supervisor.
func Parse(name string, data []byte) (*Config, error) {
	c, _, err := ParseWithKeys(name, data)
	return c, err
}

// ParseWithKeys is [Parse], and says besides where each runtime key stands: in the tables of
// these paths, in the order in which they were read.
func ParseWithKeys(name string, data []byte) (*Config, map[string][]string, error) {
	c, doc, err := readTersely(name, data, (*document).config)
	if err != nil {
		return nil, nil, err
	}
	return c, doc.runtimeKeys, nil
}

// readTersely reads a document of which nobody wants to know more than what it comes to. If
// it has unknown keys it is read once more, to say what is known in their place.
func readTersely[T any](name string, data []byte, read func(*document, *table) T) (v T, doc *document, err error) {
	doc, root, err := open(name, data)
	if err != nil {
		return v, nil, err
	}
	doc.terse = true
	v = read(doc, root)
	if doc.unknown {
		verbose := newDocument(name, doc.text)
		doc, root = verbose, newTable(node{doc: verbose, raw: root.raw})
		v = read(doc, root)
	}
	return v, doc, doc.err()
}

// ParseSupervisor reads the supervisor's sections only; see [Supervisor]. Keys of
// other sections, and keys of a listener or an access log that are the proxy's, are not looked at.
// Errors are as those of [Parse].
func ParseSupervisor(name string, data []byte) (*Supervisor, error) {
	s, _, err := readTersely(name, data, func(_ *document, root *table) Supervisor {
		return readSupervisor(root, root.tables("listeners"), root.tables("access_logs"))
	})
	if err != nil {
		return nil, err
	}
	return &s, nil
}

// config reads everything. Order matters only where a section needs what another
// declared; problems come out in the order of the file in any case.
func (d *document) config(root *table) *Config {
	listeners, accessLogs := root.tables("listeners"), root.tables("access_logs")
	c := &Config{
		Supervisor: readSupervisor(root, listeners, accessLogs),
		Drain:      readDrain(root.table("drain")),
		Tunnels:    readTunnels(root.table("tunnels")),
		Recordings: readRecordings(accessLogs),
	}
	c.Clusters = readClusters(root.tables("clusters"), c.Reload.ReadyTimeout)
	refs := referencesTo(c)
	c.HTTPListeners = readListeners(listeners, &refs)
	refs.addListeners(c.HTTPListeners)
	c.VirtualHosts = readVirtualHosts(root.tables("virtual_hosts"), refs)
	root.strict()
	return c
}

// readSupervisor reads what both processes read, and marks nothing else as known.
func readSupervisor(root *table, listeners, accessLogs []*table) Supervisor {
	s := Supervisor{
		Process:   readProcess(root.table("process")),
		Admin:     readAdmin(root.table("admin")),
		Log:       readLog(root.table("log")),
		Runtime:   readRuntime(root.table("runtime")),
		Reload:    readReload(root.table("reload")),
		Stop:      readStop(root.table("stop")),
		Tickets:   readTickets(root.table("tls")),
		Listeners: readSockets(listeners),

		AccessLogs: readAccessLogs(accessLogs),
	}
	if root.empty("listeners") {
		root.at("listeners").fail("missing; at least one [[listeners]] is needed, with name and address")
	}
	return s
}
