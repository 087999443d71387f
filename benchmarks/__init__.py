"""Benchmarks: each one proves its result before it reports a time."""
