"""Metrics of the benchmarks: pure functions on texts, a module a family, equal to the official
scripts on every input that these accept."""
