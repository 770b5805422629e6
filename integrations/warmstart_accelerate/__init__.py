"""Warm starts for loops of one's own under accelerate."""

from warmstart_accelerate.warm_start import warm_start

__all__ = ["warm_start"]
