"""Ahead-of-time compilation of every kernel for GPUs that this machine need not have."""
