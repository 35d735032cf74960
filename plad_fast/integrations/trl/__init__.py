"""plad_fast inside TRL."""

from plad_fast.integrations.trl.use import use_plad_fast

__all__ = ["use_plad_fast"]
