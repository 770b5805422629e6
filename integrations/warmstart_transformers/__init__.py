"""Warm starts for Hugging Face transformers."""

from warmstart_transformers.conversions import conversion_rules

__all__ = ["conversion_rules"]
