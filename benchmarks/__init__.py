"""Measurements: ``python -m benchmarks.step`` (training steps against the peers), ``python -m benchmarks.ops``."""
