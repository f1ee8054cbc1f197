"""Loss, speed and memory, next to a checkout of nanoGPT: `python -m benchmarks --help`."""
