"""Warm starts for loops of one's own under accelerate."""

from warmstart_accelerate.offloaded import onloaded
from warmstart_accelerate.warm_start import warm_start

__all__ = ["onloaded", "warm_start"]
