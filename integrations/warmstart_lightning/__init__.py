"""Warm starts for Lightning."""
