"""Benchmarks of every op against its peers and against the machine's limits: `fastmix bench`."""
