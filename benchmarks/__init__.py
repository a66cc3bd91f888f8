"""What compression costs in time: `python -m benchmarks.codecs`, `python -m benchmarks.steps`."""
