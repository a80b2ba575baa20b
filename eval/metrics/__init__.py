"""The metrics of the benchmarks: pure functions on texts, in a module for each benchmark.

They equal the official scripts on every input that these accept.
"""
