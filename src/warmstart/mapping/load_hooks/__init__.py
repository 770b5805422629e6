"""Modules with their own way to load, and what it makes of the keys."""
