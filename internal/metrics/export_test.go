package metrics

// Check returns what is wrong with a definition.
func (d *Desc) Check() error { return d.check() }
