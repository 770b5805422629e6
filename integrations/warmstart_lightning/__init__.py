"""Warm starts for Lightning."""

from warmstart_lightning.callback import WarmStart

__all__ = ["WarmStart"]
