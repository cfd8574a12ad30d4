"""Measurements: ``python -m benchmarks.step`` (whole training steps against the peers), ``python -m benchmarks.ops``."""
