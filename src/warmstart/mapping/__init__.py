"""Decide, on names, shapes and dtypes alone, what goes where."""
