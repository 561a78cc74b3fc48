package config

// Parse reads a whole configuration. name is the file's name for messages. It
// does no I/O and resolves no name. The error joins one [*Problem] for each
// mistake, in the order of the file. Where Parse succeeds, [ParseSupervisor]
// succeeds with the same Supervisor.
func Parse(name string, data []byte) (*Config, error) {
	doc, root, err := open(name, data)
	if err != nil {
		return nil, err
	}
	c := doc.config(root)
	if err := doc.err(); err != nil {
		return nil, err
	}
	return c, nil
}

// ParseSupervisor reads the supervisor's sections only; see [Supervisor]. Keys of
// other sections, and keys of a listener that are the proxy's, are not looked at.
// Errors are as those of [Parse].
func ParseSupervisor(name string, data []byte) (*Supervisor, error) {
	doc, root, err := open(name, data)
	if err != nil {
		return nil, err
	}
	s := readSupervisor(root, root.tables("listeners"))
	if err := doc.err(); err != nil {
		return nil, err
	}
	return &s, nil
}

// config reads everything. Order matters only where a section needs what another
// declared; problems come out in the order of the file in any case.
func (d *document) config(root *table) *Config {
	listeners := root.tables("listeners")
	c := &Config{
		Supervisor:    readSupervisor(root, listeners),
		Drain:         readDrain(root.table("drain")),
		Tunnels:       readTunnels(root.table("tunnels")),
		HTTPListeners: readListeners(listeners),
		Clusters:      readClusters(root.tables("clusters")),
	}
	c.VirtualHosts = readVirtualHosts(root.tables("virtual_hosts"), referencesTo(c))
	root.strict()
	return c
}

// readSupervisor reads what both processes read, and marks nothing else as known.
func readSupervisor(root *table, listeners []*table) Supervisor {
	s := Supervisor{
		Process:   readProcess(root.table("process")),
		Admin:     readAdmin(root.table("admin")),
		Log:       readLog(root.table("log")),
		Reload:    readReload(root.table("reload")),
		Stop:      readStop(root.table("stop")),
		Listeners: readSockets(listeners),

		AccessLogs: readAccessLogs(root.tables("access_logs")),
	}
	if root.empty("listeners") {
		root.at("listeners").fail("missing; at least one [[listeners]] is needed, with name and address")
	}
	return s
}
