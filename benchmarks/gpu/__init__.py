"""One check of correctness and speed for whoever has a GPU: `python -m benchmarks.gpu`."""
