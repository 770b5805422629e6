"""The command line: look at a checkpoint, plan, compare, convert, and trace where weights came from."""

from warmstart.cli.running import main

__all__ = ["main"]
