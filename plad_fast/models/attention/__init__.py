"""Attention over packed rows, registered with transformers."""
