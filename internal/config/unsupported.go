package config

// unsupported lists keys that Holdfast has a meaning for, but not in this
// version, by the section in which they stand. Calling them unknown would send
// their reader looking for a spelling mistake.
var unsupported = map[string][]string{}
