"""Pickles, read without executing any: scanned, resolved to inert descriptions, given their places."""
