package proxy

import "testing"

func TestPipesLeaveRoomForConnectionsAndForOtherGenerations(t *testing.T) {
	t.Parallel()
	const kib, mib = 1 << 10, 1 << 20
	for _, tt := range []struct {
		loops              int
		buffer             int64
		descriptors, pages uint64
		each, size         int
	}{
		{1, mib, 20_000, 16 << 10, 16, 512 * kib},
		{2, mib, 20_000, 16 << 10, 16, 256 * kib},
		{4, mib, 20_000, 16 << 10, 16, 128 * kib},
		{16, mib, 20_000, 16 << 10, 8, 64 * kib},
		{64, mib, 20_000, 16 << 10, 2, 64 * kib},
		{128, mib, 1 << 20, 16 << 10, 1, 64 * kib},
		{2, 256 * kib, 20_000, 16 << 10, 16, 256 * kib},
		{2, 300 * kib, 20_000, 16 << 10, 16, 256 * kib},
		{2, 63 * kib, 20_000, 16 << 10, 0, 0},
		{2, 64 * kib, 20_000, 16 << 10, 32, 64 * kib},
		{2, 64 * mib, 20_000, 0, 32, mib},
		{2, 0, 20_000, 0, 0, 0}, // no tunnels
		{2, mib, 20_000, 0, 32, mib},
		{2, mib, 20_000, 1 << 40, 32, mib},
		{2, mib, 1024, 0, 8, mib},
		{2, mib, 1024, 16 << 10, 8, 512 * kib},
		{2, mib, 256, 16 << 10, 2, mib},
		{2, mib, 64, 16 << 10, 0, mib},
		{2, mib, 0, 16 << 10, 0, mib},
		{2, mib, 20_000, 8, 0, 64 * kib},
		{2, mib, 1 << 40, 64, 0, 64 * kib},
	} {
		each, size := pipesOfEach(tt.loops, tt.buffer, tt.descriptors, tt.pages)
		if each != tt.each || each > 0 && size != tt.size {
			t.Errorf("%d loops, buffers of %d bytes, %d descriptors and %d pages: %d pipes of %d bytes for each loop, want %d of %d",
				tt.loops, tt.buffer, tt.descriptors, tt.pages, each, size, tt.each, tt.size)
		}
	}
}
