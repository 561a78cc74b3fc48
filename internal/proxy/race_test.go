//go:build race

package proxy_test

// poolsForget says that a sync.Pool drops some of what it is given, as with the race detector.
const poolsForget = true
