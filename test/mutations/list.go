package main

// all are the mutations, in the order of the design's invariants.
var all = []mutation{
	{
		name:    "crash-not-mended",
		promise: "a killed generation is replaced",
		file:    "internal/supervisor/crash.go",
		old:     "	s.crashes++\n	g.log.Error(why",
		new:     "	s.crashes++\n	s.restoring = true\n	g.log.Error(why",
		pkg:     "./internal/supervisor", tests: "TestAKilledGenerationIsReplaced",
	},
}
