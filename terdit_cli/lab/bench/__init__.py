"""Benchmarks: terdit and its rivals take turns on the same work."""
