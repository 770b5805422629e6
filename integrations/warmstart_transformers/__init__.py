"""Warm starts for Hugging Face transformers."""

from warmstart_transformers.arguments import WarmStartArguments
from warmstart_transformers.callback import WarmStartCallback
from warmstart_transformers.conversions import conversion_rules
from warmstart_transformers.vocabulary import vocab_map

__all__ = ["WarmStartArguments", "WarmStartCallback", "conversion_rules", "vocab_map"]
