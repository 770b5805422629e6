"""Start training from pretrained weights: planned, verified by value, frozen, reported."""

__version__ = "0.1.0"
