"""Benchmarks of the fused module beside the reference: `python -m benchmarks --help`."""
