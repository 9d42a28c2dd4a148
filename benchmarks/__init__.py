"""Timings: each a module, `python -m benchmarks.NAME`."""
