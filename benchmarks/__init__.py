"""How fast the pipeline is, measured side by side with what the authors' code does. See docs/benchmarks.md."""
