//go:build race

package route_test

// slow says that the race detector makes everything take many times as long.
const slow = true
