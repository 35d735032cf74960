"""Benchmarks of plad_fast against the libraries its users would otherwise take."""
