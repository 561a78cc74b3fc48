//go:build !race

package proxy_test

const poolsForget = false
