"""GPU kernels, the ground floor of plad_fast: nothing here imports from above it."""
