"""Benchmarks: each measures its rivals in the same run, in turn, and writes JSON. `proper-ds bench` calls them."""
