"""GPU kernels: torch and Triton only."""
