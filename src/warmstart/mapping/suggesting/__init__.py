"""Suggesting: the rules between two spellings of one architecture, inferred from names, shapes and tree structure."""
