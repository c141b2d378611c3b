"""Benchmarks of the fused module beside the reference: `python -m benchmarks --help`."""

STOPPED = 130  # exit status after Ctrl-C
