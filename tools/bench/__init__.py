"""Benchmarks: `python -m tools.bench.mla`, `python -m tools.bench.host`. See README.md."""
