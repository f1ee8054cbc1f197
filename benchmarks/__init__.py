"""How fast and how good, beside nanoGPT: `python -m benchmarks --help`."""
